package tunnel

import (
	"encoding/base64"
	"reflect"
	"slices"
)

// Difference is one field in which two configurations of a tunnel differ.
type Difference struct {
	Field    string
	Old, New any
	// Interrupts is the reason why a change interrupts traffic; empty if it does not.
	Interrupts string
}

// Diff returns the fields in which b differs from a, in the order of declaration.
func Diff(a, b Config) []Difference {
	if a.Kind() != b.Kind() {
		return []Difference{{Field: "kind", Old: a.Kind(), New: b.Kind(), Interrupts: "the tunnel is made again"}}
	}
	return compare(a, b)
}

// Fields returns the fields of c that are set, as the differences from an empty configuration.
func Fields(c Config) []Difference { return compare(Config{}, c) }

// compare compares two configurations of one kind. The first one may be empty.
func compare(a, b Config) []Difference {
	var d differences
	if b.Disabled {
		d.add("disabled", a.Disabled, b.Disabled, "the tunnel is shut down, and its sessions and static routes leave it")
	} else {
		d.add("disabled", a.Disabled, b.Disabled, "")
	}
	const rehomed = "the interface is made again"
	d.add("id", a.ID, b.ID, rehomed)
	d.add("interface", a.Interface, b.Interface, rehomed)
	d.add("underlay", a.Underlay, b.Underlay, rehomed)
	d.add("mtu", a.MTU, b.MTU, "")
	d.add("probe", a.Probe, b.Probe, "")
	if !slices.Equal(a.Inside, b.Inside) {
		d.add("inside", a.Inside, b.Inside, "sessions on the former inside addresses end")
	}
	d = append(d, b.carrier().diff(a.carrier())...)
	if a.Disabled { // it carries nothing that could be interrupted
		for i := range d {
			d[i].Interrupts = ""
		}
	}
	return d
}

// differences collects fields that differ.
type differences []Difference

func (d *differences) add(field string, old, new any, interrupts string) {
	if !reflect.DeepEqual(old, new) {
		*d = append(*d, Difference{Field: field, Old: old, New: new, Interrupts: interrupts})
	}
}

// keyText returns a key as WireGuard's tools write it.
func keyText(k [32]byte) string { return base64.StdEncoding.EncodeToString(k[:]) }

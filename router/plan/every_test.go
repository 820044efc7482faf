package plan

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// fill sets every exported field to a different value, and slices to one element.
func fill(v reflect.Value, n *uint64) {
	*n++
	switch {
	case v.Type() == reflect.TypeFor[netip.Addr]():
		v.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{10, byte(*n >> 16), byte(*n >> 8), byte(*n)})))
	case v.Type() == reflect.TypeFor[netip.Prefix]():
		v.Set(reflect.ValueOf(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(*n >> 16), byte(*n >> 8), byte(*n)}), 32)))
	case v.Type() == reflect.TypeFor[netip.AddrPort]():
		v.Set(reflect.ValueOf(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(*n >> 16), byte(*n >> 8), byte(*n)}), 80)))
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fill(v.Field(i), n)
			}
		}
	case v.Kind() == reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), n)
	case v.Kind() == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), n)
	case v.Kind() == reflect.Array: // a key
		fill(v.Index(0), n)
	case v.Kind() == reflect.String:
		v.SetString(fmt.Sprint("s", *n))
	case v.Kind() == reflect.Bool:
		v.SetBool(true)
	case v.CanInt():
		v.SetInt(int64(*n%120 + 1))
	case v.CanUint():
		v.SetUint(*n%120 + 1)
	case v.CanFloat():
		v.SetFloat(float64(*n))
	default:
		panic("no value for " + v.Type().String())
	}
}

// leaves yields every field with a value of its own, with its path.
func leaves(v reflect.Value, path string, yield func(path string, v reflect.Value)) {
	switch {
	case slices.Contains([]reflect.Type{reflect.TypeFor[netip.Addr](), reflect.TypeFor[netip.Prefix](), reflect.TypeFor[netip.AddrPort]()}, v.Type()):
		yield(path, v)
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.IsExported() {
				leaves(v.Field(i), strings.TrimPrefix(path+"."+f.Name, "."), yield)
			}
		}
	case v.Kind() == reflect.Slice:
		leaves(v.Index(0), path, yield)
	case v.Kind() == reflect.Pointer:
		leaves(v.Elem(), path, yield)
	default:
		yield(path, v)
	}
}

// derived are fields that follow from other fields, which are reported. TestDiff checks the clamps,
// which belong to a tunnel.
var derived = []string{"Reason", "BGP.Reason", "BGP.ASN", "BGP.RouterID", "NAT.Underlay", "NAT.Own", "NAT.Attachments", "NAT.Sessions", "NAT.Lanes", "NAT.API.Port", "NAT.DNS", "NAT.Links", "NAT.Tunnels", "NAT.Clamps.", "NAT.Pools.Shared", "Tunnels.Own", "Tunnels.Link", "Tunnels.Number"}

// oneKind keeps the settings of the tunnel's kind that a path leads to, or else those of the first
// kind: a tunnel has one kind.
func oneKind(t *Target, path string) {
	v := reflect.ValueOf(&t.Tunnels[0]).Elem()
	kept := false
	for i := range v.NumField() {
		name := "Tunnels." + v.Type().Field(i).Name + "."
		if v.Field(i).Kind() == reflect.Pointer && strings.HasPrefix(path, name) {
			kept = true
		}
	}
	for i := range v.NumField() {
		if v.Field(i).Kind() != reflect.Pointer {
			continue
		}
		if chosen := strings.HasPrefix(path, "Tunnels."+v.Type().Field(i).Name+"."); !chosen && kept {
			v.Field(i).SetZero()
		}
		kept = true
	}
}

// TestEveryFieldIsAChange checks that Diff reports a difference in any field of two targets.
func TestEveryFieldIsAChange(t *testing.T) {
	target := func() *Target {
		var n uint64
		out := &Target{}
		fill(reflect.ValueOf(out).Elem(), &n)
		return out
	}
	var unseen []string
	fields := 0
	leaves(reflect.ValueOf(target()).Elem(), "", func(path string, _ reflect.Value) {
		fields++
		changed := target()
		leaves(reflect.ValueOf(changed).Elem(), "", func(at string, v reflect.Value) {
			if at == path {
				switch n := uint64(70_000); {
				case v.Kind() == reflect.Bool:
					v.SetBool(false)
				case v.CanInt():
					v.SetInt(v.Int() + 1)
				case v.CanUint():
					v.SetUint(v.Uint() + 1)
				default:
					fill(v, &n)
				}
			}
		})
		was := target()
		oneKind(was, path)
		oneKind(changed, path)
		if len(Diff(*was, *changed)) == 0 && !slices.ContainsFunc(derived, func(d string) bool { return strings.HasPrefix(path, d) }) {
			unseen = append(unseen, path)
		}
	})
	t.Log(fields, "fields")
	if len(unseen) > 0 {
		t.Errorf("no change of %s is reported", strings.Join(unseen, ", "))
	}
}

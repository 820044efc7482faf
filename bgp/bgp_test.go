package bgp

import (
	"math"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"
)

func TestRuleMatch(t *testing.T) {
	p := netip.MustParsePrefix
	r := Rule{Prefix: p("10.0.0.0/8"), Min: 0, Max: 24}
	for prefix, want := range map[string]bool{
		"10.0.0.0/8": true, "10.1.2.0/24": true, "10.1.2.0/25": false, "11.0.0.0/8": false, "0.0.0.0/0": false,
		"10.0.0.0/7": false, "2001:db8::/16": false,
	} {
		if got := r.Match(p(prefix)); got != want {
			t.Errorf("%v matches %s: %v", r, prefix, got)
		}
	}
}

// TestDiffPeer changes each field by itself: each shows, and it is known of each whether the
// session goes on.
func TestDiffPeer(t *testing.T) {
	goesOn := []string{"Tunnel", "Import", "Export", "MaxPrefixes"}
	for i := range reflect.TypeFor[Peer]().NumField() {
		var a, b Peer
		f := reflect.ValueOf(&b).Elem().Field(i)
		name := reflect.TypeFor[Peer]().Field(i).Name
		if name == "Name" {
			continue // another peer
		}
		switch v := f.Addr().Interface().(type) {
		case *string:
			*v = "x"
		case *netip.Addr:
			*v = netip.MustParseAddr("169.254.0.1")
		case *time.Duration:
			*v = time.Second
		case *bool:
			*v = true
		case *uint8:
			*v = 1
		case *uint32:
			*v = 1
		case *Import:
			v.LocalPreference = 1
		case *Export:
			v.Prepend = 1
		default:
			f.Field(0).SetString("x") // a secret
		}
		d := DiffPeer(a, b)
		if len(d) != 1 || d[0].Field != name || d[0].Old == d[0].New || (d[0].Interrupts == "") != slices.Contains(goesOn, name) {
			t.Errorf("%s: %+v", name, d)
		}
	}
	if d := DiffPeer(Peer{}, Peer{}); len(d) != 0 {
		t.Errorf("no change: %+v", d)
	}
}

func TestCapacity(t *testing.T) {
	for rule, want := range map[Rule]float64{
		{netip.MustParsePrefix("10.0.0.0/8"), 8, 8}: 1, {netip.MustParsePrefix("10.0.0.0/8"), 0, 10}: 7, {netip.MustParsePrefix("10.0.0.0/8"), 24, 24}: 65536,
		{netip.MustParsePrefix("10.0.0.0/8"), 0, 4}: 0, {netip.MustParsePrefix("::/0"), 128, 128}: math.Ldexp(1, 128),
	} {
		if got := rule.Capacity(); got != want {
			t.Errorf("%v: %v, want %v", rule, got, want)
		}
	}
}

func TestExportString(t *testing.T) {
	med := uint32(70)
	e := Export{Allow: []Rule{{netip.MustParsePrefix("10.0.0.0/8"), 8, 8}, {netip.MustParsePrefix("10.0.0.0/8"), 16, 24}}, MED: &med, Prepend: 2, MaxPrefixes: 90}
	if got, want := e.String(), "[10.0.0.0/8 10.0.0.0/8 from /16 to /24] med 70 prepend 2 at most 90"; got != want {
		t.Errorf("%q", got)
	}
}

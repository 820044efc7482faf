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

// TestInterrupts changes each field by itself, and checks whether the session goes on.
func TestInterrupts(t *testing.T) {
	goesOn := []string{"Lanes", "Tunnel", "Import", "Export", "MaxPrefixes"}
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
		case *[]string:
			*v = []string{"x"}
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
		if why := Interrupts(a, b); (why == "") != slices.Contains(goesOn, name) {
			t.Errorf("%s: %q", name, why)
		}
	}
	if why := Interrupts(Peer{}, Peer{}); why != "" {
		t.Errorf("no change: %s", why)
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

func TestRuleString(t *testing.T) {
	for _, tt := range []struct {
		min, max uint8
		want     string
	}{{8, 8, "10.0.0.0/8"}, {8, 24, "10.0.0.0/8 le 24"}, {16, 16, "10.0.0.0/8 ge 16"}, {16, 24, "10.0.0.0/8 ge 16 le 24"}} {
		if got := (Rule{netip.MustParsePrefix("10.0.0.0/8"), tt.min, tt.max}).String(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

package nat

import (
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// TestPolicyEqual changes each field in turn: none may be forgotten.
func TestPolicyEqual(t *testing.T) {
	for i := range reflect.TypeFor[Policy]().NumField() {
		var a, b Policy
		f := reflect.ValueOf(&b).Elem().Field(i)
		name := reflect.TypeFor[Policy]().Field(i).Name
		switch v := f.Addr().Interface().(type) {
		case *string:
			*v = "x"
		case *Action:
			*v = Deny
		case *bool:
			*v = true
		case *[]string:
			*v = []string{"x"}
		case *[]netip.Prefix:
			*v = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
		case *[]PortRange:
			*v = []PortRange{{1, 2}}
		case *netip.AddrPort:
			*v = netip.MustParseAddrPort("10.0.0.1:80")
		case *Timeouts:
			v.UDP = time.Second
		default:
			t.Fatalf("%s: a field of a kind that this test does not know", name)
		}
		if a.Equal(&b) || b.Equal(&a) {
			t.Errorf("%s is not compared", name)
		}
		if !b.Equal(&b) {
			t.Errorf("%s: not equal to itself", name)
		}
	}
}

// TestSSHByTunnel: a tunnel lets SSH in from prefixes of its own. One from which everything may
// come has none.
func TestSSHByTunnel(t *testing.T) {
	p := netip.MustParsePrefix
	c := Config{
		Attachments: []Attachment{{Interface: "t-a", Sources: []netip.Prefix{p("10.1.0.0/16"), p("2001:db8:a::/48")}}, {Interface: "t-b", Sources: []netip.Prefix{p("0.0.0.0/0"), p("::/0")}}, {Interface: "eth1", Sources: []netip.Prefix{p("10.5.0.0/16")}}},
		Tunnels:     []Tunnel{{Interface: "t-a"}, {Interface: "t-b", Port: 51820}},
		Input:       Input{SSH: []netip.Prefix{p("0.0.0.0/0"), p("10.0.0.0/15"), p("10.1.0.0/16"), p("10.1.2.0/24"), p("10.5.0.0/24"), p("::/0"), p("2001:db8:a:1::/64")}},
	}
	if got, want := c.SSHByTunnel(), []netip.Prefix{p("10.1.0.0/16"), p("10.1.2.0/24"), p("2001:db8:a:1::/64")}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

package live

import (
	"net/netip"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/tunnel"
)

// TestInside: which addresses no name may stand for.
func TestInside(t *testing.T) {
	a, p := netip.MustParseAddr, netip.MustParsePrefix
	target := plan.Target{NAT: nat.Config{
		Underlay: "eth0", Own: []netip.Addr{a("10.9.0.4")},
		Pools: []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: a("192.0.2.5"), Public: a("203.0.113.5")}}}},
		Attachments: []nat.Attachment{
			{Interface: "t-a", Sources: []netip.Prefix{p("0.0.0.0/0"), p("172.16.0.0/16"), p("2001:db8:16::/48")}},
		},
		Maps: []nat.Map{{Inside: p("10.3.0.0/24"), Mapped: p("100.64.3.0/24")}},
	}}
	target.Underlay.Interface = "eth0"
	target.Tunnels = []tunnel.Config{{Name: "t", Inside: []tunnel.Inside{{Local: p("192.168.1.1/30"), Remote: a("192.168.1.2")}}, IPsec: &tunnel.IPsec{RemoteAddress: a("203.0.113.77")}}}
	target.Names.Resolvers = []netip.AddrPort{netip.MustParseAddrPort("192.168.9.53:53"), netip.MustParseAddrPort("9.9.9.9:53")}
	facts := Facts{Resolvers: []netip.Addr{a("192.168.8.53"), a("8.8.8.8")}, Read: true}
	facts.Machine = fib.Surroundings{Addresses: []fib.Assigned{{Interface: "eth0", Prefix: p("10.9.0.4/24")}, {Interface: "eth1", Prefix: p("10.8.0.4/24")}}, Routes: []fib.Foreign{{Table: fib.TableMain, Interface: "eth0", Prefix: p("0.0.0.0/0"), Gateway: a("198.51.100.1")}}}
	inside := Of(&target, facts).Inside
	for text, want := range map[string]bool{
		"10.9.0.4": true, "10.9.0.77": true, "10.8.0.4": true, "10.8.0.5": true, "192.0.2.5": true, "192.0.2.6": false, "203.0.113.5": true,
		"172.16.9.9": true, "2001:db8:16::9": true, "100.64.3.9": true, "192.168.1.1": true, "192.168.1.2": true, "192.168.1.3": false, "203.0.113.77": false, "192.168.9.53": true, "9.9.9.9": false, "192.168.8.53": true, "8.8.8.8": false,
		"198.51.100.1": true, "169.254.169.254": true, "100.100.100.200": true, "127.0.0.1": true,
		"198.51.100.7": false, "2001:db8:51::7": false,
	} {
		if got := inside(a(text)); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

// TestUnusedFamilies: a family is asked for when a source of a policy or an address that is probed
// has it.
func TestUnusedFamilies(t *testing.T) {
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	unused := unused(&plan.Target{NAT: nat.Config{Policies: []nat.Policy{
		{Name: "four", Action: nat.SNAT, Sources: p("10.0.0.0/8"), Names: []string{"four.example", "both.example"}},
		{Name: "six", Action: nat.SNAT, Sources: p("2001:db8::/32"), Names: []string{"both.example"}},
		{Name: "proxy", Action: nat.Redirect, Sources: append(p("10.0.0.0/8"), p("2001:db8::/32")...), Names: []string{"proxy.example"}, To: netip.MustParseAddrPort("10.1.0.9:3128")},
	}}})
	for name, want := range map[string][2]bool{"four.example": {false, true}, "both.example": {false, false}, "proxy.example": {false, true}, "none.example": {true, true}} {
		if got := [2]bool{unused(name, false), unused(name, true)}; got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

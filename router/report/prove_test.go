package report

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// TestProofOfIPv6: packets that no router forwards may pass the guard without a violation; packets
// beyond these are one.
func TestProofOfIPv6(t *testing.T) {
	own := netip.MustParseAddr("2001:db8::5")
	config := nat.Config{Pools: []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: own, Public: own}}}}}
	from := func(first, last string) nat.Departure {
		return nat.Departure{Sources: nat.Range{First: netip.MustParseAddr(first), Last: netip.MustParseAddr(last)}}
	}
	translated := from("fd00::", "fdff::")
	translated.Address = own
	passing := []nat.Departure{from("::", "::"), from("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), translated}
	for _, test := range []struct {
		what  string
		extra []nat.Departure
		bad   int
	}{
		{"neighbour discovery and the pool", nil, 0},
		{"more than the unspecified address", []nat.Departure{from("::", "::1")}, 1},
		{"more than link-local addresses", []nat.Departure{from("fe7f::", "fe80::1")}, 1},
		{"link-local IPv4, which is routed by those who do not know better", []nat.Departure{from("169.254.0.0", "169.254.255.255")}, 1},
	} {
		p := &isthmusv1.EgressProof{}
		used := judge(p, "now", config, append(slices.Clone(passing), test.extra...), []netip.Addr{own})
		if len(p.Violations) != test.bad || !slices.Equal(used, []netip.Addr{own}) {
			t.Errorf("%s: %q, used %v", test.what, p.Violations, used)
		}
	}
}

// TestDeciding: a policy that others beat for all of the flows expects nothing.
func TestDeciding(t *testing.T) {
	p := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	pool := func(name string, addrs ...string) (out nat.Pool) {
		out.Name = name
		for _, a := range addrs {
			out.Addresses = append(out.Addresses, nat.PoolAddress{Address: netip.MustParseAddr(a), Public: netip.MustParseAddr(a)})
		}
		return out
	}
	c := nat.Config{
		Pools: []nat.Pool{pool("all", "192.0.2.20"), pool("api", "192.0.2.10", "192.0.2.11"), pool("web", "192.0.2.30")},
		Policies: []nat.Policy{
			{Name: "all", Action: nat.SNAT, Sources: p("10.0.0.0/8"), Pool: "all"},
			{Name: "api", Action: nat.SNAT, Sources: p("10.0.0.0/8"), Destinations: p("198.51.100.0/24"), Pool: "api"},
			{Name: "web", Action: nat.SNAT, Sources: p("10.1.0.0/16"), Destinations: p("203.0.113.0/24"), Protocol: "tcp", Ports: []nat.PortRange{{First: 443, Last: 443}}, Pool: "web"},
			{Name: "no", Action: nat.Deny, Sources: p("10.2.0.0/16"), Destinations: p("203.0.113.0/24")},
		},
	}
	for _, k := range []struct {
		sources, destinations []netip.Prefix
		want                  string
	}{
		{p("0.0.0.0/0"), p("198.51.100.0/24"), "[192.0.2.10 192.0.2.11]"},
		{p("10.5.0.0/16"), p("198.51.100.7/32"), "[192.0.2.10 192.0.2.11]"},
		{p("10.0.0.0/8"), p("198.51.0.0/16"), "[192.0.2.10 192.0.2.11 192.0.2.20]"},
		{p("10.1.0.0/16"), p("203.0.113.0/24"), "[192.0.2.30 192.0.2.20]"},
		{p("10.2.0.0/16"), p("203.0.113.0/24"), "[]"},
		{p("10.3.0.0/16"), p("203.0.113.0/24"), "[192.0.2.20]"},
		{p("11.0.0.0/8"), p("203.0.113.0/24"), "[]"},
	} {
		if got := fmt.Sprint(deciding(c, k.sources, k.destinations)); got != k.want {
			t.Errorf("from %v to %v: %s, want %s", k.sources, k.destinations, got, k.want)
		}
	}
}

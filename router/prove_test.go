package router

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// TestProofOfIPv6: what no router forwards may pass the guard and is no way out, and whatever goes beyond it is one.
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

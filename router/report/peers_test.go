package report

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/isthmus-net/isthmus/bgp"
)

func TestPeerLimits(t *testing.T) {
	c := bgp.Peer{Name: "a", Address: netip.MustParseAddr("fd00::1"), MaxPrefixes: 1000, Export: bgp.Export{MaxPrefixes: 90}}
	for _, k := range []struct {
		c        bgp.Peer
		s        bgp.PeerState
		families []string
		limits   []string
	}{
		{c, bgp.PeerState{State: bgp.Established, Received: 812, Accepted: 810, Announced: 90, HeldBack: 3}, []string{"IPv6 unicast"},
			[]string{"812 of at most 1000 prefixes received, 810 of them used", "90 of at most 90 prefixes announced, 3 more held back"}},
		{c, bgp.PeerState{State: bgp.OpenSent}, nil, []string{"0 of at most 1000 prefixes received, 0 of them used", "0 of at most 90 prefixes announced"}},
		{bgp.Peer{Name: "a", Address: netip.MustParseAddr("169.254.0.1")}, bgp.PeerState{State: bgp.Established, Received: 5}, []string{"IPv4 unicast"}, nil},
		{bgp.Peer{Name: "a", Address: netip.MustParseAddr("169.254.0.1")}, bgp.PeerState{State: bgp.Established, BothFamilies: true}, []string{"IPv4 unicast", "IPv6 unicast"}, nil},
	} {
		if p := peerStatus(k.c, k.s); !slices.Equal(p.Families, k.families) || !slices.Equal(p.Limits, k.limits) || p.ExportMaxPrefixes != k.c.Export.MaxPrefixes {
			t.Errorf("%+v: %q, %q", k.s, p.Families, p.Limits)
		}
	}
}

package document

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
)

// learnt is a machine with paths of BGP.
type learnt struct {
	counting
	paths map[netip.Prefix][]bgp.Path
}

func (l learnt) Learned() map[netip.Prefix][]bgp.Path { return l.paths }

// TestRouted checks what a plan says about the routes and announcements that an edit of a policy
// takes away and adds, from the paths in use.
func TestRouted(t *testing.T) {
	p := netip.MustParsePrefix
	rule := func(prefix string, most uint8) bgp.Rule {
		return bgp.Rule{Prefix: p(prefix), Min: uint8(p(prefix).Bits()), Max: most}
	}
	path := func(peer string, as ...uint32) bgp.Path { return bgp.Path{Peer: peer, ASPath: as} }
	paths := map[netip.Prefix][]bgp.Path{
		p("172.16.1.0/24"): {path("branch", 65001)},
		p("172.16.2.0/24"): {path("branch", 65001)},
		p("172.16.3.0/24"): {path("branch", 65001), path("site", 65002)},
		p("10.9.0.0/16"):   {path("site", 65002)},
		p("10.8.0.0/16"):   {path("site", 65002, 65001)}, // a loop for branch
		p("fd00::/48"):     {path("site", 65002)},        // another family
	}
	target := func(change func(branch *bgp.Peer)) plan.Target {
		t := plan.Target{BGP: bgp.Config{ASN: 64620, Announce: []netip.Prefix{p("0.0.0.0/0")}}}
		branch := bgp.Peer{Name: "branch", ASN: 65001, Address: netip.MustParseAddr("169.254.1.1"),
			Import: bgp.Import{Allow: []bgp.Rule{rule("172.16.0.0/16", 24)}}, Export: bgp.Export{Allow: []bgp.Rule{rule("0.0.0.0/0", 0), rule("10.0.0.0/8", 16)}}}
		site := bgp.Peer{Name: "site", ASN: 65002, Address: netip.MustParseAddr("169.254.2.1"), Import: bgp.Import{Allow: []bgp.Rule{rule("0.0.0.0/0", 32)}}}
		if change != nil {
			change(&branch)
		}
		t.BGP.Peers = []bgp.Peer{branch, site}
		return t
	}
	m := &Manager{Options: Options{Machine: learnt{paths: paths}}}
	for name, tt := range map[string]struct {
		change     func(*bgp.Peer)
		interrupts string
		fields     string
	}{
		"import of nothing": {func(b *bgp.Peer) { b.Import.Allow = []bgp.Rule{rule("172.31.0.0/16", 24)} },
			"2 routes go: 172.16.1.0/24, 172.16.2.0/24, and withdrawn from other peers, unless another peer announces the same; 1 route keeps paths of other peers alone: 172.16.3.0/24", ""},
		"import of less": {func(b *bgp.Peer) { b.Import.Allow = []bgp.Rule{rule("172.16.1.0/24", 24), rule("172.16.3.0/24", 24)} }, "1 route goes: 172.16.2.0/24", ""},
		"import of more": {func(b *bgp.Peer) { b.Import.Allow = append(b.Import.Allow, rule("10.0.0.0/8", 24)) }, "", ""},
		"export without the default": {func(b *bgp.Peer) { b.Export.Allow = b.Export.Allow[1:] },
			"1 prefix is withdrawn from the peer: 0.0.0.0/0", ""},
		"export of nothing": {func(b *bgp.Peer) { b.Export.Allow = nil }, "2 prefixes are withdrawn from the peer: 0.0.0.0/0, 10.9.0.0/16", ""},
		"a limit below what the peer has sent": {func(b *bgp.Peer) { b.MaxPrefixes = 2 },
			"the session is closed and held down: the peer has sent 3 prefixes, more than maxPrefixes", ""},
		"a limit that holds": {func(b *bgp.Peer) { b.MaxPrefixes = 3 }, "", ""},
		"export of a loop, allowed": {func(b *bgp.Peer) { b.ASOverride = true },
			"the session is closed and opened again", "1 prefix is announced to the peer: 10.8.0.0/16"},
	} {
		from, to := target(nil), target(tt.change)
		changes := m.routed(plan.Diff(from, to), from, to)
		if len(changes) != 1 || !strings.HasPrefix(changes[0].Interrupts, tt.interrupts) || (tt.interrupts == "") != (changes[0].Interrupts == "") || !strings.Contains(strings.Join(changes[0].Fields, "\n"), tt.fields) {
			t.Errorf("%s: %+v", name, changes)
		}
	}
	from, to := target(nil), target(nil)
	to.BGP.Peers = to.BGP.Peers[1:]
	if changes := m.routed(plan.Diff(from, to), from, to); len(changes) != 1 || !strings.HasPrefix(changes[0].Interrupts, "the session is closed, and its routes are removed; 2 routes go: 172.16.1.0/24, 172.16.2.0/24") {
		t.Errorf("a peer is removed: %+v", changes)
	}
}

// TestTaken checks what a plan says about a new route that takes packets of another one.
func TestTaken(t *testing.T) {
	p := netip.MustParsePrefix
	from := plan.Target{Routes: []fib.Route{{Key: fib.Main(p("10.9.0.0/16"))}}}
	m := &Manager{Options: Options{Machine: learnt{paths: map[netip.Prefix][]bgp.Path{p("172.16.0.0/16"): {{Peer: "branch"}}, p("0.0.0.0/0"): {{Peer: "hub"}}, p("fd00::/48"): {{Peer: "six"}}}}}}
	for prefix, want := range map[string]string{
		"172.16.0.0/16":   "it takes the packets to 172.16.0.0/16 from the route to 172.16.0.0/16, learned from peer branch",
		"172.16.1.0/24":   "it takes the packets to 172.16.1.0/24 from the route to 172.16.0.0/16, learned from peer branch",
		"172.0.0.0/8":     "it takes the packets to 172.0.0.0/8 from the route to 0.0.0.0/0, learned from peer hub",
		"10.9.8.0/24":     "it takes the packets to 10.9.8.0/24 from the static route to 10.9.0.0/16",
		"fd00:0:0:1::/64": "it takes the packets to fd00:0:0:1::/64 from the route to fd00::/48, learned from peer six",
		"fd01::/48":       "",
	} {
		to := plan.Target{Routes: append(slices.Clone(from.Routes), fib.Route{Key: fib.Main(p(prefix)), Blackhole: true})}
		if changes := m.routed(plan.Diff(from, to), from, to); len(changes) != 1 || changes[0].Interrupts != want {
			t.Errorf("%s: %+v, want %q", prefix, changes, want)
		}
	}
}

// TestRoutedIsBounded checks that a plan for many peers and prefixes gives up.
func TestRoutedIsBounded(t *testing.T) {
	paths := map[netip.Prefix][]bgp.Path{}
	for i := range 20_000 {
		paths[netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)] = []bgp.Path{{Peer: "x"}}
	}
	m := &Manager{Options: Options{Machine: learnt{paths: paths}}}
	changes := make([]plan.Change, 1000)
	for i := range changes {
		changes[i] = plan.Change{Action: plan.Modify, Kind: "peer", Name: "x"}
	}
	m.routed(changes, plan.Target{}, plan.Target{})
	if !strings.Contains(changes[999].Interrupts, "are not counted") || changes[0].Interrupts != "" {
		t.Errorf("%+v", changes[999])
	}
}

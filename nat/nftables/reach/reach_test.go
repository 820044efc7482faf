package reach_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	lib "github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/nftables"
	"github.com/isthmus-net/isthmus/nat/nftables/reach"
	"github.com/isthmus-net/isthmus/test/root"
	"github.com/isthmus-net/isthmus/test/traffic"
)

func pfx(list ...string) (p []netip.Prefix) {
	for _, s := range list {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// inside returns an attachment that accepts every source.
func inside(name string) []nat.Attachment {
	return []nat.Attachment{{Interface: name, Sources: pfx("0.0.0.0/0", "::/0")}}
}

func pool(name string, addrs ...string) nat.Pool {
	p := nat.Pool{Name: name}
	for _, a := range addrs {
		p.Addresses = append(p.Addresses, nat.PoolAddress{Address: addr(a), Public: addr(a)})
	}
	return p
}

func isPool(c nat.Config, a netip.Addr) bool {
	return slices.ContainsFunc(c.Pools, func(p nat.Pool) bool {
		return slices.ContainsFunc(p.Addresses, func(o nat.PoolAddress) bool { return o.Address == a })
	})
}

func inRange(r nat.Range, a netip.Addr) bool { return !a.Less(r.First) && !r.Last.Less(a) }

// holds reports whether a flow is in the set of a departure.
func holds(d nat.Departure, f nat.Flow) bool {
	return inRange(d.Sources, f.Source) && inRange(d.Destinations, f.Destination) &&
		d.Protocols[0] <= f.Protocol && f.Protocol <= d.Protocols[1] && d.Ports.First <= f.Port && f.Port <= d.Ports.Last
}

// TestDeparturesAgreeWithMatch computes departures for many prefixes at once, and looks up single
// flows in the result.
func TestDeparturesAgreeWithMatch(t *testing.T) {
	left, dropped := 0, 0
	seeds := root.Count(uint64(200), 40)
	for seed := range seeds {
		r := traffic.Random{Rand: rand.New(rand.NewPCG(seed, 7))}
		c := nat.Config{Underlay: "wan", Attachments: inside("in0"), Own: []netip.Addr{addr("192.0.2.1")}, Pools: []nat.Pool{
			pool("one", "203.0.113.1", "2001:db8:f::1"), pool("many", "203.0.113.2", "203.0.113.3", "203.0.113.4", "2001:db8:f::2", "2001:db8:f::3"), pool("four-only", "203.0.113.9"),
		}}
		for i := range r.IntN(15) {
			c.Policies = append(c.Policies, r.Policy(fmt.Sprintf("p%d", i)))
		}
		traffic.RemoveTies(&c)
		departures, err := nftables.New(nftables.Options{}).Predict(c, pfx("10.0.0.0/8", "44.0.0.0/8", "2001:db8:a::/48", "2001:db8:2c::/48"), pfx("198.48.0.0/12", "2001:db8:b0::/48"))
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for range 200 {
			f := r.Flow()
			if f.Protocol != unix.IPPROTO_TCP && f.Protocol != unix.IPPROTO_UDP {
				f.Port = 0
			}
			if f.Late = false; f.Destination.Is4() && !netip.MustParsePrefix("198.48.0.0/12").Contains(f.Destination) || f.Outside || isPool(c, f.Destination) || netip.MustParsePrefix("2001:db8:ff::/48").Contains(f.Destination) {
				continue // outside of the prefixes
			}
			decision := c.Match(f)
			want := decision.Address
			if decision.To.IsValid() {
				want = netip.Addr{} // it goes to the proxy in the result
			}
			var got []netip.Addr
			for _, d := range departures {
				if holds(d, f) && !slices.Contains(got, d.Address) {
					got = append(got, d.Address)
				}
			}
			may := []netip.Addr{}
			switch {
			case decision.Action == nat.NoNAT:
				may = []netip.Addr{{}}
				left++
			case want.IsValid():
				// by the rules alone, a flow may leave with any address of the pool
				for _, p := range c.Pools {
					var all []netip.Addr
					for _, a := range p.Usable(want.Is6(), c.Zone(f.Source)) {
						all = append(all, a.Address)
					}
					if slices.Contains(all, want) {
						may = all
					}
				}
				left++
			default:
				dropped++
			}
			slices.SortFunc(got, netip.Addr.Compare)
			if !slices.Equal(got, may) {
				t.Fatalf("seed %d: %+v: may leave as %v, Match says %v", seed, f, got, may)
			}
		}
	}
	t.Logf("%d flows left, %d were dropped", left, dropped)
	if most := 5 * int(seeds); left < most || dropped < most {
		t.Error("too one-sided to be significant")
	}
}

// TestMapsAreFollowed computes departures for spokes that share one prefix, each with two tunnels.
// The rules identify them by the mapped prefix.
func TestMapsAreFollowed(t *testing.T) {
	c := nat.Config{Underlay: "wan", Attachments: inside("in0"), Own: []netip.Addr{addr("192.0.2.1")}, Pools: []nat.Pool{pool("one", "203.0.113.1")}}
	for i := range 20 {
		c.Maps = append(c.Maps, nat.Map{Interfaces: []string{fmt.Sprintf("tun%d", i), fmt.Sprintf("tan%d", i)},
			Inside: netip.MustParsePrefix("10.0.0.0/20"), Mapped: netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(i) << 4, 0}), 20)})
	}
	c.Policies = []nat.Policy{{Name: "some", Action: nat.SNAT, Sources: pfx("100.64.16.0/20"), Pool: "one"}}
	departures, err := nftables.New(nftables.Options{}).Predict(c, pfx("10.0.0.128/25"), pfx("198.51.100.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	want := nat.Range{First: addr("100.64.16.128"), Last: addr("100.64.16.255")}
	for _, d := range departures {
		if d.Sources != want || d.Address != addr("203.0.113.1") {
			t.Errorf("%+v", d)
		}
	}
	if len(departures) == 0 {
		t.Error("nothing leaves")
	}
}

// TestHandWrittenRules computes departures for small tables: which packets each kind of expression
// passes, and that an unknown expression causes an error.
func TestHandWrittenRules(t *testing.T) {
	const reg = unix.NFT_REG_1
	load := func(offset, size uint32) expr.Any {
		return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
	}
	equal := func(data ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: data} }
	verdict := func(kind expr.VerdictKind, chain string) expr.Any { return &expr.Verdict{Kind: kind, Chain: chain} }
	accept, drop := verdict(expr.VerdictAccept, ""), verdict(expr.VerdictDrop, "")
	snat := []expr.Any{&expr.Immediate{Register: reg, Data: []byte{192, 0, 2, 1}},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg, RegAddrMax: reg}}
	base := func(rules ...[]expr.Any) *reach.Chain {
		return &reach.Chain{Base: true, Hook: *lib.ChainHookPostrouting, Priority: *lib.ChainPriorityNATSource, Rules: rules}
	}
	rule := func(e ...expr.Any) []expr.Any { return e }
	look := func(set string, verdict bool) expr.Any {
		return &expr.Lookup{SourceRegister: reg, IsDestRegSet: verdict, SetName: set}
	}
	for _, k := range []struct {
		what  string
		rules reach.Ruleset
		want  string // departures as source range and address, or a part of the error
	}{
		{"no rule", reach.Ruleset{}, "10.0.0.0-10.0.0.255 as it is"},
		{"drop", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(drop))}}, ""},
		{"a chain that is only jumped to", reach.Ruleset{Chains: map[string]*reach.Chain{"a": {Rules: [][]expr.Any{rule(drop)}}}}, "10.0.0.0-10.0.0.255 as it is"},
		{"of the node itself", reach.Ruleset{Chains: map[string]*reach.Chain{"a": {Base: true, Hook: *lib.ChainHookOutput, Rules: [][]expr.Any{rule(drop)}}}},
			"10.0.0.0-10.0.0.255 as it is"},
		{"part of the sources", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(load(12, 4), equal(10, 0, 0, 7), accept), rule(drop))}}, "10.0.0.7-10.0.0.7 as it is"},
		{"all but one", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(load(12, 4), equal(10, 0, 0, 0), drop))}}, "10.0.0.1-10.0.0.255 as it is"},
		{"an untracked field has both results", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(load(0, 1), equal(0x45), drop), snat)}}, "10.0.0.0-10.0.0.255 as 192.0.2.1"},
		{"translated after the last rule that drops", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(snat), "b": {Base: true, Hook: *lib.ChainHookPostrouting,
			Priority: *lib.ChainPriorityNATSource + 1, Rules: [][]expr.Any{rule(load(12, 4), equal(192, 0, 2, 1), accept), rule(drop)}}}}, "10.0.0.0-10.0.0.255 as 192.0.2.1"},
		{"goto does not come back", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(verdict(expr.VerdictGoto, "b")), rule(drop)), "b": {}}}, "10.0.0.0-10.0.0.255 as it is"},
		{"jump does", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(verdict(expr.VerdictJump, "b")), rule(drop)), "b": {}}}, ""},
		{"a set of ranges", reach.Ruleset{
			Chains: map[string]*reach.Chain{"a": base(rule(load(12, 4), look("s", false), accept), rule(drop))},
			Sets:   map[string]*reach.Set{"s": {IsInterval: true, Elements: []reach.Element{{Key: "\x0a\x00\x00\x03\x0a\x00\x00\x05"}}}}}, "10.0.0.3-10.0.0.5 as it is"},
		{"a map of verdicts", reach.Ruleset{
			Chains: map[string]*reach.Chain{"a": base(rule(load(12, 4), look("m", true)), rule(drop))},
			Sets:   map[string]*reach.Set{"m": {IsVerdict: true, Elements: []reach.Element{{Key: "\x0a\x00\x00\x09", Verdict: expr.Verdict{Kind: expr.VerdictAccept}}}}}}, "10.0.0.9-10.0.0.9 as it is"},
		{"a set that rules fill has both results", reach.Ruleset{
			Chains: map[string]*reach.Chain{"a": base(rule(load(12, 4), look("d", false), drop))},
			Sets:   map[string]*reach.Set{"d": {IsDynamic: true}}}, "10.0.0.0-10.0.0.255 as it is"},
		{"a map that rules fill", reach.Ruleset{
			Chains: map[string]*reach.Chain{"a": base(rule(load(12, 4), look("d", true)))},
			Sets:   map[string]*reach.Set{"d": {IsDynamic: true}}}, `error: a rule looks up map "d", which other rules fill`},
		{"a missing chain", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(verdict(expr.VerdictGoto, "b")))}}, `error: a rule leads to chain "b", which does not exist`},
		{"a missing set", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(load(12, 4), look("s", false)))}}, `error: a rule looks up set "s", which does not exist`},
		{"an expression", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(&expr.Masq{}))}}, "error: unknown expression in a rule: *expr.Masq"},
		{"an address that depends on the packet", reach.Ruleset{Chains: map[string]*reach.Chain{"a": base(rule(load(12, 4), snat[1]))}}, "error: a rule translates to an unknown address"},
	} {
		departures, err := k.rules.Departures("up0", 0, pfx("10.0.0.0/24"), pfx("198.51.100.0/24"))
		var got []string
		for _, d := range departures {
			as := "it is"
			if d.Address.IsValid() {
				as = d.Address.String()
			}
			if s := fmt.Sprintf("%v-%v as %s", d.Sources.First, d.Sources.Last, as); !slices.Contains(got, s) {
				got = append(got, s)
			}
		}
		if err != nil {
			got = []string{"error: " + err.Error()}
		}
		if s := strings.Join(got, ", "); s != k.want {
			t.Errorf("%s: %q, want %q", k.what, s, k.want)
		}
	}
}

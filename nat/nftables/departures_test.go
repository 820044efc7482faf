package nftables

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/traffic"
	"golang.org/x/sys/unix"
)

func inRange(r nat.Range, a netip.Addr) bool { return !a.Less(r.First) && !r.Last.Less(a) }

// holds says whether a flow is in a departure's set.
func holds(d nat.Departure, f nat.Flow) bool {
	return inRange(d.Sources, f.Source) && inRange(d.Destinations, f.Destination) &&
		d.Protocols[0] <= f.Protocol && f.Protocol <= d.Protocols[1] && d.Ports.First <= f.Port && f.Port <= d.Ports.Last
}

// TestDeparturesAgreeWithMatch asks for a lot at once and looks single flows up in the answer.
func TestDeparturesAgreeWithMatch(t *testing.T) {
	left, dropped := 0, 0
	for seed := range uint64(200) {
		r := traffic.Random{Rand: rand.New(rand.NewPCG(seed, 7))}
		c := nat.Config{Underlay: "wan", Attachments: inside("in0"), Own: []netip.Addr{addr("192.0.2.1")}, Pools: []nat.Pool{
			pool("one", "203.0.113.1", "2001:db8:f::1"), pool("many", "203.0.113.2", "203.0.113.3", "203.0.113.4", "2001:db8:f::2", "2001:db8:f::3"), pool("four-only", "203.0.113.9"),
		}}
		for i := range r.IntN(15) {
			c.Policies = append(c.Policies, r.Policy(fmt.Sprintf("p%d", i)))
		}
		traffic.Settle(&c)
		departures, err := New(Options{}).Predict(c, pfx("10.0.0.0/8", "44.0.0.0/8", "2001:db8:a::/48", "2001:db8:2c::/48"), pfx("198.48.0.0/12", "2001:db8:b0::/48"))
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for range 200 {
			f := r.Flow()
			if f.Protocol != unix.IPPROTO_TCP && f.Protocol != unix.IPPROTO_UDP {
				f.Port = 0
			}
			if f.Late = false; f.Destination.Is4() && !netip.MustParsePrefix("198.48.0.0/12").Contains(f.Destination) || f.Outside || isPool(c, f.Destination) || netip.MustParsePrefix("2001:db8:ff::/48").Contains(f.Destination) {
				continue // not asked for
			}
			decision := c.Match(f)
			want := decision.Address
			if decision.To.IsValid() {
				want = netip.Addr{} // it goes to a proxy, of which the answer tells where that is
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
				for _, p := range c.Pools { // one flow may leave with any address of the pool, as far as the rules tell
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
	if left < 1000 || dropped < 1000 {
		t.Error("too one-sided to tell anything")
	}
}

// TestDifferencesSeeEveryMutation takes each rule and one element of each set away, one at a time.
func TestDifferencesSeeEveryMutation(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := withLinks(t, d, example())
	apply(t, d, c)
	same := func() {
		t.Helper()
		if got, err := d.Differences(t.Context(), c); err != nil || len(got) > 0 {
			t.Fatalf("nothing was changed: %v, %v", got, err)
		}
	}
	same()
	mutate := func(what string, f func(conn *nftables.Conn) error) {
		t.Helper()
		conn, err := d.open()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.CloseLasting()
		if err := errors.Join(f(conn), conn.Flush()); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if got, err := d.Differences(t.Context(), c); err != nil || len(got) != 1 {
			t.Errorf("%s: %q, %v", what, got, err)
		}
		apply(t, d, c)
		same()
	}
	have, err := compile(c)
	if err != nil {
		t.Fatal(err)
	}
	rules := 0
	for name, chain := range have.chains {
		for i := range chain.rules {
			rules++
			mutate(fmt.Sprintf("rule %d of chain %s", i, name), func(conn *nftables.Conn) error {
				list, err := conn.GetRules(table(), &nftables.Chain{Name: name, Table: table()})
				if err != nil {
					return err
				}
				return conn.DelRule(list[i])
			})
		}
	}
	sets := 0
	for name, set := range have.sets {
		all := elements(set.shape, set.elements)
		if len(all) == 0 {
			continue
		}
		sets++
		mutate("an element of set "+name, func(conn *nftables.Conn) error {
			return conn.SetDeleteElements(kernelSet(name, set), all[:1])
		})
	}
	t.Logf("%d rules and %d sets", rules, sets)
	mutate("a rule more", func(conn *nftables.Conn) error {
		conn.InsertRule(&nftables.Rule{Table: table(), Chain: &nftables.Chain{Name: "guard", Table: table()}, Exprs: exprs(verdict(expr.VerdictAccept, ""))})
		return nil
	})
	if d, err := d.Departures(t.Context(), c.Underlay, pfx("0.0.0.0/0", "::/0"), pfx("0.0.0.0/0", "::/0")); err != nil || len(d) == 0 {
		t.Errorf("what is read back cannot be followed: %v, %v", d, err)
	}
}

// TestMapsAreFollowed asks for spokes of which many have one prefix, each by two tunnels: what leaves is known by the mapped prefix.
func TestMapsAreFollowed(t *testing.T) {
	c := nat.Config{Underlay: "wan", Attachments: inside("in0"), Own: []netip.Addr{addr("192.0.2.1")}, Pools: []nat.Pool{pool("one", "203.0.113.1")}}
	for i := range 20 {
		c.Maps = append(c.Maps, nat.Map{Interfaces: []string{fmt.Sprintf("tun%d", i), fmt.Sprintf("tan%d", i)},
			Inside: netip.MustParsePrefix("10.0.0.0/20"), Mapped: netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64, byte(i) << 4, 0}), 20)})
	}
	c.Policies = []nat.Policy{{Name: "some", Action: nat.SNAT, Sources: pfx("100.64.16.0/20"), Pool: "one"}}
	departures, err := New(Options{}).Predict(c, pfx("10.0.0.128/25"), pfx("198.51.100.0/24"))
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

// TestDifferencesKnowPlacements has what runs without being configured: it is no difference.
func TestDifferencesKnowPlacements(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := withLinks(t, d, spread())
	apply(t, d, c)
	place(t, d, nat.Placement{Pool: "p", Source: addr("10.0.0.1"), Destination: addr("198.51.100.1"), Address: addr("192.0.2.11")})
	full := nat.Exhausted{Pool: "p", Service: nat.Service{Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_TCP, Port: 443}}
	if err := d.Refuse(t.Context(), nat.Overload{Exhausted: []nat.Exhausted{full}, TableFull: true}); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Differences(t.Context(), c); err != nil || len(got) > 0 {
		t.Errorf("%q, %v", got, err)
	}
}

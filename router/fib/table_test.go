package fib

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/isthmus-net/isthmus/test/root"
)

func key(s string) Key { return Main(netip.MustParsePrefix(s)) }

func hop(i string, gw ...string) NextHop {
	h := NextHop{Interface: i}
	if len(gw) > 0 {
		h.Gateway = netip.MustParseAddr(gw[0])
	}
	return h
}

// bench is a table with its kernel.
type bench struct {
	*testing.T
	table  *Table
	kernel *fakeKernel
}

func newBench(t *testing.T, links ...string) *bench {
	b := &bench{t, NewTable(), newFakeKernel()}
	for i, name := range links {
		b.kernel.links[name] = Link{name, uint32(i + 10), true}
	}
	b.table.Adopt(b.kernel.state())
	b.table.Synced()
	return b
}

// run makes all changes, and returns the number of each kind.
func (b *bench) run() map[OpKind]int {
	b.Helper()
	b.kernel.kinds = map[OpKind]int{}
	for range 10000 {
		ops := b.table.Ops(3)
		if len(ops) == 0 {
			return b.kernel.kinds
		}
		errs := b.kernel.Execute(context.Background(), ops)
		if !b.table.Done(ops, errs) {
			b.Fatalf("refused: %v", join(errs))
		}
	}
	b.Fatal("no end of changes")
	return nil
}

func (b *bench) expect(got map[OpKind]int, want map[OpKind]int) {
	b.Helper()
	if !maps.Equal(got, want) {
		b.Fatalf("changes %v, want %v", got, want)
	}
}

func TestRoutesShareAGroup(t *testing.T) {
	b := newBench(t, "a", "b")
	ab := []NextHop{hop("b", "169.254.1.1"), hop("a", "169.254.0.1")}
	b.table.Update([]Route{
		{Key: key("10.0.0.0/24"), NextHops: ab},
		{Key: key("10.0.1.0/24"), NextHops: []NextHop{ab[1], ab[0], ab[0]}},
		{Key: key("10.0.2.0/24"), NextHops: ab[:1]},
	})
	b.expect(b.run(), map[OpKind]int{SetNextHop: 2, SetGroup: 2, AddRoute: 3})

	t.Log("a dead tunnel touches groups only")
	b.table.SetAlive(NextHop{Interface: "b"}, false)
	b.expect(b.run(), map[OpKind]int{SetGroup: 2, SetNextHop: 1, DeleteNextHop: 1})
	if g := b.kernel.groups[b.kernel.routes[key("10.0.2.0/24")].NextHop]; !b.kernel.objects[g[0]].Blackhole {
		t.Error("a route without a living next hop is not a black hole")
	}
	b.table.SetAlive(NextHop{Interface: "b"}, true)
	b.expect(b.run(), map[OpKind]int{SetGroup: 2, SetNextHop: 1, DeleteNextHop: 1})

	t.Log("the same again writes nothing")
	b.table.Update([]Route{{Key: key("10.0.2.0/24"), NextHops: ab[:1]}})
	b.expect(b.run(), map[OpKind]int{})

	t.Log("withdrawing everything leaves nothing")
	b.table.Update([]Route{{Key: key("10.0.0.0/24")}, {Key: key("10.0.1.0/24")}, {Key: key("10.0.2.0/24")}})
	b.expect(b.run(), map[OpKind]int{DeleteRoute: 3, DeleteGroup: 2, DeleteNextHop: 2})
	if len(b.table.routes)+len(b.table.groups)+len(b.table.byID)+len(b.table.objects)+len(b.table.taken) > 0 {
		t.Errorf("the table is not empty: %+v", b.table)
	}
}

func TestStaticWins(t *testing.T) {
	b := newBench(t, "a", "b")
	k := key("10.0.0.0/24")
	b.table.Update([]Route{{Key: k, NextHops: []NextHop{hop("a")}}})
	b.table.SetStatic([]Route{{Key: k, Blackhole: true}})
	b.expect(b.run(), map[OpKind]int{AddRoute: 1})
	b.table.SetStatic(nil)
	b.expect(b.run(), map[OpKind]int{SetNextHop: 1, SetGroup: 1, ReplaceRoute: 1})
	b.table.SetStatic([]Route{{Key: k, NextHops: []NextHop{hop("b")}}})
	b.expect(b.run(), map[OpKind]int{SetNextHop: 1, SetGroup: 1, ReplaceRoute: 1, DeleteGroup: 1, DeleteNextHop: 1})
}

// TestTransit checks that default routes move to the table of forwarded packets and back, whether
// they are reported before or after, and that nothing of either is left behind.
func TestTransit(t *testing.T) {
	b := newBench(t, "a", "b")
	four, six := key("0.0.0.0/0"), key("::/0")
	expect := func(want string) {
		t.Helper()
		b.run()
		keys := slices.SortedFunc(maps.Keys(b.kernel.routes), Key.Compare)
		if got := fmt.Sprint(keys); got != want {
			t.Errorf("the kernel has %s, want %s", got, want)
		}
	}
	b.table.Update([]Route{{Key: four, NextHops: []NextHop{hop("a")}}, {Key: key("10.0.0.0/8"), NextHops: []NextHop{hop("a")}}})
	expect("[0.0.0.0/0 10.0.0.0/8]")
	b.table.SetTransit(true)
	b.table.Update([]Route{{Key: six, NextHops: []NextHop{hop("a")}}})
	expect("[10.0.0.0/8 0.0.0.0/0 in table 18772 ::/0 in table 18772]")
	for s := range b.table.Routes {
		if s.Transit != (s.Key.Prefix.Bits() == 0) || s.Key.Domain != 0 || !s.Installed {
			t.Errorf("%+v", s)
		}
	}

	t.Log("a static route wins, and goes")
	b.table.SetStatic([]Route{{Key: four, Blackhole: true}})
	b.run()
	if !b.kernel.routes[Key{Transit, four.Prefix}].Blackhole {
		t.Error("the static route does not win")
	}
	b.table.SetTransit(false)
	b.table.SetTransit(true)
	b.table.SetStatic(nil)
	b.run()
	if b.kernel.routes[Key{Transit, four.Prefix}].Blackhole {
		t.Error("the static route is still there")
	}

	t.Log("a new run finds its routes, and what is not reported again goes")
	after := NewTable()
	after.Adopt(b.kernel.state())
	b.table = after
	after.Update([]Route{{Key: four, NextHops: []NextHop{hop("a")}}, {Key: key("10.0.0.0/8"), NextHops: []NextHop{hop("a")}}})
	after.SetTransit(true)
	after.Synced()
	expect("[10.0.0.0/8 0.0.0.0/0 in table 18772]")
	after.Restarted()
	after.SetTransit(false)
	after.Update([]Route{{Key: key("10.0.0.0/8"), NextHops: []NextHop{hop("a")}}})
	expect("[0.0.0.0/0 10.0.0.0/8]")
	after.Synced()
	expect("[10.0.0.0/8]")
	after.Update([]Route{{Key: key("10.0.0.0/8")}})
	expect("[]")
	if len(after.routes)+len(after.groups)+len(after.byID)+len(after.objects)+len(after.static) > 0 {
		t.Errorf("the table is not empty: %+v", after)
	}
}

func TestOutsideAddressesStayOutside(t *testing.T) {
	b := newBench(t, "a")
	b.table.SetReserved(covered([]netip.Addr{netip.MustParseAddr("203.0.113.7")}))
	for _, p := range []string{"203.0.113.0/24", "0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"} {
		b.table.Update([]Route{{Key: key(p), NextHops: []NextHop{hop("a")}}})
	}
	b.run()
	if got := slices.Collect(maps.Keys(b.kernel.routes)); len(got) != 2 {
		t.Errorf("installed %v, want 0.0.0.0/0 and 0.0.0.0/1", got)
	}
	for r := range b.table.Routes {
		if withheld := r.Key.Prefix.Bits() > 0 && r.Key.Prefix.Contains(netip.MustParseAddr("203.0.113.7")); withheld != (r.Takes != nil) || withheld == r.Installed {
			t.Errorf("state %+v", r)
		}
	}
	b.table.SetReserved(nil)
	b.expect(b.run(), map[OpKind]int{AddRoute: 2})
}

func TestRestart(t *testing.T) {
	b := newBench(t, "a", "b")
	routes := []Route{
		{Key: key("10.0.0.0/24"), NextHops: []NextHop{hop("a"), hop("b")}},
		{Key: key("10.0.1.0/24"), NextHops: []NextHop{hop("a")}},
		{Key: key("10.0.3.0/24"), Blackhole: true},
		{Key: key("2001:db8::/48"), NextHops: []NextHop{hop("a")}},
		{Key: key("10.0.2.0/24"), NextHops: []NextHop{hop("b")}},
	}
	b.table.Update(routes)
	b.run()

	b.table = NewTable()
	b.table.Adopt(b.kernel.state())
	b.expect(b.run(), map[OpKind]int{})
	b.table.Update(routes[:4])
	b.expect(b.run(), map[OpKind]int{})
	b.table.Synced()
	b.expect(b.run(), map[OpKind]int{DeleteRoute: 1, DeleteGroup: 1})

	t.Log("the BGP process starts again")
	b.table.Restarted()
	b.table.Update(routes[1:4])
	b.expect(b.run(), map[OpKind]int{})
	b.table.Synced()
	b.expect(b.run(), map[OpKind]int{DeleteRoute: 1, DeleteGroup: 1, DeleteNextHop: 1})
}

func TestRestartBeforeAdopt(t *testing.T) {
	b := newBench(t, "a", "b")
	routes := []Route{
		{Key: key("10.0.0.0/24"), NextHops: []NextHop{hop("a"), hop("b")}},
		{Key: key("10.0.1.0/24"), NextHops: []NextHop{hop("a")}},
	}
	b.table.Update(routes)
	b.run()
	b.table = NewTable()
	b.table.Update(routes)
	b.table.Synced()
	b.table.Adopt(b.kernel.state())
	b.expect(b.run(), map[OpKind]int{})
}

// TestDeadBeforeSynced checks that a tunnel that dies after a start leaves the routes of a former
// run, which BGP has not reported again yet.
func TestDeadBeforeSynced(t *testing.T) {
	b := newBench(t, "a", "b")
	k := key("10.0.0.0/24")
	b.table.Update([]Route{{Key: k, NextHops: []NextHop{hop("a", "169.254.0.1"), hop("b", "169.254.1.1")}}})
	b.run()
	b.table = NewTable()
	b.table.Adopt(b.kernel.state())
	b.run()
	b.table.SetAlive(NextHop{Interface: "a"}, false)
	b.run()
	ways := func() (n int, dead bool) {
		g := b.kernel.groups[b.kernel.routes[k].NextHop]
		for _, id := range g {
			dead = dead || b.kernel.objects[id].Link == b.kernel.links["a"].Index
		}
		return len(g), dead
	}
	if n, dead := ways(); n != 1 || dead {
		t.Errorf("%d ways, the dead tunnel is among them: %v", n, dead)
	}
	b.table.Adopt(b.kernel.state())
	b.table.SetAlive(NextHop{Interface: "b", Gateway: netip.MustParseAddr("169.254.1.1")}, false)
	b.run()
	if g := b.kernel.groups[b.kernel.routes[k].NextHop]; !b.kernel.objects[g[0]].Blackhole {
		t.Error("no black hole without a way")
	}
	b.table.SetAlive(NextHop{Interface: "b", Gateway: netip.MustParseAddr("169.254.1.1")}, true)
	b.table.SetAlive(NextHop{Interface: "a"}, true)
	b.run()
	if n, _ := ways(); n != 2 {
		t.Errorf("%d ways when both are back", n)
	}
}

// TestRandomWalk makes random changes of every kind, with restarts and failures, on a kernel that
// refuses the same changes as the real one, and compares the result with the wanted routes.
func TestRandomWalk(t *testing.T) {
	for seed := range root.Count(uint64(300), 60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { walk(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func walk(t *testing.T, r *rand.Rand) {
	names := []string{"a", "b", "c", "d"}
	b := newBench(t, names...)
	index := uint32(100)
	alive := map[string]bool{"a": true, "b": true, "c": true, "d": true}
	static, bgp := map[Key]Route{}, map[Key]Route{}
	var outside []netip.Addr

	route := func() Route {
		var rt Route
		if r.IntN(4) > 0 {
			rt.Key.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(12)), 0}), 24)
		} else {
			rt.Key.Prefix = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, byte(r.IntN(6))}), 48)
		}
		if r.IntN(3) == 0 {
			rt.Key.Domain = 100
		}
		switch r.IntN(10) {
		case 0:
		case 1:
			rt.Blackhole = true
		default:
			for _, n := range names {
				if r.IntN(2) == 0 {
					h := NextHop{Interface: n}
					switch {
					case r.IntN(2) == 0:
					case rt.Key.Prefix.Addr().Is4() && r.IntN(3) > 0:
						h.Gateway = netip.AddrFrom4([4]byte{169, 254, n[0], byte(r.IntN(2))})
					default:
						h.Gateway = netip.MustParseAddr("fe80::1")
					}
					rt.NextHops = append(rt.NextHops, h)
				}
			}
			rt.Resilient = r.IntN(3) == 0
			r.Shuffle(len(rt.NextHops), func(i, j int) { rt.NextHops[i], rt.NextHops[j] = rt.NextHops[j], rt.NextHops[i] })
		}
		return rt
	}
	for range 150 {
		switch r.IntN(12) {
		case 0, 1, 2, 3, 4:
			rt := route()
			if bgp[rt.Key] = rt; !rt.Blackhole && len(rt.NextHops) == 0 {
				delete(bgp, rt.Key)
			}
			b.table.Update([]Route{rt})
		case 5:
			clear(static)
			for range r.IntN(4) {
				if rt := route(); rt.Blackhole || len(rt.NextHops) > 0 {
					static[rt.Key] = rt
				}
			}
			b.table.SetStatic(slices.Collect(maps.Values(static)))
		case 6:
			n := names[r.IntN(len(names))]
			alive[n] = r.IntN(2) == 0
			b.table.SetAlive(NextHop{Interface: n}, alive[n])
		case 7:
			n := names[r.IntN(len(names))]
			l := b.kernel.links[n]
			switch {
			case l.Index == 0:
				index++
				l = Link{n, index, r.IntN(4) > 0}
			case r.IntN(2) == 0:
				l = Link{Name: n}
			default:
				l.Up = !l.Up
			}
			b.kernel.setLink(l)
			if r.IntN(2) == 0 {
				// The table has the link, but not yet the deletions that the kernel made with it.
				b.table.SetLinks(b.kernel.state().Links)
			}
		case 8:
			outside = nil
			for range r.IntN(3) {
				outside = append(outside, netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(12)), 9}))
			}
			b.table.SetReserved(covered(outside))
		case 9:
			switch r.IntN(3) {
			case 0:
				b.table = NewTable()
				b.table.SetReserved(covered(outside))
				for n, a := range alive {
					b.table.SetAlive(NextHop{Interface: n}, a)
				}
			case 1:
				b.table.Restarted()
			case 2:
				for k := range b.kernel.routes { // a route is deleted by hand
					delete(b.kernel.routes, k)
					break
				}
			}
			b.table.SetStatic(slices.Collect(maps.Values(static)))
			if r.IntN(2) == 0 {
				b.table.Adopt(b.kernel.state())
			}
			b.table.Update(slices.Collect(maps.Values(bgp)))
			b.table.Adopt(b.kernel.state())
			b.table.Synced()
		case 10:
			for range 5 {
				ops := b.table.Ops(1 + r.IntN(5))
				if r.IntN(3) == 0 { // a route changes while the changes are made
					rt := route()
					if bgp[rt.Key] = rt; !rt.Blackhole && len(rt.NextHops) == 0 {
						delete(bgp, rt.Key)
					}
					b.table.Update([]Route{rt})
				}
				if r.IntN(6) == 0 {
					b.kernel.fail = func(Op) error {
						if r.IntN(3) == 0 {
							return errors.New("out of luck")
						}
						return nil
					}
				}
				if !b.table.Done(ops, b.kernel.Execute(context.Background(), ops)) {
					b.table.Adopt(b.kernel.state())
				}
				b.kernel.fail = nil
			}
		case 11:
			b.table.Adopt(b.kernel.state())
			b.run()
		}
	}
	b.table.Synced()
	b.table.Adopt(b.kernel.state())
	b.run()

	// The wanted routes, computed without the table.
	want := map[Key]Route{}
	maps.Copy(want, bgp)
	maps.Copy(want, static)
	objects, groups := map[string]bool{}, map[string]bool{}
	for k, rt := range want {
		if k.Domain == 0 && slices.ContainsFunc(outside, k.Prefix.Contains) {
			delete(want, k)
			continue
		}
		got, ok := b.kernel.routes[k]
		if !ok {
			t.Fatalf("%v is missing", k)
		}
		if rt.Blackhole {
			if !got.Blackhole {
				t.Fatalf("%v is not a black hole: %+v", k, got)
			}
			continue
		}
		var hops []string
		for _, h := range rt.NextHops {
			if l := b.kernel.links[h.Interface]; l.Up && alive[h.Interface] {
				hops = append(hops, fmt.Sprint(l.Index, h.Gateway, h.Gateway.Is6() || !h.Gateway.IsValid() && k.Prefix.Addr().Is6()))
			}
		}
		if hops == nil {
			hops = []string{fmt.Sprint("hole ", k.Prefix.Addr().Is6())}
		}
		var have []string
		for _, id := range b.kernel.groups[got.NextHop] {
			if o := b.kernel.objects[id]; o.Blackhole {
				have = append(have, fmt.Sprint("hole ", o.IPv6))
			} else {
				have = append(have, fmt.Sprint(o.Link, o.Gateway, o.IPv6))
			}
		}
		slices.Sort(hops)
		slices.Sort(have)
		if !slices.Equal(hops, have) {
			t.Fatalf("%v: %q, want %q", k, have, hops)
		}
		for _, h := range hops {
			objects[h] = true
		}
		set := slices.Clone(rt.NextHops)
		slices.SortFunc(set, compareHops)
		resilient := uint16(0)
		if rt.Resilient && len(set) > 1 {
			resilient = map[int]uint16{2: 64, 3: 128, 4: 128}[len(set)]
		}
		if n := b.kernel.buckets[got.NextHop]; n != resilient {
			t.Fatalf("%v: %d buckets, want %d", k, n, resilient)
		}
		groups[fmt.Sprint(k.Prefix.Addr().Is6(), set, resilient)] = true
	}
	if len(b.kernel.routes) != len(want) || len(b.kernel.groups) != len(groups) || len(b.kernel.objects) != len(objects) {
		t.Fatalf("%d routes, %d groups, %d objects; want %d, %d, %d", len(b.kernel.routes), len(b.kernel.groups),
			len(b.kernel.objects), len(want), len(groups), len(objects))
	}
	b.table.Adopt(b.kernel.state())
	b.expect(b.run(), map[OpKind]int{})
}

func FuzzUpdateKeepsPrefixesApart(f *testing.F) {
	f.Add([]byte{10, 0, 0, 0}, uint8(24))
	f.Fuzz(func(t *testing.T, a []byte, bits uint8) {
		addr, ok := netip.AddrFromSlice(a)
		if !ok || int(bits) > addr.BitLen() || addr.Is4In6() {
			return
		}
		b := newBench(t, "a")
		b.table.Update([]Route{{Key: Main(netip.PrefixFrom(addr, int(bits))), NextHops: []NextHop{hop("a")}}})
		b.run()
		if _, ok := b.kernel.routes[Main(netip.PrefixFrom(addr, int(bits)).Masked())]; !ok {
			t.Errorf("%v/%d is missing", addr, bits)
		}
	})
}

// covered returns reserved keys of addresses that no route may cover.
func covered(addrs []netip.Addr) (all []Reserved) {
	for _, a := range addrs {
		all = append(all, Reserved{Key: Main(netip.PrefixFrom(a, a.BitLen())), Covered: true})
	}
	return all
}

// TestReserved checks that a route into a reserved network or to a reserved address is withheld,
// and one that covers an address only if it is longer than the machine's own route to it.
func TestReserved(t *testing.T) {
	table := NewTable()
	table.SetReserved([]Reserved{
		{Key: key("169.254.0.0/16"), Why: "a"}, {Key: key("192.0.2.0/24"), Why: "b"}, {Key: key("10.9.0.2/32"), Covered: true, Own: 0, Why: "c"},
		{Key: key("10.8.0.2/32"), Covered: true, Own: 24, Why: "d"}, {Key: key("10.7.0.2/32"), Why: "e"}, {Key: key("fe80::/10"), Why: "f"},
	})
	for text, want := range map[string]string{
		"0.0.0.0/0": "", "169.254.3.0/24": "a", "169.254.0.0/16": "a", "169.0.0.0/8": "", "192.0.2.7/32": "b", "192.0.0.0/16": "", "10.9.0.0/16": "c", "10.0.0.0/8": "c",
		"10.8.0.0/16": "", "10.8.0.0/24": "", "10.8.0.0/25": "d", "10.7.0.0/16": "", "10.7.0.2/32": "e", "fe80::1/128": "f", "2001:db8::/32": "",
	} {
		got := ""
		if k := table.reserved.taken(key(text)); k != nil {
			got = k.Why
		}
		if got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}

package fib

import (
	"maps"
	"net/netip"
	"slices"
	"testing"
)

// inTable returns the key of a prefix in a table other than the main one.
func inTable(d Domain, s string) Key { return Key{Domain: d, Prefix: netip.MustParsePrefix(s)} }

func TestKey(t *testing.T) {
	sorted := []Key{
		key("10.0.0.0/8"), key("10.0.0.0/16"), key("10.1.0.0/16"), key("2001:db8::/32"), inTable(100, "9.0.0.0/8"), inTable(101, "8.0.0.0/8"),
	}
	reversed := slices.Clone(sorted)
	slices.Reverse(reversed)
	if slices.SortFunc(reversed, Key.Compare); !slices.Equal(reversed, sorted) {
		t.Errorf("order %v, want %v", reversed, sorted)
	}
	for _, k := range []struct {
		key  Key
		want string
	}{{key("10.0.0.0/8"), "10.0.0.0/8"}, {inTable(100, "10.0.0.0/8"), "10.0.0.0/8 in table 100"}, {inTable(100, "10.1.2.3/8").Masked(), "10.0.0.0/8 in table 100"}} {
		if got := k.key.String(); got != k.want {
			t.Errorf("%q, want %q", got, k.want)
		}
	}
	if m := Domain(0).Table(); m != TableMain || DomainOf(m) != 0 {
		t.Errorf("the main table is %d, and its domain %d", m, DomainOf(m))
	}
	if d := DomainOf(70000); d != 70000 || d.Table() != 70000 {
		t.Errorf("table 70000 is domain %d of table %d", d, d.Table())
	}
}

// TestDomains checks that routes to the same prefix in two domains do not disturb each other.
func TestDomains(t *testing.T) {
	for _, prefix := range []string{"10.0.0.0/24", "2001:db8::/48"} {
		t.Run(prefix, func(t *testing.T) {
			b := newBench(t, "a", "b")
			first, second := key(prefix), inTable(100, prefix)
			a := []NextHop{hop("a")}
			// Nexthop objects belong to the namespace, so both routes share a group.
			b.table.Update([]Route{{Key: first, NextHops: a}, {Key: second, NextHops: a}})
			b.expect(b.run(), map[OpKind]int{SetNextHop: 1, SetGroup: 1, AddRoute: 2})
			installed := func(want ...Key) {
				t.Helper()
				if got := slices.SortedFunc(maps.Keys(b.kernel.routes), Key.Compare); !slices.Equal(got, want) {
					t.Errorf("the kernel has %v, want %v", got, want)
				}
			}
			installed(first, second)

			t.Log("replace one")
			b.table.Update([]Route{{Key: second, NextHops: []NextHop{hop("b")}}})
			b.expect(b.run(), map[OpKind]int{SetNextHop: 1, SetGroup: 1, ReplaceRoute: 1})
			via := func(k Key) uint32 {
				return b.kernel.objects[b.kernel.groups[b.kernel.routes[k].NextHop][0]].Link
			}
			if via(first) != b.kernel.links["a"].Index || via(second) != b.kernel.links["b"].Index {
				t.Errorf("the kernel has %+v", b.kernel.state())
			}
			b.table.SetStatic([]Route{{Key: second, Blackhole: true}})
			b.expect(b.run(), map[OpKind]int{ReplaceRoute: 1, DeleteGroup: 1, DeleteNextHop: 1})
			b.table.SetStatic(nil)
			b.expect(b.run(), map[OpKind]int{SetNextHop: 1, SetGroup: 1, ReplaceRoute: 1})

			t.Log("a restart keeps both, and Synced deletes the one that is not wanted")
			b.table = NewTable()
			b.table.Adopt(b.kernel.state())
			b.table.Update([]Route{{Key: second, NextHops: []NextHop{hop("b")}}})
			b.expect(b.run(), map[OpKind]int{})
			b.table.Synced()
			b.expect(b.run(), map[OpKind]int{DeleteRoute: 1, DeleteGroup: 1, DeleteNextHop: 1})
			installed(second)
			if n := b.table.Best(first.Prefix.Addr()); n != -1 {
				t.Errorf("the main table has a route of length %d", n)
			}

			t.Log("delete the other one")
			b.table.Update([]Route{{Key: first, NextHops: a}})
			b.run()
			b.table.Update([]Route{{Key: second}})
			b.expect(b.run(), map[OpKind]int{DeleteRoute: 1, DeleteGroup: 1, DeleteNextHop: 1})
			installed(first)
		})
	}
}

// TestReservedOfADomain checks that a reserved key withholds no route of another domain.
func TestReservedOfADomain(t *testing.T) {
	b := newBench(t, "a")
	outside, inside := Main(netip.MustParsePrefix("203.0.113.7/32")), inTable(100, "169.254.0.2/32")
	b.table.SetReserved([]Reserved{{Key: inside, Covered: true}, {Key: outside, Covered: true}})
	want := map[Key]bool{}
	for _, prefix := range []string{"203.0.113.0/24", "169.254.0.0/24", "10.0.0.0/24"} {
		for _, d := range []Domain{0, 100, 101} {
			k := inTable(d, prefix)
			want[k] = !k.Prefix.Contains(outside.Prefix.Addr()) && !k.Prefix.Contains(inside.Prefix.Addr())
			b.table.Update([]Route{{Key: k, NextHops: []NextHop{hop("a")}}})
		}
	}
	for _, d := range []Domain{100, 101} {
		want[inTable(d, "203.0.113.0/24")] = true
	}
	for _, d := range []Domain{0, 101} {
		want[inTable(d, "169.254.0.0/24")] = true
	}
	b.run()
	for r := range b.table.Routes {
		if r.Installed != want[r.Key] || (r.Takes == nil) != want[r.Key] {
			t.Errorf("state %+v, want installed: %v", r, want[r.Key])
		}
	}
}

package nftables

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// TestDifferencesSeeEveryMutation removes every rule and one element of every set, one at a time.
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

// TestDifferencesKnowPlacements checks that placements, which no configuration names, do not count
// as differences.
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

// maps4 returns a table with one layer of elements.
func maps4(elements map[string]element) *ruleset {
	return &ruleset{sets: map[string]*set{"policy-1-4": {shape{isMap: true, isVerdict: true, isInterval: true, isConcat: true}, elements}}}
}

func TestCountersMove(t *testing.T) {
	count := func(n uint64) nat.Counter { return nat.Counter{Packets: n, Bytes: 100 * n} }
	counted := func(before, now uint64) element {
		return element{kind: drop, policy: "p", before: count(before), now: count(now)}
	}
	wanted := element{kind: drop, policy: "p"}
	other := element{kind: drop, policy: "other", now: count(1000)}
	have := map[string]element{"a": counted(1, 2), "b": counted(4, 8), "o": other}
	for _, k := range []struct {
		name        string
		want        map[string]element
		remove, add map[string]element
		moved       bool
	}{
		{"nothing", map[string]element{"a": wanted, "b": wanted, "o": other}, nil, nil, false},
		{"one goes", map[string]element{"b": wanted, "o": other},
			map[string]element{"a": counted(1, 2), "b": counted(4, 8)}, map[string]element{"b": counted(15, 0)}, true},
		{"one moves", map[string]element{"b": wanted, "c": wanted, "o": other},
			map[string]element{"a": counted(1, 2)}, map[string]element{"c": counted(3, 0)}, true},
		{"one comes", map[string]element{"a": wanted, "b": wanted, "c": wanted, "o": other},
			nil, map[string]element{"c": wanted}, false},
		{"the policy goes", map[string]element{"o": other},
			map[string]element{"a": counted(1, 2), "b": counted(4, 8)}, nil, false},
	} {
		todo, moved := changes(maps4(have), maps4(k.want))
		got := todo["policy-1-4"]
		if got == nil {
			got = &change{}
		}
		if len(got.remove)+len(k.remove) > 0 && !reflect.DeepEqual(got.remove, k.remove) ||
			len(got.add)+len(k.add) > 0 && !reflect.DeepEqual(got.add, k.add) || moved != k.moved {
			t.Errorf("%s: remove %+v, add %+v, moved %v; want %+v, %+v, %v", k.name, got.remove, got.add, moved, k.remove, k.add, k.moved)
		}
	}
}

// TestCountersMoveBesides creates a map with another shape, or a whole table, again: the counters
// must be carried over.
func TestCountersMoveBesides(t *testing.T) {
	now := func(n uint64) element { return element{kind: drop, policy: "p", now: nat.Counter{Packets: n}} }
	have, want := maps4(map[string]element{"a": now(3), "b": now(5)}), maps4(map[string]element{"a": now(0), "c": now(0)})
	for _, k := range []struct {
		whole, larger bool
		remove, add   int // elements of the wanted map
	}{{false, false, 1, 1}, {false, true, 0, 2}, {true, false, 0, 2}} {
		s := *want.sets["policy-1-4"]
		if k.larger {
			s.shape.size = 128
		}
		todo, _ := changes(besides(have, &ruleset{sets: map[string]*set{"policy-1-4": &s}}, k.whole))
		c := todo["policy-1-4"]
		carried := uint64(0)
		for _, e := range c.add {
			carried += e.before.Packets
		}
		lost := uint64(8)
		if !k.whole && !k.larger {
			lost = 5 // the other element stays
		}
		if len(c.remove) != k.remove || len(c.add) != k.add || carried != lost {
			t.Errorf("%+v: %d go, %d come, with %d of %d packets", k, len(c.remove), len(c.add), carried, lost)
		}
	}
}

// TestDifferencesOfShape checks that a set of another type is reported as that, and not as one with
// other elements. Ring: pure.
func TestDifferencesOfShape(t *testing.T) {
	have, err := compile(example())
	if err != nil {
		t.Fatal(err)
	}
	want, err := compile(example())
	if err != nil {
		t.Fatal(err)
	}
	name := slices.Sorted(maps.Keys(have.sets))[0]
	have.sets[name].shape.size++
	if got, text := differences(have, want), []string{"set " + name + " has another type or size"}; !slices.Equal(got, text) {
		t.Errorf("%q", got)
	}
}

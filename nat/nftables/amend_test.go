package nftables

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
	"github.com/isthmus-net/isthmus/test/root"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// difference returns the first difference of two rulesets, counters aside, or an empty text.
func difference(have, want *ruleset) string {
	if !sameFrame(have, want) {
		return "the frame"
	}
	if todo, _ := changes(have, want); len(todo) > 0 {
		return fmt.Sprintf("the elements: %+v", todo)
	}
	names := func(r *ruleset) []string { return slices.Sorted(maps.Keys(r.timeouts)) }
	if !slices.Equal(names(have), names(want)) {
		return fmt.Sprintf("the timeouts: %v, %v", names(have), names(want))
	}
	if !reflect.DeepEqual(have.layers, want.layers) {
		return fmt.Sprintf("the layers: %v, %v", have.layers, want.layers)
	}
	same := func(a, b laid) bool {
		return nat.Order(a.Rule, b.Rule) == 0 && a.Ports == b.Ports && a.Policy.Equal(b.Policy) && a.layers == b.layers
	}
	if !slices.EqualFunc(have.laid, want.laid, same) {
		return "where rules are laid"
	}
	return ""
}

// edited returns a configuration with a few policies added, removed or changed, sorted by name and
// without ties.
func edited(r traffic.Random, c nat.Config, name string) nat.Config {
	c.Policies = slices.Clone(c.Policies)
	for i := range 1 + r.IntN(2) {
		at := r.IntN(len(c.Policies))
		switch p := r.Policy(fmt.Sprintf("%s-%d", name, i)); r.IntN(5) {
		case 0:
			c.Policies = slices.Delete(c.Policies, at, at+1)
		case 1: // another policy with the same name
			p.Name = c.Policies[at].Name
			c.Policies[at] = p
		case 2: // one more prefix
			q := &c.Policies[at]
			q.Sources = append(slices.Clone(q.Sources), r.Source())
			*q = traffic.Permitted(*q)
		default:
			c.Policies = append(c.Policies, p)
		}
	}
	slices.SortFunc(c.Policies, func(a, b nat.Policy) int { return cmp.Compare(a.Name, b.Name) })
	traffic.RemoveTies(&c)
	return c
}

// TestAmendIsCompile edits configurations at random. Where an amendment is made, its ruleset must
// be equal to the output of compile.
func TestAmendIsCompile(t *testing.T) {
	made, left := 0, 0
	moves, chains, timeouts := 0, 0, 0
	kinds := map[nat.Action]int{}
	seeds := root.Count(uint64(24), 6)
	for seed := range seeds {
		r := traffic.Random{Rand: rand.New(rand.NewPCG(seed, 11))}
		c := nat.Config{Underlay: "up0", Attachments: inside("tun0"), Pools: []nat.Pool{pool("one", "192.0.2.11", "2001:db8:ff::11"), pool("many", "192.0.2.21"), pool("four-only", "192.0.2.31")}}
		for i := range []int{5, 40, 120}[seed%3] {
			c.Policies = append(c.Policies, r.Policy(fmt.Sprintf("a%03d", i)))
		}
		slices.SortFunc(c.Policies, func(a, b nat.Policy) int { return cmp.Compare(a.Name, b.Name) })
		traffic.RemoveTies(&c)
		have, err := compile(c)
		if err != nil {
			t.Fatal(err)
		}
		for step := range 40 {
			next := edited(r, c, fmt.Sprintf("b%03d", step))
			want, err := compile(next)
			if err != nil {
				t.Fatal(err)
			}
			gone, came, ok := differing(c.Policies, next.Policies)
			if !ok {
				t.Fatal("the policies are out of order")
			}
			if a := have.amend(next, gone, came); a != nil {
				if got := difference(have, mustCompile(t, c)); got != "" {
					t.Fatalf("seed %d, step %d: amend has changed %s", seed, step, got)
				}
				moves += len(a.add)
				chains, timeouts = chains+len(a.made.chains)+len(a.chains), timeouts+len(a.made.timeouts)+len(a.timeouts)
				for _, p := range slices.Concat(gone, came) {
					kinds[p.Action]++
				}
				have.amendBy(a)
				made++
				if got := difference(have, want); got != "" {
					t.Fatalf("seed %d, step %d: gone %+v, came %+v: %s", seed, step, gone, came, got)
				}
			} else {
				have = want
				left++
			}
			c = next
		}
	}
	t.Log(made, "amended with", moves, "elements,", chains, "chains and", timeouts, "timeouts,", left, "compiled;", kinds)
	if n := int(seeds); made < 200*n/24 || left < 100*n/24 || chains < 40*n/24 {
		t.Errorf("not enough of one kind")
	}
	for _, action := range []nat.Action{nat.SNAT, nat.NoNAT, nat.Deny, nat.Reject, nat.DNAT, nat.Redirect} {
		if kinds[action] < 20*int(seeds)/24 {
			t.Errorf("%d policies with %s amended", kinds[action], action)
		}
	}
}

func mustCompile(t testing.TB, c nat.Config) *ruleset {
	t.Helper()
	r, err := compile(c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestAmendDivided edits layers of several maps, also where one more element changes how they are
// divided.
func TestAmendDivided(t *testing.T) {
	c := many(2*mapSize - 1)
	have := mustCompile(t, c)
	if n := have.layers[policyView][0]; !slices.Equal(n, []int{2, 1}) {
		t.Fatalf("maps %v", n)
	}
	edit := func(next nat.Config) bool {
		gone, came, _ := differing(c.Policies, next.Policies)
		a := have.amend(next, gone, came)
		want := mustCompile(t, next)
		if a == nil {
			have = want
		} else {
			have.amendBy(a)
		}
		c = next
		if got := difference(have, want); got != "" {
			t.Fatal(got)
		}
		return a != nil
	}
	for _, k := range []struct {
		policies int
		amended  bool
	}{{2 * mapSize, true}, {2*mapSize - 3, true}, {2*mapSize + 1, false}, {2*mapSize + 9, true}, {2*mapSize - 1, false}} {
		if edit(many(k.policies)) != k.amended {
			t.Errorf("%d policies: not amended %v", k.policies, k.amended)
		}
	}
	largest := 0
	for _, s := range mustCompile(t, many(8*mapSize)).sets {
		largest = max(largest, len(s.elements))
	}
	if largest > mapSize*5/4 {
		t.Errorf("a map has %d elements, where %d are the average", largest, mapSize)
	}
}

// TestAmendBeside makes edits that change more than elements: chains, timeouts, addresses with
// port forwards, pairs of prefixes for the guard.
func TestAmendBeside(t *testing.T) {
	ns := netns.New(t)
	d := newDriver(t, ns)
	timed := func(name, source string, udp time.Duration) nat.Policy {
		return nat.Policy{Name: name, Action: nat.SNAT, Pool: "p", Sources: pfx(source), Destinations: pfx("198.18.0.0/24"), Timeouts: nat.Timeouts{UDP: udp}}
	}
	toTarget := func(name string, action nat.Action, source, target, pool string, port uint16, t nat.Timeouts) nat.Policy {
		return nat.Policy{Name: name, Action: action, Pool: pool, Sources: pfx(source), Protocol: "tcp", Ports: []nat.PortRange{{First: port, Last: port}}, To: netip.MustParseAddrPort(target), Timeouts: t}
	}
	plain := func(name, source, destination string) nat.Policy {
		return nat.Policy{Name: name, Action: nat.NoNAT, Sources: pfx(source), Destinations: pfx(destination)}
	}
	c := many(20)
	for i := range 40 { // so many addresses that one more needs another map
		c.Pools = append(c.Pools, pool(fmt.Sprintf("pool%02d", i), fmt.Sprintf("192.0.2.%d", 100+i)))
	}
	for i := range 4 { // so deep that no other policy begins or ends a layer with all policies
		c.Policies = append(c.Policies, nat.Policy{Name: fmt.Sprintf("s-deep-%d", i), Action: nat.Deny, Sources: pfx("10.0.0.0/9"), Destinations: pfx(fmt.Sprintf("10.210.0.0/%d", 16+i))})
	}
	c.Policies = append(c.Policies, toTarget("s-in", nat.DNAT, "0.0.0.0/0", "10.9.0.1:80", "p", 80, nat.Timeouts{}), toTarget("s-proxy", nat.Redirect, "10.0.0.0/9", "10.250.0.1:3128", "", 80, nat.Timeouts{}),
		plain("s-plain", "10.0.0.0/9", "10.200.0.0/16"), plain("s-plain-2", "10.0.0.0/9", "10.201.0.0/17"))
	slices.SortFunc(c.Policies, func(a, b nat.Policy) int { return cmp.Compare(a.Name, b.Name) })
	apply(t, d, c)
	set := func(p nat.Policy) func(c *nat.Config) {
		return func(c *nat.Config) {
			at, had := slices.BinarySearchFunc(c.Policies, p.Name, func(o nat.Policy, name string) int { return cmp.Compare(o.Name, name) })
			if had {
				c.Policies[at] = p
			} else {
				c.Policies = slices.Insert(c.Policies, at, p)
			}
		}
	}
	remove := func(name string) func(c *nat.Config) {
		return func(c *nat.Config) {
			c.Policies = slices.DeleteFunc(c.Policies, func(p nat.Policy) bool { return p.Name == name })
		}
	}
	for _, k := range []struct {
		what    string
		change  func(c *nat.Config)
		amended bool
	}{
		{"timeouts", set(timed("t1", "172.16.0.0/16", time.Minute)), true},
		{"the same for another one", set(timed("t2", "172.17.0.0/16", time.Minute)), true},
		{"the first goes", remove("t1"), true},
		{"the same with another pool", func(c *nat.Config) {
			p := timed("t3", "172.18.0.0/16", time.Minute)
			p.Pool = "q"
			set(p)(c)
		}, true},
		{"which goes", remove("t3"), true},
		{"other timeouts", set(timed("t2", "172.17.0.0/16", 2*time.Minute)), true},
		{"the last goes", remove("t2"), true},
		{"another port is open", set(toTarget("u-in", nat.DNAT, "0.0.0.0/0", "10.9.0.2:81", "p", 81, nat.Timeouts{TCPClosing: time.Minute})), true},
		{"at another address, before the first", set(toTarget("u-in", nat.DNAT, "0.0.0.0/0", "10.9.0.2:81", "pool03", 81, nat.Timeouts{TCPClosing: time.Minute})), true},
		{"another server", set(toTarget("u-in", nat.DNAT, "0.0.0.0/0", "10.9.0.3:8081", "pool03", 81, nat.Timeouts{})), true},
		{"and none", remove("u-in"), true},
		{"another proxy", set(toTarget("v", nat.Redirect, "10.0.0.0/9", "10.250.0.2:3128", "", 81, nat.Timeouts{})), true},
		{"at another port", set(toTarget("v", nat.Redirect, "10.0.0.0/9", "10.250.0.2:3129", "", 81, nat.Timeouts{})), true},
		{"which is down", func(c *nat.Config) {
			c.Policies[slices.IndexFunc(c.Policies, func(p nat.Policy) bool { return p.Name == "v" })].Down = true
		}, false},
		{"and up", func(c *nat.Config) {
			c.Policies[slices.IndexFunc(c.Policies, func(p nat.Policy) bool { return p.Name == "v" })].Down = false
		}, false},
		{"and goes", remove("v"), true},
		{"more without translation", set(plain("w", "10.0.0.0/9", "10.202.0.0/16")), true},
		{"less", remove("s-plain"), true},
		{"of two lengths", set(plain("w", "10.0.0.0/10", "10.201.0.0/18")), false},
		{"of one length", set(plain("w", "10.0.0.0/9", "10.202.0.0/16")), false},
		{"everything open", func(c *nat.Config) {
			for i := range 32 {
				set(toTarget(fmt.Sprintf("x%02d", i), nat.DNAT, "0.0.0.0/0", "10.9.0.1:80", fmt.Sprintf("pool%02d", i), 80, nat.Timeouts{}))(c)
			}
		}, false},
		{"one less", remove("x31"), true},
		{"so few that the maps are smaller", remove("x30"), false},
	} {
		rules := d.last.rules
		c.Policies = slices.Clone(c.Policies)
		k.change(&c)
		apply(t, d, c)
		if d.last == nil || (d.last.rules == rules) != k.amended {
			t.Errorf("%s: not amended %v", k.what, k.amended)
		}
		if got := difference(d.last.rules, mustCompile(t, c)); got != "" {
			t.Errorf("%s: %s", k.what, got)
		}
		fresh := newDriver(t, ns)
		apply(t, fresh, c)
		if fresh.Writes() != 0 {
			t.Fatalf("%s: the rules are not what another driver writes", k.what)
		}
		conn, err := d.open()
		if err != nil {
			t.Fatal(err)
		}
		objects.Lock()
		list, err := conn.GetNamedObjects(table())
		objects.Unlock()
		conn.CloseLasting()
		n := 0
		for _, o := range list {
			if o, ok := o.(*nftables.NamedObj); ok && o.Type == nftables.ObjTypeCtTimeout {
				n++
			}
		}
		if err != nil || n != len(d.last.rules.timeouts) {
			t.Errorf("%s: the kernel has %d timeouts, want %d (%v)", k.what, n, len(d.last.rules.timeouts), err)
		}
	}
}

// TestAmendRefuses makes edits that need a full compilation.
func TestAmendRefuses(t *testing.T) {
	base := many(20)
	for name, p := range map[string]nat.Policy{
		"a tie":          {Name: "z", Action: nat.Deny, Sources: base.Policies[3].Sources, Destinations: base.Policies[3].Destinations},
		"a new layer":    {Name: "z", Action: nat.Deny, Sources: pfx("10.0.0.0/9")},
		"another family": {Name: "z", Action: nat.Deny, Sources: pfx("2001:db8::/32")},
		"a new view":     {Name: "z", Action: nat.Reject, Sources: pfx("172.16.0.0/16"), Destinations: pfx("198.18.0.0/24")},
		"plain":          {Name: "z", Action: nat.NoNAT, Sources: pfx("172.16.0.0/16"), Destinations: pfx("172.17.0.0/24")},
		"a wrong one":    {Name: "z", Action: "what", Sources: pfx("172.16.0.0/16"), Destinations: pfx("198.18.0.0/24")},
	} {
		have := mustCompile(t, base)
		after := base
		after.Policies = append(slices.Clone(base.Policies), p)
		if have.amend(after, nil, []nat.Policy{p}) != nil {
			t.Errorf("%s was amended", name)
		}
	}
}

// many returns n policies for as many sources and destinations, and one for everything else.
func many(n int) nat.Config {
	c := nat.Config{Underlay: "up0", Attachments: inside("tun0"), Own: []netip.Addr{addr("192.0.2.1")}, Pools: []nat.Pool{pool("p", "192.0.2.11"), pool("q", "192.0.2.12")}}
	for i := range n {
		src := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24)
		dst := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i >> 4), byte(i << 4)}), 28)
		c.Policies = append(c.Policies, nat.Policy{Name: fmt.Sprintf("p%05d", i), Action: nat.SNAT, Sources: []netip.Prefix{src}, Destinations: []netip.Prefix{dst}, Pool: "p"})
	}
	c.Policies = append(c.Policies, nat.Policy{Name: "rest", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Pool: "p"})
	return c
}

// TestAmendKernel edits the kernel's rules at random. After each edit, another driver must find
// them as it would have written them itself.
func TestAmendKernel(t *testing.T) {
	r := traffic.Random{Rand: rand.New(rand.NewPCG(5, 5))}
	ns := netns.New(t)
	d := newDriver(t, ns)
	c := nat.Config{Underlay: "up0", Attachments: inside("tun0"), Pools: []nat.Pool{pool("one", "192.0.2.11", "2001:db8:ff::11"), pool("many", "192.0.2.21"), pool("four-only", "192.0.2.31")}}
	for i := range 60 {
		c.Policies = append(c.Policies, r.Policy(fmt.Sprintf("a%03d", i)))
	}
	traffic.RemoveTies(&c)
	apply(t, d, c)
	amended := 0
	for step := range 60 {
		before := d.last
		c = edited(r, c, fmt.Sprintf("b%03d", step))
		apply(t, d, c)
		if d.last == nil {
			t.Fatal("the driver has lost the ruleset that it wrote")
		}
		if d.last.rules == before.rules {
			amended++
		}
		fresh := newDriver(t, ns)
		apply(t, fresh, c)
		if fresh.Writes() != 0 {
			t.Fatalf("step %d: the rules are not what another driver writes", step)
		}
		writes := d.Writes()
		apply(t, d, c)
		if d.Writes() != writes {
			t.Fatalf("step %d: the same was written again", step)
		}
	}
	t.Log(amended, "of 60 amended")
	if amended < 15 {
		t.Errorf("only %d amended", amended)
	}
}

// TestAmendKeepsCounters edits policies that have counted.
func TestAmendKeepsCounters(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := many(4)
	apply(t, d, c)
	s.transmit(nat.Flow{Source: addr("10.0.1.1"), Destination: addr("198.51.0.17"), Protocol: 17, Port: 7}, 1, 0)
	s.transmit(nat.Flow{Source: addr("10.0.9.1"), Destination: addr("198.51.9.17"), Protocol: 17, Port: 7}, 2, 0)
	s.receive(100 * time.Millisecond)
	want := map[string]uint64{"p00000": 0, "p00001": 1, "p00002": 0, "p00003": 0, "rest": 1}
	edit := func(what string, change func(c *nat.Config)) {
		t.Helper()
		rules := d.last.rules
		c.Policies = slices.Clone(c.Policies)
		change(&c)
		apply(t, d, c)
		if d.last == nil || d.last.rules != rules {
			t.Errorf("%s: not amended", what)
		}
		state, err := d.Observe(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]uint64{}
		for _, p := range state.Policies {
			got[p.Name] = p.Flows.Packets
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	edit("another pool", func(c *nat.Config) { c.Policies[1].Pool = "q" })
	edit("one prefix more", func(c *nat.Config) { c.Policies[1].Sources = append(pfx("172.16.0.0/24"), c.Policies[1].Sources...) })
	edit("the prefix that has counted goes", func(c *nat.Config) { c.Policies[1].Sources = pfx("172.16.0.0/24") })
	edit("one more and one less", func(c *nat.Config) { c.Policies[1].Sources = pfx("172.16.1.0/24") })
	delete(want, "p00001")
	edit("the policy goes", func(c *nat.Config) { c.Policies = slices.Delete(c.Policies, 1, 2) })
	want["p00001"] = 0
	edit("and comes", func(c *nat.Config) { c.Policies = slices.Insert(c.Policies, 1, many(4).Policies[1]) })
}

// BenchmarkEdit adds, removes and changes one of 10,000 policies: as an amendment, and compiled as
// a whole.
func BenchmarkEdit(b *testing.B) {
	const n = 10_000
	d := newDriver(b, netns.New(b))
	all, more, other := many(n), many(n+1), many(n)
	other.Policies[n/2].Pool = "q"
	spent := map[string]time.Duration{}
	apply(b, d, all)
	for b.Loop() {
		for _, way := range []string{"amended", "compiled"} {
			for _, step := range []struct {
				what string
				to   nat.Config
			}{{"add", more}, {"remove", all}, {"change", other}, {"same", other}, {"", all}} {
				if way == "compiled" {
					d.last.config.Underlay = "other" // so that the configurations differ
				}
				start := time.Now()
				apply(b, d, step.to)
				spent[step.what+"-"+way] += time.Since(start)
			}
		}
	}
	for _, what := range []string{"add", "remove", "change", "same"} {
		for _, way := range []string{"-amended", "-compiled"} {
			b.ReportMetric(spent[what+way].Seconds()*1000/float64(b.N), what+way+"-ms")
		}
	}
}

func TestDiffering(t *testing.T) {
	list := func(names ...string) (out []nat.Policy) {
		for _, n := range names {
			out = append(out, nat.Policy{Name: n[:1], Pool: n[1:]})
		}
		return out
	}
	lots := many(maxAmended).Policies
	for _, k := range []struct {
		a, b       []nat.Policy
		gone, came int
		ok         bool
	}{
		{list("a", "b"), list("a", "b"), 0, 0, true},
		{list("b", "a"), list("b", "a"), 0, 0, true}, // in any order
		{list("a", "c"), list("a", "b", "c"), 0, 1, true},
		{list("a", "b", "c"), list("b"), 2, 0, true},
		{list("a", "b1", "c"), list("a", "b2", "d"), 2, 2, true},
		{nil, list("a"), 0, 1, true},
		{list("a"), list("a", "a1"), 0, 0, false}, // the same name twice
		{list("a", "b"), list("b", "a"), 0, 0, false},
		{nil, lots, 0, 0, false},
	} {
		gone, came, ok := differing(k.a, k.b)
		if ok != k.ok || ok && (len(gone) != k.gone || len(came) != k.came) {
			t.Errorf("from %v to %v: %v, %v, %v", k.a, k.b, gone, came, ok)
		}
	}
}

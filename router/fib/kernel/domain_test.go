package kernel

import (
	"maps"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/fib"
)

// TestDomains checks that the kernel's main table and another one have the same prefixes
// independently of each other, that the first sync removes what a former run left in any table, and
// that routes of others stay there. Table 70000 does not fit into rtm_table, which has 8 bits.
func TestDomains(t *testing.T) {
	ns := newNamespace(t, "t0", "t1")
	ns.Run(`ip route add 10.8.0.0/16 dev t0 table 100 metric 2048 proto 73
		ip -6 route add 2001:db8:8::/48 dev t0 table 100 metric 2048 proto 73
		ip route add 10.8.0.0/16 dev t0 table 70000 metric 2048 proto 73
		ip route add 10.7.0.0/16 dev t0 table 100 metric 2048 proto static
		ip -6 route add 2001:db8:7::/48 dev t0 table 100 metric 2048 proto static`)
	d := newDriver(t, ns)
	f, _ := run(t, d)
	v4, v6 := pfx("10.0.0.0/24"), pfx("2001:db8::/48")
	in := func(domain fib.Domain) []fib.Key {
		return []fib.Key{{Domain: domain, Prefix: v4}, {Domain: domain, Prefix: v6}}
	}
	update := func(keys []fib.Key, hops ...fib.NextHop) {
		t.Helper()
		var routes []fib.Route
		for _, k := range keys {
			routes = append(routes, fib.Route{Key: k, NextHops: hops})
		}
		f.Update(routes)
		f.Synced()
		settle(t, f)
	}
	// has compares the routes of ours with those that are wanted, by the interface that each leads
	// to.
	has := func(want map[fib.Key]string) {
		t.Helper()
		s := observe(t, d)
		links, objects, groups := map[uint32]string{}, map[uint32]uint32{}, map[uint32][]uint32{}
		for _, l := range s.Links {
			links[l.Index] = l.Name
		}
		for _, o := range s.NextHops {
			objects[o.ID] = o.Link
		}
		for _, g := range s.Groups {
			groups[g.ID] = g.Members
		}
		got := map[fib.Key]string{}
		for _, r := range s.Routes {
			for _, id := range groups[r.NextHop] {
				got[r.Key] += links[objects[id]]
			}
		}
		if !maps.Equal(got, want) || len(s.Routes) != len(want) {
			t.Errorf("the kernel has %v, want %v", got, want)
		}
	}
	want := map[fib.Key]string{}
	for i, domain := range []fib.Domain{0, 100, 70000} {
		name := []string{"t0", "t1", "t0"}[i]
		update(in(domain), hop(name, ""))
		for _, k := range in(domain) {
			want[k] = name
		}
		has(want)
	}

	t.Log("the tables as iproute2 shows them")
	for _, table := range []string{"main", "100", "70000"} {
		out := ns.Run("ip route show table " + table + "\nip -6 route show table " + table)
		if !strings.Contains(out, v4.String()+" nhid") || !strings.Contains(out, v6.String()+" nhid") || strings.Contains(out, ".8.0.0/16") {
			t.Errorf("table %s: %s", table, out)
		}
	}

	t.Log("replace and delete in one table")
	update(in(100), hop("t0", ""))
	for _, k := range in(100) {
		want[k] = "t0"
	}
	has(want)
	update(in(0))
	for _, k := range in(0) {
		delete(want, k)
	}
	has(want)
	update(in(0), hop("t1", ""))
	update(in(100))
	for i := range in(0) {
		want[in(0)[i]] = "t1"
		delete(want, in(100)[i])
	}
	has(want)

	t.Log("others' routes")
	out := ns.Run("ip route show table 100\nip -6 route show table 100")
	if !strings.Contains(out, "10.7.0.0/16 dev t0 proto static") || !strings.Contains(out, "2001:db8:7::/48 dev t0 proto static") {
		t.Errorf("routes of others in table 100 are gone: %s", out)
	}
}

package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/netlink"
	"github.com/isthmus-net/isthmus/test/netns"
)

// Ring: namespace. Pairs of virtual Ethernet interfaces stand for tunnels.

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func hop(i, gw string) fib.NextHop {
	h := fib.NextHop{Interface: i}
	if gw != "" {
		h.Gateway = netip.MustParseAddr(gw)
	}
	return h
}

func newDriver(t testing.TB, ns *netns.NS) *Driver {
	t.Helper()
	var d *Driver
	var err error
	ns.Do(func() { d, err = New() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func newNamespace(t testing.TB, tunnels ...string) *netns.NS {
	ns := netns.New(t)
	ns.Run("sysctl -qw net.ipv4.nexthop_compat_mode=0")
	for _, n := range tunnels {
		addTunnel(ns, n)
	}
	return ns
}

func addTunnel(ns *netns.NS, n string) {
	ns.Run("ip link add " + n + " type veth peer name far-" + n + "\nip link set far-" + n + " up\nip link set " + n + " up")
}

// run starts a FIB on a driver; stop ends it.
func run(t testing.TB, d fib.Driver) (f *fib.FIB, stop func()) {
	f = fib.New(d, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	stop = func() {
		cancel()
		if done != nil {
			<-done
			done = nil
		}
	}
	t.Cleanup(stop)
	return f, stop
}

func settle(t testing.TB, f *fib.FIB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := f.Wait(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestRoutes(t *testing.T) {
	ns := newNamespace(t, "t0", "t1")
	ns.Run("ip addr add 169.254.0.2/30 dev t0\nip addr add 169.254.9.2/32 dev t1")
	d := newDriver(t, ns)
	f, stop := run(t, d)
	f.SetStatic([]fib.Route{{Key: fib.Main(pfx("10.9.0.0/16")), Blackhole: true}, {Key: fib.Main(pfx("2001:db8:9::/48")), Blackhole: true}})
	f.Update([]fib.Route{
		{Key: fib.Main(pfx("10.0.0.0/24")), NextHops: []fib.NextHop{hop("t0", "169.254.0.1"), hop("t1", "169.254.9.1")}},
		{Key: fib.Main(pfx("10.1.0.0/24")), NextHops: []fib.NextHop{hop("t1", "")}},
		{Key: fib.Main(pfx("10.2.0.0/24")), NextHops: []fib.NextHop{hop("t0", "fe80::1")}},
		{Key: fib.Main(pfx("0.0.0.0/0")), NextHops: []fib.NextHop{hop("t0", "169.254.0.1")}},
		{Key: fib.Main(pfx("2001:db8::/48")), NextHops: []fib.NextHop{hop("t0", "fe80::1"), hop("t1", "")}},
		{Key: fib.Main(pfx("::/0")), NextHops: []fib.NextHop{hop("t0", "")}},
	})
	f.Synced()
	settle(t, f)
	get := func(dst, want string) {
		t.Helper()
		out, err := ns.Try("ip route get " + dst)
		if err != nil {
			out = err.Error()
		}
		if !strings.Contains(out, want) {
			t.Errorf("route to %s: %q, want %q", dst, out, want)
		}
	}
	get("10.0.0.1", "via 169.254.")
	get("10.1.0.1", "dev t1")
	get("10.2.0.1", "via inet6 fe80::1 dev t0")
	get("192.0.2.1", "via 169.254.0.1")
	get("10.9.1.1", "Invalid argument") // the error of a black hole
	get("2001:db8::1", "dev t")
	get("2001:db8:1::1", "dev t0")
	get("2001:db8:9::1", "Invalid argument")

	t.Log("a dead tunnel: nothing falls through to the default route")
	before := d.Writes()
	f.SetAlive(fib.NextHop{Interface: "t1"}, false)
	settle(t, f)
	get("10.0.0.1", "dev t0")
	get("10.1.0.1", "Invalid argument")
	get("2001:db8::1", "dev t0")
	t.Logf("%d writes", d.Writes()-before)
	f.SetAlive(fib.NextHop{Interface: "t0"}, false)
	settle(t, f)
	get("2001:db8::1", "Invalid argument")
	f.SetAlive(fib.NextHop{Interface: "t0"}, true)
	f.SetAlive(fib.NextHop{Interface: "t1"}, true)
	settle(t, f)
	get("10.1.0.1", "dev t1")

	t.Log("a new start writes nothing, and removes at Synced the routes that are not wanted")
	stop()
	d = newDriver(t, ns)
	f, _ = run(t, d)
	settle(t, f)
	f.SetStatic([]fib.Route{{Key: fib.Main(pfx("10.9.0.0/16")), Blackhole: true}})
	f.Update([]fib.Route{{Key: fib.Main(pfx("10.0.0.0/24")), NextHops: []fib.NextHop{hop("t1", "169.254.9.1"), hop("t0", "169.254.0.1")}}})
	settle(t, f)
	if n := d.Writes(); n != 0 {
		t.Errorf("%d writes, want 0", n)
	}
	f.Synced()
	settle(t, f)
	s := observe(t, d)
	if len(s.Routes) != 2 || len(s.Groups) != 1 || len(s.NextHops) != 2 {
		t.Errorf("left: %+v", s)
	}
}

func observe(t testing.TB, d *Driver) fib.State {
	t.Helper()
	s, err := d.Observe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestErrorsSayWhatAndWhy(t *testing.T) {
	ns := newNamespace(t, "t0")
	ns.Run("ip route add 10.3.0.0/24 dev t0 metric 2048") // of another owner
	d := newDriver(t, ns)
	index := observe(t, d).Links[1].Index
	errs := d.Execute(context.Background(), []fib.Op{
		{Kind: fib.SetNextHop, ID: 0x49000001, Object: fib.Object{Link: 12345}},
		{Kind: fib.SetNextHop, ID: 0x49000002, Object: fib.Object{Link: index}},
		{Kind: fib.SetGroup, ID: 0x49000003, Members: []uint32{0x49000001}},
		{Kind: fib.SetGroup, ID: 0x49000004, Members: []uint32{0x49000002}},
		{Kind: fib.AddRoute, ID: 0x49000004, Key: fib.Main(pfx("10.3.0.0/24"))},
		{Kind: fib.DeleteRoute, Key: fib.Main(pfx("10.3.0.0/24"))},
		{Kind: fib.AddRoute, ID: 0x49000004, Key: fib.Main(pfx("10.4.0.0/24"))},
		{Kind: fib.ReplaceRoute, ID: 0x49000004, Key: fib.Main(pfx("10.5.0.0/24"))},
	})
	want := []string{"setting nexthop object 1224736769 on interface 12345: invalid argument (Invalid device index)", "",
		"setting nexthop group 1224736771 to [1224736769]: invalid argument (Invalid nexthop id)", "",
		"adding route 10.3.0.0/24: file exists", "deleting route 10.3.0.0/24: no such process", "", "replacing route 10.5.0.0/24: no such file or directory"}
	for i, err := range errs {
		if got := fmt.Sprint(err); got != want[i] && (err != nil || want[i] != "") {
			t.Errorf("change %d: %v, want %q", i, err, want[i])
		}
	}
	if !strings.Contains(ns.Run("ip route"), "10.3.0.0/24 dev t0") {
		t.Error("the route of another is gone")
	}
	if d.Execute(context.Background(), []fib.Op{{Kind: fib.DeleteRoute, Key: fib.Main(pfx("10.4.0.0/24"))}}) != nil {
		t.Error("the driver does not go on after errors")
	}
}

func TestHealing(t *testing.T) {
	ns := newNamespace(t, "t0", "t1")
	ns.Run("ip route add default dev t1 metric 100\nip route add 10.77.0.0/16 dev t1 proto static")
	d := newDriver(t, ns)
	f, _ := run(t, d)
	var routes []fib.Route
	for i := range 100 {
		routes = append(routes, fib.Route{Key: fib.Main(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i), 0}), 24)), NextHops: []fib.NextHop{hop("t0", "")}})
	}
	f.Update(routes)
	f.Synced()
	settle(t, f)
	whole := func() bool {
		s := observe(t, newDriver(t, ns))
		if len(s.Routes) != 100 || len(s.Groups) != 1 || len(s.NextHops) != 1 {
			return false
		}
		for _, r := range s.Routes {
			if r.NextHop != s.Groups[0].ID {
				return false
			}
		}
		return slices.Equal(s.Groups[0].Members, []uint32{s.NextHops[0].ID})
	}
	heals := func(what string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !whole(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: not healed: %s", what, ns.Run("ip nexthop\nip route"))
			}
		}
	}
	heals("at first")
	settle(t, f)
	before := d.Writes()
	time.Sleep(100 * time.Millisecond)
	if d.Writes() != before {
		t.Error("own writes are taken for changes by others")
	}
	group := fmt.Sprint(observe(t, newDriver(t, ns)).Groups[0].ID)
	for _, command := range []string{
		"ip route del 10.0.7.0/24 metric 2048",
		"ip route replace 10.0.7.0/24 dev t1 metric 2048 proto 73",
		"ip nexthop del id " + group,
		"ip nexthop flush proto 73",
		"ip link set t0 down",
		"ip link del t0",
	} {
		ns.Run(command)
		switch command {
		case "ip link set t0 down", "ip link del t0":
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
				if _, err := ns.Try("ip route get 10.0.5.1"); err != nil && strings.Contains(err.Error(), "Invalid argument") {
					break // a black hole
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s: traffic goes to the default route", command)
				}
			}
			if command == "ip link del t0" {
				addTunnel(ns, "t0")
			} else {
				ns.Run("ip link set t0 up")
			}
		}
		heals(command)
	}
	if out := ns.Run("ip route"); !strings.Contains(out, "10.77.0.0/16 dev t1 proto static") || !strings.Contains(out, "default dev t1") {
		t.Errorf("routes of others: %s", out)
	}
}

// TestWatch checks that changes by others wake the watcher, and that those of the driver do not.
func TestWatch(t *testing.T) {
	ns := newNamespace(t, "t0")
	d := newDriver(t, ns)
	ctx, cancel := context.WithCancel(context.Background())
	events, done := make(chan fib.Event, 10000), make(chan error)
	go func() { done <- d.Watch(ctx, func(e fib.Event) { events <- e }) }()
	next := func() fib.Event {
		select {
		case e := <-events:
			return e
		case <-time.After(100 * time.Millisecond):
			return 0
		}
	}
	if e := next(); e != fib.LinkEvent|fib.RouteEvent {
		t.Errorf("at first: %d", e)
	}
	ops := []fib.Op{
		{Kind: fib.SetNextHop, ID: 0x49000002, Object: fib.Object{Link: observe(t, d).Links[1].Index}},
		{Kind: fib.SetGroup, ID: 0x49000004, Members: []uint32{0x49000002}},
	}
	for i := range 5000 {
		ops = append(ops, fib.Op{Kind: fib.AddRoute, ID: 0x49000004, Key: fib.Main(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}), 24))})
	}
	if errs := d.Execute(ctx, ops); errs != nil {
		t.Fatal(errors.Join(errs...))
	}
	var got fib.Event
	for e := next(); e != 0; e = next() {
		got |= e
	}
	if got &^= fib.LinkEvent; got != 0 { // the kernel may report late that the interface is up
		t.Errorf("own changes: %d", got)
	}
	for _, k := range []struct {
		command string
		want    fib.Event
	}{
		{"ip route add 172.16.0.0/16 dev t0 proto static", 0},
		{"ip nexthop add id 7 dev t0", 0},
		{"ip route replace 10.0.0.0/24 dev t0 metric 2048 proto static", fib.RouteEvent},
		{"ip route del 10.0.1.0/24 proto 73", fib.RouteEvent},
		{"ip nexthop del id 1224736772", fib.RouteEvent},
		{"ip link set t0 mtu 1400", fib.LinkEvent},
	} {
		ns.Run(k.command)
		var got fib.Event
		for e := next(); e != 0; e = next() {
			got |= e
		}
		if k.want != fib.LinkEvent {
			got &^= fib.LinkEvent
		}
		if got != k.want {
			t.Errorf("%s: %d, want %d", k.command, got, k.want)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Watch returned %v", err)
	}
}

// TestRandomWalk checks that the kernel accepts all changes of a random walk, and has the wanted
// routes at its end.
func TestRandomWalk(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	names := []string{"t0", "t1", "t2"}
	ns := newNamespace(t, names...)
	d := newDriver(t, ns)
	f, stop := run(t, &strict{d, t})
	bgp := map[fib.Key]fib.Route{}
	dead := map[string]bool{}
	for range 400 {
		switch r.IntN(20) {
		case 0:
			n := names[r.IntN(3)]
			dead[n] = !dead[n]
			f.SetAlive(fib.NextHop{Interface: n}, !dead[n])
		case 1:
			settle(t, f)
		case 2:
			if r.IntN(5) == 0 {
				stop()
				f, stop = run(t, &strict{d, t})
				for n := range dead {
					f.SetAlive(fib.NextHop{Interface: n}, !dead[n])
				}
				var all []fib.Route
				for _, rt := range bgp {
					all = append(all, rt)
				}
				f.Update(all)
				f.Synced()
			}
		default:
			var rt fib.Route
			if r.IntN(2) == 0 {
				rt.Key.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(20)), 0}), 24)
			} else {
				rt.Key.Prefix = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, byte(r.IntN(20))}), 48)
			}
			switch r.IntN(8) {
			case 0:
				rt.Blackhole = true
			case 1:
			default:
				for _, n := range names {
					if r.IntN(2) == 0 {
						rt.NextHops = append(rt.NextHops, hop(n, []string{"", "fe80::1", "fe80::2"}[r.IntN(3)]))
					}
				}
				rt.Resilient = r.IntN(2) == 0
			}
			if bgp[rt.Key] = rt; !rt.Blackhole && rt.NextHops == nil {
				delete(bgp, rt.Key)
			}
			f.Update([]fib.Route{rt})
		}
	}
	f.Synced()
	settle(t, f)
	s := observe(t, newDriver(t, ns))
	objects, groups, links := map[uint32]fib.Object{}, map[uint32][]uint32{}, map[string]uint32{}
	for _, o := range s.NextHops {
		objects[o.ID] = o
	}
	for _, g := range s.Groups {
		groups[g.ID] = g.Members
	}
	for _, l := range s.Links {
		links[l.Name] = l.Index
	}
	for _, got := range s.Routes {
		want, ok := bgp[got.Key]
		if !ok {
			t.Errorf("%v is not wanted", got.Key)
		}
		var have, hops []string
		for _, id := range groups[got.NextHop] {
			o := objects[id]
			have = append(have, fmt.Sprint(o.Link, o.Gateway, o.Blackhole))
		}
		for _, h := range want.NextHops {
			if !dead[h.Interface] {
				hops = append(hops, fmt.Sprint(links[h.Interface], h.Gateway, false))
			}
		}
		if hops == nil && !want.Blackhole {
			hops = []string{fmt.Sprint(0, netip.Addr{}, true)}
		}
		slices.Sort(have)
		slices.Sort(hops)
		if !slices.Equal(have, hops) {
			t.Errorf("%v: %q, want %q", got.Key, have, hops)
		}
	}
	if len(s.Routes) != len(bgp) {
		t.Errorf("%d routes, want %d", len(s.Routes), len(bgp))
	}
}

// strict fails the test when the kernel refuses something.
type strict struct {
	*Driver
	t *testing.T
}

func (s *strict) Execute(ctx context.Context, ops []fib.Op) []error {
	errs := s.Driver.Execute(ctx, ops)
	if err := errors.Join(errs...); err != nil && ctx.Err() == nil {
		s.t.Errorf("refused: %v", err)
	}
	return errs
}

// FuzzDecode decodes damaged answers.
func FuzzDecode(f *testing.F) {
	b, _ := compile(nil, fib.Op{Kind: fib.SetGroup, ID: 7, Members: []uint32{1, 2}}, 1, 0)
	f.Add(b)
	b, _ = compile(nil, fib.Op{Kind: fib.SetGroup, ID: 7, Members: []uint32{1, 2}, Buckets: 64}, 1, 0)
	f.Add(b)
	b, _ = compile(nil, fib.Op{Kind: fib.AddRoute, ID: 7, Key: fib.Main(pfx("10.0.0.0/24"))}, 1, 0)
	f.Add(b)
	b, start := netlink.Begin(nil, unix.NLMSG_ERROR, unix.NLM_F_ACK_TLVS, 1)
	f.Add(netlink.End(append(b, 0xea, 0xff, 0xff, 0xff, 0, 0, 0), start))
	f.Fuzz(func(t *testing.T, b []byte) {
		ms, err := messages(b)
		if err != nil {
			return
		}
		var s fib.State
		for _, m := range ms {
			decodeLink(m)
			decodeNextHop(m, &s)
			decodeBucket(m)
			decodeRoute(m)
			decodeError(m)
		}
	})
}

func TestRoundTrip(t *testing.T) {
	object := fib.Object{ID: 7, Link: 3, Gateway: netip.MustParseAddr("fe80::1"), IPv6: true}
	b, err := compile(nil, fib.Op{Kind: fib.SetNextHop, ID: 7, Object: object}, 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	b, _ = compile(b, fib.Op{Kind: fib.SetGroup, ID: 8, Members: []uint32{9, 7}}, 2, 0)
	b, _ = compile(b, fib.Op{Kind: fib.AddRoute, ID: 8, Key: fib.Main(pfx("2001:db8::/32"))}, 3, 0)
	b, _ = compile(b, fib.Op{Kind: fib.SetGroup, ID: 9, Members: []uint32{7}, Buckets: 128}, 4, 0)
	ms, err := messages(b)
	if err != nil || len(ms) != 4 {
		t.Fatal(ms, err)
	}
	var s fib.State
	if err := errors.Join(decodeNextHop(ms[0], &s), decodeNextHop(ms[1], &s), decodeNextHop(ms[3], &s)); err != nil {
		t.Fatal(err)
	}
	if s.NextHops[0] != object || !slices.Equal(s.Groups[0].Members, []uint32{7, 9}) || s.Groups[0].Buckets != 0 || s.Groups[1].Buckets != 128 {
		t.Errorf("state %+v", s)
	}
	if r, ok, err := decodeRoute(ms[2]); !ok || err != nil || r != (fib.Installed{Key: fib.Main(pfx("2001:db8::/32")), NextHop: 8}) {
		t.Error(r, ok, err)
	}
}

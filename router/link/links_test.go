package link

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/link/linktest"
	"github.com/isthmus-net/isthmus/test/root"
)

// Ring: namespace. The interface kinds that need a fuller kernel are tested by their users, in the
// VM ring; here a TUN device stands for them.

func TestMain(m *testing.M) { linktest.Main(m) }

func open(t *testing.T) *Links {
	t.Helper()
	root.Need(t, "network namespaces")
	l, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestEnsure(t *testing.T) {
	l := open(t)
	linktest.Run(t, "ip", "tuntap", "add", "ist-e", "mode", "tun")
	w := Wanted{
		Name: "ist-e", Kind: TUN, Alias: "isthmus:e", MTU: 1390,
		Addresses: []Address{
			{Local: pfx("169.254.10.2/30"), Peer: netip.MustParseAddr("169.254.10.1")},
			{Local: pfx("169.254.21.5/32"), Peer: netip.MustParseAddr("10.0.0.4")},
			{Local: pfx("fd00::2/126")},
			{Local: pfx("fd01::2/128"), Peer: netip.MustParseAddr("fd01::9")},
		},
		Sysctls: map[string]string{"ipv4/conf/%s/rp_filter": "2", "ipv4/conf/%s/no_such_thing": "1"},
	}
	if err := l.Ensure(w); err != nil {
		t.Fatal(err)
	}
	first := l.Writes()
	if want := uint64(1 + 2 + 1 + 4 + 1); first != want { // alias, sysctls, MTU, addresses, up
		t.Errorf("%d writes, want %d", first, want)
	}
	if err := l.Ensure(w); err != nil {
		t.Fatal(err)
	}
	if l.Writes() != first {
		t.Errorf("%d writes although nothing differed", l.Writes()-first)
	}
	out := linktest.Run(t, "ip", "addr", "show", "ist-e")
	if link, err := l.Get("ist-e"); err != nil || link.Alias != w.Alias || link.Kind != TUN || !link.Up {
		t.Errorf("read back %+v, %v", link, err)
	}
	for _, s := range []string{
		"mtu 1390", "inet 169.254.10.2/30 scope", "inet 169.254.21.5 peer 10.0.0.4/32",
		"inet6 fd00::2/126", "inet6 fd01::2 peer fd01::9/128", "UP",
	} {
		if !strings.Contains(out, s) {
			t.Errorf("no %q in\n%s", s, out)
		}
	}
	if v := linktest.Run(t, "cat", "/proc/sys/net/ipv4/conf/ist-e/rp_filter"); strings.TrimSpace(v) != "2" {
		t.Errorf("rp_filter is %s", v)
	}

	w.Addresses = []Address{{Local: pfx("169.254.10.3/30")}, w.Addresses[3]}
	if err := l.Ensure(w); err != nil {
		t.Fatal(err)
	}
	if got := l.Writes() - first; got != 1+3 {
		t.Errorf("%d writes to replace three addresses by one", got)
	}
	out = linktest.Run(t, "ip", "addr", "show", "ist-e")
	if strings.Contains(out, "169.254.10.2/") || !strings.Contains(out, "169.254.10.3/30") {
		t.Errorf("addresses not replaced:\n%s", out)
	}

	if err := l.Remove("isthmus:e", Xfrm); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Get("ist-e"); err != nil {
		t.Errorf("removing another kind removed it: %v", err)
	}
	if err := l.Remove("isthmus:e", TUN); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Get("ist-e"); !errors.Is(err, ErrNotFound) {
		t.Errorf("after Remove: %v", err)
	}
	n := l.Writes()
	if err := l.Remove("isthmus:e", TUN); err != nil || l.Writes() != n {
		t.Errorf("removing nothing: %v, %d writes", err, l.Writes()-n)
	}
}

// TestEnsureChangesPrefixLengthAndPeer keeps the address and changes its prefix length or its
// peer.
func TestEnsureChangesPrefixLengthAndPeer(t *testing.T) {
	l := open(t)
	linktest.Run(t, "ip", "tuntap", "add", "ist-a", "mode", "tun")
	w := Wanted{Name: "ist-a", Kind: TUN, Alias: "isthmus:a", MTU: 1400}
	for _, step := range []struct {
		local, peer, shown string
	}{
		{"169.254.10.2/30", "", "inet 169.254.10.2/30"},
		{"169.254.10.2/31", "", "inet 169.254.10.2/31"},
		{"169.254.10.2/32", "10.0.0.4", "inet 169.254.10.2 peer 10.0.0.4/32"},
		{"169.254.10.2/32", "10.0.0.5", "inet 169.254.10.2 peer 10.0.0.5/32"},
		{"fd00::2/126", "", "inet6 fd00::2/126"},
		{"fd00::2/127", "", "inet6 fd00::2/127"},
		{"fd00::2/128", "fd00::9", "inet6 fd00::2 peer fd00::9/128"},
		{"fd00::2/128", "fd00::8", "inet6 fd00::2 peer fd00::8/128"},
		{"fd00::2/64", "", "inet6 fd00::2/64"},
	} {
		a := Address{Local: pfx(step.local)}
		if step.peer != "" {
			a.Peer = netip.MustParseAddr(step.peer)
		}
		w.Addresses = []Address{a}
		if err := l.Ensure(w); err != nil {
			t.Fatal(err)
		}
		out := linktest.Run(t, "ip", "addr", "show", "ist-a", "scope", "global")
		if !strings.Contains(out, step.shown) || strings.Count(out, "inet") != 1 {
			t.Errorf("%s is not the only address in\n%s", step.shown, out)
		}
	}
	if err := l.Remove("isthmus:a", TUN); err != nil {
		t.Fatal(err)
	}
}

// TestStats compares the two ways to read counters, after traffic that only one interface has.
func TestStats(t *testing.T) {
	l := open(t)
	linktest.Run(t, "ip", "link", "set", "lo", "up")
	linktest.Run(t, "ping", "-c", "3", "-i", "0.2", "127.0.0.1")
	stats, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	lo, err := l.Get("lo")
	if err != nil {
		t.Fatal(err)
	}
	if s := stats[lo.Index]; s.RxPackets < 6 || s != (Stats{lo.RxPackets, lo.TxPackets, lo.RxBytes, lo.TxBytes}) {
		t.Errorf("%+v, want %+v", s, lo)
	}
	all, err := l.List("")
	if err != nil || len(all) != len(stats) {
		t.Errorf("%d interfaces, %d with counters, %v", len(all), len(stats), err)
	}
}

func TestEnsureRefusesForeign(t *testing.T) {
	l := open(t)
	linktest.Run(t, "ip", "tuntap", "add", "ist-f", "mode", "tun")
	defer linktest.Run(t, "ip", "link", "del", "ist-f")
	linktest.Run(t, "ip", "link", "set", "ist-f", "alias", "someone else's", "up")
	err := l.Ensure(Wanted{Name: "ist-f", Kind: TUN, Alias: "isthmus:f", MTU: 1400})
	if !errors.Is(err, ErrNotOurs) {
		t.Errorf("taking a foreign interface: %v", err)
	}
	linktest.Run(t, "ip", "link", "set", "ist-f", "alias", "")
	err = l.Ensure(Wanted{Name: "ist-f", Kind: TUN, Alias: "isthmus:f", MTU: 1400})
	if !errors.Is(err, ErrNotOurs) { // it is up, so it is in use
		t.Errorf("taking an unmarked interface that is up: %v", err)
	}
	if err := l.Remove("isthmus:f", TUN); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Get("ist-f"); err != nil || l.Writes() != 0 {
		t.Errorf("foreign interface touched: %v, %d writes", err, l.Writes())
	}
}

func TestKindThatTheKernelLacks(t *testing.T) {
	l := open(t)
	for _, kind := range []string{Xfrm, WireGuard} {
		err := l.Ensure(Wanted{Name: "ist-k", Kind: kind, Alias: "isthmus:k", IfID: 7})
		if err == nil {
			_ = l.Remove("isthmus:k", kind)
			continue
		}
		if !errors.Is(err, ErrNoKind) {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

func TestPool(t *testing.T) {
	l := open(t)
	linktest.Run(t, "ip", "link", "add", "ist-p", "type", "veth", "peer", "ist-q")
	defer linktest.Run(t, "ip", "link", "del", "ist-p")
	linktest.Run(t, "ip", "addr", "add", "192.0.2.1/24", "dev", "ist-p")
	a, b, own := netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("192.0.2.1")
	for _, step := range []struct {
		want   []netip.Addr
		writes uint64
	}{
		{[]netip.Addr{a, b, own}, 2},
		{[]netip.Addr{a, b, own}, 0},
		{[]netip.Addr{b}, 1},
		{nil, 1},
		{nil, 0},
	} {
		before := l.Writes()
		if err := setPool(l, "ist-p", step.want); err != nil {
			t.Fatal(err)
		}
		if got := l.Writes() - before; got != step.writes {
			t.Errorf("%v: %d writes, want %d", step.want, got, step.writes)
		}
		out := linktest.Run(t, "ip", "addr", "show", "ist-p")
		for _, x := range []netip.Addr{a, b, own} {
			want := slices.Contains(step.want, x) || x == own
			if strings.Contains(out, x.String()+"/") != want {
				t.Errorf("%v: %s present is not %v:\n%s", step.want, x, want, out)
			}
		}
	}
}

// TestPoolIsNotTheNodes checks that the node's own IPv6 traffic keeps its source when a pool gets
// addresses, also when an earlier daemon has added them as preferred ones.
func TestPoolIsNotTheNodes(t *testing.T) {
	l := open(t)
	linktest.Run(t, "ip", "link", "add", "ist-6", "type", "veth", "peer", "name", "ist-7")
	linktest.Run(t, "ip", "link", "set", "ist-7", "up")
	linktest.Run(t, "ip", "link", "set", "ist-6", "up")
	// The longest common prefix (RFC 6724 section 5, rule 8) would choose a pool address, and so
	// would the latest.
	linktest.Run(t, "ip", "-6", "addr", "add", "2001:db8:9::100/64", "dev", "ist-6", "nodad")
	linktest.Run(t, "ip", "-6", "route", "add", "2001:db8:51::/48", "via", "2001:db8:9::1")
	route := func() string { return linktest.Run(t, "ip", "-6", "route", "get", "2001:db8:51::7") }
	before := route()
	if !strings.Contains(before, "src 2001:db8:9::100 ") {
		t.Fatalf("before: %s", before)
	}
	pool := []netip.Addr{netip.MustParseAddr("2001:db8:9::10"), netip.MustParseAddr("2001:db8:9::11")}
	link, err := l.Get("ist-6")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.changeAddress(unix.RTM_NEWADDR, link.Index, Address{Local: pfx("2001:db8:9::11/128")}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := setPool(l, "ist-6", pool); err != nil {
			t.Fatal(err)
		}
		if after := route(); after != before {
			t.Errorf("%s was %s", after, before)
		}
	}
	if n := l.Writes(); n != 3 {
		t.Errorf("%d writes, want the first, one to add and one to deprecate", n)
	}
	out := linktest.Run(t, "ip", "-6", "addr", "show", "ist-6")
	if strings.Count(out, "valid_lft forever preferred_lft 0sec") != 2 || strings.Contains(out, "scope global tentative") {
		t.Errorf("%s", out)
	}
}

func setPool(l *Links, iface string, wanted []netip.Addr) error {
	all := map[string][]netip.Addr{iface: wanted}
	if err := l.AddPool(all); err != nil {
		return err
	}
	return l.PrunePool(all)
}

func TestPoolOfNoInterface(t *testing.T) {
	l := open(t)
	if err := setPool(l, "ist-none", nil); err != nil {
		t.Errorf("nothing wanted: %v", err)
	}
	if err := setPool(l, "ist-none", []netip.Addr{netip.MustParseAddr("198.51.100.7")}); !errors.Is(err, ErrNotFound) {
		t.Errorf("an address wanted: %v", err)
	}
}

// TestPoolOverAllLinks checks that a pool address goes from an interface that is no longer the
// underlay, whichever process added it, and that inside addresses of tunnels stay.
func TestPoolOverAllLinks(t *testing.T) {
	l := open(t)
	for _, name := range []string{"ist-o", "ist-p", "ist-t"} {
		linktest.Run(t, "ip", "link", "add", name, "type", "veth", "peer", name+"x")
		defer linktest.Run(t, "ip", "link", "del", name)
	}
	linktest.Run(t, "ip", "link", "set", "ist-t", "alias", "isthmus:t")
	a, b, inside := netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("198.51.100.8"), netip.MustParseAddr("169.254.9.1")
	for iface, addr := range map[string]netip.Addr{"ist-o": a, "ist-t": inside} {
		one, err := l.Get(iface)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.changeAddress(unix.RTM_NEWADDR, one.Index, Address{Local: netip.PrefixFrom(addr, 32)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := setPool(l, "ist-p", []netip.Addr{a, b}); err != nil {
		t.Fatal(err)
	}
	for iface, want := range map[string][]string{"ist-o": nil, "ist-p": {"198.51.100.7/32", "198.51.100.8/32"}, "ist-t": {"169.254.9.1/32"}} {
		out := linktest.Run(t, "ip", "-o", "-4", "addr", "show", iface)
		if strings.Count(out, "inet ") != len(want) || slices.ContainsFunc(want, func(w string) bool { return !strings.Contains(out, w) }) {
			t.Errorf("%s: %q, want %v", iface, out, want)
		}
	}
	before := l.Writes()
	if err := setPool(l, "ist-p", []netip.Addr{a, b}); err != nil || l.Writes() != before {
		t.Errorf("%v, %d writes although nothing differed", err, l.Writes()-before)
	}
}

func TestWatch(t *testing.T) {
	l := open(t)
	ctx, cancel := context.WithCancel(t.Context())
	changes := make(chan Change, 100)
	done := make(chan error)
	go func() { done <- l.Watch(ctx, func(c Change) { changes <- c }) }()
	if c := next(t, changes); c != (Change{}) {
		t.Fatalf("first change %+v", c)
	}
	linktest.Run(t, "ip", "tuntap", "add", "ist-w", "mode", "tun")
	linktest.Run(t, "ip", "link", "set", "ist-w", "alias", "isthmus:w")
	linktest.Run(t, "ip", "addr", "add", "192.0.2.9/32", "dev", "ist-w")
	for len(changes) > 0 {
		<-changes
	}
	linktest.Run(t, "ip", "link", "del", "ist-w")
	for {
		c := next(t, changes)
		if c.Deleted {
			if c.Name != "ist-w" || c.Alias != "isthmus:w" {
				t.Errorf("change %+v", c)
			}
			break
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func next(t *testing.T, c chan Change) Change {
	t.Helper()
	select {
	case x := <-c:
		return x
	case <-time.After(time.Minute):
		t.Fatal("no change reported")
		panic("unreachable")
	}
}

func FuzzParseAddress(f *testing.F) {
	f.Add([]byte{2, 30, 0, 0, 5, 0, 0, 0, 8, 0, 2, 0, 192, 0, 2, 1})
	f.Fuzz(func(t *testing.T, m []byte) {
		if a, _, err := parseAddress(m); err == nil && !a.Local.IsValid() {
			t.Error("no error and no address")
		}
	})
}

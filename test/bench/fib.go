package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
)

// sides are the two links of the router under test, and its feeder on each.
var sides = []struct {
	name           string
	router, feeder netip.Addr
}{
	{"a", netip.MustParseAddr("169.254.64.2"), netip.MustParseAddr("169.254.64.1")},
	{"b", netip.MustParseAddr("169.254.64.6"), netip.MustParseAddr("169.254.64.5")},
}

func prefixOf(i int) netip.Prefix { return netip.PrefixFrom(address(i), 24) }

// site is a router under test between two feeders.
type site struct {
	lab     *lab.Lab
	router  *lab.Node
	feeders []*lab.Node
	oif     []uint32 // of the links, in the router
	watch   *watch
	lookup  *lookup
	// load and unload send the table to the router, for a contender without BGP.
	load, unload func()
}

func (b *bench) site(ctx context.Context, size int) (s *site, err error) {
	l, err := b.lab()
	if err != nil {
		return nil, err
	}
	s = &site{lab: l, router: l.Node("router")}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	s.router.Bridge("up0", netip.MustParsePrefix("10.99.0.10/24"))
	for _, side := range sides {
		f := l.Node("feeder-" + side.name)
		s.feeders = append(s.feeders, f)
		l.Link(lab.End{Node: s.router, Name: "t-" + side.name, Addrs: []netip.Prefix{netip.PrefixFrom(side.router, 30)}},
			lab.End{Node: f, Name: "r0", Addrs: []netip.Prefix{netip.PrefixFrom(side.feeder, 30)}})
	}
	if err := l.Up(ctx); err != nil {
		return nil, err
	}
	// isthmus sets this itself, so it is set for all contenders.
	if err := s.router.Sysctl("ipv4/nexthop_compat_mode", "0"); err != nil {
		return nil, err
	}
	err = s.router.Do(func() error {
		for _, side := range sides {
			i, err := net.InterfaceByName("t-" + side.name)
			if err != nil {
				return err
			}
			s.oif = append(s.oif, uint32(i.Index))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if s.watch, err = newWatch(s.router, size); err != nil {
		return nil, err
	}
	s.lookup, err = newLookup(s.router)
	return s, err
}

func (s *site) close() {
	if s.watch != nil {
		s.watch.close()
	}
	if s.lookup != nil {
		s.lookup.close()
	}
	if err := s.lab.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

func speakerConfig(sessions int) peer.BGPConfig {
	c := peer.BGPConfig{ASN: routerASN, RouterID: sides[0].router, Multipath: true}
	for _, side := range sides[:sessions] {
		c.Neighbors = append(c.Neighbors, peer.Neighbor{Name: side.name, Local: side.router, Remote: side.feeder, ASN: feederASN, Passive: true})
	}
	return c
}

func document(sessions int) string {
	var tunnels, peers strings.Builder
	for i, side := range sides[:sessions] {
		fmt.Fprintf(&tunnels, "- {name: %s, wireguard: {privateKey: key, peerPublicKey: %s, endpoint: '192.0.2.%d:51820', listenPort: %d}, inside: [{local: %s/30}]}\n",
			side.name, publicKey, i+1, 51820+i, side.router)
		fmt.Fprintf(&peers, "- {name: %s, tunnel: %s, asn: %d, holdTime: 90s, passive: true, maxPrefixes: 1000000, import: {allow: [{prefix: 0.0.0.0/0, ge: 8, le: 32}]}}\n", side.name, side.name, feederASN)
	}
	return fmt.Sprintf("node: {name: bench, asn: %d}\nunderlay: {interface: up0, address: 10.99.0.10, publicAddress: 198.51.100.20}\ntunnels:\n%speers:\n%s", routerASN, &tunnels, &peers)
}

const publicKey = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="

// start starts a contender with its sessions waiting.
func (b *bench) start(ctx context.Context, s *site, name string, sessions, size int) (err error) {
	switch name {
	case "BIRD":
		_, err = peer.StartBIRD(ctx, s.router, speakerConfig(sessions))
	case "FRR":
		_, err = peer.StartFRR(ctx, s.router, speakerConfig(sessions))
	case "isthmus":
		var c *client
		if _, c, err = b.startRouter(ctx, s.router); err != nil {
			return err
		}
		defer c.Close()
		key, err := peer.NewWGKey()
		if err != nil {
			return err
		}
		if _, err := c.secrets.SetSecret(ctx, &isthmusv1.SetSecretRequest{Name: "key", Value: []byte(key.Private)}); err != nil {
			return err
		}
		if _, _, err := c.apply(ctx, document(sessions)); err != nil {
			return err
		}
	case "netlink":
		p, err := s.router.Start("netlink", b.self, "contender-netlink", "-routes", fmt.Sprint(size))
		if err != nil {
			return err
		}
		s.load, s.unload = func() { p.Signal(syscall.SIGUSR1) }, func() { p.Signal(syscall.SIGUSR2) }
		return lab.Until(ctx, 10*time.Second, func() error {
			text, err := os.ReadFile(p.Log)
			if err == nil && !strings.Contains(string(text), "ready") {
				err = fmt.Errorf("the writer is not ready: %s", text)
			}
			return err
		})
	}
	return err
}

// fib measures the time of a table from the first UPDATE to the last route in the kernel, and back.
func (b *bench) fib(ctx context.Context) error {
	for _, size := range []int{b.size(10_000), b.size(100_000)} {
		t := newTable("BGP to kernel FIB: %d prefixes from one peer over veth", size)
		for range b.rounds {
			for _, name := range []string{"isthmus", "BIRD", "FRR", "netlink"} {
				if err := b.fibOnce(ctx, t, name, size); err != nil {
					return fmt.Errorf("%s, %d prefixes: %w", name, size, err)
				}
			}
		}
		t.print(os.Stdout, "BIRD", "FRR", "netlink")
	}
	return nil
}

func (b *bench) fibOnce(ctx context.Context, t *table, name string, size int) error {
	s, err := b.site(ctx, size)
	if err != nil {
		return err
	}
	defer s.close()
	if err := b.start(ctx, s, name, 1, size); err != nil {
		return err
	}
	if s.load == nil {
		r, err := dial(ctx, s.feeders[0], sides[0].router, sides[0].feeder)
		if err != nil {
			return err
		}
		defer r.Close()
		s.load = func() { r.Write(updates(size, sides[0].feeder)) }
		s.unload = func() { r.Write(withdrawals(size)) }
	}
	time.Sleep(500 * time.Millisecond) // for the work that the start of the session causes
	pids, err := processes(s.router)
	if err != nil {
		return err
	}
	base := baseLoad(pids)
	before, start := cpuTime(pids...), time.Now()
	go s.load()
	full, err := s.watch.until(size, 2*time.Minute)
	if err != nil {
		return err
	}
	loading := base.beyond(cpuTime(pids...)-before, time.Since(start))
	used, err := s.lookup.count(size)
	if err != nil {
		return err
	}
	if used[s.oif[0]] != size {
		return fmt.Errorf("a dump shows %d of %d routes", used[s.oif[0]], size)
	}
	t.add(name, "load s", full.Sub(start).Seconds())
	t.add(name, "load CPU s", loading)
	t.add(name, "peak MiB", status("VmHWM", pids...))
	before, start = cpuTime(pids...), time.Now()
	go s.unload()
	empty, err := s.watch.until(0, 2*time.Minute)
	if err != nil {
		return err
	}
	t.add(name, "withdraw s", empty.Sub(start).Seconds())
	t.add(name, "withdraw CPU s", base.beyond(cpuTime(pids...)-before, time.Since(start)))
	return nil
}

// failover measures how long packets are still sent to a dead next hop: two peers announce the same
// table, and the session with one of them is closed.
func (b *bench) failover(ctx context.Context) error {
	for _, size := range []int{b.size(10_000), b.size(100_000)} {
		t := newTable("Failover: %d prefixes with two next hops, one session ends; until no look-up leads to the dead one", size)
		for range b.rounds {
			for _, name := range []string{"isthmus", "BIRD", "FRR"} {
				if err := b.failoverOnce(ctx, t, name, size); err != nil {
					return fmt.Errorf("%s, %d prefixes: %w", name, size, err)
				}
			}
		}
		t.print(os.Stdout, "BIRD", "FRR")
	}
	return nil
}

func (b *bench) failoverOnce(ctx context.Context, t *table, name string, size int) error {
	s, err := b.site(ctx, size)
	if err != nil {
		return err
	}
	defer s.close()
	if err := b.start(ctx, s, name, 2, size); err != nil {
		return err
	}
	var sessions []*peer.RawBGP
	for i, side := range sides {
		r, err := dial(ctx, s.feeders[i], side.router, side.feeder)
		if err != nil {
			return err
		}
		defer r.Close()
		sessions = append(sessions, r)
	}
	start := time.Now()
	for i, r := range sessions {
		go r.Write(updates(size, sides[i].feeder))
	}
	if _, err := s.watch.until(size, 2*time.Minute); err != nil {
		return err
	}
	// A group that gains a next hop need not change a route, so only a dump shows when all have
	// both.
	for {
		s.watch.quiet(time.Second)
		used, err := s.lookup.count(size)
		if err != nil {
			return err
		}
		if used[s.oif[0]] == size && used[s.oif[1]] == size {
			break
		}
		if time.Since(start) > 2*time.Minute {
			return fmt.Errorf("of %d routes %d use the first and %d the second next hop", size, used[s.oif[0]], used[s.oif[1]])
		}
	}
	pids, err := processes(s.router)
	if err != nil {
		return err
	}
	dead := s.oif[1]
	var samples []netip.Addr
	for i := range 32 {
		samples = append(samples, address(i*(size-1)/31).Next())
	}
	base := baseLoad(pids)
	before, start := cpuTime(pids...), time.Now()
	sessions[1].Close()
	var first time.Duration // until one sampled prefix was repaired
	for {
		if err := s.repaired(samples, dead, start, &first); err != nil {
			return err
		}
		last := time.Since(start)
		// The samples may have missed the last one.
		used, err := s.lookup.count(size)
		if err != nil {
			return err
		}
		if used[s.oif[0]] != size {
			return fmt.Errorf("%d of %d routes are left", used[s.oif[0]], size)
		}
		if used[dead] == 0 {
			t.add(name, "first ms", first.Seconds()*1000)
			t.add(name, "all ms", last.Seconds()*1000)
			break
		}
	}
	base.regained(pids)
	t.add(name, "CPU s until idle", base.beyond(cpuTime(pids...)-before, time.Since(start)))
	t.add(name, "peak MiB", status("VmHWM", pids...))
	return nil
}

// load is the part of a core that processes take with nothing to do.
type load float64

const look = 500 * time.Millisecond

func baseLoad(pids []int) load {
	before, start := cpuTime(pids...), time.Now()
	time.Sleep(look)
	return load((cpuTime(pids...) - before).Seconds() / time.Since(start).Seconds())
}

// beyond is the CPU seconds that were used beyond the load.
func (l load) beyond(cpu, wall time.Duration) float64 {
	return max(0, cpu.Seconds()-float64(l)*wall.Seconds())
}

// regained waits until processes have no more to do than before.
func (l load) regained(pids []int) {
	for baseLoad(pids) > l+0.03 {
	}
}

// repaired waits until no sampled address is sent to the dead interface.
func (s *site) repaired(samples []netip.Addr, dead uint32, start time.Time, first *time.Duration) error {
	for clean := 0; clean < len(samples); {
		for _, a := range samples {
			bad, err := s.lookup.uses(a, dead)
			switch {
			case err != nil:
				return fmt.Errorf("looking up %v: %w", a, err)
			case time.Since(start) > 2*time.Minute:
				return fmt.Errorf("%v is still sent to the dead next hop", a)
			case bad:
				clean = 0
				time.Sleep(100 * time.Microsecond)
				continue
			}
			if *first == 0 {
				*first = time.Since(start)
			}
			clean++
		}
	}
	return nil
}

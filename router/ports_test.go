package router

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/nat/nftables"
	"github.com/isthmus-net/isthmus/nat/placement"
	"github.com/isthmus-net/isthmus/test/netns"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// Ring: namespace.

// crowd is many clients behind a router, and a server on its underlay that answers to UDP.
type crowd struct {
	t                      testing.TB
	client, router, server *netns.NS
	driver                 *nftables.Driver
	netns                  int // of the router
	config                 nat.Config
	flows                  *conntrack.Conn
	placer                 *placer
	wg                     sync.WaitGroup
}

func newCrowd(t testing.TB, addresses int) *crowd {
	c := &crowd{t: t, client: netns.New(t), router: netns.New(t), server: netns.New(t)}
	netns.Veth(c.router, "tun0", c.client, "r0")
	netns.Veth(c.router, "up0", c.server, "r0")
	c.client.Run("ip addr add 172.31.0.2/30 dev r0\nip route add default via 172.31.0.1\nip route add local 10.0.0.0/16 dev lo")
	c.router.Run(`sysctl -qw net.ipv4.ip_forward=1 net.netfilter.nf_conntrack_udp_timeout=600 net.ipv4.icmp_ratelimit=0 net.ipv4.icmp_msgs_per_sec=100000 net.ipv4.icmp_msgs_burst=10000
		ip addr add 172.31.0.1/30 dev tun0
		ip addr add 192.0.2.1/24 dev up0
		ip route add 10.0.0.0/16 via 172.31.0.2
		ip route add 198.51.100.0/24 via 192.0.2.254`)
	c.server.Run(`ip addr add 192.0.2.254/24 dev r0
		ip addr add 198.51.100.1/24 dev lo`)
	config := nat.Config{Underlay: "up0", Attachments: []nat.Attachment{{Interface: "tun0", Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("172.31.0.0/30")}}}, Own: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Pools: []nat.Pool{{Name: "p"}},
		Policies: []nat.Policy{{Name: "all", Action: nat.SNAT, Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}, Pool: "p"}}}
	for i := range addresses {
		a := netip.AddrFrom4([4]byte{192, 0, 2, byte(11 + i)})
		c.router.Run("ip addr add " + a.String() + "/24 dev up0")
		config.Pools[0].Addresses = append(config.Pools[0].Addresses, nat.PoolAddress{Address: a, Public: a})
	}
	f, err := os.Open(c.router.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	c.netns = int(f.Fd())
	c.driver = nftables.New(nftables.Options{NetNS: c.netns})
	if err := c.driver.Apply(context.Background(), config); err != nil {
		t.Fatal(err)
	}
	c.router.Do(func() { c.flows, err = conntrack.Open() })
	if err != nil {
		t.Fatal(err)
	}
	c.placer = newPlacer(c.driver, c.flows, slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	c.config = config
	c.placer.use(config)
	var echo *net.UDPConn
	c.server.Do(func() {
		echo, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 53})
	})
	if err != nil {
		t.Fatal(err)
	}
	c.wg.Go(func() {
		if err := traffic.Echo(echo, nil); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		echo.Close()
		c.wg.Wait()
		c.flows.Close()
	})
	return c
}

// place places flows until it is stopped, at the end of the test at the latest.
func (c *crowd) place() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.placer.run(ctx)
	}()
	stop = func() { cancel(); <-ended }
	c.t.Cleanup(stop)
	return stop
}

// ends sends requests from so many sources in turn, each from the next port.
func ends(sources, firstPort int) traffic.Ends {
	return func(i int) (from, to netip.AddrPort) {
		s := i % sources
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(s >> 8), byte(s)}), uint16(firstPort+i/sources)), netip.MustParseAddrPort("198.51.100.1:53")
	}
}

// TestPoolSpills makes 240,000 flows to one server through four addresses, which have room for 258,048. Where everybody waits for a processor, the
// placer is late: what happens once must happen again to count.
func TestPoolSpills(t *testing.T) {
	const n = 240_000
	for _, sources := range []int{4, 16, 64} {
		t.Run(fmt.Sprint(sources, " sources"), func(t *testing.T) {
			silent := spill(t, n, sources)
			if silent > n/1000 {
				t.Logf("again, since %d of %d requests were not answered", silent, n)
				silent = spill(t, n, sources)
			}
			if silent > n/1000 {
				t.Errorf("%d of %d requests were not answered", silent, n)
			}
		})
		if t.Failed() {
			break
		}
	}
}

// spill returns how many of n flows do not come about.
func spill(t *testing.T, n, sources int) (silent int) {
	c := newCrowd(t, 4)
	stop := c.place()
	var o traffic.Outcome
	var err error
	c.client.Do(func() { o, err = traffic.Ask(n, ends(sources, 1024)) })
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(freshness)
	c.placer.recount(context.Background())
	s := c.placer.status()
	stop()
	t.Log(o)
	for _, total := range s.Totals {
		t.Logf("%v: %d flows", total.Address, total.Flows)
	}
	t.Logf("%d placements, %d failed insertions, %d entries", s.Placements, s.stats.InsertFailed, s.Entries)
	return n - o.Answered
}

// TestLowPorts has 700 hosts ask one server from one port below 1024, all through one address: each gets a port from 1024 on, as is counted.
func TestLowPorts(t *testing.T) {
	for _, port := range []uint16{123, 1023} {
		t.Run(fmt.Sprint("port ", port), func(t *testing.T) {
			c := newCrowd(t, 1)
			const n = 700
			var o traffic.Outcome
			var err error
			c.client.Do(func() {
				o, err = traffic.Ask(n, func(i int) (from, to netip.AddrPort) {
					return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), port), netip.MustParseAddrPort("198.51.100.1:53")
				})
			})
			if err != nil || o.Answered != n {
				t.Errorf("%v, %v", o, err)
			}
			low := 0
			if err := c.flows.Dump(t.Context(), unix.AF_INET, func(f *conntrack.Flow) bool {
				if f.Protocol == unix.IPPROTO_UDP && f.Reply.Destination.Port() < 1024 {
					low++
				}
				return true
			}); err != nil || low > 0 {
				t.Errorf("%d flows leave from a port below 1024, %v", low, err)
			}
		})
	}
}

// TestLiveFlows changes everything that is decided about new flows under 5,000 that are under way, of which none may notice.
func TestLiveFlows(t *testing.T) {
	c := newCrowd(t, 4)
	const n, sources = 5000, 50
	var flows *traffic.Held
	var err error
	c.client.Do(func() { flows, err = traffic.Hold(n, ends(sources, 20_000)) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(flows.Close)
	unbroken := func(when string) {
		t.Helper()
		if silent := flows.Broken(); silent > 0 {
			t.Errorf("%s: %d of %d flows are broken", when, silent, n)
		}
	}
	unbroken("at first")

	apply := func(change func(*nat.Config)) func() error {
		return func() error {
			changed := c.config
			changed.Pools = []nat.Pool{{Name: "p", Addresses: slices.Clone(c.config.Pools[0].Addresses)}}
			change(&changed)
			return c.driver.Apply(context.Background(), changed)
		}
	}
	pool := c.config.Pools[0].Addresses
	place := func() error {
		var all []nat.Placement
		for i := range sources {
			all = append(all, nat.Placement{Pool: "p", Source: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), Destination: netip.MustParseAddr("198.51.100.1"), Address: pool[i%4].Address})
		}
		return c.driver.Place(context.Background(), all)
	}
	for _, k := range []struct {
		name   string
		change func() error
	}{
		{"every source is placed", place},
		{"other weights", apply(func(c *nat.Config) { c.Pools[0].Addresses[0].Weight = 10 })},
		{"three addresses are down", apply(func(c *nat.Config) {
			for i := range 3 {
				c.Pools[0].Addresses[i].Down = true
			}
		})},
		{"zones, with other rules", apply(func(c *nat.Config) {
			c.Zones = []nat.Zone{{Name: "a", Prefixes: c.Policies[0].Sources}}
			c.Pools[0].Addresses[3].Zone = "a"
		})},
		{"another address", apply(func(c *nat.Config) {
			c.Pools[0].Addresses = append(c.Pools[0].Addresses, nat.PoolAddress{Address: netip.MustParseAddr("192.0.2.99")})
		})},
		{"everything is refused", func() error {
			return c.driver.Refuse(context.Background(), nat.Overload{TableFull: true, Exhausted: []nat.Exhausted{{
				Pool: "p", Service: nat.Service{Destination: netip.MustParseAddr("198.51.100.1"), Protocol: unix.IPPROTO_UDP, Port: 53}}}})
		}},
		{"a new start", func() error {
			c.driver = nftables.New(nftables.Options{NetNS: c.netns})
			return c.driver.Apply(context.Background(), c.config)
		}},
	} {
		if err := k.change(); err != nil {
			t.Fatalf("%s: %v", k.name, err)
		}
		unbroken(k.name)
	}
}

// BenchmarkNewFlows measures what new flows cost the thread that sends them, which carries them through the router: with one
// rule, with the maps of a pool of four addresses, and while flows are counted and placed as well. They take turns within
// a round.
func BenchmarkNewFlows(b *testing.B) {
	c := newCrowd(b, 4)
	c.router.Run("nft add table inet plain")
	turns := []struct {
		name  string
		begin func() (end func())
	}{
		{"rule", func() func() {
			c.router.Run(`nft delete table inet isthmus
				nft add chain inet plain post { type nat hook postrouting priority srcnat ; }
				nft add rule inet plain post oifname up0 snat ip to 192.0.2.11`)
			return func() { c.router.Run("nft delete chain inet plain post") }
		}},
		{"maps", func() func() { return func() {} }},
		{"placing", c.place},
	}
	const n = 4000
	port := 1024
	cost := map[string][]float64{}
	for b.Loop() {
		for _, turn := range turns {
			if turn.name != "rule" {
				if err := c.driver.Apply(context.Background(), c.config); err != nil {
					b.Fatal(err)
				}
			}
			end := turn.begin()
			var err error
			c.client.Do(func() {
				var before, after unix.Timespec
				unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before)
				next := ends(64, port)
				for i := range n {
					var fd int
					if fd, err = traffic.Begin(next(i)); err != nil {
						return
					}
					unix.Close(fd)
				}
				unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &after)
				cost[turn.name] = append(cost[turn.name], float64(after.Nano()-before.Nano())/n/1000)
			})
			end()
			if err != nil {
				b.Fatal(err)
			}
			if port += n/64 + 1; port > 60_000 {
				port = 1024
			}
		}
	}
	for _, name := range []string{"maps", "placing"} {
		var ratios []float64
		for i := range cost[name] {
			ratios = append(ratios, cost["rule"][i]/cost[name][i])
		}
		slices.Sort(ratios)
		b.ReportMetric(ratios[len(ratios)/2], name+"/rule")
		b.Logf("%s: flows a CPU second against one rule: %.2f (%.2f-%.2f)", name, ratios[len(ratios)/2], ratios[0], ratios[len(ratios)-1])
	}
	slices.Sort(cost["rule"])
	b.ReportMetric(cost["rule"][len(cost["rule"])/2], "rule-us/flow")
}

// fullNode is a node whose connection table is full. What it is not asked for panics.
type fullNode struct {
	nat.Driver
	Flows
	refused nat.Overload
}

func (*fullNode) Observe(context.Context) (nat.State, error) {
	return nat.State{Present: true, Guarded: true}, nil
}
func (*fullNode) Begun(context.Context) (uint64, uint64, error)    { return 0, 0, nil }
func (*fullNode) Meter(context.Context) (nat.Meter, error)         { return nat.Meter{}, nil }
func (*fullNode) Place(context.Context, []nat.Placement) error     { return nil }
func (n *fullNode) Refuse(_ context.Context, o nat.Overload) error { n.refused = o; return nil }
func (*fullNode) Stats(context.Context) (conntrack.Stats, error) {
	return conntrack.Stats{Entries: 96, Limit: 100}, nil
}
func (*fullNode) Dump(_ context.Context, _ uint8, f func(*conntrack.Flow) bool) error {
	for range 96 {
		f(&conntrack.Flow{Status: conntrack.Assured})
	}
	return nil
}

// TestRefusalEndsWithPools takes the pools away while the table is full: nobody looks at it any more, and nothing is refused because of it.
func TestRefusalEndsWithPools(t *testing.T) {
	n := &fullNode{}
	e := newPlacer(n, n, slog.New(slog.DiscardHandler), nil)
	for _, k := range []struct {
		pools []nat.Pool
		full  bool
	}{{[]nat.Pool{{Name: "p"}}, true}, {nil, false}, {[]nat.Pool{{Name: "p"}}, true}} {
		e.use(nat.Config{Pools: k.pools})
		if _, err := e.step(t.Context(), false); err != nil || n.refused.TableFull != k.full || e.status().TableFull != k.full {
			t.Errorf("%d pools: %+v, told %v, %v", len(k.pools), n.refused, e.status().TableFull, err)
		}
	}
}

// TestRefusedIsToldOnce: what was refused belongs to a service, and is not repeated for each address of the pool.
func TestRefusedIsToldOnce(t *testing.T) {
	service := nat.Service{Destination: netip.MustParseAddr("198.51.100.7"), Protocol: unix.IPPROTO_TCP, Port: 443}
	other := service
	other.Port = 80
	r := &Router{placer: newPlacer(nil, nil, slog.New(slog.DiscardHandler), nil)}
	for _, a := range []string{"192.0.2.11", "192.0.2.12"} {
		for _, s := range []nat.Service{service, other} {
			r.placer.shown.Uses = append(r.placer.shown.Uses, placement.Use{Pool: "p", Address: netip.MustParseAddr(a), Service: s, Used: 1, Refused: uint64(s.Port)})
		}
	}
	refused := uint64(0)
	for _, p := range r.ports() {
		refused += p.Refused
	}
	if refused != 443+80 {
		t.Errorf("%d are refused, want %d", refused, 443+80)
	}
}

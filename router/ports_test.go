package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/nat/nftables"
	"github.com/isthmus-net/isthmus/nat/placement"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/netns"
)

// Ring: namespace.

// crowd is many clients behind a router, and a server on its underlay that answers to UDP.
type crowd struct {
	t                      testing.TB
	client, router, server *netns.NS
	driver                 *nftables.Driver
	netns                  int // of the router
	config                 nat.Config
	placer                 *placer
	wg                     sync.WaitGroup
}

func newCrowd(t testing.TB, addresses int, wrap func(*conntrack.Conn) Flows) *crowd {
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
	config := nat.Config{Underlay: "up0", Own: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Pools: []nat.Pool{{Name: "p"}},
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
	var flows *conntrack.Conn
	c.router.Do(func() { flows, err = conntrack.Open() })
	if err != nil {
		t.Fatal(err)
	}
	c.placer = newPlacer(c.driver, wrap(flows), slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	c.config = config
	c.placer.use(config)
	var echo *net.UDPConn
	c.server.Do(func() {
		echo, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 53})
	})
	if err == nil {
		var raw syscall.RawConn
		if raw, err = echo.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) })
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	c.wg.Go(func() {
		b := make([]byte, 64)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			echo.WriteToUDPAddrPort(b[:n], from)
		}
	})
	t.Cleanup(func() {
		echo.Close()
		c.wg.Wait()
		flows.Close()
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

func asItIs(c *conntrack.Conn) Flows { return c }

// outcome is what became of requests.
type outcome struct {
	first, answered, refused, lost int // first: answered without a repetition
	elapsed                        time.Duration
}

// request waits for its answer.
type request struct {
	fd    int
	tries int
	due   time.Time
}

// ask sends n requests from so many sources in turn, each from the next port, and repeats one that is not answered after a second, four times.
func (c *crowd) ask(n, sources int, firstPort uint16) (o outcome) {
	c.t.Helper()
	start := time.Now()
	var failed error
	var waiting []request
	c.client.Do(func() {
		for i := 0; failed == nil && (i < n || len(waiting) > 0); i++ {
			if i < n {
				s := i % sources
				var r request
				r, failed = begin([4]byte{10, 0, byte(s >> 8), byte(s)}, int(firstPort)+i/sources)
				waiting = append(waiting, r)
			}
			if i%64 == 0 || i >= n {
				waiting = o.collect(waiting)
			}
			if i >= n || len(waiting) > 15_000 {
				time.Sleep(time.Millisecond)
			}
		}
		for _, r := range waiting {
			unix.Close(r.fd)
		}
	})
	if failed != nil {
		c.t.Fatal(failed)
	}
	o.elapsed = time.Since(start)
	return o
}

// patience is how long a request waits for an answer before it is repeated.
const patience = time.Second

func begin(from [4]byte, port int) (request, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return request{}, err
	}
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrInet4{Addr: from, Port: port}),
		unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{198, 51, 100, 1}, Port: 53}),
	)
	if err == nil {
		_, err = unix.Write(fd, []byte("request"))
	}
	return request{fd, 1, time.Now().Add(patience)}, err
}

// collect counts the requests that are decided, repeats those that are due, and returns those that wait on.
func (o *outcome) collect(waiting []request) (on []request) {
	b := make([]byte, 64)
	now := time.Now()
	for _, r := range waiting {
		_, err := unix.Read(r.fd, b)
		switch {
		case err == nil && r.tries == 1:
			o.first++
			fallthrough
		case err == nil:
			o.answered++
		case err != unix.EAGAIN:
			o.refused++
		case now.Before(r.due):
			on = append(on, r)
			continue
		case r.tries < 5:
			r.tries, r.due = r.tries+1, now.Add(patience)
			unix.Write(r.fd, []byte("request"))
			on = append(on, r)
			continue
		default:
			o.lost++
		}
		unix.Close(r.fd)
	}
	return on
}

// TestPoolSpills makes 240,000 flows to one server through four addresses, which have room for 258,048.
func TestPoolSpills(t *testing.T) {
	for _, sources := range []int{4, 16, 64} {
		t.Run(fmt.Sprint(sources, " sources"), func(t *testing.T) {
			c := newCrowd(t, 4, asItIs)
			c.place()
			const n = 240_000
			o := c.ask(n, sources, 1024)
			time.Sleep(freshness)
			c.placer.recount(context.Background())
			s := c.placer.status()
			t.Logf("%d of %d were answered, %d at once, %d refused, in %v", o.answered, n, o.first, o.refused, o.elapsed.Round(time.Millisecond))
			for _, total := range s.Totals {
				t.Logf("%v: %d flows", total.Address, total.Flows)
			}
			t.Logf("%d placements, %d failed insertions, %d entries", s.Placements, s.stats.InsertFailed, s.Entries)
			if o.answered < n-n/1000 {
				t.Errorf("%d of %d requests were not answered", n-o.answered, n)
			}
		})
		if t.Failed() {
			break
		}
	}
}

// TestExhaustion makes more flows to one server than an address has ports for, 64,512.
func TestExhaustion(t *testing.T) {
	c := newCrowd(t, 1, asItIs)
	c.place()
	const n = 72_000
	o := c.ask(n, 2, 1024)
	time.Sleep(freshness)
	c.placer.recount(context.Background())
	s := c.placer.status()
	t.Logf("of %d requests %d were answered (%d at once), %d refused, %d lost, in %v; %d insertions failed", n, o.answered, o.first, o.refused, o.lost, o.elapsed.Round(time.Millisecond), s.stats.InsertFailed)
	if o.answered < 64_000 || o.answered > placement.Ports || len(s.Uses) != 1 {
		t.Fatalf("%d answered", o.answered)
	}
	if o.refused < (n-o.answered)*9/10 {
		t.Errorf("%d refused, %d lost without a word", o.refused, o.lost)
	}
	if u := s.Uses[0]; int(u.Used) != o.answered || !u.Alarm || !u.Exhausted || u.Refused < uint64(o.refused) || len(s.alarms) != 1 {
		t.Errorf("used %d, low %v, exhausted %v, refused %d, %d alarms", u.Used, u.Alarm, u.Exhausted, u.Refused, len(s.alarms))
	}

	t.Log("the same, as it is shown")
	r := &Router{Options: Options{Log: slog.New(slog.DiscardHandler)}, placer: c.placer}
	ports, totals, conditions := r.ports(), r.portTotals(), r.portConditions()
	if p := ports[0]; p.State != "exhausted" || p.Free != placement.Ports-p.Used || p.Percent < 99 || p.Protocol != "udp" || p.Port != 53 || p.PublicAddress != "192.0.2.11" {
		t.Errorf("%v", p)
	}
	if a := totals.Addresses[0]; len(totals.Addresses) != 1 || int(a.Flows) != o.answered || a.Services != 1 || totals.Table.InsertFailed == 0 || int(totals.Table.Entries) < o.answered || totals.Counted == nil {
		t.Errorf("%v", totals)
	}
	if len(conditions) != 1 || conditions[0].Type != "PortsExhausted" || conditions[0].Since == nil {
		t.Errorf("%v", conditions)
	}
}

// TestLiveFlows changes everything that is decided about new flows under 5,000 that are under way, of which none may notice.
func TestLiveFlows(t *testing.T) {
	c := newCrowd(t, 4, asItIs)
	const n, sources = 5000, 50
	var flows []request
	var failed error
	c.client.Do(func() {
		for i := 0; i < n && failed == nil; i++ {
			var r request
			r, failed = begin([4]byte{10, 0, 0, byte(i % sources)}, 20_000+i/sources)
			flows = append(flows, r)
		}
	})
	if failed != nil {
		t.Fatal(failed)
	}
	t.Cleanup(func() {
		for _, r := range flows {
			unix.Close(r.fd)
		}
	})
	b := make([]byte, 64)
	answered := func(when string) {
		t.Helper()
		silent := 0
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			silent = 0
			for i := range flows {
				r := &flows[i]
				if r.tries == 0 {
					continue
				}
				if _, err := unix.Read(r.fd, b); err == nil {
					r.tries = 0
				} else {
					silent++
				}
			}
			if silent == 0 || time.Now().After(deadline) {
				break
			}
		}
		if silent > 0 {
			t.Errorf("%s: %d of %d flows are broken", when, silent, n)
		}
	}
	answered("at first")

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
		for i := range flows {
			flows[i].tries = 1
			unix.Write(flows[i].fd, []byte("again"))
		}
		answered(k.name)
	}
}

// fullTable is a connection table that says it is full of flows which the kernel does not give up.
type fullTable struct {
	*conntrack.Conn
	full atomic.Bool
}

func (f *fullTable) Stats(ctx context.Context) (conntrack.Stats, error) {
	s, err := f.Conn.Stats(ctx)
	if f.full.Load() {
		s.Limit = s.Entries
	}
	return s, err
}

func (f *fullTable) Dump(ctx context.Context, family uint8, each func(*conntrack.Flow) bool) error {
	return f.Conn.Dump(ctx, family, func(flow *conntrack.Flow) bool {
		flow.Status |= conntrack.Assured
		return each(flow)
	})
}

// TestTableFull has new flows refused while the connection table is full, whose size tests cannot change: all namespaces share it.
func TestTableFull(t *testing.T) {
	table := &fullTable{}
	c := newCrowd(t, 1, func(conn *conntrack.Conn) Flows { table.Conn = conn; return table })
	c.place()
	if o := c.ask(1000, 10, 1024); o.answered != 1000 {
		t.Fatalf("%+v", o)
	}
	r := &Router{placer: c.placer}
	has := func(kind string) bool {
		return slices.ContainsFunc(r.portConditions(), func(c *isthmusv1.Condition) bool { return c.Type == kind })
	}
	table.full.Store(true)
	wait(t, "alarm", func() bool { return has("ConnectionTableFull") })
	if o := c.ask(100, 10, 10_000); o.refused != 100 {
		t.Errorf("with a full table: %+v", o)
	}
	wait(t, "count", func() bool { return r.portTotals().Table.Refused == 100 })
	table.full.Store(false)
	wait(t, "end of the alarm", func() bool { return !has("ConnectionTableFull") })
	if o := c.ask(100, 10, 20_000); o.answered != 100 {
		t.Errorf("afterwards: %+v", o)
	}
}

func wait(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}

// BenchmarkNewFlows measures what new flows cost the thread that sends them, which carries them through the router: with one
// rule, with the maps of a pool of four addresses, and while flows are counted and placed as well. They take turns within
// a round.
func BenchmarkNewFlows(b *testing.B) {
	c := newCrowd(b, 4, asItIs)
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
				for i := range n {
					var r request
					if r, err = begin([4]byte{10, 0, byte(i % 64), 1}, port+i/64); err != nil {
						return
					}
					unix.Close(r.fd)
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

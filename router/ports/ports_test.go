package ports

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/nat/nftables"
	testcrowd "github.com/isthmus-net/isthmus/test/crowd"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// Ring: namespace.

// crowd is many clients behind a router whose ports are kept.
type crowd struct {
	*testcrowd.Crowd
	t      testing.TB
	keeper *Keeper
}

func newCrowd(t testing.TB, addresses int) *crowd {
	c := &crowd{Crowd: testcrowd.New(t, addresses), t: t}
	c.keeper = New(c.Driver, c.Flows, slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	c.keeper.Use(c.Config)
	return c
}

// place places flows until it is stopped, at the end of the test at the latest.
func (c *crowd) place() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.keeper.Run(ctx)
	}()
	stop = func() { cancel(); <-ended }
	c.t.Cleanup(stop)
	return stop
}

// TestPoolSpills makes 240,000 flows to one server through four addresses, which have room for
// 258,048. Where everybody waits for a processor, the placer is late: what happens once must happen
// again to count.
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
	c.Client.Do(func() { o, err = traffic.Ask(n, testcrowd.Ends(sources, 1024)) })
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(freshness)
	c.keeper.Recount(context.Background())
	s := c.keeper.Figures()
	stop()
	t.Log(o)
	for _, total := range s.Totals {
		t.Logf("%v: %d flows", total.Address, total.Flows)
	}
	t.Logf("%d placements, %d failed insertions, %d entries", s.Placements, s.Stats.InsertFailed, s.Entries)
	return n - o.Answered
}

// TestLowPorts has 700 hosts ask one server from one port below 1024, all through one address: each
// gets a port from 1024 on, as is counted.
func TestLowPorts(t *testing.T) {
	for _, port := range []uint16{123, 1023} {
		t.Run(fmt.Sprint("port ", port), func(t *testing.T) {
			c := newCrowd(t, 1)
			const n = 700
			var o traffic.Outcome
			var err error
			c.Client.Do(func() {
				o, err = traffic.Ask(n, func(i int) (from, to netip.AddrPort) {
					return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), port), netip.MustParseAddrPort("198.51.100.1:53")
				})
			})
			if err != nil || o.Answered != n {
				t.Errorf("%v, %v", o, err)
			}
			low := 0
			if err := c.Flows.Dump(t.Context(), unix.AF_INET, func(f *conntrack.Flow) bool {
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

// TestLiveFlows changes everything that is decided about new flows under 5,000 established ones.
// None of these may notice.
func TestLiveFlows(t *testing.T) {
	c := newCrowd(t, 4)
	const n, sources = 5000, 50
	var flows *traffic.Held
	var err error
	c.Client.Do(func() { flows, err = traffic.Hold(n, testcrowd.Ends(sources, 20_000)) })
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
			changed := c.Config
			changed.Pools = []nat.Pool{{Name: "p", Addresses: slices.Clone(c.Config.Pools[0].Addresses)}}
			change(&changed)
			return c.Driver.Apply(context.Background(), changed)
		}
	}
	pool := c.Config.Pools[0].Addresses
	place := func() error {
		var all []nat.Placement
		for i := range sources {
			all = append(all, nat.Placement{Pool: "p", Source: netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), Destination: netip.MustParseAddr("198.51.100.1"), Address: pool[i%4].Address})
		}
		return c.Driver.Place(context.Background(), all)
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
			return c.Driver.Refuse(context.Background(), nat.Overload{TableFull: true, Exhausted: []nat.Exhausted{{
				Pool: "p", Service: nat.Service{Destination: netip.MustParseAddr("198.51.100.1"), Protocol: unix.IPPROTO_UDP, Port: 53}}}})
		}},
		{"a new start", func() error {
			c.Driver = nftables.New(nftables.Options{NetNS: c.NetNS})
			return c.Driver.Apply(context.Background(), c.Config)
		}},
	} {
		if err := k.change(); err != nil {
			t.Fatalf("%s: %v", k.name, err)
		}
		unbroken(k.name)
	}
}

// BenchmarkNewFlows measures what new flows cost the thread that sends them, which carries them
// through the router: with one rule, with the maps of a pool of four addresses, and while flows are
// counted and placed as well. They take turns within a round.
func BenchmarkNewFlows(b *testing.B) {
	c := newCrowd(b, 4)
	c.Router.Run("nft add table inet plain")
	turns := []struct {
		name  string
		begin func() (end func())
	}{
		{"rule", func() func() {
			c.Router.Run(`nft delete table inet isthmus
				nft add chain inet plain post { type nat hook postrouting priority srcnat ; }
				nft add rule inet plain post oifname up0 snat ip to 192.0.2.11`)
			return func() { c.Router.Run("nft delete chain inet plain post") }
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
				if err := c.Driver.Apply(context.Background(), c.Config); err != nil {
					b.Fatal(err)
				}
			}
			end := turn.begin()
			var err error
			c.Client.Do(func() {
				var before, after unix.Timespec
				unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &before)
				next := testcrowd.Ends(64, port)
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

// fullNode is a node whose connection table is full. Other calls panic.
type fullNode struct {
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

// TestRefusalEndsWithPools takes the pools away while the table is full: the table is not
// checked any more, and nothing is refused because of it.
func TestRefusalEndsWithPools(t *testing.T) {
	n := &fullNode{}
	e := New(n, n, slog.New(slog.DiscardHandler), nil)
	for _, k := range []struct {
		pools []nat.Pool
		full  bool
	}{{[]nat.Pool{{Name: "p"}}, true}, {nil, false}, {[]nat.Pool{{Name: "p"}}, true}} {
		e.Use(nat.Config{Pools: k.pools})
		if _, err := e.step(t.Context(), false); err != nil || n.refused.TableFull != k.full || e.Figures().TableFull != k.full {
			t.Errorf("%d pools: %+v, told %v, %v", len(k.pools), n.refused, e.Figures().TableFull, err)
		}
	}
}

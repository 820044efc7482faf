package document

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/test/crowd"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// counting is a machine whose flows are counted.
type counting struct{ flows observe.Flows }

func (counting) Surroundings() fib.Surroundings       { return fib.Surroundings{} }
func (counting) Learned() map[netip.Prefix][]bgp.Path { return nil }
func (counting) MTU(string) int                       { return 0 }
func (counting) Received(string) uint32               { return 3 }
func (counting) Processors() int                      { return 1 }
func (counting) Listening(netip.Addr) []string        { return []string{"tcp/22"} }
func (c counting) Count(ctx context.Context, sets []nat.Ending) ([]int, error) {
	return observe.CountFlows(ctx, c.flows, sets)
}

// TestPlannedEndings takes an address from under live flows: those that the plan counted end, the
// others do not.
func TestPlannedEndings(t *testing.T) {
	c := crowd.New(t, 2)
	const n = 2000
	var flows *traffic.Held
	var err error
	c.Client.Do(func() { flows, err = traffic.Hold(n, crowd.Ends(40, 20_000)) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(flows.Close)
	if silent := flows.Broken(); silent > 0 {
		t.Fatalf("%d of %d flows are broken at first", silent, n)
	}

	target := func(addresses ...nat.PoolAddress) plan.Target {
		config := c.Config
		config.Pools = []nat.Pool{{Name: "p", Addresses: addresses}}
		return plan.Target{NAT: config}
	}
	all := c.Config.Pools[0].Addresses
	m, former := &Manager{Options: Options{Machine: counting{c.Flows}}}, target(all...)
	if changes := m.counted(plan.Diff(former, target(all[1], all[0]))); len(changes) != 1 || changes[0].Interrupts != "" {
		t.Errorf("another order: %+v", changes)
	}
	next := target(all[0])
	changes := m.counted(plan.Diff(former, next))
	var end int
	if _, err := fmt.Sscanf(changes[0].Interrupts, "1,%d flows from 192.0.2.12 end", &end); err == nil {
		end += 1000
	} else if _, err := fmt.Sscanf(changes[0].Interrupts, "%d flows from 192.0.2.12 end", &end); err != nil {
		t.Fatalf("%+v", changes)
	}
	if len(changes) != 1 || end == 0 || end == n {
		t.Fatalf("%d of %d flows: %+v", end, n, changes)
	}
	if err := c.Driver.Apply(context.Background(), next.NAT); err != nil {
		t.Fatal(err)
	}
	c.Router.Run("ip addr del 192.0.2.12/24 dev up0")
	if broken := flows.Broken(); broken != end {
		t.Errorf("%d of %d flows are broken, the plan said that %d end", broken, n, end)
	}
	t.Logf("%d flows, %d ended as planned", n, end)
}

// deafTable is a connection table that cannot be read.
type deafTable struct{}

func (deafTable) Dump(context.Context, uint8, func(*conntrack.Flow) bool) error {
	return errors.New("no such luck")
}

func TestUncountedEndings(t *testing.T) {
	a := netip.MustParseAddr("192.0.2.11")
	former := plan.Target{NAT: nat.Config{Pools: []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: a, Public: a}}}}}}
	for want, flows := range map[string]observe.Flows{
		"flows from 192.0.2.11 end, their number is unknown: no such luck":                     deafTable{},
		"flows from 192.0.2.11 end, their number is unknown: the connection table is not read": nil,
	} {
		m := &Manager{Options: Options{Machine: counting{flows}}}
		if c := m.counted(plan.Diff(former, plan.Target{})); len(c) != 1 || c[0].Interrupts != want {
			t.Errorf("%+v, want %s", c, want)
		}
	}
	for n, want := range map[int]string{0: "0 flows from a end", 1: "1 flow from a ends", 999: "999 flows from a end", 3214: "3,214 flows from a end", 1234567: "1,234,567 flows from a end"} {
		if got := ended(n, "from a"); got != want {
			t.Errorf("%d: %q", n, got)
		}
	}
}

package router

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// TestPlannedEndings takes an address from under live flows: those that the plan counted end, the others do not.
func TestPlannedEndings(t *testing.T) {
	c := newCrowd(t, 2)
	const n = 2000
	var flows *traffic.Held
	var err error
	c.client.Do(func() { flows, err = traffic.Hold(n, ends(40, 20_000)) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(flows.Close)
	if silent := flows.Broken(); silent > 0 {
		t.Fatalf("%d of %d flows are broken at first", silent, n)
	}

	target := func(addresses ...nat.PoolAddress) plan.Target {
		config := c.config
		config.Pools = []nat.Pool{{Name: "p", Addresses: addresses}}
		return plan.Target{NAT: config}
	}
	all := c.config.Pools[0].Addresses
	r := &Router{Options: Options{Flows: c.flows}, target: target(all...)}
	if changes := r.counted(plan.Diff(r.target, target(all[1], all[0]))); len(changes) != 1 || changes[0].Interrupts != "" {
		t.Errorf("another order: %+v", changes)
	}
	next := target(all[0])
	changes := r.counted(plan.Diff(r.target, next))
	var end int
	if _, err := fmt.Sscanf(changes[0].Interrupts, "1,%d flows from 192.0.2.12 end", &end); err == nil {
		end += 1000
	} else if _, err := fmt.Sscanf(changes[0].Interrupts, "%d flows from 192.0.2.12 end", &end); err != nil {
		t.Fatalf("%+v", changes)
	}
	if len(changes) != 1 || end == 0 || end == n {
		t.Fatalf("%d of %d flows: %+v", end, n, changes)
	}
	if err := c.driver.Apply(context.Background(), next.NAT); err != nil {
		t.Fatal(err)
	}
	c.router.Run("ip addr del 192.0.2.12/24 dev up0")
	if broken := flows.Broken(); broken != end {
		t.Errorf("%d of %d flows are broken, the plan said that %d end", broken, n, end)
	}
	t.Logf("%d flows, %d ended as planned", n, end)
}

// deafTable is a connection table that cannot be read.
type deafTable struct{ Flows }

func (deafTable) Dump(context.Context, uint8, func(*conntrack.Flow) bool) error {
	return errors.New("no such luck")
}

func TestUncountedEndings(t *testing.T) {
	a := netip.MustParseAddr("192.0.2.11")
	former := plan.Target{NAT: nat.Config{Pools: []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: a, Public: a}}}}}}
	for want, flows := range map[string]Flows{
		"flows from 192.0.2.11 end, it is not known how many: no such luck":                     deafTable{},
		"flows from 192.0.2.11 end, it is not known how many: the connection table is not read": nil,
	} {
		r := &Router{Options: Options{Flows: flows}, target: former}
		if c := r.counted(plan.Diff(r.target, plan.Target{})); len(c) != 1 || c[0].Interrupts != want {
			t.Errorf("%+v, want %s", c, want)
		}
	}
	for n, want := range map[int]string{0: "0 flows from a end", 1: "1 flow from a ends", 999: "999 flows from a end", 3214: "3,214 flows from a end", 1234567: "1,234,567 flows from a end"} {
		if got := ended(n, "from a"); got != want {
			t.Errorf("%d: %q", n, got)
		}
	}
}

// flowTable holds flows by their source.
type flowTable struct {
	Flows
	mu    sync.Mutex
	flows []conntrack.Flow
}

func (f *flowTable) Dump(_ context.Context, _ uint8, see func(*conntrack.Flow) bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.flows {
		if !see(&f.flows[i]) {
			break
		}
	}
	return nil
}

func (f *flowTable) End(_ context.Context, _ uint8, which func(*conntrack.Flow) bool) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	before := len(f.flows)
	f.flows = slices.DeleteFunc(f.flows, func(f conntrack.Flow) bool { return which(&f) })
	return before - len(f.flows), nil
}

// TestFlowsEndWithTheirAddress: at once when a document is applied for good, and not before it is confirmed otherwise, since it may go back.
func TestFlowsEndWithTheirAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir, table := newMachine(t), t.TempDir(), &flowTable{}
		m.flows = table
		r, stop := m.boot(dir)
		defer func() { stop() }()
		flow := func(as string) conntrack.Flow {
			partner := netip.MustParseAddrPort("198.51.100.7:443")
			return conntrack.Flow{
				Original: conntrack.Tuple{Source: netip.MustParseAddrPort("10.0.0.1:1000"), Destination: partner},
				Reply:    conntrack.Tuple{Source: partner, Destination: netip.MustParseAddrPort(as + ":1000")},
			}
		}
		table.flows = []conntrack.Flow{flow("10.9.0.5"), flow("10.9.0.6")}
		both := strings.Replace(base, "{address: 10.9.0.5}", "{address: 10.9.0.5}, {address: 10.9.0.6}", 1)
		left := func(what string, want int) {
			t.Helper()
			synctest.Wait()
			table.mu.Lock()
			defer table.mu.Unlock()
			if len(table.flows) != want {
				t.Fatalf("%s: %d flows are left, want %d", what, len(table.flows), want)
			}
		}
		probation := func(doc string) uint64 {
			g, _, err := r.apply(context.Background(), text(doc), nil, time.Minute, "tester")
			if err != nil {
				t.Fatal(err)
			}
			return g
		}
		apply(t, r, both)
		left("at first", 2)
		probation(base)
		left("not yet confirmed", 2)
		time.Sleep(2 * time.Minute)
		left("gone back", 2)
		g := probation(base)
		left("not yet confirmed again", 2)
		if err := r.confirm(g); err != nil {
			t.Fatal(err)
		}
		left("confirmed", 1)
		probation(strings.Replace(base, "10.9.0.5", "10.9.0.7", 1))
		left("another address on trial", 1)
		time.Sleep(2 * time.Minute)
		left("gone back again", 1)

		other := strings.Replace(base, "10.9.0.5", "10.9.0.6", 1)
		probation(other)
		left("another address on trial", 1)
		table.mu.Lock()
		table.flows = append(table.flows, flow("10.9.0.6"))
		table.mu.Unlock()
		stop()
		time.Sleep(2 * time.Minute)
		r, stop = m.boot(dir)
		left("gone back at start", 1)
		g = probation(other)
		left("another address on trial again", 1)
		stop()
		r, stop = m.boot(dir)
		left("another address on trial, and a new start", 1)
		if err := r.confirm(g); err != nil {
			t.Fatal(err)
		}
		left("confirmed after a new start", 0)
		table.mu.Lock()
		table.flows = append(table.flows, flow("10.9.0.6"))
		table.mu.Unlock()
		apply(t, r, strings.Replace(base, "10.9.0.5", "10.9.0.8", 1))
		left("another address for good", 0)
	})
}

// TestFlowsEndThoughDocumentsCome: what an earlier document took away ends also when another one is carried out in its place.
func TestFlowsEndThoughDocumentsCome(t *testing.T) {
	changed := strings.Replace(base, "10.9.0.5", "10.9.0.6", 1)
	for name, change := range map[string]func(m *machine, r *Router){
		"the same pools for good": func(_ *machine, r *Router) {
			if _, _, err := r.apply(context.Background(), text(changed), nil, time.Minute, "tester"); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			apply(t, r, strings.Replace(changed, "10.7.0.0", "10.8.0.0", 1))
		},
		"not carried out": func(m *machine, r *Router) {
			m.mu.Lock()
			m.unruly = errors.New("no")
			m.mu.Unlock()
			apply(t, r, changed)
			apply(t, r, strings.Replace(base, "10.9.0.5", "10.9.0.7", 1))
			m.mu.Lock()
			m.unruly = nil
			m.mu.Unlock()
			time.Sleep(2 * lastRetry)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, table := newMachine(t), &flowTable{}
				m.flows = table
				r, stop := m.boot(t.TempDir())
				defer stop()
				apply(t, r, base)
				partner := netip.MustParseAddrPort("198.51.100.7:443")
				table.mu.Lock()
				table.flows = []conntrack.Flow{{
					Original: conntrack.Tuple{Source: netip.MustParseAddrPort("10.0.0.1:1000"), Destination: partner},
					Reply:    conntrack.Tuple{Source: partner, Destination: netip.MustParseAddrPort("10.9.0.5:1000")},
				}}
				table.mu.Unlock()
				change(m, r)
				synctest.Wait()
				table.mu.Lock()
				defer table.mu.Unlock()
				if len(table.flows) > 0 {
					t.Error("a flow is left with an address that is in no pool")
				}
			})
		})
	}
}

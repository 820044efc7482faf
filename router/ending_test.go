package router

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/plan"
)

// TestPlannedEndings takes an address from under live flows: those that the plan counted end, the others do not.
func TestPlannedEndings(t *testing.T) {
	var table *conntrack.Conn
	c := newCrowd(t, 2, func(conn *conntrack.Conn) Flows { table = conn; return conn })
	const n = 2000
	flows := make([]request, n)
	var err error
	c.client.Do(func() {
		for i := 0; i < n && err == nil; i++ {
			flows[i], err = begin([4]byte{10, 0, 0, byte(i % 40)}, 20_000+i/40)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, f := range flows {
			unix.Close(f.fd)
		}
	})
	b := make([]byte, 64)
	answered := func(wanted int) (count int) {
		for deadline := time.Now().Add(3 * time.Second); count < wanted && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			for _, f := range flows {
				if _, err := unix.Read(f.fd, b); err == nil {
					count++
				}
			}
		}
		return count
	}
	if got := answered(n); got != n {
		t.Fatalf("%d answers at first", got)
	}

	target := func(addresses ...nat.PoolAddress) plan.Target {
		config := c.config
		config.Pools = []nat.Pool{{Name: "p", Addresses: addresses}}
		return plan.Target{NAT: config}
	}
	all := c.config.Pools[0].Addresses
	r := &Router{Options: Options{Flows: table}, target: target(all...)}
	if changes := r.counted(plan.Diff(r.target, target(all[1], all[0]))); len(changes) != 1 || changes[0].Interrupts != "" {
		t.Errorf("another order: %+v", changes)
	}
	next := target(all[0])
	changes := r.counted(plan.Diff(r.target, next))
	var ends int
	if _, err := fmt.Sscanf(changes[0].Interrupts, "1,%d flows from 192.0.2.12 end", &ends); err == nil {
		ends += 1000
	} else if _, err := fmt.Sscanf(changes[0].Interrupts, "%d flows from 192.0.2.12 end", &ends); err != nil {
		t.Fatalf("%+v", changes)
	}
	if len(changes) != 1 || ends == 0 || ends == n {
		t.Fatalf("%d of %d flows: %+v", ends, n, changes)
	}
	if err := c.driver.Apply(context.Background(), next.NAT); err != nil {
		t.Fatal(err)
	}
	c.router.Run("ip addr del 192.0.2.12/24 dev up0")
	for _, f := range flows {
		unix.Write(f.fd, []byte("again"))
	}
	got := answered(n - ends)
	got += answered(1) // none comes late
	if got != n-ends {
		t.Errorf("%d of %d flows go on, the plan said that %d end", got, n, ends)
	}
	t.Logf("%d flows, %d ended as planned", n, ends)
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
		"flows from 192.0.2.11 end, nobody knows how many: no such luck":                     deafTable{},
		"flows from 192.0.2.11 end, nobody knows how many: the connection table is not read": nil,
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

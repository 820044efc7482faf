package router

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/plan"
)

// countTime bounds how long a plan waits for the flows to be counted.
const countTime = 3 * time.Second

// counted adds to changes how many flows under way each of them ends.
func (r *Router) counted(changes []plan.Change) []plan.Change {
	var ends []nat.Ending
	for _, c := range changes {
		ends = append(ends, c.Ends...)
	}
	if len(ends) == 0 {
		return changes
	}
	counts, err := []int(nil), errTooManyEndings
	if len(ends) <= maxCounted {
		counts, err = r.countFlows(ends)
	}
	for i := range changes {
		c := &changes[i]
		var said []string
		if c.Interrupts != "" {
			said = append(said, c.Interrupts)
		}
		for _, e := range c.Ends {
			if err != nil {
				said = append(said, fmt.Sprintf("flows %s end, it is not known how many: %v", e.Flows, err))
				continue
			}
			said = append(said, ended(counts[0], e.Flows))
			counts = counts[1:]
		}
		c.Interrupts = strings.Join(said, "; ")
	}
	return changes
}

// maxCounted is how many sets of flows are counted: each flow is compared with each set.
const maxCounted = 1000

var errTooManyEndings = fmt.Errorf("more than %d objects end some", maxCounted)

// errUncounted is why flows are not counted where nothing reads the connection table.
var errUncounted = errors.New("the connection table is not read")

// countFlows returns how many flows under way are in each of some sets. A TCP connection that only waits for its late packets
// (TIME_WAIT and CLOSE of the kernel's enum tcp_conntrack) is not under way.
func (r *Router) countFlows(sets []nat.Ending) ([]int, error) {
	const timeWait, closed = 7, 8
	if r.Flows == nil {
		return nil, errUncounted
	}
	ctx, cancel := context.WithTimeout(context.Background(), countTime)
	defer cancel()
	counts := make([]int, len(sets))
	err := r.Flows.Dump(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
		if f.Status&conntrack.Dying != 0 || f.TCPState == timeWait || f.TCPState == closed {
			return true
		}
		t := track(f)
		for i := range sets {
			if sets[i].Has(t) {
				counts[i]++
			}
		}
		return true
	})
	return counts, err
}

func track(f *conntrack.Flow) nat.Track {
	t := nat.Track{
		Source: f.Original.Source.Addr(), Destination: f.Original.Destination.Addr(),
		LeavesAs: f.Reply.Destination.Addr(), GoesTo: f.Reply.Source.Addr(),
		Protocol: f.Protocol,
	}
	if f.Protocol != unix.IPPROTO_ICMP && f.Protocol != unix.IPPROTO_ICMPV6 {
		t.Port, t.ServerPort = f.Original.Destination.Port(), f.Reply.Source.Port()
	}
	return t
}

// outliving are the addresses that pools have had and that a document took away, until the flows with them have ended: the
// document may be replaced before it is carried out.
type outliving struct {
	mu   sync.Mutex
	pool nat.Pool
}

// add notes what is in no pool of a configuration any more, and reports whether there was anything.
func (o *outliving) add(had []nat.Pool, now nat.Config) (some bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, p := range had {
		for _, a := range p.Addresses {
			one := nat.Config{Pools: []nat.Pool{{Name: p.Name, Addresses: []nat.PoolAddress{a}}}}
			if len(nat.Endings(one, nat.Config{Pools: slices.Concat(now.Pools, []nat.Pool{o.pool}), Own: now.Own})) > 0 {
				o.pool.Addresses, some = append(o.pool.Addresses, a), true
			}
		}
	}
	return some
}

// endFlows ends the flows of addresses that pools have had and no pool has now. Else they would stay in the connection table, up to days,
// and a client that goes on sending UDP would never get another address. Of other endings Has may say too much.
func (r *Router) endFlows(ctx context.Context, now nat.Config) error {
	r.outliving.mu.Lock()
	had := r.outliving.pool
	r.outliving.mu.Unlock()
	ends := nat.Endings(nat.Config{Pools: []nat.Pool{had}}, nat.Config{Pools: now.Pools, Own: now.Own})
	if len(ends) > 0 && r.Flows != nil {
		n, err := r.Flows.End(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
			t := track(f)
			return slices.ContainsFunc(ends, func(e nat.Ending) bool { return e.Has(t) })
		})
		if n > 0 {
			r.Log.Info("flows ended, since their address is in no pool any more", "flows", n)
		}
		if err != nil {
			return err
		}
	}
	r.outliving.mu.Lock()
	defer r.outliving.mu.Unlock()
	r.outliving.pool.Addresses = r.outliving.pool.Addresses[len(had.Addresses):]
	return nil
}

// ended says that n flows end, as "3,214 flows from 203.0.113.9 end".
func ended(n int, flows string) string {
	if n == 1 {
		return "1 flow " + flows + " ends"
	}
	digits := strconv.Itoa(n)
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	return digits + " flows " + flows + " end"
}

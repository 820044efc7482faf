package apply

import (
	"context"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
)

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
func (a *Applier) endFlows(ctx context.Context, now nat.Config) error {
	a.outliving.mu.Lock()
	had := a.outliving.pool
	a.outliving.mu.Unlock()
	ends := nat.Endings(nat.Config{Pools: []nat.Pool{had}}, nat.Config{Pools: now.Pools, Own: now.Own})
	if len(ends) > 0 && a.o.Flows != nil {
		n, err := a.o.Flows.End(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
			t := f.Track()
			return slices.ContainsFunc(ends, func(e nat.Ending) bool { return e.Has(t) })
		})
		if n > 0 {
			a.o.Log.Info("flows ended, since their address is in no pool any more", "flows", n)
		}
		if err != nil {
			return err
		}
	}
	a.outliving.mu.Lock()
	defer a.outliving.mu.Unlock()
	a.outliving.pool.Addresses = a.outliving.pool.Addresses[len(had.Addresses):]
	return nil
}

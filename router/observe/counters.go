package observe

import (
	"context"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

const (
	// countersAge is the maximum age of the policies' counters: reading many of them is expensive.
	countersAge = 2 * time.Second
	// countersTime bounds the time to read them.
	countersTime = 5 * time.Second
)

type counters struct {
	sync.Mutex
	state nat.State
	at    time.Time
}

// Rules returns the rules with their counters, as read recently. If the kernel cannot be read, it
// returns the last state as not present.
func (o *Observer) Rules() nat.State {
	o.counters.Lock()
	defer o.counters.Unlock()
	if time.Since(o.counters.at) < countersAge {
		return o.counters.state
	}
	ctx, cancel := context.WithTimeout(context.Background(), countersTime)
	defer cancel()
	state, err := o.o.NAT.Observe(ctx)
	if err != nil {
		o.o.Log.Warn("reading NAT back failed; its last state is shown", "err", err)
		o.counters.state.Present = false
		return o.counters.state
	}
	o.counters.state, o.counters.at = state, time.Now()
	return state
}

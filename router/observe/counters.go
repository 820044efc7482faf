package observe

import (
	"context"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

const (
	// countersAge is how old the counters of the policies may be: reading many of them back is not
	// free.
	countersAge = 2 * time.Second
	// countersTime bounds how long they are read.
	countersTime = 5 * time.Second
)

type counters struct {
	sync.Mutex
	state nat.State
	at    time.Time
}

// Rules returns the rules with their counters, read back a moment ago. When the kernel cannot be
// read, those that were last read are returned as not present.
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

package router

import (
	"context"
	"fmt"
	"sync"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/plan"
)

// verdictTime is for how long after the start BGP waits for the first word on the addresses of shared pools. A
// graceful restart takes longer; announcing too little in the meantime would send the spokes to the other node.
const verdictTime = 5 * time.Second

// taker watches the node that shares the pools.
type taker struct {
	wanted chan egress.Takeover // capacity 1: the newest

	mu    sync.Mutex
	ways  int
	tried time.Time // last attempt to take
	err   error     // of it
}

func (t *taker) use(c egress.Takeover) {
	select {
	case <-t.wanted:
	default:
	}
	t.wanted <- c
}

// takeOver runs a watcher with the newest configuration until ctx is done.
func (r *Router) takeOver(ctx context.Context) error {
	stop := func() {}
	defer func() { stop() }()
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-r.taker.wanted:
			stop()
			r.taker.mu.Lock()
			r.taker.ways = len(c.Paths)
			if r.taker.err != nil { // of a watcher that tries no more
				r.taker.tried, r.taker.err = time.Time{}, nil
			}
			r.taker.mu.Unlock()
			stop = func() {}
			if len(c.Paths) == 0 || r.Mover == nil {
				continue
			}
			w := takeover.Watcher{Mover: r.Mover, Log: r.Log.With("room", "takeover"), Took: r.took, Spared: r.spared, Echo: func(ctx context.Context, way egress.Path) error {
				return r.Probe(ctx, way.Interface, way.From, egress.Target{Scheme: "icmp", Host: way.To.String()})
			}}
			running, cancel := context.WithCancel(ctx)
			done := make(chan struct{})
			go func() {
				defer close(done)
				w.Run(running, c)
			}()
			stop = func() { cancel(); <-done }
		}
	}
}

func (r *Router) took(err error) {
	r.taker.mu.Lock()
	r.taker.tried, r.taker.err = time.Now(), err
	r.taker.mu.Unlock()
	r.state.bell.Ring()
}

// spared notes that nothing is tried any more.
func (r *Router) spared() {
	r.taker.mu.Lock()
	r.taker.tried, r.taker.err = time.Time{}, nil
	r.taker.mu.Unlock()
	r.state.bell.Ring()
}

func (r *Router) takeoverConditions() (out []*isthmusv1.Condition) {
	r.taker.mu.Lock()
	defer r.taker.mu.Unlock()
	switch {
	case r.taker.ways == 0:
	case r.Mover == nil:
		out = append(out, &isthmusv1.Condition{
			Type: "TakeoverImpossible", Severity: "error", Since: stamp(r.started),
			Message: "the document wants addresses to be taken over, and there is no program that does it: start isthmusd with -mover",
		})
	case r.taker.err != nil:
		out = append(out, &isthmusv1.Condition{
			Type: "TakeoverFailed", Severity: "error", Since: stamp(r.taker.tried), Message: fmt.Sprintf("taking the public addresses: %v; it is tried again", r.taker.err),
		})
	case !r.taker.tried.IsZero():
		out = append(out, &isthmusv1.Condition{
			Type: "TookOver", Severity: "warning", Since: stamp(r.taker.tried), Message: "the other node did not answer, and this one took the public addresses of the pools",
		})
	}
	return out
}

// proven says whether a pool may announce what depends on it. Without takeover an address of which nothing is known yet may
// work; with it, it may be the other node's.
func proven(t plan.Target, p health.PoolState) bool {
	if len(t.Takeover.Paths) == 0 {
		return p.Usable() > 0
	}
	for _, m := range p.Members {
		if m.Status == health.Healthy {
			return true
		}
	}
	return false
}

// awaitVerdict waits, soon after the start, until something is known of every address of shared pools.
func (r *Router) awaitVerdict(ctx context.Context, t plan.Target) {
	if len(t.Takeover.Paths) == 0 {
		return
	}
	for time.Since(r.started) < verdictTime && ctx.Err() == nil {
		known := 0
		for _, p := range r.health.Pools() {
			for _, m := range p.Members {
				if m.Status != health.Unknown {
					known++
				}
			}
		}
		if known >= len(t.Takeover.Addresses) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

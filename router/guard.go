package router

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// sampleRetry is how long to wait after the samples of the guard could not be heard, as while a former daemon still listens.
const sampleRetry = 30 * time.Second

// guarded returns an error while nothing keeps inside addresses in. A tunnel that came up meanwhile would let its spoke out
// under its own addresses.
func (r *Router) guarded(ctx context.Context) error {
	if r.guard.Load() {
		return nil
	}
	state, err := r.NAT.Observe(ctx)
	if err != nil {
		return fmt.Errorf("looking for the guard: %w", err)
	}
	if !state.Present {
		return errors.New("waiting for the guard: without it, inside addresses could leave")
	}
	r.guard.Store(true)
	return nil
}

// guardInPlace has those tunnels worked on at once that waited for the guard.
func (r *Router) guardInPlace() {
	if r.guard.Swap(true) {
		return
	}
	for _, o := range r.work.failed() {
		r.work.again(o.key)
	}
}

// sampleGuard logs some of the packets that the guard drops, each with the policy that should have had it.
func (r *Router) sampleGuard(ctx context.Context) error {
	for {
		err := r.NAT.Sample(ctx, r.guardDropped)
		if ctx.Err() != nil {
			return nil
		}
		r.Log.Warn("what the guard drops is not sampled; trying again", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(sampleRetry):
		}
	}
}

func (r *Router) guardDropped(f nat.Flow) {
	r.state.mu.Lock()
	config := r.state.target.NAT
	r.state.mu.Unlock()
	config, _ = r.liveNAT(config)
	r.Log.Warn("the guard dropped a packet", "source", f.Source, "destination", f.Destination, "protocol", f.Protocol, "port", f.Port, "why", config.Explain(f))
}

package router

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
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
	if !state.Guarded {
		return errors.New("waiting for the guard: without it, inside addresses could leave")
	}
	r.guard.Store(true)
	return nil
}

// close closes the node while no document is carried out. The rules of a document that are still there stay, since they keep inside addresses in.
func (r *Router) close(ctx context.Context) error {
	state, err := r.NAT.Observe(ctx)
	if err != nil {
		return fmt.Errorf("looking for the guard: %w", err)
	}
	if state.Guarded {
		return nil
	}
	r.mu.Lock()
	closed := r.closed
	r.mu.Unlock()
	return r.nat.apply(ctx, r, closed)
}

// guardInPlace has those tunnels worked on at once that waited for the guard.
func (r *Router) guardInPlace() {
	r.guardBack()
	r.ruled.Store(true)
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

func (r *Router) guardDropped(reason nat.Reason, f nat.Flow) {
	why := reason.String()
	if reason == nat.DropGuard {
		r.state.mu.Lock()
		config := r.state.target.NAT
		r.state.mu.Unlock()
		config, _ = r.liveNAT(config)
		why = config.Explain(f) + r.leftNames(config, f)
	}
	r.Log.Warn("dropped a packet", "reason", string(reason), "source", f.Source, "destination", f.Destination, "protocol", f.Protocol, "port", f.Port, "why", why)
}

// lossShown is how long a condition tells that the rules were missing.
const lossShown = time.Hour

// guardLoss is when the rules were last taken away, and for how long.
type guardLoss struct {
	mu        sync.Mutex
	at, until time.Time // until is zero while they are away
	times     int
}

// watchGuard has the rules put back at once when another process has changed or removed them. While they are away nothing is forwarded.
func (r *Router) watchGuard(ctx context.Context) error {
	for {
		err := r.NAT.Watch(ctx, r.rulesChanged)
		if ctx.Err() != nil {
			return nil
		}
		r.Log.Warn("changes of the rules by others are not heard; trying again", "err", err)
		pause(ctx, lookRetry)
	}
}

func (r *Router) rulesChanged(present bool) {
	r.state.mu.Lock()
	wanted := r.state.target.Underlay.Interface != ""
	r.state.mu.Unlock()
	if !present && wanted {
		// First of all, since every packet counts. The job "forwarding" turns it on again, behind the guard.
		err := r.Host.Forward(false)
		if r.guard.Swap(false) {
			r.lost.mu.Lock()
			r.lost.at, r.lost.until = time.Now(), time.Time{}
			r.lost.times++
			r.lost.mu.Unlock()
			r.Log.Error("another process removed the rules; nothing is forwarded until they are back", "err", err)
		}
	}
	r.work.again("nat")
	r.work.again("forwarding")
	r.state.bell.Ring()
}

// guardBack notes that the rules are there.
func (r *Router) guardBack() {
	r.lost.mu.Lock()
	defer r.lost.mu.Unlock()
	if r.lost.times > 0 && r.lost.until.IsZero() {
		r.lost.until = time.Now()
		r.Log.Warn("the rules are back", "away", r.lost.until.Sub(r.lost.at).Round(time.Millisecond))
	}
}

// guardConditions tells that the rules are or were away.
func (r *Router) guardConditions() []*isthmusv1.Condition {
	r.lost.mu.Lock()
	defer r.lost.mu.Unlock()
	switch {
	case r.lost.times == 0:
	case r.lost.until.IsZero():
		return []*isthmusv1.Condition{{Type: "GuardMissing", Severity: "error", Since: stamp(r.lost.at), Message: "another process removed the rules, and nothing is forwarded until they are back"}}
	case time.Since(r.lost.until) < lossShown:
		return []*isthmusv1.Condition{{Type: "GuardWasMissing", Severity: "warning", Since: stamp(r.lost.at),
			Message: fmt.Sprintf("another process removed the rules, %d times since the daemon started; they were back after %v, and nothing was forwarded meanwhile; `systemctl disable nftables` when its ruleset begins with `flush ruleset`",
				r.lost.times, r.lost.until.Sub(r.lost.at).Round(time.Millisecond))}}
	}
	return nil
}

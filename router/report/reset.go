package report

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/fault"
)

// resetPace is the shortest time between two resets of a tunnel: each negotiates keys, and a caller
// in a loop must keep neither charon nor the tunnel from working.
const resetPace = 10 * time.Second

// resets has the times of the last resets of tunnels.
type resets struct {
	mu sync.Mutex
	at map[string]time.Time
}

// begin records a reset, and returns how long the caller has to wait instead if one has begun
// within resetPace. It forgets older ones.
func (r *resets) begin(name string, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at == nil {
		r.at = map[string]time.Time{}
	}
	for old, at := range r.at {
		if now.Sub(at) >= resetPace {
			delete(r.at, old)
		}
	}
	if at, ok := r.at[name]; ok {
		return resetPace - now.Sub(at)
	}
	r.at[name] = now
	return 0
}

// ResetTunnel implements api.Router.
func (r *Report) ResetTunnel(ctx context.Context, name string) error {
	t := r.Observed.Target()
	i, ok := t.Tunnel(name)
	if !ok {
		return fmt.Errorf("resetting tunnel %s: %w", name, fault.ErrNoTunnel)
	}
	c := t.Tunnels[i]
	if c.Disabled {
		return fmt.Errorf("resetting tunnel %s: %w: it is disabled in the document; enable it", name, fault.ErrPrecondition)
	}
	d := r.Drivers[c.Kind()]
	if d == nil {
		return fmt.Errorf("resetting tunnel %s: tunnels of kind %q have no driver", name, c.Kind())
	}
	if left := r.resets.begin(name, time.Now()); left > 0 {
		return fmt.Errorf("resetting tunnel %s: %w: it was reset a moment ago; try again in %v", name, fault.ErrTooSoon, left.Round(time.Second))
	}
	return d.Reset(ctx, name)
}

package apply

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// guarded returns an error while nothing keeps inside addresses in. A tunnel that came up meanwhile
// would let its spoke out under its own addresses.
func (a *Applier) guarded(ctx context.Context) error {
	if a.guard.Load() {
		return nil
	}
	state, err := a.o.NAT.Observe(ctx)
	if err != nil {
		return fmt.Errorf("looking for the guard: %w", err)
	}
	if !state.Guarded {
		return errors.New("waiting for the guard: without it, inside addresses could leave")
	}
	a.guard.Store(true)
	return nil
}

// guardInPlace has those tunnels worked on at once that waited for the guard.
func (a *Applier) guardInPlace() {
	a.guardBack()
	a.ruled.Store(true)
	if a.guard.Swap(true) {
		return
	}
	a.Retry()
}

// guardLoss is when the rules were last taken away, and for how long.
type guardLoss struct {
	mu        sync.Mutex
	at, until time.Time // until is zero while they are away
	times     int
}

// watchRetry is how long after a failure changes of the rules are watched again.
const watchRetry = 5 * time.Second

// watchRules has the rules put back at once when another process has changed or removed them. While
// they are away nothing is forwarded.
func (a *Applier) watchRules(ctx context.Context) {
	for {
		err := a.o.NAT.Watch(ctx, a.RulesChanged)
		if ctx.Err() != nil {
			return
		}
		a.o.Log.Warn("changes of the rules by others are not heard; trying again", "err", err)
		pause(ctx, watchRetry)
	}
}

// RulesChanged takes note that another process may have changed the rules; present reports whether
// they are there.
func (a *Applier) RulesChanged(present bool) {
	if w, _ := a.Wanted(); !present && w.Mode == Carry {
		// First of all, since every packet counts. The job "forwarding" turns it on again, behind
		// the guard.
		err := a.o.Host.Forward(false)
		if a.guard.Swap(false) {
			a.lost.mu.Lock()
			a.lost.at, a.lost.until = time.Now(), time.Time{}
			a.lost.times++
			a.lost.mu.Unlock()
			a.o.Log.Error("another process removed the rules; nothing is forwarded until they are back", "err", err)
		}
	}
	a.work.again("nat")
	a.work.again("forwarding")
	a.o.Changed()
}

// GuardLoss returns when the rules were last taken away by another process, when they were back,
// and how often that happened since the start. until is zero while they are away.
func (a *Applier) GuardLoss() (at, until time.Time, times int) {
	a.lost.mu.Lock()
	defer a.lost.mu.Unlock()
	return a.lost.at, a.lost.until, a.lost.times
}

// guardBack notes that the rules are there.
func (a *Applier) guardBack() {
	a.lost.mu.Lock()
	defer a.lost.mu.Unlock()
	if a.lost.times > 0 && a.lost.until.IsZero() {
		a.lost.until = time.Now()
		a.o.Log.Warn("the rules are back", "away", a.lost.until.Sub(a.lost.at).Round(time.Millisecond))
	}
}

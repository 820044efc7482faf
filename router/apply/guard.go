package apply

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// guarded returns an error until the guard is in place. A tunnel that came up earlier would let its
// spoke out under its own addresses.
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

// guardInPlace runs the jobs of tunnels that waited for the guard at once.
func (a *Applier) guardInPlace() {
	a.guardBack()
	a.ruled.Store(true)
	if a.guard.Swap(true) {
		return
	}
	a.Retry()
}

// guardLoss is the time when the rules were last removed, and when they were restored.
type guardLoss struct {
	mu        sync.Mutex
	at, until time.Time // until is zero while they are missing
	times     int
}

// watchRetry is the delay before changes of the rules are watched again after a failure.
const watchRetry = 5 * time.Second

// watchRules restores the rules at once when another process has changed or removed them. While
// they are missing, the node forwards nothing.
func (a *Applier) watchRules(ctx context.Context) {
	for {
		err := a.o.NAT.Watch(ctx, a.RulesChanged)
		if ctx.Err() != nil {
			return
		}
		a.o.Log.Warn("changes of the rules by other processes cannot be watched; trying again", "err", err)
		pause(ctx, watchRetry)
	}
}

// RulesChanged handles a possible change of the rules by another process; present reports whether
// they still exist.
func (a *Applier) RulesChanged(present bool) {
	if w, _ := a.Wanted(); !present && w.Mode == Carry {
		// Stop forwarding first, since every packet counts. The job "forwarding" turns it on again,
		// after the guard.
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

// GuardLoss returns when another process last removed the rules, when they were restored, and how
// often that happened since the start. until is zero while they are missing.
func (a *Applier) GuardLoss() (at, until time.Time, times int) {
	a.lost.mu.Lock()
	defer a.lost.mu.Unlock()
	return a.lost.at, a.lost.until, a.lost.times
}

// guardBack records that the rules are in the kernel.
func (a *Applier) guardBack() {
	a.lost.mu.Lock()
	defer a.lost.mu.Unlock()
	if a.lost.times > 0 && a.lost.until.IsZero() {
		a.lost.until = time.Now()
		a.o.Log.Warn("the rules are back", "away", a.lost.until.Sub(a.lost.at).Round(time.Millisecond))
	}
}

package router

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
)

// lockPace is how often Alive tries to get the lock.
const lockPace = 10 * time.Millisecond

// Ready says whether the rules of the document that is carried out are in the kernel, or nothing is to be carried out. It does not wait; while
// the router is busy the answer may be no.
func (r *Router) Ready() bool {
	if r.Safe || r.ruled.Load() {
		return true
	}
	if !r.mu.TryLock() {
		return false // the caller does not wait
	}
	defer r.mu.Unlock()
	return r.spec == nil
}

// Alive returns nil when the router's lock can be had and the scheduler makes progress before ctx is done, else an error that says what does
// not. A scheduler with a long pass makes progress with each object that it has worked on.
func (r *Router) Alive(ctx context.Context) error {
	for !r.mu.TryLock() {
		select {
		case <-ctx.Done():
			return errors.New("the router's lock is not given back")
		case <-time.After(lockPace):
		}
	}
	r.mu.Unlock()
	if r.Safe {
		return nil // nothing is scheduled
	}
	if err := r.work.alive(ctx); err != nil {
		return fmt.Errorf("the scheduler makes no progress: %w", err)
	}
	return nil
}

// Summary returns what the node does, in one line.
func (r *Router) Summary() string {
	status, _ := r.Status()
	if status.GetGeneration() == 0 {
		return "no document yet: isthmus apply -f FILE"
	}
	up, tunnels := 0, r.tunnels()
	for _, t := range tunnels {
		if t.State == string(tunnel.Up) {
			up++
		}
	}
	bad := 0
	for _, c := range status.GetConditions() {
		if c.Severity == "error" {
			bad++
		}
	}
	text := fmt.Sprintf("generation %d", status.GetGeneration())
	if status.GetAppliedGeneration() != status.GetGeneration() {
		text += fmt.Sprintf(" (applied: %d)", status.GetAppliedGeneration())
	}
	return fmt.Sprintf("%s, %d of %d tunnels up, %d errors", text, up, len(tunnels), bad)
}

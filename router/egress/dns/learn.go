package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

func (r *Resolver) notedLocked(news bool) {
	if news {
		r.dirty = true
		r.news++
	}
}

// learn stores an answer that a spoke is about to receive, and reports whether the rules may lack
// it, because it is new or was so a moment ago.
func (r *Resolver) learn(by, name string, a answer) bool {
	r.mu.Lock()
	news := r.table.learn(by, name, a.addrs, a.ttl, time.Now())
	r.notedLocked(news)
	lacking := r.news != r.applied && r.table.wants(name)
	r.mu.Unlock()
	if news {
		r.wake()
	}
	return lacking
}

// round is one writing of the rules, shared by all who wait for it.
type round struct {
	done chan struct{}
	err  error
}

// apply makes everything that was learned so far a destination. Callers that arrive while rules are
// being written share the next writing. After a failure, Changed starts another attempt for which
// no client waits.
func (r *Resolver) apply(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, applyTime)
	defer cancel()
	r.mu.Lock()
	mine := r.upcoming
	if mine == nil {
		mine = &round{done: make(chan struct{})}
		r.upcoming = mine
	}
	if !r.applying {
		r.applying = true
		go r.rounds(context.WithoutCancel(ctx))
	}
	r.mu.Unlock()
	select {
	case <-mine.done:
		return mine.err
	case <-ctx.Done():
		return fmt.Errorf("waiting for the rules: %w", ctx.Err())
	}
}

// rounds writes the rules as long as a client waits for it. It pauses after each writing for as
// long as the writing took, so that names of spokes take at most half of a processor.
func (r *Resolver) rounds(ctx context.Context) {
	for {
		r.mu.Lock()
		now, news := r.upcoming, r.news
		if r.upcoming = nil; now == nil {
			r.applying = false
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		began := time.Now()
		limited, cancel := context.WithTimeout(ctx, applyTime)
		now.err = r.options.Apply(limited)
		cancel()
		r.mu.Lock()
		r.applied = max(r.applied, news)
		r.mu.Unlock()
		close(now.done)
		r.options.Changed(now.err != nil)
		time.Sleep(min(time.Since(began), maxRest))
	}
}

// Resolve returns the addresses of a name that was set, without a query; at least one.
func (r *Resolver) Resolve(_ context.Context, name string) ([]netip.Addr, error) {
	s := r.State(name)
	switch {
	case len(s.Addresses) > 0:
		return s.Addresses, nil
	case s.LastError != "":
		return nil, errors.New(s.LastError)
	case len(s.Refused) > 0:
		return nil, fmt.Errorf("%s has %v, which no name may stand for: an address of the node, of pools, of the platform or inside", name, s.Refused[0])
	}
	return nil, fmt.Errorf("%s has no address", name)
}

// Used records that flows to an address of a name live, or began a moment ago.
func (r *Resolver) Used(name string, a netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.table.touch(name, a, now) && now.Sub(r.saved) >= min(maxUnsaved, r.table.hold/2) {
		r.dirty = true
		defer r.wake()
	}
}

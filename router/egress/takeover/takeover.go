// Package takeover has a node take the public addresses of its pools when the node that shares them
// is gone.
//
// Nodes that share a pool have the same public addresses in their documents; the platform leads
// each address to one of them. Only the platform stores which node has an address: a node that has
// lost its addresses sees its probes fail and withdraws the prefixes that it announces because of
// them.
package takeover

import (
	"context"
	"log/slog"
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/router/egress"
)

// Mover has the platform lead public addresses to this node. Taking addresses that are here already
// changes nothing.
type Mover interface {
	Take(ctx context.Context, addresses []egress.SharedAddress) error
}

// Grace is how long after the start the other node may stay unseen, because its lanes may still
// have to come up.
const Grace = 30 * time.Second

// retry is the pace of attempts to take.
var retry = backoff.Backoff{First: time.Second, Last: 30 * time.Second}

// verdict judges the other node by the last requests. It has no clock and does no I/O.
type verdict struct {
	fall   int
	failed int
	seen   bool // it has been alive since the start, or since its addresses were taken
}

// alive records an answer.
func (v *verdict) alive() { v.failed, v.seen = 0, true }

// silent records that no path answered, and reports whether the other node is gone. early: the
// grace time since the start is not over.
func (v *verdict) silent(early bool) bool {
	v.failed++
	return v.failed >= v.fall && (v.seen || !early)
}

// Watcher watches the other node.
type Watcher struct {
	// Echo sends a request on a path, and returns nil when there is an answer before ctx is done.
	Echo  func(ctx context.Context, w egress.Path) error
	Mover Mover
	Log   *slog.Logger
	// Took is called after each attempt to take.
	Took func(err error)
	// Saw is called when the other node answers and had not been seen.
	Saw func()
	// Spared is called when the other node answers again before an attempt has succeeded.
	Spared func()
}

// Run watches until ctx is done. seen: the other node has been alive before. Once the addresses are
// taken, they are not taken again before the other node has been seen alive.
func (w *Watcher) Run(ctx context.Context, c egress.Takeover, seen bool) {
	v := verdict{fall: c.Fall, seen: seen}
	started, taken := time.Now(), false
	ticker := time.NewTicker(c.Interval)
	defer ticker.Stop()
	for ctx.Err() == nil {
		if w.answers(ctx, c) {
			if !v.seen {
				w.Saw()
			}
			v.alive()
			taken = false
		} else if !taken && v.silent(time.Since(started) < Grace) && ctx.Err() == nil {
			w.Log.Warn("the other node does not answer; taking its addresses", "requests", v.failed)
			taken = w.take(ctx, c)
			v = verdict{fall: c.Fall, seen: !taken}
		}
		select {
		case <-ctx.Done():
		case <-ticker.C:
		}
	}
}

// answers reports whether the other node answers within an interval.
func (w *Watcher) answers(ctx context.Context, c egress.Takeover) bool {
	ctx, cancel := context.WithTimeout(ctx, c.Interval)
	defer cancel()
	results := make(chan error, len(c.Paths))
	for _, way := range c.Paths {
		go func() { results <- w.Echo(ctx, way) }()
	}
	for range c.Paths {
		if <-results == nil {
			return true
		}
	}
	return false
}

// take retries until it succeeds. It returns false when the other node answers or ctx is done
// before: a node that is alive keeps its addresses.
func (w *Watcher) take(ctx context.Context, c egress.Takeover) bool {
	for failures := 0; ; failures++ {
		err := w.Mover.Take(ctx, c.Addresses)
		w.Took(err)
		if err == nil {
			w.Log.Info("took the addresses", "addresses", len(c.Addresses))
			return true
		}
		delay := retry.Delay(failures)
		w.Log.Error("taking the addresses failed", "err", err, "next", delay)
		if w.returns(ctx, c, delay) {
			w.Log.Info("the other node answers again; its addresses are not taken")
			w.Spared()
			return false
		}
		if ctx.Err() != nil {
			return false
		}
	}
}

// returns sends requests until there is an answer, and reports whether there was one in time.
func (w *Watcher) returns(ctx context.Context, c egress.Takeover, within time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for ctx.Err() == nil {
		if w.answers(ctx, c) {
			return true
		}
		select {
		case <-ctx.Done():
		case <-time.After(c.Interval):
		}
	}
	return false
}

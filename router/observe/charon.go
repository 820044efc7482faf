package observe

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
)

// charonCheck is the interval at which charon's health is queried.
const charonCheck = 10 * time.Second

// charonHealth is the last known health of charon.
type charonHealth struct {
	mu    sync.Mutex
	words []string // problems, as text
	err   error    // why charon does not answer
	since time.Time
}

// WatchCharon polls charon's health. A separate goroutine, because an answer may take long.
func (o *Observer) WatchCharon(ctx context.Context) error {
	tick := time.NewTicker(charonCheck)
	defer tick.Stop()
	for {
		o.askCharon(ctx, time.Now())
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// askCharon queries charon's health, if a tunnel needs charon.
func (o *Observer) askCharon(ctx context.Context, now time.Time) {
	if o.o.Charon == nil || !o.has(tunnel.KindIPsec) {
		o.charon.set(nil, nil, now)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, charonCheck/2)
	defer cancel()
	words, err := o.o.Charon(ctx)
	if o.charon.set(words, err, now) {
		o.o.Bell.Ring()
	}
}

// has reports whether a tunnel of a kind is wanted.
func (o *Observer) has(kind tunnel.Kind) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.ContainsFunc(o.seen.Target.Tunnels, func(c tunnel.Config) bool { return c.Kind() == kind && !c.Disabled })
}

// set reports whether the health has changed.
func (c *charonHealth) set(words []string, err error, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.Equal(words, c.words) && (err == nil) == (c.err == nil) {
		return false
	}
	c.words, c.err, c.since = words, err, now
	return true
}

// Charon returns the problems of charon, since when, and why it does not answer.
func (o *Observer) Charon() (words []string, since time.Time, err error) {
	o.charon.mu.Lock()
	defer o.charon.mu.Unlock()
	return o.charon.words, o.charon.since, o.charon.err
}

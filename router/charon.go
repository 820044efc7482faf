package router

import (
	"context"
	"slices"
	"sync"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel"
)

// charonHealth is what charon last said of itself.
type charonHealth struct {
	mu    sync.Mutex
	words []string // what does not fit
	err   error    // why it does not answer
	since time.Time
}

// watchCharon asks charon again and again. Nothing else waits for the answer: one that hangs may take long.
func (r *Router) watchCharon(ctx context.Context) error {
	tick := time.NewTicker(charonCheck)
	defer tick.Stop()
	for {
		r.askCharon(ctx, time.Now())
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// askCharon asks charon how it is, if there is something for it to do.
func (r *Router) askCharon(ctx context.Context, now time.Time) {
	if r.Charon == nil || !r.state.hasIPsec() {
		r.charon.set(nil, nil, now)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, charonCheck/2)
	defer cancel()
	words, err := r.Charon(ctx)
	if r.charon.set(words, err, now) {
		r.state.bell.Ring()
	}
}

// set returns whether something is new.
func (c *charonHealth) set(words []string, err error, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.Equal(words, c.words) && (err == nil) == (c.err == nil) {
		return false
	}
	c.words, c.err, c.since = words, err, now
	return true
}

func (c *charonHealth) conditions() (out []*isthmusv1.Condition) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		out = append(out, &isthmusv1.Condition{
			Type: "CharonUnreachable", Severity: "error", Since: stamp(c.since),
			Message: c.err.Error() + "; established tunnels go on until their keys expire: start charon (systemctl start strongswan)",
		})
	}
	for _, w := range c.words {
		out = append(out, &isthmusv1.Condition{Type: "CharonUnfit", Severity: "warning", Since: stamp(c.since), Message: w})
	}
	return out
}

func (o *observed) hasIPsec() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.tunnels {
		if c.Kind() == tunnel.KindIPsec {
			return true
		}
	}
	return false
}

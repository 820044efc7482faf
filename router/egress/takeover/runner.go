package takeover

import (
	"context"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

// Runner runs a Watcher with the newest configuration. Its methods are safe for concurrent use.
type Runner struct {
	// Mover takes public addresses. Nil: none can be taken.
	Mover Mover
	// Echo sends a request on a path, and returns nil when an answer comes before ctx is done.
	Echo func(context.Context, egress.Path) error
	// Await is called with addresses that the platform has led to this node.
	Await func([]netip.Addr)
	// Changed is called when State has changed.
	Changed func()
	Log     *slog.Logger

	once   sync.Once
	wanted chan egress.Takeover // capacity 1: the newest

	mu    sync.Mutex
	state State
}

// State is the state of a Runner.
type State struct {
	Paths int       // to the other node; 0: nothing is watched
	Since time.Time // start of watching
	Seen  bool      // the other node has answered since then, and since its addresses were taken
	Tried time.Time // last attempt to take; zero: none since the other node last answered
	Err   error     // of that attempt
}

func (r *Runner) channel() chan egress.Takeover {
	r.once.Do(func() { r.wanted = make(chan egress.Takeover, 1) })
	return r.wanted
}

// Use sets the configuration.
func (r *Runner) Use(c egress.Takeover) {
	wanted := r.channel()
	for {
		select {
		case wanted <- c:
			return
		default:
		}
		select {
		case <-wanted: // an older one
		default:
		}
	}
}

// State returns the state of the Runner.
func (r *Runner) State() State {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}

func (r *Runner) set(f func(*State)) {
	r.mu.Lock()
	f(&r.state)
	r.mu.Unlock()
	r.Changed()
}

// Run watches until ctx is done.
func (r *Runner) Run(ctx context.Context) error {
	stop := func() {}
	defer func() { stop() }()
	var former egress.Takeover
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-r.channel():
			if reflect.DeepEqual(c, former) {
				continue
			}
			stop()
			stop = func() {}
			same := slices.ContainsFunc(c.Paths, func(p egress.Path) bool { return slices.Contains(former.Paths, p) })
			former = c
			var seen bool
			r.set(func(s *State) {
				s.Paths = len(c.Paths)
				if !same {
					s.Since, s.Seen = time.Now(), false
				}
				seen = s.Seen
				if s.Err != nil { // of a watcher that has ended
					s.Tried, s.Err = time.Time{}, nil
				}
			})
			if len(c.Paths) == 0 || r.Mover == nil {
				continue
			}
			running, cancel := context.WithCancel(ctx)
			done := make(chan struct{})
			go func() {
				defer close(done)
				r.watcher(c).Run(running, c, seen)
			}()
			stop = func() { cancel(); <-done }
		}
	}
}

func (r *Runner) watcher(c egress.Takeover) *Watcher {
	return &Watcher{
		Mover: r.Mover, Echo: r.Echo, Log: r.Log,
		Saw: func() { r.set(func(s *State) { s.Seen = true }) },
		Took: func(err error) {
			if err == nil {
				var taken []netip.Addr
				for _, a := range c.Addresses {
					taken = append(taken, a.Address)
				}
				r.Await(taken)
			}
			r.set(func(s *State) { s.Tried, s.Err, s.Seen = time.Now(), err, err != nil && s.Seen })
		},
		Spared: func() { r.set(func(s *State) { s.Tried, s.Err, s.Seen = time.Time{}, nil, true }) },
	}
}

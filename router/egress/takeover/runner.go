package takeover

import (
	"context"
	"log/slog"
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
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-r.channel():
			stop()
			r.set(func(s *State) {
				s.Paths = len(c.Paths)
				if s.Err != nil { // of a watcher that has ended
					s.Tried, s.Err = time.Time{}, nil
				}
			})
			stop = func() {}
			if len(c.Paths) == 0 || r.Mover == nil {
				continue
			}
			w := Watcher{
				Mover: r.Mover, Echo: r.Echo, Log: r.Log,
				Took:   func(err error) { r.set(func(s *State) { s.Tried, s.Err = time.Now(), err }) },
				Spared: func() { r.set(func(s *State) { s.Tried, s.Err = time.Time{}, nil }) },
			}
			running, cancel := context.WithCancel(ctx)
			done := make(chan struct{})
			go func() {
				defer close(done)
				w.Run(running, c)
			}()
			stop = func() { cancel(); <-done }
		}
	}
}

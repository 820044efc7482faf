package takeover

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

type hangingMover struct{}

func (hangingMover) Take(ctx context.Context, _ []egress.SharedAddress) error {
	<-ctx.Done()
	return ctx.Err()
}

// TestTakeoverFailureEndsWithItsConfig replaces the configuration while a program runs for it: a
// failed attempt is not retried under the new one.
func TestTakeoverFailureEndsWithItsConfig(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var answers atomic.Bool
		echo := func(context.Context, egress.Path) error {
			if answers.Load() {
				return nil
			}
			return errors.New("no answer in time")
		}
		r := &Runner{Mover: hangingMover{}, Echo: echo, Changed: func() {}, Await: func([]netip.Addr) { t.Error("awaits addresses that were not taken") }, Log: slog.New(slog.DiscardHandler)}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.Run(ctx) }()
		defer func() { cancel(); <-done }()
		c := egress.Takeover{Paths: []egress.Path{{To: netip.MustParseAddr("169.254.80.1")}}, Interval: 250 * time.Millisecond, Fall: 4}
		r.Use(c)
		time.Sleep(time.Minute)
		c.Fall = 5
		answers.Store(true)
		r.Use(c)
		time.Sleep(time.Minute)
		if s := r.State(); s.Paths != 1 || s.Err != nil || !s.Tried.IsZero() {
			t.Errorf("%+v", s)
		}
	})
}

type mover func() error

func (m mover) Take(context.Context, []egress.SharedAddress) error { return m() }

// TestSeen has another node that is not there at first, that answers, and that dies: the state says
// whether it was seen, the same configuration again changes nothing, and taken addresses are
// awaited.
func TestSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var answers atomic.Bool
		var awaited, taken atomic.Int32
		r := &Runner{
			Mover: mover(func() error { taken.Add(1); return nil }), Changed: func() {}, Log: slog.New(slog.DiscardHandler),
			Await: func(a []netip.Addr) { awaited.Add(int32(len(a))) },
			Echo: func(context.Context, egress.Path) error {
				if answers.Load() {
					return nil
				}
				return errors.New("no answer in time")
			},
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.Run(ctx) }()
		defer func() { cancel(); <-done }()
		path := egress.Path{To: netip.MustParseAddr("169.254.80.1")}
		c := egress.Takeover{Paths: []egress.Path{path}, Interval: 250 * time.Millisecond, Fall: 4, Addresses: addresses}
		began := time.Now()
		r.Use(c)
		time.Sleep(10 * time.Second)
		if s := r.State(); s.Seen || !s.Since.Equal(began) || taken.Load() != 0 {
			t.Fatalf("before the other node answers: %+v", s)
		}
		answers.Store(true)
		time.Sleep(time.Second)
		r.Use(c)
		c.Fall = 2 // still the same other node
		r.Use(c)
		time.Sleep(time.Second)
		if s := r.State(); !s.Seen || !s.Since.Equal(began) {
			t.Fatalf("when it has answered: %+v", s)
		}
		// It dies early after a change of the configuration, and was seen before: no grace.
		answers.Store(false)
		c.Fall = 3
		r.Use(c)
		time.Sleep(2 * time.Second)
		if s := r.State(); s.Seen || s.Tried.IsZero() || taken.Load() != 1 || awaited.Load() != 1 {
			t.Fatalf("after its death: %+v, taken %d times, %d addresses awaited", s, taken.Load(), awaited.Load())
		}
		answers.Store(true)
		time.Sleep(time.Second)
		c.Paths = []egress.Path{{To: netip.MustParseAddr("169.254.90.1")}}
		answers.Store(false)
		r.Use(c)
		time.Sleep(time.Second)
		if s := r.State(); s.Seen {
			t.Errorf("another node than before was not seen: %+v", s)
		}
	})
}

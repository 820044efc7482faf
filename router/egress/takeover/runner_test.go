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
		r := &Runner{Mover: hangingMover{}, Echo: echo, Changed: func() {}, Log: slog.New(slog.DiscardHandler)}
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

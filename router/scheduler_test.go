package router

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestAskedAgainMeanwhile: an attempt that fails while it is asked for another one is not put off, since what it lacked may be there now.
func TestAskedAgainMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScheduler()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go s.run(ctx, func() {})
		for _, meanwhile := range []bool{true, false} {
			var attempts atomic.Int32
			s.set(object{key: "x", apply: func(context.Context) error {
				if attempts.Add(1) > 1 {
					return nil
				}
				if meanwhile {
					s.again("x")
				}
				return errors.New("not yet")
			}})
			synctest.Wait()
			if n := attempts.Load(); (n == 2) != meanwhile {
				t.Errorf("asked again meanwhile %v: %d attempts at once", meanwhile, n)
			}
			time.Sleep(2 * firstRetry)
			if n := attempts.Load(); n != 2 {
				t.Errorf("asked again meanwhile %v: %d attempts in all", meanwhile, n)
			}
		}
	})
}

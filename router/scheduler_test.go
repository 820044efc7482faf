package router

import (
	"context"
	"errors"
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
			began, attempts := time.Now(), []time.Duration{}
			s.set(object{key: "x", apply: func(context.Context) error {
				attempts = append(attempts, time.Since(began))
				if len(attempts) > 1 {
					return nil
				}
				if meanwhile {
					s.again("x")
				}
				return errors.New("not yet")
			}})
			synctest.Wait()
			if n := len(attempts); (n == 2) != meanwhile {
				t.Errorf("asked again meanwhile %v: attempts at once after %v", meanwhile, attempts)
			}
			time.Sleep(2 * firstRetry)
			if n := len(attempts); n != 2 {
				t.Errorf("asked again meanwhile %v: attempts after %v", meanwhile, attempts)
			}
		}
	})
}

package apply

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestAskedAgainMeanwhile: an attempt that fails while it is asked for another one is not put off,
// since what it lacked may be there now.
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

// TestReplacedWhileItWaits: an object waits for others of its stage, and is replaced before its
// turn comes.
func TestReplacedWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScheduler()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		for n := range parallel {
			s.set(object{key: fmt.Sprint("a", n), apply: func(context.Context) error { time.Sleep(time.Second); return nil }})
		}
		var former, next atomic.Int32
		s.set(object{key: "x", apply: func(context.Context) error { former.Add(1); return nil }})
		go s.run(ctx, func() {})
		synctest.Wait()
		s.set(object{key: "x", apply: func(context.Context) error { next.Add(1); return nil }})
		time.Sleep(time.Minute)
		if former.Load() != 0 || next.Load() != 1 {
			t.Errorf("the former one was worked on %d times, the next one %d times", former.Load(), next.Load())
		}
	})
}

// TestEarlierStageFirst: what comes during a pass for several stages is worked on in their order.
func TestEarlierStageFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScheduler()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s.set(object{key: "bgp", stage: StageBGP, apply: func(context.Context) error { time.Sleep(time.Second); return nil }})
		s.set(object{key: "prune", stage: StageRemoval, apply: func(context.Context) error { return nil }})
		go s.run(ctx, func() {})
		synctest.Wait()
		var order []string
		for stage, key := range map[Stage]string{StageRoutes: "routes", StageBGP: "bgp", StageRemoval: "removal"} {
			if key != "" {
				s.set(object{key: key, stage: stage, apply: func(context.Context) error { order = append(order, key); return nil }})
			}
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := fmt.Sprint(order); got != "[routes bgp removal]" {
			t.Errorf("worked on in the order %s", got)
		}
	})
}

// set makes an object be worked on soon, in place of what it was, and leaves the others.
func (s *scheduler) set(o object) {
	s.mu.Lock()
	all := []*object{&o}
	for key, other := range s.objects {
		if key != o.key {
			all = append(all, other)
		}
	}
	s.mu.Unlock()
	s.replace(all, func(other *object) bool { return other != &o })
}

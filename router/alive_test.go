package router

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestAlive: a router whose lock or scheduler hangs is not alive, and one with much to do is.
func TestAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &Router{work: newScheduler()}
		running, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); r.work.run(running, func() {}) }()
		ask := func(what string, alive bool) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := r.Alive(ctx); (err == nil) != alive {
				t.Errorf("%s: %v", what, err)
			}
		}
		ask("idle", true)
		r.mu.Lock()
		ask("the lock is held", false)
		time.AfterFunc(time.Second, r.mu.Unlock)
		ask("the lock is held for a second", true)

		// Much to do: more than the limit in all, and each object less.
		for _, name := range []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j"} {
			r.work.set(object{key: name, apply: func(context.Context) error { time.Sleep(8 * time.Second); return nil }})
		}
		time.Sleep(time.Second)
		ask("busy", true)
		time.Sleep(time.Minute)
		hang := make(chan struct{})
		r.work.set(object{key: "stuck", apply: func(context.Context) error { <-hang; return nil }})
		time.Sleep(time.Second)
		ask("an object hangs", false)
		close(hang)
		ask("it does not any more", true)
		stop()
		<-ended
		ask("the scheduler has ended", false)
	})
}

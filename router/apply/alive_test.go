package apply

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestAlive: a scheduler that hangs is not alive, and one with much to do is.
func TestAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newScheduler()
		running, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); s.run(running, func() {}) }()
		ask := func(what string, alive bool) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := s.alive(ctx); (err == nil) != alive {
				t.Errorf("%s: %v", what, err)
			}
		}
		ask("idle", true)
		// Much to do: more than the limit in all, and each object less.
		for _, name := range []string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j"} {
			s.set(object{key: name, apply: func(context.Context) error { time.Sleep(8 * time.Second); return nil }})
		}
		time.Sleep(time.Second)
		ask("busy", true)
		time.Sleep(time.Minute)
		hang := make(chan struct{})
		s.set(object{key: "stuck", apply: func(context.Context) error { <-hang; return nil }})
		time.Sleep(time.Second)
		ask("an object hangs", false)
		close(hang)
		ask("it does not any more", true)
		stop()
		<-ended
		ask("the scheduler has ended", false)
	})
}

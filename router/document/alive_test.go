package document

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestAlive: documents whose lock is not given back are not alive.
func TestAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Manager{}
		ask := func(what string, alive bool) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := m.Alive(ctx); (err == nil) != alive {
				t.Errorf("%s: %v", what, err)
			}
		}
		ask("idle", true)
		m.mu.Lock()
		ask("the lock is held", false)
		time.AfterFunc(time.Second, m.mu.Unlock)
		ask("the lock is held for a second", true)
	})
}

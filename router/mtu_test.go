package router

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// TestUnderlayMTU checks that a document without underlay.mtu follows the interface, and that one
// that asks for more than the interface has is refused when it is new.
func TestUnderlayMTU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		dir := t.TempDir()
		m.mtu.Store(1460)
		r, stop := m.boot(dir)
		used := func(when string, want int) {
			t.Helper()
			time.Sleep(2 * time.Second) // by the test's clock; the interface is read every second
			synctest.Wait()
			if got := target(r).Underlay.MTU; got != want {
				t.Errorf("%s: %d, want %d", when, got, want)
			}
		}
		accept(t, r, base)
		used("interface of 1460", 1460)
		for _, k := range []struct{ of, want int32 }{{9001, 1500}, {0, 1500}, {1400, 1400}, {576, 1280}, {1500, 1500}, {1460, 1460}} {
			m.mtu.Store(k.of)
			used("changed", int(k.want))
		}
		given := strings.Replace(base, "address: 10.9.0.4", "address: 10.9.0.4, mtu: 1461", 1)
		if _, err := r.Apply(t.Context(), "tester", &isthmusv1.ApplyRequest{Source: text(given)}); err == nil || !strings.Contains(err.Error(), "underlay.mtu: is more than the MTU of interface eth0, 1460") {
			t.Errorf("got %v", err)
		}
		m.mtu.Store(1500)
		accept(t, r, given)
		used("given", 1461)
		stop()

		// An accepted document stays when the interface is smaller at the next start.
		m.mtu.Store(1400)
		r, stop = m.boot(dir)
		defer stop()
		used("started again", 1461)
		if s := r.documents.Status(); s.Invalid != nil {
			t.Error(s.Invalid)
		}
		// It can be edited, and comes back by a rollback.
		accept(t, r, strings.Replace(given, "10.7.0.0/16", "10.8.0.0/16", 1))
		used("edited", 1461)
		accept(t, r, base)
		used("corrected", 1400)
		if _, err := r.Apply(t.Context(), "tester", &isthmusv1.ApplyRequest{Source: text(given)}); err == nil || !strings.Contains(err.Error(), "underlay.mtu: is more than") {
			t.Errorf("new again: %v", err)
		}
		if _, err := r.Rollback(t.Context(), "tester", &isthmusv1.RollbackRequest{}); err != nil {
			t.Errorf("rollback: %v", err)
		}
		used("rolled back", 1461)
	})
}

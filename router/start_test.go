package router

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/store"
)

// deadly has generation 2, the document changed, accepted within confirm, and not completely
// applied when the daemon died.
func deadly(t *testing.T, m *machine, dir, changed string, confirm time.Duration) {
	t.Helper()
	r, stop := m.boot(dir)
	accept(t, r, base)
	if got := r.o.Store.Carry(); got != (store.Carry{Carried: 1}) {
		t.Fatalf("after an applied document: %+v", got)
	}
	if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: confirm}, text(changed)); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	// As it was before the pass ended.
	if err := r.o.Store.SetCarry(store.Carry{Carried: 1}); err != nil {
		t.Fatal(err)
	}
	stop()
}

// die starts a daemon that ends before it runs.
func die(m *machine, dir string) {
	r := m.begin(dir, false)
	r.o.Store.Close()
}

func conditions(r *Router) string {
	var out []string
	for _, c := range status(r).GetConditions() {
		out = append(out, c.Type+": "+c.Message)
	}
	return strings.Join(out, "\n")
}

var changedBase = strings.Replace(base, "10.7.0.0", "10.8.0.0", 1)

// TestDeadlyGenerationIsHeldBack checks that after two starts that died under a generation, the
// previous one is applied, until another document is.
func TestDeadlyGenerationIsHeldBack(t *testing.T) {
	for name, mend := range map[string]func(*testing.T, *Router) uint64{
		"apply": func(t *testing.T, r *Router) uint64 {
			return accept(t, r, strings.Replace(base, "10.7.0.0", "10.9.0.0", 1))
		},
		"the same once more": func(t *testing.T, r *Router) uint64 { return accept(t, r, changedBase) },
		"rollback": func(t *testing.T, r *Router) uint64 {
			g, _, err := r.documents.Rollback(context.Background(), document.Change{Author: "tester"}, 0)
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			return g
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, dir := newMachine(t), t.TempDir()
				deadly(t, m, dir, changedBase, 0)
				die(m, dir)
				die(m, dir)
				for range 3 { // and at each start from now on, stopped or killed
					m.static = nil
					r, stop := m.boot(dir)
					synctest.Wait()
					if len(m.static) != 1 || m.static[0].Key.String() != "10.7.0.0/16" {
						t.Errorf("routes are %v", m.static)
					}
					if got := conditions(r); !strings.Contains(got, "GenerationHeldBack: the daemon died again and again while it carried out generation 2, and generation 1 is carried out in its place: apply another document, or `isthmus rollback`") {
						t.Errorf("conditions: %s", got)
					}
					if s := status(r); s.Generation != 2 || s.AppliedGeneration != 1 {
						t.Errorf("generation %d, applied %d", s.Generation, s.AppliedGeneration)
					}
					if g, _, doc, err := r.documents.Document(0); err != nil || g != 1 || doc != base {
						t.Errorf("generation %d is reported as applied: %v", g, err)
					}
					stop()
					die(m, dir)
				}
				r, stop := m.boot(dir)
				synctest.Wait()
				if g := mend(t, r); g != 3 {
					t.Errorf("generation %d", g)
				}
				if got := conditions(r); got != "" || status(r).AppliedGeneration != 3 {
					t.Errorf("afterwards: %s", got)
				}
				stop()
				r, stop = m.boot(dir)
				defer stop()
				if got := conditions(r); got != "" {
					t.Errorf("after a restart: %s", got)
				}
			})
		})
	}
}

// TestOneDeathIsNone checks that a generation is tried again after a start that died, and then
// counts as applied, whatever dies later.
func TestOneDeathIsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		deadly(t, m, dir, changedBase, 0)
		die(m, dir)
		r, stop := m.boot(dir)
		synctest.Wait()
		if got := r.o.Store.Carry(); got != (store.Carry{Carried: 2}) || conditions(r) != "" {
			t.Errorf("%+v, %s", got, conditions(r))
		}
		stop()
		for range 5 {
			die(m, dir)
		}
		r, stop = m.boot(dir)
		defer stop()
		if got := conditions(r); got != "" {
			t.Error(got)
		}
	})
}

// TestStoppedIsNotDead checks that a daemon that is stopped before a generation is applied has not
// died under it.
func TestStoppedIsNotDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		deadly(t, m, dir, changedBase, 0)
		for range 5 {
			r := m.begin(dir, false)
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			if err := r.documents.NoteCarried(ctx); err != nil {
				t.Fatal(err)
			}
			r.o.Store.Close()
		}
		r, stop := m.boot(dir)
		defer stop()
		if got := conditions(r); got != "" {
			t.Error(got)
		}
	})
}

// TestDeadlyToTheEnd checks that nothing is applied when the previous generation ends the daemon as
// well.
func TestDeadlyToTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		deadly(t, m, dir, changedBase, 0)
		for range 4 {
			die(m, dir)
		}
		m.taken()
		r, stop := m.boot(dir)
		synctest.Wait()
		expect(t, m)
		if got := conditions(r); !strings.Contains(got, "nothing is carried out, and what runs stays as it is") {
			t.Errorf("conditions: %s", got)
		}
		if g := accept(t, r, base); g != 3 || conditions(r) != "" {
			t.Errorf("generation %d, %s", g, conditions(r))
		}
		stop()
	})
}

// TestDeadlyGenerationGoesBack checks that an unconfirmed document is rolled back in time, whether
// the daemon dies meanwhile or not.
func TestDeadlyGenerationGoesBack(t *testing.T) {
	for name, deaths := range map[string]int{"once": 1, "held back": 2, "to the end": 6} {
		for when, late := range map[string]bool{"in time": false, "late": true} {
			t.Run(name+" "+when, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m, dir := newMachine(t), t.TempDir()
					deadly(t, m, dir, changedBase, time.Minute)
					for range deaths {
						die(m, dir)
					}
					if late {
						time.Sleep(2 * time.Minute)
					}
					r, stop := m.boot(dir)
					defer stop()
					time.Sleep(2 * time.Minute)
					synctest.Wait()
					s := status(r)
					if g, _, doc, err := r.documents.Document(0); err != nil || g != 3 || doc != base || s.AppliedGeneration != 3 || len(s.Conditions) > 0 {
						t.Errorf("generation %d is applied: %v, %v", g, err, s)
					}
					if m.static[0].Key.String() != "10.7.0.0/16" {
						t.Errorf("routes are %v", m.static)
					}
				})
			})
		}
	}
}

// TestSafeStart checks that with -safe nothing is applied, but documents are accepted.
func TestSafeStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		deadly(t, m, dir, changedBase, 0)
		m.taken()
		r := m.begin(dir, true)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- r.Run(ctx) }()
		time.Sleep(3 * resyncPace)
		if g := accept(t, r, base); g != 3 {
			t.Errorf("generation %d", g)
		}
		if _, set := r.applier.Wanted(); set {
			t.Error("work is waiting for a driver")
		}
		time.Sleep(3 * resyncPace)
		expect(t, m)
		if got := conditions(r); !strings.HasPrefix(got, "SafeStart: ") {
			t.Errorf("conditions: %s", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		r.o.Store.Close()
		r, stop := m.boot(dir)
		defer stop()
		synctest.Wait()
		if status(r).AppliedGeneration != 3 || conditions(r) != "" {
			t.Errorf("without it: %v", status(r))
		}
	})
}

// TestStartWithoutDisk checks that a disk on which nothing can be stored keeps the daemon neither
// from starting nor from applying documents.
func TestStartWithoutDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		deadly(t, m, dir, changedBase, 0)
		// A directory in its place prevents the temporary file, for root too.
		if err := os.Mkdir(filepath.Join(dir, "carry.tmp"), 0o700); err != nil {
			t.Fatal(err)
		}
		r, stop := m.boot(dir)
		defer stop()
		synctest.Wait()
		if s := status(r); s.AppliedGeneration != 2 {
			t.Errorf("status %v", s)
		}
	})
}

// TestHeldBackIsAppliedOnceMore checks that a document that is held back is accepted when it is
// applied again, although nothing in the target would change.
func TestHeldBackIsAppliedOnceMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		commented := base + "# as before\n"
		deadly(t, m, dir, commented, 0)
		die(m, dir)
		die(m, dir)
		r, stop := m.boot(dir)
		defer stop()
		synctest.Wait()
		if g := accept(t, r, commented); g != 3 || conditions(r) != "" {
			t.Errorf("generation %d, %s", g, conditions(r))
		}
	})
}

package router

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// slow is a machine that blocks one question for its capabilities.
type slow struct {
	*machine
	asked, answer chan struct{}
}

func (s slow) Has(string) bool {
	select {
	case s.asked <- struct{}{}:
		<-s.answer
	default:
	}
	return true
}

// TestPlanningHoldsNothingUp checks that while the document of one caller is planned, the node
// returns its status and accepts another document, and that the first one is planned again from
// that.
func TestPlanningHoldsNothingUp(t *testing.T) {
	m := newMachine(t)
	r, stop := m.boot(t.TempDir())
	defer stop()
	s := slow{m, make(chan struct{}, 1), make(chan struct{})}
	r.documents.Plan.Can = s.Has
	type outcome struct {
		generation uint64
		changes    []plan.Change
		err        error
	}
	first := make(chan outcome)
	go func() {
		g, changes, err := r.documents.Apply(context.Background(), document.Change{Author: "slow"}, text(strings.Replace(base, "10.7.0.0", "10.8.0.0", 1)))
		first <- outcome{g, changes, err}
	}()
	for len(s.asked) == 0 {
		status(r)
	}
	// Only one question can block, so that others are answered at once.
	if problems, _, err := r.documents.Validate(context.Background(), text(base)); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	if g, _, err := r.documents.Apply(context.Background(), document.Change{Author: "quick"}, text(base)); err != nil || g != 1 {
		t.Errorf("the quick one became generation %d: %v", g, err)
	}
	close(s.answer)
	got := <-first
	if got.err != nil || got.generation != 2 || len(got.changes) != 2 {
		t.Errorf("the slow one became generation %d with changes %v: %v", got.generation, got.changes, got.err)
	}
	zero := uint64(0)
	if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "late", Expected: &zero}, text(base)); !errors.Is(err, store.ErrStale) {
		t.Errorf("a writer that has seen an old generation: %v", err)
	}
}

// TestCallerGone checks that a document whose caller has gone is neither checked to the end nor
// accepted.
func TestCallerGone(t *testing.T) {
	m := newMachine(t)
	r, stop := m.boot(t.TempDir())
	defer stop()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := r.documents.Validate(ctx, text(base)); !errors.Is(err, context.Canceled) {
		t.Errorf("validate: %v", err)
	}
	if g, _, err := r.documents.Apply(ctx, document.Change{Author: "tester"}, text(base)); !errors.Is(err, context.Canceled) || g != 0 {
		t.Errorf("apply: generation %d, %v", g, err)
	}
}

// TestProductIsRefusedEverywhere checks that a short text that multiplies is a problem in every
// call that takes one, before anything is made of it.
func TestProductIsRefusedEverywhere(t *testing.T) {
	var sources, destinations []string
	for i := range 400 {
		sources, destinations = append(sources, fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255)), append(destinations, fmt.Sprintf("20.%d.%d.0/24", i>>8, i&255))
	}
	bomb := fmt.Sprintf("{name: y, sources: [%s], destinations: [%s], pool: p}", strings.Join(sources, ", "), strings.Join(destinations, ", "))
	doc := strings.Replace(base, "policies: [", "policies: ["+bomb+", ", 1)
	m := newMachine(t)
	r, stop := m.boot(t.TempDir())
	defer stop()
	if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester"}, text(base)); err != nil {
		t.Fatal(err)
	}
	told := func(what string, problems spec.Problems) {
		if len(problems) != 1 || !strings.Contains(problems[0].Rule, "makes 160000 rules") {
			t.Errorf("%s: %v", what, problems)
		}
	}
	problems, _, err := r.documents.Validate(context.Background(), text(doc))
	if err != nil {
		t.Error(err)
	}
	told("validate", problems)
	_, _, _, err = r.documents.Preview(context.Background(), netip.Addr{}, text(doc))
	problems, _ = errors.AsType[spec.Problems](err)
	told("plan", problems)
	_, _, err = r.documents.Apply(context.Background(), document.Change{Author: "tester"}, text(doc))
	problems, _ = errors.AsType[spec.Problems](err)
	told("apply", problems)
	e := spec.Edit{}
	e.Read([]byte("policies: [" + bomb + "]"))
	_, _, err = r.documents.Edit(context.Background(), document.Change{Author: "tester"}, e)
	problems, _ = errors.AsType[spec.Problems](err)
	told("edit", problems)
}

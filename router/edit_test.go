package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

var editable = strings.Replace(base, "egress: {pools: [{name: p, addresses: [{address: 10.9.0.5}]}], policies: [{name: x, sources: [10.0.0.0/8], pool: p}]}", `egress:
  pools: [{name: p, addresses: [{address: 10.9.0.5}]}]
  policies:
  # everybody
  - {name: x, sources: [10.0.0.0/8], pool: p}
  - {name: m, action: no-nat, sources: [10.7.0.0/16], destinations: [10.66.0.0/16]} # inside
`, 1)

// ledger returns the ledger of the stored document.
func ledger(r *Router) []byte {
	now, _ := r.o.Store.Current()
	return now.Ledger
}

// planned returns the target without tunnels, because their secrets are in another store.
func planned(r *Router) plan.Target {
	t := target(r)
	t.Tunnels = nil
	if len(t.NAT.Policies) == 0 {
		t.NAT.Policies = nil
	}
	return t
}

// TestEditIsApply checks that an edit has all effects of applying the edited document, also on what
// restarts.
func TestEditIsApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, other, dir := newMachine(t), newMachine(t), t.TempDir()
		r, stop := one.boot(dir)
		defer func() { stop() }()
		whole, stopWhole := other.boot(t.TempDir())
		defer stopWhole()
		accept(t, r, editable)
		accept(t, whole, editable)
		one.taken()
		for i, q := range []*isthmusv1.EditPoliciesRequest{
			{Text: "policies: [{name: y, sources: [10.1.0.0/16], pool: p}]"},
			{Text: "policies: [{name: y, sources: [10.1.0.0/16], pool: p}]"}, // the same
			{Text: "policies: [{name: a, action: no-nat, sources: [10.7.0.0/16], destinations: [10.66.0.0/17]}]"},
			{Delete: []string{"m"}, Message: "NET-1"},
			{Set: []*isthmusv1.EgressPolicy{{Name: "x", Action: "deny", Sources: []string{"10.0.0.0/8"}}, {Name: "0", Sources: []string{"10.4.0.0/16"}, Pool: "p"}}, Delete: []string{"y", "a"}},
			{Text: "policies: [{name: r, action: redirect, sources: [10.8.0.0/16], to: 10.7.0.9:80, protocol: tcp, probes: {}}]"},
			{Text: "policies: [{name: r, action: redirect, sources: [10.8.0.0/16], to: 10.7.0.8:80, protocol: tcp, probes: {interval: 9s}}]"},
			{Delete: []string{"r", "x", "0"}},
			{Text: "policies: [{name: x, sources: [10.0.0.0/8], pool: p}]"},
		} {
			was := one.nat
			a, err := r.EditPolicies(t.Context(), "tester", q)
			if err != nil {
				t.Fatalf("edit %d: %v", i, err)
			}
			synctest.Wait()
			g, _, doc, err := r.documents.Document(0)
			if err != nil || g != a.Generation {
				t.Fatalf("edit %d: generation %d, %v", i, g, err)
			}
			b, err := whole.Apply(t.Context(), "tester", &isthmusv1.ApplyRequest{Source: text(doc), Message: q.Message})
			if err != nil {
				t.Fatalf("edit %d: %v\n%s", i, err, doc)
			}
			synctest.Wait()
			if fmt.Sprint(a.Changes) != fmt.Sprint(b.Changes) || a.Generation != b.Generation {
				t.Errorf("edit %d: generation %d with %v, want %d with %v", i, a.Generation, a.Changes, b.Generation, b.Changes)
			}
			if got, want := planned(r), planned(whole); !reflect.DeepEqual(got, want) || !bytes.Equal(ledger(r), ledger(whole)) {
				t.Errorf("edit %d: differs from applying in %+v", i, plan.Diff(got, want))
			}
			if !one.nat.Equal(other.nat) {
				t.Errorf("edit %d: %+v, want %+v", i, one.nat, other.nat)
			}
			if got := one.taken(); len(got) != len(a.Changes) && (len(got) > 1 || len(a.Changes) == 0) || one.nat.Equal(was) != (len(a.Changes) == 0) {
				t.Errorf("edit %d wrote %v for %v", i, got, a.Changes)
			}
			if h := r.o.Store.History(); len(a.Changes) > 0 && h[0].Message != q.Message {
				t.Errorf("edit %d: the history has the reason %q", i, h[0].Message)
			}
			if s := status(r); s.GetAppliedGeneration() != a.Generation {
				t.Errorf("edit %d: %v", i, s)
			}
			if i == 4 {
				stop()
				r, stop = one.boot(dir)
				synctest.Wait()
				if got := one.taken(); !reflect.DeepEqual(planned(r), planned(whole)) || slices.Contains(got, "nat") {
					t.Errorf("after a restart %v", got)
				}
			}
		}
		if _, _, doc, _ := r.documents.Document(0); !strings.Contains(doc, "# everybody") {
			t.Errorf("the comment is lost:\n%s", doc)
		}
		if h := r.o.Store.History(); h[0].Reason != "policies x" || h[3].Reason != "policies r" || h[4].Reason != "policies x, 0, y and 1 more" {
			t.Errorf("history %+v", h)
		}
	})
}

func TestEditRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		y := spec.Edit{}
		y.Read([]byte("policies: [{name: y, sources: [10.1.0.0/16], pool: p}]"))
		if _, _, err := r.documents.Edit(context.Background(), document.Change{Author: "tester"}, y); !errors.Is(err, api.ErrPrecondition) {
			t.Errorf("without a document: %v", err)
		}
		g := accept(t, r, editable)
		m.taken()
		stale := g + 1
		for what, c := range map[string]struct {
			edit     spec.Edit
			expected *uint64
			is       error
			as       any
		}{
			"stale":   {y, &stale, store.ErrStale, nil},
			"unknown": {spec.Edit{Delete: []string{"y"}}, nil, nil, new(spec.Problems)},
		} {
			if _, _, err := r.documents.Edit(context.Background(), document.Change{Author: "tester", Expected: c.expected}, c.edit); c.is != nil && !errors.Is(err, c.is) || c.as != nil && !errors.As(err, c.as) {
				t.Errorf("%s: %v", what, err)
			}
		}
		// A dry run returns the changes of the edit.
		var said []plan.Change
		for _, dry := range []bool{true, false} {
			got, changes, err := r.documents.Edit(context.Background(), document.Change{Author: "tester", Expected: &g, Confirm: time.Minute, Dry: dry}, y)
			if err != nil || len(changes) != 1 || (got == g) != dry || !dry && fmt.Sprint(changes) != fmt.Sprint(said) {
				t.Errorf("dry %v: generation %d, %v, %v", dry, got, changes, err)
			}
			said = changes
			synctest.Wait()
			if dry {
				expect(t, m)
			}
		}
		expect(t, m, "nat")
		time.Sleep(2 * time.Minute)
		expect(t, m, "nat")
		if _, _, doc, _ := r.documents.Document(0); doc != editable {
			t.Errorf("an unconfirmed edit was not rolled back:\n%s", doc)
		}
	})
}

// TestEffectiveSpec checks that the effective document is that of the present one, and that
// applying it changes nothing.
func TestEffectiveSpec(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMachine(t)
		r, stop := m.boot(t.TempDir())
		defer stop()
		if _, err := r.EffectiveSpec(t.Context()); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("without a document: %v", err)
		}
		accept(t, r, editable)
		synctest.Wait()
		s, err := r.EffectiveSpec(t.Context())
		if err != nil || !strings.Contains(s.Text, "mtu: 1500\n") || s.Generation != 1 || s.Spec.GetUnderlay().GetMtu() != 1500 {
			t.Fatalf("%v: %v", err, s)
		}
		p, err := r.Plan(t.Context(), text(s.Text))
		if err != nil || len(p.Changes) > 0 {
			t.Errorf("the effective document changes %v (%v)", p.GetChanges(), err)
		}
	})
}

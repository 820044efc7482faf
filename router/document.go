package router

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// Daemon is the author of what the daemon does on its own.
const Daemon = "isthmusd"

// source is a document as it came, with its text as it will be kept.
type source struct {
	doc      spec.Document
	problems spec.Problems
	text     string
	awaits   bool // secrets that are not stored yet are no problem
}

func read(src *isthmusv1.Source) (source, error) {
	if m := src.GetSpec(); m != nil {
		text, err := spec.Encode(m)
		return source{doc: spec.FromMessage(m), problems: spec.Fits(text), text: text}, err
	}
	d, problems := spec.Decode([]byte(src.GetText()))
	return source{doc: d, problems: problems, text: src.GetText()}, nil
}

// basis is what a plan is made from. Nothing in it is changed later, so that it can be used without the lock.
type basis struct {
	version uint64 // of the router's
	present store.Revision
	carried store.Revision
	dying   bool
	spec    *spec.Spec
	target  plan.Target
	ledger  plan.Ledger
}

func (r *Router) basis() basis {
	r.mu.Lock()
	defer r.mu.Unlock()
	return basis{r.version, r.present, r.carried(), r.dying, r.spec, r.target, r.ledger}
}

// attempts is how often a plan is made for a change while others come between.
const attempts = 5

// change plans without the lock, so that a document which takes long holds up nothing else, and has commit carry it out with the
// lock if what it was planned from is still so; else it plans again. make returns what is to be carried out; nil: nothing is.
func (r *Router) change(make func(basis) (commit func() error, err error)) (uint64, error) {
	for range attempts {
		b := r.basis()
		commit, err := make(b)
		if err != nil || commit == nil {
			return b.present.Generation, err
		}
		r.mu.Lock()
		if r.version != b.version {
			r.mu.Unlock()
			continue
		}
		err = commit()
		generation := r.present.Generation
		r.mu.Unlock()
		return generation, err
	}
	return r.basis().present.Generation, fmt.Errorf("%w: other changes came before this one could be carried out; try again", store.ErrStale)
}

// planNew is plan for a document that a caller brings. Its secrets must fit the fields that name them; a document that was accepted stays
// what it is.
func (r *Router) planNew(ctx context.Context, s source, b basis) (*spec.Spec, plan.Target, plan.Ledger, spec.Problems, error) {
	checked, target, ledger, problems, err := r.plan(ctx, s.doc, s.problems, b.present.Ledger, s.awaits)
	if err != nil || len(problems) > 0 {
		return checked, target, ledger, problems, err
	}
	for _, u := range checked.Secrets {
		ref, err := r.Store.Ref(u.Name)
		if err != nil {
			continue // it has gone meanwhile, which version says
		}
		value, err := r.Store.Lookup(ref)
		if err != nil {
			continue
		}
		if err := u.Kind.Check(value); err != nil {
			problems = append(problems, spec.Problem{Path: u.Path, Value: u.Name, Line: checked.Line(u.Path), Rule: "is a secret that does not fit: " + err.Error(), Remedy: "set it with `isthmus secret set " + u.Name + "`"})
		}
	}
	return checked, target, ledger, spec.Join(problems), nil
}

// validate returns what is wrong with a document, and when nothing is, what to know about it.
func (r *Router) validate(ctx context.Context, src *isthmusv1.Source) (problems, noted spec.Problems, err error) {
	s, err := read(src)
	if err != nil {
		return nil, nil, err
	}
	checked, target, _, problems, err := r.planNew(ctx, s, r.basis())
	if err != nil {
		return nil, nil, err
	}
	return problems, r.noted(checked, target), nil
}

// preview returns what applying a document would change, and the generation that this is based on, and what to know about
// the document. A bad one is an error that is spec.Problems.
func (r *Router) preview(ctx context.Context, src *isthmusv1.Source) (uint64, []plan.Change, spec.Problems, error) {
	s, err := read(src)
	if err != nil {
		return 0, nil, nil, err
	}
	b := r.basis()
	checked, target, _, problems, err := r.planNew(ctx, s, b)
	if err != nil {
		return b.present.Generation, nil, nil, err
	}
	if len(problems) > 0 {
		return b.present.Generation, nil, nil, problems
	}
	return b.present.Generation, r.cut(r.counted(plan.Diff(b.target, target)), b.target, target, api.Caller(ctx)), r.noted(checked, target), nil
}

// apply makes a document the wanted one. expected is the generation that the writer has seen; nil: not checked. With
// confirm > 0 the former document comes back by itself unless confirm is called in time. The same document again
// changes nothing and makes no new generation.
func (r *Router) apply(ctx context.Context, src *isthmusv1.Source, expected *uint64, confirm time.Duration, author string) (uint64, []plan.Change, error) {
	s, err := read(src)
	if err != nil {
		return 0, nil, err
	}
	return r.accept(ctx, s, expected, confirm, author, "apply")
}

func (r *Router) accept(ctx context.Context, s source, expected *uint64, confirm time.Duration, author, reason string) (generation uint64, changes []plan.Change, err error) {
	generation, err = r.change(func(b basis) (func() error, error) {
		if err := b.expects(expected); err != nil {
			return nil, err
		}
		checked, target, ledger, problems, err := r.planNew(ctx, s, b)
		if err != nil {
			return nil, err
		}
		if len(problems) > 0 {
			return nil, problems
		}
		changes = r.cut(r.counted(plan.Diff(b.target, target)), b.target, target, api.Caller(ctx))
		if s.text == b.present.Text && len(changes) == 0 && b.spec != nil && !b.dying {
			return nil, nil
		}
		encoded, err := json.Marshal(ledger)
		if err != nil {
			return nil, fmt.Errorf("encoding ledger: %w", err)
		}
		return func() error {
			if err := ctx.Err(); err != nil {
				return err // who has gone would not hear of it
			}
			err := r.commit(store.Revision{Author: author, Reason: reason, Changes: uint32(len(changes)), Text: s.text, Ledger: encoded}, confirm)
			if err == nil {
				r.use(checked, target, ledger)
			}
			return err
		}, nil
	})
	if _, bad := errors.AsType[spec.Problems](err); bad {
		changes = nil
	}
	return generation, changes, err
}

// edit changes single policies of the present document; dry only says what would change.
func (r *Router) edit(ctx context.Context, e spec.Edit, expected *uint64, confirm time.Duration, dry bool, author string) (generation uint64, changes []plan.Change, err error) {
	generation, err = r.change(func(b basis) (func() error, error) {
		if err := b.expects(expected); err != nil {
			return nil, err
		}
		if b.spec == nil {
			return nil, fmt.Errorf("%w: there is no document that can be edited; apply one", api.ErrPrecondition)
		}
		edited, problems, err := e.Apply(b.spec, b.carried.Text)
		if len(problems) > 0 {
			return nil, problems
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", api.ErrPrecondition, err)
		}
		target := plan.Amend(b.target, edited.Spec, edited.Names)
		changes = r.counted(plan.DiffPolicies(b.target, target, edited.Names))
		if dry || len(edited.Names) == 0 {
			return nil, nil
		}
		reason := "policies " + strings.Join(edited.Names, ", ")
		if n := len(edited.Names); n > maxNamed {
			reason = fmt.Sprintf("policies %s and %d more", strings.Join(edited.Names[:maxNamed], ", "), n-maxNamed)
		}
		return func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			err := r.commit(store.Revision{Author: author, Reason: reason, Changes: uint32(len(changes)), Text: edited.Text, Ledger: b.carried.Ledger}, confirm)
			if err == nil {
				r.use(edited.Spec, target, b.ledger)
			}
			return err
		}, nil
	})
	if _, bad := errors.AsType[spec.Problems](err); bad {
		changes = nil
	}
	return generation, changes, err
}

// maxNamed is how many policies the reason of an edit names.
const maxNamed = 3

// expects refuses a writer who has seen another generation than the present one. Nil: not checked.
func (b basis) expects(generation *uint64) error {
	if generation != nil && *generation != b.present.Generation {
		return fmt.Errorf("%w: expected %d, present is %d", store.ErrStale, *generation, b.present.Generation)
	}
	return nil
}

// commit makes a revision the present one. With confirm > 0 it is so until then.
func (r *Router) commit(next store.Revision, confirm time.Duration) error {
	next.Time = time.Now()
	if confirm > 0 {
		// Before the first document there is none to go back to: then everything is removed.
		next.ConfirmBy, next.RevertTo = next.Time.Add(confirm), r.present.Generation
		// A chain of unconfirmed documents goes back to the last one that an operator stood by.
		if !r.present.ConfirmBy.IsZero() {
			next.RevertTo = r.present.RevertTo
		}
	}
	generation, err := r.Store.Accept(r.present.Generation, next)
	if err != nil {
		return fmt.Errorf("storing document: %w", err)
	}
	next.Generation = generation
	r.present, r.stuck, r.unstored, r.held, r.dying = next, nil, nil, nil, false
	r.version++
	if next.ConfirmBy.IsZero() {
		r.dropFormer()
	}
	r.Log.Info("accepted", "generation", generation, "author", next.Author, "reason", next.Reason, "changes", next.Changes)
	return nil
}

// dropFormer forgets the former values of secrets, since a document was accepted with the present ones.
func (r *Router) dropFormer() {
	if err := r.Store.DropFormer(); err != nil {
		r.Log.Warn("forgetting former values of secrets failed", "err", err)
	}
}

// confirm keeps a generation that was applied with a confirm timeout.
func (r *Router) confirm(generation uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.unstored != nil && generation == r.present.Generation {
		return fmt.Errorf("%w: generation %d was not confirmed in time, generation %d is carried out again", api.ErrPrecondition, generation, r.present.RevertTo)
	}
	if err := r.Store.Confirm(generation); err != nil {
		return err
	}
	r.present.ConfirmBy, r.present.RevertTo = time.Time{}, 0
	r.dropFormer()
	r.endOutlived()
	return nil
}

// endOutlived ends the flows that waited for the present document to be kept.
func (r *Router) endOutlived() {
	r.outliving.add(r.outlived(r.target), r.target.NAT)
	r.work.again("nat") // which ends them when the rules use their addresses no more
}

// goBack applies an earlier document again; generation 0 is the one before the present one.
func (r *Router) goBack(ctx context.Context, generation uint64, expected *uint64, author string) (uint64, []plan.Change, error) {
	present := r.basis().present.Generation
	if generation == 0 {
		history := r.Store.History()
		i := slices.IndexFunc(history, func(h store.Revision) bool { return h.Generation < present })
		if i < 0 {
			return present, nil, fmt.Errorf("%w: there is no earlier document", api.ErrPrecondition)
		}
		generation = history[i].Generation
		if expected == nil {
			expected = &present // else another one could be the earlier one by now
		}
	}
	old, err := r.Store.Revision(generation)
	if err != nil {
		return present, nil, err
	}
	d, problems := spec.Decode([]byte(old.Text))
	return r.accept(ctx, source{doc: d, problems: problems, text: old.Text}, expected, 0, author, fmt.Sprintf("rollback to %d", generation))
}

// revertIfDue goes back when the present document, which makes this target, was not confirmed in time.
func (r *Router) revertIfDue(now time.Time, from plan.Target) {
	if r.present.ConfirmBy.IsZero() || now.Before(r.present.ConfirmBy) {
		return
	}
	if r.stuck == nil {
		r.Log.Warn("not confirmed in time, going back", "generation", r.present.Generation, "to", r.present.RevertTo)
	}
	if err := r.revert(from); err != nil {
		if r.stuck == nil || r.stuck.Error() != err.Error() {
			r.Log.Error("going back failed; trying again", "err", err)
		}
		r.stuck = err
	}
}

// revert carries out the document that the present one was to be confirmed against, and then stores that: an operator who is locked
// out does not wait for a disk that is full.
func (r *Router) revert(from plan.Target) error {
	if r.unstored == nil && r.present.RevertTo == 0 {
		r.unstored = &store.Revision{Author: Daemon, Reason: "not confirmed, back to no document", Changes: uint32(len(plan.Diff(from, plan.Nothing(r.machine(), spec.Access{})))), Ledger: r.present.Ledger}
		r.held = nil
		r.clear(from)
	}
	if r.unstored == nil {
		old, err := r.Store.Revision(r.present.RevertTo)
		if err != nil {
			return err
		}
		d, problems := spec.Decode([]byte(old.Text))
		checked, target, ledger, problems, err := r.plan(context.Background(), d, problems, r.present.Ledger, awaits(old))
		if err != nil {
			return err
		}
		if len(problems) > 0 {
			return problems
		}
		encoded, err := json.Marshal(ledger)
		if err != nil {
			return fmt.Errorf("encoding ledger: %w", err)
		}
		r.unstored = &store.Revision{
			Author: Daemon, Reason: fmt.Sprintf("not confirmed, back to %d", r.present.RevertTo),
			Changes: uint32(len(plan.Diff(from, target))), Text: old.Text, Ledger: encoded,
		}
		r.had = append(slices.Clip(r.had), from.NAT.Pools...)
		r.held = nil
		r.use(checked, target, ledger)
	}
	if err := r.commit(*r.unstored, 0); err != nil {
		return err
	}
	if r.spec != nil {
		r.endOutlived()
	}
	return nil
}

// carried is what the node is told to do: the present document, unless that was not confirmed and could not be replaced.
func (r *Router) carried() store.Revision {
	if r.unstored != nil {
		return *r.unstored
	}
	if r.held != nil {
		return *r.held
	}
	return r.present
}

// crowded is how many changes of another text a document may be while others come.
const crowded = 32

// settle has the present document need no other file when no other one has come for a while, or after many changes.
func (r *Router) settle(now time.Time) error {
	r.mu.Lock()
	changes := crowded
	if now.Sub(r.present.Time) >= settleAfter {
		changes = 1
	}
	r.mu.Unlock()
	return r.Store.Settle(changes)
}

// document returns an accepted document as message and text; generation 0 is the one that is carried out.
func (r *Router) document(generation uint64) (uint64, *isthmusv1.Spec, string, error) {
	r.mu.Lock()
	if generation == 0 && r.unstored != nil {
		generation = r.present.RevertTo
	} else if generation == 0 && r.held != nil {
		generation = r.held.Generation
	}
	r.mu.Unlock()
	var rev store.Revision
	var err error
	if generation == 0 {
		var ok bool
		if rev, ok = r.Store.Current(); !ok {
			return 0, nil, "", fmt.Errorf("%w: no document has been applied yet", api.ErrNotFound)
		}
	} else if rev, err = r.Store.Revision(generation); err != nil {
		return 0, nil, "", err
	}
	d, _ := spec.Decode([]byte(rev.Text))
	return rev.Generation, d.Message, rev.Text, nil
}

// secretsChanged plans the present document again: what uses a changed secret differs by its fingerprint.
func (r *Router) secretsChanged(ctx context.Context) error {
	r.mu.Lock()
	r.version++ // what was planned before has the former secrets
	r.mu.Unlock()
	return r.planAgain(ctx)
}

// SecretsOpened carries the present document out with secrets that could not be read before.
func (r *Router) SecretsOpened(ctx context.Context) error { return r.secretsChanged(ctx) }

// planAgain carries the present document out for what it is planned for now.
func (r *Router) planAgain(ctx context.Context) error {
	_, err := r.change(func(b basis) (func() error, error) {
		if b.present.Generation == 0 {
			return nil, nil
		}
		d, problems := spec.Decode([]byte(b.carried.Text))
		checked, target, ledger, problems, err := r.plan(ctx, d, problems, b.carried.Ledger, awaits(b.carried))
		if err != nil {
			return nil, err
		}
		if len(problems) > 0 && b.spec == nil {
			// The stored document could not be used before either; with the next secret it may.
			return func() error {
				r.invalid = fmt.Errorf("reading generation %d: %w", b.present.Generation, problems)
				return nil
			}, nil
		}
		if len(problems) > 0 {
			return nil, problems
		}
		return func() error {
			r.use(checked, target, ledger)
			return nil
		}, nil
	})
	return err
}

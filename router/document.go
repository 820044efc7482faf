package router

import (
	"encoding/json"
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
}

func read(src *isthmusv1.Source) (source, error) {
	if m := src.GetSpec(); m != nil {
		text, err := spec.Encode(m)
		return source{doc: spec.FromMessage(m), problems: spec.Fits(text), text: text}, err
	}
	d, problems := spec.Decode([]byte(src.GetText()))
	return source{d, problems, src.GetText()}, nil
}

// validate returns what is wrong with a document, and when nothing is, what to know about it.
func (r *Router) validate(src *isthmusv1.Source) (problems, noted spec.Problems, err error) {
	s, err := read(src)
	if err != nil {
		return nil, nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	checked, _, _, problems := r.plan(s.doc, s.problems, r.present.Ledger)
	return problems, notes(checked), nil
}

// preview returns what applying a document would change, and the generation that this is based on, and what to know about
// the document. A bad one is an error that is spec.Problems.
func (r *Router) preview(src *isthmusv1.Source) (uint64, []plan.Change, spec.Problems, error) {
	s, err := read(src)
	if err != nil {
		return 0, nil, nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	checked, target, _, problems := r.plan(s.doc, s.problems, r.present.Ledger)
	if len(problems) > 0 {
		return r.present.Generation, nil, nil, problems
	}
	return r.present.Generation, r.counted(plan.Diff(r.target, target)), notes(checked), nil
}

// apply makes a document the wanted one. expected is the generation that the writer has seen; nil: not checked. With
// confirm > 0 the former document comes back by itself unless confirm is called in time. The same document again
// changes nothing and makes no new generation.
func (r *Router) apply(src *isthmusv1.Source, expected *uint64, confirm time.Duration, author string) (uint64, []plan.Change, error) {
	s, err := read(src)
	if err != nil {
		return 0, nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.accept(s, expected, confirm, author, "apply")
}

func (r *Router) accept(s source, expected *uint64, confirm time.Duration, author, reason string) (uint64, []plan.Change, error) {
	if err := r.expects(expected); err != nil {
		return r.present.Generation, nil, err
	}
	checked, target, ledger, problems := r.plan(s.doc, s.problems, r.present.Ledger)
	if len(problems) > 0 {
		return r.present.Generation, nil, problems
	}
	changes := r.counted(plan.Diff(r.target, target))
	if s.text == r.present.Text && len(changes) == 0 && r.spec != nil {
		return r.present.Generation, nil, nil
	}
	encoded, err := json.Marshal(ledger)
	if err != nil {
		return r.present.Generation, nil, fmt.Errorf("encoding ledger: %w", err)
	}
	err = r.commit(store.Revision{Author: author, Reason: reason, Changes: uint32(len(changes)), Text: s.text, Ledger: encoded}, confirm)
	if err == nil {
		r.use(checked, target, ledger)
	}
	return r.present.Generation, changes, err
}

// edit changes single policies of the present document; dry only says what would change.
func (r *Router) edit(e spec.Edit, expected *uint64, confirm time.Duration, dry bool, author string) (uint64, []plan.Change, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.expects(expected); err != nil {
		return r.present.Generation, nil, err
	}
	if r.spec == nil {
		return r.present.Generation, nil, fmt.Errorf("%w: there is no document that can be edited; apply one", api.ErrPrecondition)
	}
	edited, problems, err := e.Apply(r.spec, r.carried().Text)
	if len(problems) > 0 {
		return r.present.Generation, nil, problems
	}
	if err != nil {
		return r.present.Generation, nil, fmt.Errorf("%w: %w", api.ErrPrecondition, err)
	}
	target := plan.Amend(r.target, edited.Spec, edited.Names)
	changes := r.counted(plan.DiffPolicies(r.target, target, edited.Names))
	if dry || len(edited.Names) == 0 {
		return r.present.Generation, changes, nil
	}
	reason := "policies " + strings.Join(edited.Names, ", ")
	if n := len(edited.Names); n > maxNamed {
		reason = fmt.Sprintf("policies %s and %d more", strings.Join(edited.Names[:maxNamed], ", "), n-maxNamed)
	}
	err = r.commit(store.Revision{Author: author, Reason: reason, Changes: uint32(len(changes)), Text: edited.Text, Ledger: r.carried().Ledger}, confirm)
	if err == nil {
		r.use(edited.Spec, target, r.ledger)
	}
	return r.present.Generation, changes, err
}

// maxNamed is how many policies the reason of an edit names.
const maxNamed = 3

// expects refuses a writer who has seen another generation than the present one. Nil: not checked.
func (r *Router) expects(generation *uint64) error {
	if generation != nil && *generation != r.present.Generation {
		return fmt.Errorf("%w: expected %d, present is %d", store.ErrStale, *generation, r.present.Generation)
	}
	return nil
}

// commit makes a revision the present one. With confirm > 0 it is so until then.
func (r *Router) commit(next store.Revision, confirm time.Duration) error {
	next.Time = time.Now()
	if confirm > 0 {
		if r.present.Generation == 0 {
			return fmt.Errorf("%w: there is no former document to go back to", api.ErrPrecondition)
		}
		next.ConfirmBy, next.RevertTo = next.Time.Add(confirm), r.present.Generation
		// A chain of unconfirmed documents goes back to the last one that somebody stood by.
		if !r.present.ConfirmBy.IsZero() {
			next.RevertTo = r.present.RevertTo
		}
	}
	generation, err := r.Store.Accept(r.present.Generation, next)
	if err != nil {
		return fmt.Errorf("storing document: %w", err)
	}
	next.Generation = generation
	r.present, r.stuck, r.unstored = next, nil, nil
	r.Log.Info("accepted", "generation", generation, "author", next.Author, "reason", next.Reason, "changes", next.Changes)
	return nil
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
	r.endOutlived()
	return nil
}

// endOutlived ends the flows that waited for the present document to be kept.
func (r *Router) endOutlived() {
	r.outliving.add(r.outlived(r.target), r.target.NAT)
	r.work.again("nat") // which ends them when the rules use their addresses no more
}

// goBack applies an earlier document again; generation 0 is the one before the present one.
func (r *Router) goBack(generation uint64, expected *uint64, author string) (uint64, []plan.Change, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if generation == 0 {
		history := r.Store.History()
		i := slices.IndexFunc(history, func(h store.Revision) bool { return h.Generation < r.present.Generation })
		if i < 0 {
			return r.present.Generation, nil, fmt.Errorf("%w: there is no earlier document", api.ErrPrecondition)
		}
		generation = history[i].Generation
	}
	old, err := r.Store.Revision(generation)
	if err != nil {
		return r.present.Generation, nil, err
	}
	d, problems := spec.Decode([]byte(old.Text))
	return r.accept(source{d, problems, old.Text}, expected, 0, author, fmt.Sprintf("rollback to %d", generation))
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

// revert carries out the document that the present one was to be confirmed against, and then stores that: whoever is locked
// out does not wait for a disk that is full.
func (r *Router) revert(from plan.Target) error {
	if r.unstored == nil {
		old, err := r.Store.Revision(r.present.RevertTo)
		if err != nil {
			return err
		}
		d, problems := spec.Decode([]byte(old.Text))
		checked, target, ledger, problems := r.plan(d, problems, r.present.Ledger)
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
		r.use(checked, target, ledger)
	}
	if err := r.commit(*r.unstored, 0); err != nil {
		return err
	}
	r.endOutlived()
	return nil
}

// carried is what the node is told to do: the present document, unless that was not confirmed and could not be replaced.
func (r *Router) carried() store.Revision {
	if r.unstored != nil {
		return *r.unstored
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

// secretsChanged plans the present document anew: what uses a changed secret differs by its fingerprint.
func (r *Router) secretsChanged() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.present.Generation == 0 {
		return nil
	}
	d, problems := spec.Decode([]byte(r.carried().Text))
	checked, target, ledger, problems := r.plan(d, problems, r.carried().Ledger)
	if len(problems) > 0 && r.spec == nil {
		// The stored document could not be used before either; with the next secret it may.
		r.invalid = fmt.Errorf("reading generation %d: %w", r.present.Generation, problems)
		return nil
	}
	if len(problems) > 0 {
		return problems
	}
	r.use(checked, target, ledger)
	return nil
}

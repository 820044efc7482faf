package document

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// Daemon is the author of changes that the daemon makes by itself.
const Daemon = "isthmusd"

// source is a received document with the text that will be stored.
type source struct {
	doc      spec.Document
	problems spec.Problems
	text     string
	again    bool // it was accepted before
	awaits   bool // secrets that are not stored yet are not reported as problems
}

// read decodes a caller's document, text or message.
func read(src *isthmusv1.Source) (source, error) {
	if m := src.GetSpec(); m != nil {
		text, err := spec.Encode(m)
		return source{doc: spec.FromMessage(m), problems: spec.Fits(text), text: text}, err
	}
	d, problems := spec.Decode([]byte(src.GetText()))
	return source{doc: d, problems: problems, text: src.GetText()}, nil
}

// basis is the input of a plan. It is immutable, so that it can be used without the lock.
type basis struct {
	version uint64 // of the router's
	present store.Revision
	carried store.Revision
	dying   bool
	spec    *spec.Spec
	target  plan.Target
	ledger  plan.Ledger
}

func (m *Manager) basis() basis {
	m.mu.Lock()
	defer m.mu.Unlock()
	return basis{m.version, m.present, m.carried(), m.dying, m.spec, m.target, m.ledger}
}

// attempts bounds how often a change is planned again because other changes were accepted
// meanwhile.
const attempts = 5

// change plans without the lock, so that a large document does not block others, and calls commit
// with the lock if its basis is still the present one; otherwise it plans again. make returns the
// revision to commit, or nil for none.
func (m *Manager) change(make func(basis) (commit func() error, err error)) (uint64, error) {
	for range attempts {
		b := m.basis()
		commit, err := make(b)
		if err != nil || commit == nil {
			return b.present.Generation, err
		}
		m.mu.Lock()
		if m.version != b.version {
			m.mu.Unlock()
			continue
		}
		err = commit()
		generation := m.present.Generation
		m.mu.Unlock()
		return generation, err
	}
	return m.basis().present.Generation, fmt.Errorf("%w: other changes were accepted before this one: try again", store.ErrStale)
}

// planNew plans a caller's document. Its secrets must fit the fields that name them; accepted
// documents are not checked for this again.
func (m *Manager) planNew(ctx context.Context, s source, b basis) (*spec.Spec, plan.Target, plan.Ledger, spec.Problems, error) {
	checked, target, ledger, problems, err := m.plan(ctx, s.doc, s.problems, b.present.Ledger, s.awaits)
	if err != nil || len(problems) > 0 {
		return checked, target, ledger, problems, err
	}
	if !s.again {
		var had spec.Problems
		if b.spec != nil {
			had = m.unfit(b.spec)
		}
		for _, p := range m.unfit(checked) {
			if !slices.ContainsFunc(had, func(h spec.Problem) bool { return h.Value == p.Value && h.Rule == p.Rule }) {
				problems = append(problems, p)
			}
		}
	}
	for _, u := range checked.Secrets {
		ref, err := m.Store.Ref(u.Name)
		if err != nil {
			continue // deleted meanwhile: version has changed
		}
		value, err := m.Store.Lookup(ref)
		if err != nil {
			continue
		}
		if err := u.Kind.Check(value); err != nil {
			problems = append(problems, spec.Problem{Path: u.Path, Value: u.Name, Line: checked.Line(u.Path), Rule: "is a secret that does not fit: " + err.Error(), Remedy: "set it with `isthmus secret set " + u.Name + "`"})
		}
	}
	return checked, target, ledger, spec.Join(problems), nil
}

// unfit returns what a new document is refused for. Documents that were accepted have it too: by a
// former version, or before the interface changed. They stay in use, can be edited, and come back
// by a rollback.
func (m *Manager) unfit(s *spec.Spec) (out spec.Problems) {
	if seen := m.Machine.MTU(s.Underlay.Interface); seen != 0 && !s.DerivedMTU && s.Underlay.MTU > seen {
		out = append(out, spec.Problem{Path: "underlay.mtu", Value: strconv.Itoa(s.Underlay.MTU), Line: s.Line("underlay.mtu"),
			Rule: fmt.Sprintf("is more than the MTU of interface %s, %d", s.Underlay.Interface, seen), Remedy: "leave it out, or raise that of the interface first"})
	}
	return append(out, s.OtherFamily()...)
}

// Validate returns the problems of a document, or its notes if it has none.
func (m *Manager) Validate(ctx context.Context, src *isthmusv1.Source) (problems, noted spec.Problems, err error) {
	s, err := read(src)
	if err != nil {
		return nil, nil, err
	}
	checked, target, _, problems, err := m.planNew(ctx, s, m.basis())
	if err != nil {
		return nil, nil, err
	}
	return problems, m.noted(checked, target), nil
}

// Preview returns the changes that applying a document would make, the generation that they are
// based on, and notes about the document. The caller's address serves to warn about lost API
// access; the zero address loses nothing. For a document with problems the error is spec.Problems.
func (m *Manager) Preview(ctx context.Context, caller netip.Addr, src *isthmusv1.Source) (uint64, []plan.Change, spec.Problems, error) {
	s, err := read(src)
	if err != nil {
		return 0, nil, nil, err
	}
	b := m.basis()
	checked, target, _, problems, err := m.planNew(ctx, s, b)
	if err != nil {
		return b.present.Generation, nil, nil, err
	}
	if len(problems) > 0 {
		return b.present.Generation, nil, nil, problems
	}
	return b.present.Generation, m.cut(m.routed(m.counted(plan.Diff(b.target, target)), b.target, target), b.target, target, caller), m.noted(checked, target), nil
}

// Change describes the author and the conditions of a change.
type Change struct {
	Author string
	Caller netip.Addr // address of the author; zero: on the node
	// Expected is the generation that the author expects to be the present one. Nil: not checked.
	Expected *uint64
	// Confirm is the time after which the former document comes back unless Confirm is called. 0:
	// the new one stays.
	Confirm time.Duration
	Message string // why the author makes it
	Dry     bool   // only the changes are returned
}

// Apply makes a document the present one. The same document again changes nothing and makes no new
// generation.
func (m *Manager) Apply(ctx context.Context, c Change, src *isthmusv1.Source) (uint64, []plan.Change, error) {
	s, err := read(src)
	if err != nil {
		return 0, nil, err
	}
	return m.accept(ctx, c, s, "apply")
}

func (m *Manager) accept(ctx context.Context, c Change, s source, reason string) (generation uint64, changes []plan.Change, err error) {
	return m.acceptMade(ctx, c, func(basis) (source, string, error) { return s, reason, nil })
}

// SetDisabled shuts tunnels and peers of the present document down, or takes them back.
func (m *Manager) SetDisabled(ctx context.Context, c Change, e spec.Disabling) (uint64, []plan.Change, error) {
	return m.acceptMade(ctx, c, func(b basis) (source, string, error) {
		if b.spec == nil {
			return source{}, "", fault.ErrNoDocument
		}
		text, problems, err := e.Apply(b.carried.Text)
		if len(problems) > 0 {
			return source{}, "", problems
		}
		if err != nil {
			return source{}, "", fmt.Errorf("%w: %w", fault.ErrPrecondition, err)
		}
		d, problems := spec.Decode([]byte(text))
		return source{doc: d, problems: problems, text: text}, e.String(), nil
	})
}

// acceptMade accepts the document that made makes of the present one, with its reason.
func (m *Manager) acceptMade(ctx context.Context, c Change, made func(basis) (source, string, error)) (generation uint64, changes []plan.Change, err error) {
	generation, err = m.change(func(b basis) (func() error, error) {
		if err := b.expects(c.Expected); err != nil {
			return nil, err
		}
		s, reason, err := made(b)
		if err != nil {
			return nil, err
		}
		checked, target, ledger, problems, err := m.planNew(ctx, s, b)
		if err != nil {
			return nil, err
		}
		if len(problems) > 0 {
			return nil, problems
		}
		changes = m.cut(m.routed(m.counted(plan.Diff(b.target, target)), b.target, target), b.target, target, c.Caller)
		if c.Dry || s.text == b.present.Text && len(changes) == 0 && b.spec != nil && !b.dying {
			return nil, nil
		}
		encoded, err := json.Marshal(ledger)
		if err != nil {
			return nil, fmt.Errorf("encoding ledger: %w", err)
		}
		return func() error {
			if err := ctx.Err(); err != nil {
				return err // the caller has gone: do not commit
			}
			err := m.commit(store.Revision{Author: c.Author, Reason: reason, Message: c.Message, Changes: uint32(len(changes)), Text: s.text, Ledger: encoded}, c.Confirm)
			if err == nil {
				m.use(checked, target, ledger)
			}
			return err
		}, nil
	})
	if _, bad := errors.AsType[spec.Problems](err); bad {
		changes = nil
	}
	return generation, changes, err
}

// Edit changes single policies of the present document; with dry it only returns the changes.
func (m *Manager) Edit(ctx context.Context, c Change, e spec.Edit) (generation uint64, changes []plan.Change, err error) {
	generation, err = m.change(func(b basis) (func() error, error) {
		if err := b.expects(c.Expected); err != nil {
			return nil, err
		}
		if b.spec == nil {
			return nil, fault.ErrNoDocument
		}
		edited, problems, err := e.Apply(b.spec, b.carried.Text)
		if len(problems) > 0 {
			return nil, problems
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", fault.ErrPrecondition, err)
		}
		target := plan.Amend(b.target, edited.Spec, edited.Names)
		changes = m.counted(plan.DiffPolicies(b.target, target, edited.Names))
		if c.Dry || len(edited.Names) == 0 {
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
			err := m.commit(store.Revision{Author: c.Author, Reason: reason, Message: c.Message, Changes: uint32(len(changes)), Text: edited.Text, Ledger: b.carried.Ledger}, c.Confirm)
			if err == nil {
				m.use(edited.Spec, target, b.ledger)
			}
			return err
		}, nil
	})
	if _, bad := errors.AsType[spec.Problems](err); bad {
		changes = nil
	}
	return generation, changes, err
}

// maxNamed bounds the policies that the reason of an edit names.
const maxNamed = 3

// expects refuses a writer that expects another generation than the present one. Nil: not checked.
func (b basis) expects(generation *uint64) error {
	if generation != nil && *generation != b.present.Generation {
		return fmt.Errorf("%w: expected %d, present is %d", store.ErrStale, *generation, b.present.Generation)
	}
	return nil
}

// commit makes a revision the present one, until confirm has passed if that is not 0.
func (m *Manager) commit(next store.Revision, confirm time.Duration) error {
	next.Time = time.Now()
	if confirm > 0 {
		// Before the first document the node goes back to no document: everything is removed.
		next.ConfirmBy, next.RevertTo = next.Time.Add(confirm), m.present.Generation
		// A chain of unconfirmed documents goes back to the last confirmed one.
		if !m.present.ConfirmBy.IsZero() {
			next.RevertTo = m.present.RevertTo
		}
	}
	generation, err := m.Store.Accept(m.present.Generation, next)
	if err != nil {
		return fmt.Errorf("storing document: %w", err)
	}
	next.Generation = generation
	m.present, m.stuck, m.unstored, m.held, m.dying = next, nil, nil, nil, false
	m.version++
	if next.ConfirmBy.IsZero() {
		m.dropFormer()
	}
	m.Log.Info("accepted", "generation", generation, "author", next.Author, "reason", next.Reason, "changes", next.Changes)
	return nil
}

// maxDeltas bounds how many deltas the present revision may consist of before it is compacted.
const maxDeltas = 32

// compact rewrites the present document as one whole file, when no other document came for a while
// or after many deltas.
func (m *Manager) compact(now time.Time) error {
	m.mu.Lock()
	changes := maxDeltas
	if now.Sub(m.present.Time) >= compactAfter {
		changes = 1
	}
	m.mu.Unlock()
	return m.Store.Compact(changes)
}

// Document returns an accepted document as message and text; generation 0 is the one that the node
// applies.
func (m *Manager) Document(generation uint64) (uint64, *isthmusv1.Spec, string, error) {
	m.mu.Lock()
	if generation == 0 && m.unstored != nil {
		generation = m.present.RevertTo
	} else if generation == 0 && m.held != nil {
		generation = m.held.Generation
	}
	m.mu.Unlock()
	var rev store.Revision
	var err error
	if generation == 0 {
		var ok bool
		if rev, ok = m.Store.Current(); !ok {
			return 0, nil, "", fmt.Errorf("%w: no document has been applied yet", store.ErrNotFound)
		}
	} else if rev, err = m.Store.Revision(generation); err != nil {
		return 0, nil, "", err
	}
	d, _ := spec.Decode([]byte(rev.Text))
	return rev.Generation, d.Message, rev.Text, nil
}

// Effective returns the applied document with the values that it leaves out; see plan.Effective.
func (m *Manager) Effective() (uint64, *isthmusv1.Spec, error) {
	m.mu.Lock()
	s, t := m.spec, m.target
	m.mu.Unlock()
	generation, message, _, err := m.Document(0)
	switch {
	case err != nil:
		return 0, nil, err
	case s == nil:
		return 0, nil, fmt.Errorf("%w: no document is in effect: `isthmus status` shows why", store.ErrNotFound)
	}
	return generation, plan.Effective(message, s, t), nil
}

// secretsChanged plans the present document again: the parts that use a changed secret differ by
// its fingerprint.
func (m *Manager) secretsChanged(ctx context.Context) error {
	m.mu.Lock()
	m.version++ // invalidates plans made with the former secrets
	m.mu.Unlock()
	return m.planAgain(ctx)
}

// SecretsOpened plans and applies the present document with secrets that could not be read before.
func (m *Manager) SecretsOpened(ctx context.Context) error { return m.secretsChanged(ctx) }

// mtuChanged plans the present document again if it takes the MTU of the underlay from the
// interface, and that has changed.
func (m *Manager) mtuChanged(ctx context.Context) error {
	m.mu.Lock()
	s := m.spec
	m.mu.Unlock()
	if s == nil || !s.DerivedMTU {
		return nil
	}
	if seen := m.Machine.MTU(s.Underlay.Interface); seen == 0 || spec.DefaultMTU(seen) == s.Underlay.MTU {
		return nil
	}
	return m.planAgain(ctx)
}

// planAgain plans the present document again with the present inputs and applies it.
func (m *Manager) planAgain(ctx context.Context) error {
	_, err := m.change(func(b basis) (func() error, error) {
		if b.present.Generation == 0 {
			return nil, nil
		}
		d, problems := spec.Decode([]byte(b.carried.Text))
		checked, target, ledger, problems, err := m.plan(ctx, d, problems, b.carried.Ledger, awaits(b.carried))
		if err != nil {
			return nil, err
		}
		if len(problems) > 0 && b.spec == nil {
			// The stored document was unusable before too; the next secret may make it usable.
			return func() error {
				m.invalid = fmt.Errorf("reading generation %d: %w", b.present.Generation, problems)
				return nil
			}, nil
		}
		if len(problems) > 0 {
			return nil, problems
		}
		return func() error {
			m.use(checked, target, ledger)
			return nil
		}, nil
	})
	return err
}

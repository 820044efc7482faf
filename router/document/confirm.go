package document

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// dropFormer deletes the former values of secrets, because a document was accepted with the present
// ones.
func (m *Manager) dropFormer() {
	if err := m.Store.DropFormer(); err != nil {
		m.Log.Warn("forgetting former values of secrets failed", "err", err)
	}
}

// Reasons of revisions with which the daemon reverts. Progress reads them from the history.
const (
	backTo     = "not confirmed, back to %d"
	backToNone = "not confirmed, back to no document"
)

// Confirm keeps a generation that was applied with a confirm timeout.
func (m *Manager) Confirm(generation uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.unstored != nil && generation == m.present.Generation {
		return fmt.Errorf("%w: generation %d, and generation %d is applied again", fault.ErrNotConfirmed, generation, m.present.RevertTo)
	}
	if err := m.Store.Confirm(generation); err != nil {
		return err
	}
	m.present.ConfirmBy, m.present.RevertTo = time.Time{}, 0
	m.dropFormer()
	m.Carrier.Confirmed()
	return nil
}

// Progress returns the present generation and the one that is carried out. A generation that the
// node has reverted, or has not accepted, is an error; generation 0 is the present one.
func (m *Manager) Progress(generation uint64) (present, applied uint64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	present, applied = m.present.Generation, m.applied
	switch {
	case present == 0:
		return present, applied, fmt.Errorf("%w: no document has been applied yet", fault.ErrNoGeneration)
	case generation == 0:
		generation = present
	case generation > present:
		return present, applied, fmt.Errorf("%w: generation %d, the present one is %d", fault.ErrNoGeneration, generation, present)
	}
	if m.unstored != nil && m.present.RevertTo < generation {
		return present, applied, fmt.Errorf("%w: generation %d, and %s is applied again", fault.ErrNotConfirmed, generation, former(m.present.RevertTo))
	}
	// A revert to an earlier generation takes back each one in between.
	for _, h := range m.Store.History() {
		if h.Generation <= generation {
			break
		}
		to, ok := revertOf(h)
		if ok && to < generation {
			return present, applied, fmt.Errorf("%w: generation %d, and generation %d went back to %s", fault.ErrNotConfirmed, generation, h.Generation, former(to))
		}
	}
	return present, applied, nil
}

// revertOf returns the generation to which a revision of the daemon went back; 0: to no document.
func revertOf(h store.Revision) (to uint64, ok bool) {
	if h.Author != Daemon {
		return 0, false
	}
	if h.Reason == backToNone {
		return 0, true
	}
	_, err := fmt.Sscanf(h.Reason, backTo, &to)
	return to, err == nil
}

func former(generation uint64) string {
	if generation == 0 {
		return "no document"
	}
	return fmt.Sprintf("generation %d", generation)
}

// Rollback applies an earlier document again; generation 0 is the one before the present one.
func (m *Manager) Rollback(ctx context.Context, c Change, generation uint64) (uint64, []plan.Change, error) {
	present := m.basis().present.Generation
	if generation == 0 {
		history := m.Store.History()
		i := slices.IndexFunc(history, func(h store.Revision) bool { return h.Generation < present })
		if i < 0 {
			return present, nil, fmt.Errorf("%w: no earlier document exists", fault.ErrPrecondition)
		}
		generation = history[i].Generation
		if c.Expected == nil {
			c.Expected = &present // so that a new document does not change which one is the earlier
		}
	}
	old, err := m.Store.Revision(generation)
	if err != nil {
		return present, nil, err
	}
	d, problems := spec.Decode([]byte(old.Text))
	return m.accept(ctx, c, source{doc: d, problems: problems, text: old.Text, again: true}, fmt.Sprintf("rollback to %d", generation))
}

// revertIfDue reverts when the present document, which t is the target of, was not confirmed in
// time.
func (m *Manager) revertIfDue(now time.Time, from plan.Target) {
	if m.present.ConfirmBy.IsZero() || now.Before(m.present.ConfirmBy) {
		return
	}
	if m.stuck == nil {
		m.Log.Warn("not confirmed in time, going back", "generation", m.present.Generation, "to", m.present.RevertTo)
	}
	if err := m.revert(from); err != nil {
		if m.stuck == nil || m.stuck.Error() != err.Error() {
			m.Log.Error("going back failed; trying again", "err", err)
		}
		m.stuck = err
	}
}

// revert applies the former document first and stores it afterwards, so that an operator who is
// locked out does not wait for a full disk.
func (m *Manager) revert(from plan.Target) error {
	if m.unstored == nil && m.present.RevertTo == 0 {
		m.unstored = &store.Revision{Author: Daemon, Reason: backToNone, Changes: uint32(len(plan.Diff(from, plan.Nothing(m.machine(), spec.Access{})))), Ledger: m.present.Ledger}
		m.held = nil
		m.clear()
	}
	if m.unstored == nil {
		old, err := m.Store.Revision(m.present.RevertTo)
		if err != nil {
			return err
		}
		d, problems := spec.Decode([]byte(old.Text))
		checked, target, ledger, problems, err := m.plan(context.Background(), d, problems, m.present.Ledger, awaits(old))
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
		m.unstored = &store.Revision{
			Author: Daemon, Reason: fmt.Sprintf(backTo, m.present.RevertTo),
			Changes: uint32(len(plan.Diff(from, target))), Text: old.Text, Ledger: encoded,
		}
		m.held = nil
		m.use(checked, target, ledger)
	}
	if err := m.commit(*m.unstored, 0); err != nil {
		return err
	}
	if m.spec != nil {
		m.Carrier.Confirmed()
	}
	return nil
}

// carried returns the document that the node applies: the present one, or the former one if the
// present one was not confirmed and the revert could not be stored.
func (m *Manager) carried() store.Revision {
	if m.unstored != nil {
		return *m.unstored
	}
	if m.held != nil {
		return *m.held
	}
	return m.present
}

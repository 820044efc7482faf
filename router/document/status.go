package document

import (
	"context"
	"errors"
	"time"

	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// Status describes the document that a node applies, and why it is not another one.
type Status struct {
	Present store.Revision
	Spec    *spec.Spec // of the applied document; nil: none
	Target  plan.Target
	Applied uint64 // newest generation whose jobs have all succeeded; 0: none since the start
	Invalid error  // why the stored document cannot be used
	Safe    bool   // started with -safe: nothing is applied
	Dying   bool   // the daemon died repeatedly under the present document
	// Held is applied instead of the present document, under which the daemon died. Nil: none is.
	Held *store.Revision
	// Reverted means that the former document is applied instead of the present one, which was not
	// confirmed, and that this could not be stored. Stuck is the reason, or the reason why the
	// former document could not come back.
	Reverted bool
	Stuck    error
	// Missing are the fields whose secrets are not stored.
	Missing []spec.SecretUse
}

// Status returns the state of the documents.
func (m *Manager) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Status{
		Present: m.present, Spec: m.spec, Target: m.target, Applied: m.applied, Invalid: m.invalid, Safe: m.Safe,
		Dying: m.dying, Held: m.held, Reverted: m.unstored != nil, Stuck: m.stuck,
	}
	if m.spec != nil && awaits(m.carried()) {
		for _, u := range m.spec.Secrets {
			if _, err := m.Store.Ref(u.Name); errors.Is(err, secret.ErrNotFound) {
				s.Missing = append(s.Missing, u)
			}
		}
	}
	return s
}

// lockPace is how often Alive tries to get the lock.
const lockPace = 10 * time.Millisecond

// Alive returns nil if it can take the lock of the documents before ctx is done.
func (m *Manager) Alive(ctx context.Context) error {
	for !m.mu.TryLock() {
		select {
		case <-ctx.Done():
			return errors.New("the lock of the documents is not released")
		case <-time.After(lockPace):
		}
	}
	m.mu.Unlock()
	return nil
}

// Empty reports whether no document is applied. It does not wait: while the lock is taken it
// returns false.
func (m *Manager) Empty() bool {
	if !m.mu.TryLock() {
		return false
	}
	defer m.mu.Unlock()
	return m.spec == nil
}

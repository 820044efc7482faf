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

// Status is which document a node carries out, and why it is not another one.
type Status struct {
	Present store.Revision
	Spec    *spec.Spec // of what is carried out; nil: nothing is
	Target  plan.Target
	Applied uint64 // newest generation with everything done; 0: none since the start
	Invalid error  // why the stored document cannot be used
	Safe    bool   // nothing is carried out, as the daemon was told
	Dying   bool   // the daemon died under the present document again and again
	// Held is carried out in place of the present document, under which the daemon died. Nil:
	// nothing is.
	Held *store.Revision
	// Reverted says that the former document is carried out in place of the present one, which was
	// not confirmed, and cannot be stored. Stuck is why, or why the former document could not come
	// back.
	Reverted bool
	Stuck    error
	// Missing are the fields that name a secret which is not stored.
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

// Alive returns nil when the lock of the documents can be had before ctx is done.
func (m *Manager) Alive(ctx context.Context) error {
	for !m.mu.TryLock() {
		select {
		case <-ctx.Done():
			return errors.New("the lock of the documents is not given back")
		case <-time.After(lockPace):
		}
	}
	m.mu.Unlock()
	return nil
}

// Empty reports whether nothing is carried out. It does not wait: while the documents are busy the
// answer is no.
func (m *Manager) Empty() bool {
	if !m.mu.TryLock() {
		return false
	}
	defer m.mu.Unlock()
	return m.spec == nil
}

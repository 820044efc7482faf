package document

import (
	"context"
	"time"

	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// A generation that ends the daemon while it is carried out must not end it at every start: after
// so many starts that did not come to its end, the one before it is carried out in its place, and
// after as many more that did not come to the end of that, nothing is.
const (
	startsOf       = 2
	startsWithBack = 2
)

// begin notes that this start is about to carry out the present generation, and says how that has
// gone until now. The note is on disk before the document is read. A disk that takes no note keeps
// no router from routing.
func (m *Manager) begin() store.Carry {
	c := m.Store.Carry()
	generation := m.present.Generation
	if c.Carried == generation {
		return store.Carry{Carried: generation}
	}
	if c.Trying != generation {
		c.Trying, c.Starts, c.Back = generation, 0, false
	}
	next := c
	if !c.Back {
		next.Starts++
	}
	if err := m.Store.SetCarry(next); err != nil {
		m.Log.Warn("noting that a generation is carried out failed; if it ends the daemon, that is tried again at each start", "generation", generation, "err", err)
	}
	return c
}

// startBack carries out the newest generation that was carried out before, in place of the present
// one, under which the daemon died again and again, or nothing.
func (m *Manager) startBack(c store.Carry) error {
	m.dying = true
	m.Log.Error("the present generation is not carried out: the daemon has died under it again and again", "generation", m.present.Generation, "starts", c.Starts, "carried out before", c.Carried)
	// An operator who is locked out waits for this.
	m.revertIfDue(time.Now(), plan.Target{})
	if m.spec != nil || c.Carried == 0 || c.Starts >= startsOf+startsWithBack && !c.Back {
		return nil
	}
	old, err := m.Store.Revision(c.Carried)
	if err != nil {
		m.Log.Error("nothing is carried out, since the generation before cannot be read", "err", err)
		return nil
	}
	d, problems := spec.Decode([]byte(old.Text))
	s, target, ledger, problems, err := m.plan(context.Background(), d, problems, m.present.Ledger, awaits(old))
	if err != nil {
		return err
	}
	if len(problems) > 0 {
		m.Log.Error("nothing is carried out, since the generation before cannot be used", "generation", old.Generation, "err", problems)
		return nil
	}
	m.held = &old
	m.use(s, target, ledger)
	return nil
}

// came notes that everything that was wanted has been tried once, with success or not.
func (m *Manager) came() {
	m.mu.Lock()
	c := store.Carry{Carried: m.present.Generation}
	switch {
	case m.spec == nil || m.Safe || !m.Carrier.Tried():
		m.mu.Unlock()
		return
	case m.held != nil:
		c = m.Store.Carry()
		c.Back = true
	case m.unstored != nil:
		c = store.Carry{Carried: m.present.RevertTo, Trying: m.present.Generation, Back: true}
	}
	m.mu.Unlock()
	if err := m.Store.SetCarry(c); err != nil {
		m.Log.Warn("noting that a generation was carried out failed", "generation", c.Carried, "err", err)
	}
}

// NoteCarried notes after each pass how far carrying out has come, until ctx is done. A daemon that
// is stopped has not died.
func (m *Manager) NoteCarried(ctx context.Context) error {
	for {
		select {
		case <-m.passes:
			m.came()
		case <-ctx.Done():
			if c := m.Store.Carry(); c.Trying != 0 && !c.Back && c.Starts > 0 {
				c.Starts--
				if err := m.Store.SetCarry(c); err != nil {
					m.Log.Warn("noting that the daemon was stopped failed", "err", err)
				}
			}
			return nil
		}
	}
}

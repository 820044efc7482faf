package document

import (
	"context"
	"net/netip"
	"reflect"

	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// FirstBoot is the author of the document that came with the machine's user-data. A client's name
// has no space.
const FirstBoot = "first boot"

// awaits says whether secrets that a document names may come later. User-data has no secrets, and
// those are set over the API when the document is there already.
func awaits(rev store.Revision) bool { return rev.Author == FirstBoot }

// CheckFirst says what is wrong with a text as the first document; an error that is spec.Problems
// is about the text.
func (m *Manager) CheckFirst(ctx context.Context, text string) error {
	d, problems := spec.Decode([]byte(text))
	_, _, _, problems, err := m.planNew(ctx, source{doc: d, problems: problems, text: text, awaits: true}, m.basis())
	if err == nil && len(problems) > 0 {
		err = problems
	}
	return err
}

// ApplyFirst makes a text the first document, as Apply does. Secrets that it names may be missing:
// what uses them is made when they are set. With another document accepted meanwhile, the error
// wraps store.ErrStale.
func (m *Manager) ApplyFirst(ctx context.Context, text string) (uint64, error) {
	d, problems := spec.Decode([]byte(text))
	none := uint64(0)
	generation, _, err := m.accept(ctx, Change{Author: FirstBoot, Expected: &none}, source{doc: d, problems: problems, text: text, awaits: true}, "user-data")
	return generation, err
}

// Generation returns the number of the newest accepted document; 0: there has never been one.
func (m *Manager) Generation() uint64 { return m.basis().present.Generation }

// SetFirstAccess says which sources may reach the API as long as the document names none. It
// returns before the rules are in the kernel.
func (m *Manager) SetFirstAccess(ctx context.Context, api []netip.Prefix) error {
	m.first.Store(&api)
	m.mu.Lock()
	m.version++ // what was planned before has the former access
	without := m.spec == nil
	if without {
		m.withoutDocument()
	}
	m.mu.Unlock()
	if without {
		return nil
	}
	return m.planAgain(ctx)
}

// withoutDocument has the access rules of a node put in that carries no document out.
func (m *Manager) withoutDocument() {
	carried := m.carried()
	d, _ := spec.Decode([]byte(carried.Text))
	m.target = plan.Nothing(m.machine(), spec.AccessOf(d.Message))
	switch {
	case m.Safe:
	case carried.Text == "" && m.present.Generation != 0:
		m.Carrier.Clear(m.target)
	default:
		m.Carrier.Hold(m.target)
	}
}

// SetFacts says what the platform says of addresses now, and carries the present document out with
// it. When the document cannot be used with it, what runs stays as it is, and the error says why.
func (m *Manager) SetFacts(ctx context.Context, p spec.Platform) error {
	former := m.facts.Swap(&p)
	if reflect.DeepEqual(*former, p) && !m.unplanned.Load() {
		return nil
	}
	m.mu.Lock()
	m.version++ // what was planned before has the former facts
	m.mu.Unlock()
	err := m.planAgain(ctx)
	m.unplanned.Store(err != nil)
	return err
}

package document

import (
	"context"
	"net/netip"
	"reflect"

	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// FirstBoot is the author of the document from the machine's user-data. The names of clients have
// no space.
const FirstBoot = "first boot"

// awaits reports whether secrets that the document names may be missing. User-data has no secrets;
// they are set over the API after the document.
func awaits(rev store.Revision) bool { return rev.Author == FirstBoot }

// CheckFirst checks a text as the first document. An error of type spec.Problems is about the text.
func (m *Manager) CheckFirst(ctx context.Context, text string) error {
	d, problems := spec.Decode([]byte(text))
	_, _, _, problems, err := m.planNew(ctx, source{doc: d, problems: problems, text: text, awaits: true}, m.basis())
	if err == nil && len(problems) > 0 {
		err = problems
	}
	return err
}

// ApplyFirst makes a text the first document, as Apply does. Secrets that it names may be missing:
// the parts that use them are created when they are set. If another document was accepted
// meanwhile, the error wraps store.ErrStale.
func (m *Manager) ApplyFirst(ctx context.Context, text string) (uint64, error) {
	d, problems := spec.Decode([]byte(text))
	none := uint64(0)
	generation, _, err := m.accept(ctx, Change{Author: FirstBoot, Expected: &none}, source{doc: d, problems: problems, text: text, awaits: true}, "user-data")
	return generation, err
}

// SetFirstAccess sets the sources that may reach the API while the document names none. It returns
// before the rules are in the kernel.
func (m *Manager) SetFirstAccess(ctx context.Context, api []netip.Prefix) error {
	m.first.Store(&api)
	m.mu.Lock()
	m.version++ // invalidates plans made with the former access
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

// withoutDocument applies the access rules of a node without a document.
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

// SetFacts sets the platform's present answer and plans the present document with it. If the
// document cannot be planned with it, the present configuration stays, and the error gives the
// reason.
func (m *Manager) SetFacts(ctx context.Context, p spec.Platform) error {
	former := m.facts.Swap(&p)
	if reflect.DeepEqual(*former, p) && !m.unplanned.Load() {
		return nil
	}
	m.mu.Lock()
	m.version++ // invalidates plans made with the former facts
	m.mu.Unlock()
	err := m.planAgain(ctx)
	m.unplanned.Store(err != nil)
	return err
}

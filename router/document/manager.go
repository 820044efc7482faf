// Package document decides which document a node carries out: it accepts, confirms and reverts
// documents, edits single policies, keeps their history, and holds back one that ends the daemon
// again and again.
package document

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// Carrier carries targets out. Its methods return before that is done.
type Carrier interface {
	// Carry has a target carried out. onTrial says that the former one comes back unless this one
	// is confirmed.
	Carry(s *spec.Spec, t plan.Target, onTrial bool)
	// Clear has everything removed but the rules of a target without a document.
	Clear(t plan.Target)
	// Hold leaves what runs as it is. Where no rules are, those of a target without a document are
	// put in.
	Hold(t plan.Target)
	// Confirmed takes note that the former target does not come back.
	Confirmed()
	// Settled reports whether everything is as wanted, and Tried whether everything has been tried
	// once.
	Settled() bool
	Tried() bool
}

// Machine is what a preview looks at.
type Machine interface {
	// Surroundings returns what the machine has of addresses and routes; the zero value when it has
	// not been read.
	Surroundings() fib.Surroundings
	// Listening returns what listens at an address of the machine, as "tcp/22".
	Listening(netip.Addr) []string
	// Count returns how many flows under way are in each of some sets.
	Count(ctx context.Context, sets []nat.Ending) ([]int, error)
}

// Options are what a Manager works with.
type Options struct {
	Store   *store.Store
	Carrier Carrier
	Machine Machine
	// Plan is what documents are planned for; First and the API's sources of a document are added.
	Plan plan.Machine
	// FirstAPI are sources that may reach the API as long as the document names none; see
	// SetFirstAccess.
	FirstAPI []netip.Prefix
	// Facts is what the platform said of addresses when it was last asked; see SetFacts.
	Facts spec.Platform
	// Safe carries nothing out: documents are taken and stored, and what runs stays as it is.
	Safe bool
	Log  *slog.Logger
}

// Manager has the documents of a node. Methods may be called from several goroutines.
type Manager struct {
	Options
	first     atomic.Pointer[[]netip.Prefix] // see SetFirstAccess
	facts     atomic.Pointer[spec.Platform]  // see SetFacts
	unplanned atomic.Bool                    // the present document could not be planned with facts
	passes    chan struct{}                  // full when a pass has ended

	mu sync.Mutex // held while a document becomes the present one, not while it is planned
	// of what plans are made from: present, spec, target, ledger and the secrets
	version  uint64
	present  store.Revision
	spec     *spec.Spec // nil: there is no document, or it cannot be used
	target   plan.Target
	ledger   plan.Ledger
	textUses map[uint64][]spec.SecretUse // see usesIn
	invalid  error                       // why the stored document cannot be used
	stuck    error                       // why the former document, which was to come back, did not
	applied  uint64                      // newest generation with everything done

	// The daemon died under the present document again and again, and held, if there is one, is
	// carried out instead.
	dying bool
	held  *store.Revision
	// unstored is carried out instead of the present document, which was not confirmed, while
	// storing it fails.
	unstored *store.Revision
}

// New returns a Manager with the stored document, if there is one. Load has it carried out.
func New(o Options) *Manager {
	m := &Manager{Options: o, passes: make(chan struct{}, 1)}
	m.first.Store(&o.FirstAPI)
	m.facts.Store(&o.Facts)
	m.present, _ = o.Store.Current()
	d, _ := spec.Decode([]byte(m.present.Text))
	m.target = plan.Nothing(m.machine(), spec.AccessOf(d.Message))
	return m
}

// Load has the stored document carried out.
func (m *Manager) Load() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, stored := m.Store.Current()
	if stored {
		if err := m.loadLocked(); err != nil {
			return err
		}
	}
	if m.spec == nil && !m.Safe && (!stored || m.present.Text != "") {
		m.Carrier.Hold(m.target)
	}
	return nil
}

func (m *Manager) loadLocked() error {
	present := m.present
	if present.Text == "" {
		// the first document was not confirmed, and a former daemon may not have come to the end of
		// that
		m.clear()
		return nil
	}
	if m.Safe {
		m.Log.Warn("started with -safe: nothing is carried out", "generation", present.Generation)
		return nil
	}
	if c := m.begin(); c.Carried != present.Generation && c.Starts >= startsOf {
		return m.startBack(c)
	}
	d, problems := spec.Decode([]byte(present.Text))
	s, target, ledger, problems, err := m.plan(context.Background(), d, problems, present.Ledger, awaits(present))
	if err != nil {
		return err
	}
	if len(problems) > 0 {
		// What runs is left as it is: the document was good once, and its removal was not asked
		// for.
		m.invalid = fmt.Errorf("reading generation %d: %w", present.Generation, problems)
		m.Log.Error("the stored document cannot be used; nothing is changed", "err", m.invalid)
		return nil
	}
	// A document whose confirm timeout passed while the daemon was down is not applied again.
	m.revertIfDue(time.Now(), target)
	if m.spec == nil {
		m.use(s, target, ledger)
	}
	return nil
}

// machine is what documents are planned for.
func (m *Manager) machine() plan.Machine {
	p := m.Plan
	p.First = *m.first.Load()
	return p
}

// plan checks a document and decides about it, without changing anything, and needs no lock. It
// ends soon after ctx is done, with an error. With awaits, secrets that are not stored yet are
// accepted, and those that are sealed always are.
func (m *Manager) plan(ctx context.Context, d spec.Document, decodeProblems spec.Problems, ledger json.RawMessage, awaits bool) (*spec.Spec, plan.Target, plan.Ledger, spec.Problems, error) {
	var former plan.Ledger
	if len(ledger) > 0 {
		if err := json.Unmarshal(ledger, &former); err != nil {
			return nil, plan.Target{}, former, spec.Join(decodeProblems, spec.Problems{{Rule: "has an unreadable ledger: " + err.Error(), Remedy: "roll back to an earlier generation"}}), nil
		}
	}
	s, problems, err := spec.CheckWithin(ctx, d.On(*m.facts.Load()), func(name string) (secret.Ref, bool) {
		ref, err := m.Store.Ref(name)
		if (awaits && errors.Is(err, secret.ErrNotFound) || errors.Is(err, store.ErrSealed)) && store.ValidSecretName(name) {
			// drivers refuse it until a secret that can be read is there
			return secret.Ref{Name: name}, true
		}
		return ref, err == nil
	})
	if err != nil {
		return nil, plan.Target{}, former, nil, err
	}
	if problems = spec.Join(decodeProblems, problems); len(problems) > 0 {
		return nil, plan.Target{}, former, problems, nil
	}
	target, next, problems := plan.Make(s, former, m.machine())
	return s, target, next, spec.Join(problems), ctx.Err()
}

// use makes a target the wanted one.
func (m *Manager) use(s *spec.Spec, target plan.Target, ledger plan.Ledger) {
	m.spec, m.target, m.ledger, m.invalid = s, target, ledger, nil
	m.version++
	if !m.Safe {
		m.Carrier.Carry(s, target, !m.present.ConfirmBy.IsZero())
	}
}

// clear has everything removed that was made for a target, and leaves the node without a document.
func (m *Manager) clear() {
	m.spec, m.target, m.invalid = nil, plan.Nothing(m.machine(), spec.Access{}), nil
	m.version++
	if !m.Safe {
		m.Carrier.Clear(m.target)
	}
}

// Passed notes that a pass has ended, and with it perhaps the work on a generation.
func (m *Manager) Passed() {
	select {
	case m.passes <- struct{}{}:
	default:
	}
	if !m.Carrier.Settled() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	carried := m.present.Generation
	if m.unstored != nil {
		carried = m.present.RevertTo
	} else if m.held != nil {
		carried = m.held.Generation
	}
	if (m.spec != nil || m.present.Text == "") && m.Carrier.Settled() && m.applied != carried {
		m.applied = carried
		m.Log.Info("applied", "generation", m.applied)
	}
}

// How long a document has been the present one before its file is made to need no other, and when
// that is tried again.
const (
	compactAfter = 10 * time.Second
	compactRetry = time.Minute
)

// Run does what time alone causes, until ctx is done: an unconfirmed document goes back, and files
// are compacted.
func (m *Manager) Run(ctx context.Context) error {
	second := time.NewTicker(time.Second)
	defer second.Stop()
	compact := time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-second.C:
			m.mu.Lock()
			m.revertIfDue(now, m.target)
			m.mu.Unlock()
			if now.After(compact) {
				if err := m.compact(now); err != nil {
					m.Log.Warn("writing the present document as a whole; trying again", "err", err)
					compact = now.Add(compactRetry)
				}
			}
		}
	}
}

// Package document decides which document a node applies: it accepts, confirms and reverts
// documents, edits single policies, keeps their history, and holds back a document that ends the
// daemon repeatedly.
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

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
)

// Carrier applies targets. Its methods return before the work is done.
type Carrier interface {
	// Carry applies a target. onTrial means that the former one comes back unless this one is
	// confirmed.
	Carry(s *spec.Spec, t plan.Target, onTrial bool)
	// Clear removes everything except the rules of a target without a document.
	Clear(t plan.Target)
	// Hold keeps the present configuration. If no rules are in the kernel, it installs those of a
	// target without a document.
	Hold(t plan.Target)
	// Confirmed reports that the former target does not come back.
	Confirmed()
	// Settled reports whether every job has succeeded, and Tried whether every job has been tried
	// once.
	Settled() bool
	Tried() bool
}

// Machine is the state of the machine that a preview needs.
type Machine interface {
	// Surroundings returns the addresses and routes of the machine; the zero value when they have
	// not been read.
	Surroundings() fib.Surroundings
	// Listening returns the ports that listen at an address of the machine, as "tcp/22".
	Listening(netip.Addr) []string
	// MTU returns the MTU of an interface, 0 if it is unknown.
	MTU(iface string) int
	// Processors returns the number of processors.
	Processors() int
	// Count returns the number of established flows in each of some sets.
	Count(ctx context.Context, sets []nat.Ending) ([]int, error)
	// Received returns the number of prefixes that a BGP peer has sent.
	Received(peer string) uint32
	// Learned returns the paths in use, by prefix. The caller must not change them.
	Learned() map[netip.Prefix][]bgp.Path
}

// Options are the dependencies and settings of a Manager.
type Options struct {
	Store   *store.Store
	Carrier Carrier
	Machine Machine
	// Plan has the inputs of planning; First and the API's sources of a document are added.
	Plan plan.Machine
	// FirstAPI are sources that may reach the API while the document names none; see
	// SetFirstAccess.
	FirstAPI []netip.Prefix
	// Facts is the platform's last answer; see SetFacts.
	Facts spec.Platform
	// Safe applies nothing: documents are accepted and stored, and the present configuration stays.
	Safe bool
	Log  *slog.Logger
}

// Manager manages the documents of a node. Its methods may be called from several goroutines.
type Manager struct {
	Options
	first     atomic.Pointer[[]netip.Prefix] // see SetFirstAccess
	facts     atomic.Pointer[spec.Platform]  // see SetFacts
	unplanned atomic.Bool                    // the present document could not be planned with facts
	passes    chan struct{}                  // full when a pass has ended

	mu sync.Mutex // held to commit a document, not to plan it
	// of the inputs of plans: present, spec, target, ledger and the secrets
	version  uint64
	present  store.Revision
	spec     *spec.Spec // nil: the document is missing or cannot be used
	target   plan.Target
	ledger   plan.Ledger
	textUses map[uint64][]spec.SecretUse // see usesIn
	invalid  error                       // why the stored document cannot be used
	stuck    error                       // why the former document could not come back
	applied  uint64                      // newest generation whose jobs have all succeeded

	// The daemon died repeatedly under the present document; held is applied instead, if it is not
	// nil.
	dying bool
	held  *store.Revision
	// unstored is applied instead of the present document, which was not confirmed, until it can be
	// stored.
	unstored *store.Revision
}

// New returns a Manager with the stored document, if any. Load applies it.
func New(o Options) *Manager {
	m := &Manager{Options: o, passes: make(chan struct{}, 1)}
	m.first.Store(&o.FirstAPI)
	m.facts.Store(&o.Facts)
	m.present, _ = o.Store.Current()
	d, _ := spec.Decode([]byte(m.present.Text))
	m.target = plan.Nothing(m.machine(), spec.AccessOf(d.Message))
	return m
}

// Load applies the stored document.
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
		// The first document was not confirmed, and an earlier daemon may not have completed the
		// removal.
		m.clear()
		return nil
	}
	if m.Safe {
		m.Log.Warn("started with -safe: no document is applied", "generation", present.Generation)
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
		// Keep the present configuration: the document was valid once, and its removal was not
		// requested.
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

// machine returns the inputs of planning.
func (m *Manager) machine() plan.Machine {
	p := m.Plan
	p.First = *m.first.Load()
	return p
}

// plan checks a document and makes its target. It changes nothing and needs no lock. It returns an
// error soon after ctx is done. With awaits, secrets that are not stored yet are accepted; sealed
// secrets are always accepted.
func (m *Manager) plan(ctx context.Context, d spec.Document, decodeProblems spec.Problems, ledger json.RawMessage, awaits bool) (*spec.Spec, plan.Target, plan.Ledger, spec.Problems, error) {
	var former plan.Ledger
	if len(ledger) > 0 {
		if err := json.Unmarshal(ledger, &former); err != nil {
			return nil, plan.Target{}, former, spec.Join(decodeProblems, spec.Problems{{Rule: "has an unreadable ledger: " + err.Error(), Remedy: "roll back to an earlier generation"}}), nil
		}
	}
	s, problems, err := spec.CheckWithin(ctx, d.On(*m.facts.Load()).Over(m.Machine.MTU).With(m.Machine.Processors()), func(name string) (secret.Ref, bool) {
		ref, err := m.Store.Ref(name)
		if (awaits && errors.Is(err, secret.ErrNotFound) || errors.Is(err, store.ErrSealed)) && store.ValidSecretName(name) {
			// drivers refuse this reference until the secret can be read
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

// use makes a target the wanted one and applies it.
func (m *Manager) use(s *spec.Spec, target plan.Target, ledger plan.Ledger) {
	target.Reason = m.carried().Message
	m.spec, m.target, m.ledger, m.invalid = s, target, ledger, nil
	m.version++
	if !m.Safe {
		m.Carrier.Carry(s, target, !m.present.ConfirmBy.IsZero())
	}
}

// clear removes everything that was made for a target, and leaves the node without a document.
func (m *Manager) clear() {
	m.spec, m.target, m.invalid = nil, plan.Nothing(m.machine(), spec.Access{}), nil
	m.version++
	if !m.Safe {
		m.Carrier.Clear(m.target)
	}
}

// Passed records that a pass has ended, which may complete the work on a generation.
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

// Delay before the file of the present document is compacted, and before another attempt of it or
// with the MTU of the underlay.
const (
	compactAfter = 10 * time.Second
	compactRetry = time.Minute
)

// Run reverts unconfirmed documents and compacts files when their time has come, and follows the
// MTU of the underlay, until ctx is done.
func (m *Manager) Run(ctx context.Context) error {
	second := time.NewTicker(time.Second)
	defer second.Stop()
	var compact, measure time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-second.C:
			m.mu.Lock()
			m.revertIfDue(now, m.target)
			m.mu.Unlock()
			if now.After(measure) {
				if err := m.mtuChanged(ctx); err != nil {
					m.Log.Error("the document cannot be used with the MTU of the underlay; trying again", "err", err)
					measure = now.Add(compactRetry)
				}
			}
			if now.After(compact) {
				if err := m.compact(now); err != nil {
					m.Log.Warn("writing the present document as a whole; trying again", "err", err)
					compact = now.Add(compactRetry)
				}
			}
		}
	}
}

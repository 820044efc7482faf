// Package router is the loop: it takes documents, plans them, has the drivers carry the plan out, and keeps what is
// observed. It decides nothing about a single tunnel, session or rule; that is the plan's.
package router

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/egress/translog"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Addresses keeps pool addresses on the underlay interface.
type Addresses interface {
	// SetPool makes the addresses that an earlier call added to an interface be exactly the wanted ones, and leaves the
	// others alone.
	SetPool(iface string, wanted []netip.Addr) error
	// Surroundings reads what the machine has of addresses, routes and rules that is not isthmus's.
	Surroundings() (fib.Surroundings, error)
	// Around calls changed when addresses, interfaces, or routes that are not isthmus's may have changed, until ctx is done.
	Around(ctx context.Context, changed func()) error
	// Canary makes a host with the address from behind the interface fib.Canary, and a route to it. mtu is in bytes; 0: the kernel's
	// default. dial connects from the host to a TCP port of to. remove takes everything away and may be called again. There is one such
	// host at a time.
	Canary(from, to netip.Addr, mtu int) (dial func(ctx context.Context, port uint16) (net.Conn, error), remove func() error, err error)
	// RemoveCanary removes what is left of such a host. Nothing is not an error.
	RemoveCanary() error
}

// Host is the machine.
type Host interface {
	// Has tells whether the kernel has a capability.
	Has(capability string) bool
	// Capabilities lists what the kernel has.
	Capabilities() []string
	// Prepare sets the kernel parameters that a router needs, all but forwarding. attached are interfaces other than the underlay and tunnels that lead to
	// networks. portless is how long flows without ports are remembered; 0: that
	// is left as it is; less: it becomes what the kernel begins with.
	Prepare(underlay string, attached []string, portless time.Duration) error
	// Listening returns what listens at an address of the machine, as "tcp/22".
	Listening(netip.Addr) []string
	// Forward has the kernel forward packets, or not.
	Forward(on bool) error
}

// FIB is the forwarding table; router/fib has the words.
type FIB interface {
	// SetStatic replaces the static routes.
	SetStatic([]fib.Route)
	// Update replaces the routes of prefixes learnt by BGP; one without next hops is gone.
	Update([]fib.Route)
	// SetReserved sets what no route may take away from the node.
	SetReserved([]fib.Reserved)
	// SetAlive tells whether a next hop carries traffic; one without a gateway stands for its interface.
	SetAlive(h fib.NextHop, alive bool)
	// Restarted says that learnt routes come again, Synced that they are complete.
	Restarted()
	Synced()
	// Routes returns what is wanted and whether the kernel has it.
	Routes() []fib.RouteState
	// Run writes to the kernel until ctx is done.
	Run(context.Context) error
}

// Translations is the log of translations; router/egress/translog has the words.
type Translations interface {
	// Limit says what is wanted of the log.
	Limit(egress.Log)
	// Use says by which rules flows begin from now on.
	Use(nat.Config)
	// Who returns the flows that answer a query; an error is about what may be missing.
	Who(context.Context, translog.Query) ([]translog.Record, error)
	// Status tells how the log is doing.
	Status() translog.Status
	// Run records until ctx is done.
	Run(context.Context) error
}

// Options are what a Router works with.
type Options struct {
	Store   *store.Store
	Drivers map[tunnel.Kind]tunnel.Driver // of tunnels
	BGP     bgp.Driver
	FIB     FIB
	NAT     nat.Driver
	// Flows lets new flows be placed by what is in use of the pools' ports. Nil: nobody does.
	Flows Flows
	// Translations remembers who talked to whom as which address. Nil: nobody does.
	Translations Translations
	Addresses    Addresses
	Host         Host
	Version      string
	Log          *slog.Logger
	// Charon says what about charon does not fit, in words; nil: nobody asks. An error means that it does not answer.
	Charon func(context.Context) ([]string, error)
	// Callers returns who asks for a tunnel that is not there; nil: nobody is noticed.
	Callers func() []tunnel.Caller
	// NamesFile keeps the addresses of names for the next start. Empty: they are not kept.
	NamesFile string
	// Probe asks a target of health checks once, from an address and out by an interface. Default: health.Prober.
	Probe func(ctx context.Context, iface string, from netip.Addr, t egress.Target) error
	// Mover takes public addresses; nil: nobody can.
	Mover takeover.Mover
	// SSH has the machine's SSH server take these keys and no others. Nil: it is not ours.
	SSH func(keys []string) error
	// APIPort is the TCP port of the API; 0: it has only its unix socket.
	APIPort uint16
	// Resolvers are the DNS servers that the machine itself uses.
	Resolvers func() []netip.Addr
	// Drop says that what nothing lets in to the node is dropped where a document does not say (access.input). Default: other services than those of
	// isthmus are reached as the machine has it.
	Drop bool
	// APIFrom are sources that may reach the API beside those that the document names.
	APIFrom []netip.Prefix
	// FirstAPI are sources that may reach the API as long as the document names none; see SetFirstAccess.
	FirstAPI []netip.Prefix
	// Safe carries nothing out: documents are taken and stored, and what runs stays as it is. Where no rules are, those are put in that close the node.
	Safe bool
	// Notices returns conditions of what is around the router, such as access to it; nil: there are none.
	Notices func() []*isthmusv1.Condition
	// Facts is what the platform said of addresses when it was last asked; see SetFacts.
	Facts spec.Platform
	// Platform returns what the platform says of the machine; nil: it is not asked.
	Platform func() *isthmusv1.PlatformStatus
	// Counters fills in what the drivers have written.
	Counters func() Counters
}

// Counters counts what was written since the start of the daemon.
type Counters struct {
	Vici, Netlink, NFTables, WireGuard, BGP, BGPStarts uint64
}

// Router is one node.
type Router struct {
	Options
	started   time.Time
	work      *scheduler
	state     *observed
	health    *health.Checker
	taker     taker
	proving   chan struct{}   // full while the rules are compared with the document, or are more than that for a canary
	proxies   *health.Checker // of redirecting policies; each is the one address of a pool with the policy's name
	names     *dns.Resolver
	nat       appliedNAT
	placer    *placer    // nil: nobody places flows
	unsticker *unsticker // nil: flows are not ended
	leaving   leaving
	outliving outliving
	telling   sync.Mutex              // what is concluded from the states of tunnels is in their order
	speaks    bgp.Config              // number of the BGP that its driver may have, without anything in it; of the work on BGP alone
	pooled    map[string][]netip.Addr // pool addresses that an underlay interface may have; of the work on NAT alone
	triedNAT  []nat.Config            // under which flows may have begun, the one that was carried out first; of the work on NAT alone

	counters struct {
		sync.Mutex
		state nat.State
		at    time.Time
	}

	charon charonHealth
	ruled  atomic.Bool // rules of a document have been applied since the start
	guard  atomic.Bool // something keeps inside addresses in: this daemon or a former one put it there
	lost   guardLoss
	around around
	first  atomic.Pointer[[]netip.Prefix] // see SetFirstAccess
	facts  atomic.Pointer[spec.Platform]  // see SetFacts

	unplanned atomic.Bool // the present document could not be planned with facts

	mu       sync.Mutex // held while a document becomes the present one, not while it is planned
	version  uint64     // of what plans are made from: present, spec, target, ledger and the secrets
	present  store.Revision
	spec     *spec.Spec // nil: there is no document, or it cannot be used
	target   plan.Target
	closed   nat.Config // what closes the node while no document is carried out
	ledger   plan.Ledger
	textUses map[uint64][]spec.SecretUse // see usesIn
	had      []nat.Pool                  // of all targets since a document was last kept
	invalid  error                       // why the stored document cannot be used
	stuck    error                       // why the former document, which was to come back, did not
	applied  uint64                      // newest generation with everything done

	// The daemon died under the present document again and again, and held, if there is one, is carried out instead.
	dying  bool
	held   *store.Revision
	passes chan struct{} // a pass has ended

	// What is carried out instead of the present document, which was not confirmed, while storing this fails.
	unstored *store.Revision
}

// New returns a router with the stored document, if there is one, ready to Run.
func New(o Options) (*Router, error) {
	r := &Router{Options: o, started: time.Now(), work: newScheduler(), state: newObserved(), proving: make(chan struct{}, 1), taker: taker{wanted: make(chan egress.Takeover, 1)}, passes: make(chan struct{}, 1)}
	r.names = dns.New(dns.Options{File: o.NamesFile, Changed: r.namesChanged, Apply: r.applyNames, Log: o.Log})
	if o.Probe == nil {
		o.Probe = (&health.Prober{Resolve: r.names.Resolve}).Probe
		r.Probe = o.Probe
	}
	r.health = health.New(health.Options{Probe: o.Probe, Changed: r.healthChanged, Log: o.Log, What: "source address"})
	r.proxies = health.New(health.Options{Changed: r.proxyChanged, Log: o.Log, What: "proxy",
		Probe: func(ctx context.Context, iface string, proxy netip.Addr, t egress.Target) error {
			from := netip.IPv4Unspecified()
			if proxy.Is6() {
				from = netip.IPv6Unspecified()
			}
			return r.Probe(ctx, iface, from, t)
		}})
	if o.Flows != nil {
		r.placer = newPlacer(o.NAT, o.Flows, o.Log.With("room", "placement"), r.state.bell.Ring)
		r.unsticker = newUnsticker(o.Flows, o.Log)
	}
	r.first.Store(&o.FirstAPI)
	r.facts.Store(&o.Facts)
	present, ok := o.Store.Current()
	d, problems := spec.Decode([]byte(present.Text))
	r.target = plan.Nothing(r.machine(), spec.AccessOf(d.Message))
	r.closed = r.target.NAT
	if err := r.close(context.Background()); err != nil {
		o.Log.Error("the node is not closed to strangers until rules can be put in", "err", err)
	}
	r.present = present
	if ok {
		if err := r.load(d, problems); err != nil {
			return nil, err
		}
	}
	if r.spec == nil && !r.Safe {
		r.allowSSH(nil)
	}
	if r.spec == nil && !r.work.has("nat") && !r.Safe {
		r.work.set(object{key: "nat", stage: stageGuard, apply: r.close})
	}
	return r, nil
}

// load has the stored document carried out.
func (r *Router) load(d spec.Document, problems spec.Problems) error {
	present := r.present
	if present.Text == "" {
		r.clear(plan.Target{}) // the first document was not confirmed, and a former daemon may not have come to the end of that
		return nil
	}
	if r.Safe {
		r.Log.Warn("started with -safe: nothing is carried out", "generation", present.Generation)
		return nil
	}
	if c := r.begin(); c.Carried != present.Generation && c.Starts >= startsOf {
		return r.startBack(c)
	}
	s, target, ledger, problems, err := r.plan(context.Background(), d, problems, present.Ledger, awaits(present))
	if err != nil {
		return err
	}
	if len(problems) > 0 {
		// What runs is left as it is: the document was good once, and nobody asked for its removal.
		r.invalid = fmt.Errorf("reading generation %d: %w", present.Generation, problems)
		r.Log.Error("the stored document cannot be used; nothing is changed", "err", r.invalid)
		return nil
	}
	if !present.ConfirmBy.IsZero() {
		r.had = r.formerPools()
	}
	// What was not confirmed while nobody was here to go back is not carried out once more. Its rules may still use its addresses.
	r.target.Underlay, r.target.NAT = target.Underlay, target.NAT
	r.revertIfDue(time.Now(), target)
	if r.spec == nil {
		r.use(s, target, ledger)
	}
	return nil
}

// machine is what documents are planned for.
func (r *Router) machine() plan.Machine {
	return plan.Machine{Can: r.Host.Has, Drop: r.Drop, API: r.APIFrom, First: *r.first.Load(), SSH: r.SSH != nil}
}

// formerPools returns the pools of the document that the present one is to be confirmed against.
func (r *Router) formerPools() []nat.Pool {
	former, err := r.Store.Revision(r.present.RevertTo)
	if err != nil {
		return nil // going back will say so
	}
	d, problems := spec.Decode([]byte(former.Text))
	_, target, _, _, _ := r.plan(context.Background(), d, problems, former.Ledger, awaits(former))
	return target.NAT.Pools
}

// plan checks a document and decides about it, without changing anything, and needs no lock. It ends soon after ctx is done, with an error. With awaits, secrets that are
// not stored yet are no problem, and those that are sealed never are.
func (r *Router) plan(ctx context.Context, d spec.Document, decodeProblems spec.Problems, ledger json.RawMessage, awaits bool) (*spec.Spec, plan.Target, plan.Ledger, spec.Problems, error) {
	var former plan.Ledger
	if len(ledger) > 0 {
		if err := json.Unmarshal(ledger, &former); err != nil {
			return nil, plan.Target{}, former, spec.Join(decodeProblems, spec.Problems{{Rule: "has an unreadable ledger: " + err.Error(), Remedy: "roll back to an earlier generation"}}), nil
		}
	}
	s, problems, err := spec.CheckWithin(ctx, d.On(*r.facts.Load()), func(name string) (secret.Ref, bool) {
		ref, err := r.Store.Ref(name)
		if (awaits && errors.Is(err, secret.ErrNotFound) || errors.Is(err, store.ErrSealed)) && store.ValidSecretName(name) {
			return secret.Ref{Name: name}, true // which no secret that can be read is; drivers refuse it until there is one
		}
		return ref, err == nil
	})
	if err != nil {
		return nil, plan.Target{}, former, nil, err
	}
	if problems = spec.Join(decodeProblems, problems); len(problems) > 0 {
		return nil, plan.Target{}, former, problems, nil
	}
	target, next, problems := plan.Make(s, former, r.machine())
	return s, target, next, spec.Join(problems), ctx.Err()
}

// use makes a target the wanted one and has the drivers work on what differs from the former one.
func (r *Router) use(s *spec.Spec, target plan.Target, ledger plan.Ledger) {
	former, first := r.target, r.spec == nil
	r.spec, r.target, r.ledger, r.invalid = s, target, ledger, nil
	r.version++
	if r.Safe {
		return
	}
	r.state.explain(s)
	r.schedule(former, target, first, r.outlived(target))
	// One that changes nothing is carried out by a pass as well.
	r.work.set(object{key: "document", stage: stageRemoval, last: true, apply: func(context.Context) error { return nil }})
}

// clear removes everything that was made for a target, and leaves the node without a document.
func (r *Router) clear(from plan.Target) {
	r.spec, r.target, r.invalid, r.had = nil, plan.Nothing(r.machine(), spec.Access{}), nil, nil
	r.closed = r.target.NAT
	r.version++
	if r.Safe {
		return
	}
	r.state.explain(nil)
	r.scheduleNothing(from)
	r.work.set(object{key: "document", stage: stageRemoval, last: true, apply: func(context.Context) error { return nil }})
}

// outlived returns the pools of which flows end that have an address of none of the target's: while a document waits to be
// confirmed none do, since it may go back.
func (r *Router) outlived(target plan.Target) (had []nat.Pool) {
	r.had = append(slices.Clip(r.had), target.NAT.Pools...)
	if r.present.ConfirmBy.IsZero() {
		had, r.had = r.had, target.NAT.Pools
	}
	return had
}

// Run carries documents out until ctx is done. What is in the kernel and in charon then stays as it is.
func (r *Router) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	start := func(what string, run func(context.Context) error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := run(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", what, err))
			}
		}()
	}
	if r.Safe {
		start("watching", r.tick)
		<-ctx.Done()
		wg.Wait()
		return nil
	}
	r.surroundings() // before the first rules, which name the node's own addresses
	start("noting what was carried out", r.noteCarried)
	for kind, d := range r.Drivers {
		start("running tunnels of kind "+string(kind), func(ctx context.Context) error { return d.Run(ctx, r.tunnelChanged) })
	}
	start("running BGP", func(ctx context.Context) error { return r.BGP.Run(ctx, reporter{r}) })
	start("running the FIB", r.FIB.Run)
	start("probing", r.health.Run)
	start("taking over", r.takeOver)
	start("probing proxies", r.proxies.Run)
	start("resolving names", r.names.Run)
	start("watching the use of names", r.watchUse)
	if r.Translations != nil {
		start("recording translations", r.Translations.Run)
	}
	start("reconciling", func(ctx context.Context) error { r.work.run(ctx, r.passed); return nil })
	if r.placer != nil {
		start("placing flows", r.placer.run)
	}
	if r.unsticker != nil {
		start("ending flows", r.unsticker.run)
	}
	start("watching", r.tick)
	start("asking charon", r.watchCharon)
	start("sampling the guard", r.sampleGuard)
	start("watching the guard", r.watchGuard)
	start("looking around", r.lookAround)
	<-ctx.Done()
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// How often everything is read back although no event asked for it, how often charon is asked how it is, how long a document
// has been the present one before its file is made to need no other, and when that is tried again.
const (
	resync      = time.Minute
	charonCheck = 10 * time.Second
	settleAfter = 10 * time.Second
	settleRetry = time.Minute
)

// tick does what time alone causes: the return of an unconfirmed document, and reading back.
func (r *Router) tick(ctx context.Context) error {
	second := time.NewTicker(time.Second)
	defer second.Stop()
	last, settle := time.Now(), time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-second.C:
			r.mu.Lock()
			r.revertIfDue(now, r.target)
			r.mu.Unlock()
			if now.After(settle) {
				if err := r.settle(now); err != nil {
					r.Log.Warn("writing the present document as a whole; trying again", "err", err)
					settle = now.Add(settleRetry)
				}
			}
			if now.Sub(last) >= resync && !r.Safe {
				last = now
				r.readBack(ctx)
			}
		}
	}
}

// passed notes that a generation has been applied as a whole.
func (r *Router) passed() {
	r.state.bell.Ring()
	select {
	case r.passes <- struct{}{}:
	default:
	}
	if !r.work.settled() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	carried := r.present.Generation
	if r.unstored != nil {
		carried = r.present.RevertTo
	} else if r.held != nil {
		carried = r.held.Generation
	}
	if (r.spec != nil || r.present.Text == "") && r.work.settled() && r.applied != carried {
		r.applied = carried
		r.Log.Info("applied", "generation", r.applied)
	}
}

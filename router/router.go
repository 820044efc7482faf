// Package router wires a node together: the documents, what carries them out, what observes the result and what reports it.
// The stages are in rooms of their own; see docs/architecture.md.
package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/ports"
	"github.com/isthmus-net/isthmus/router/report"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Addresses are the machine's addresses and links.
type Addresses interface {
	apply.Addresses
	observe.Machine
	report.Addresses
}

// Host is the machine.
type Host interface {
	apply.Host
	// Has reports whether the kernel has a capability.
	Has(capability string) bool
	// Capabilities lists what the kernel has.
	Capabilities() []string
	// Listening returns what listens at an address of the machine, as "tcp/22".
	Listening(netip.Addr) []string
}

// FIB is the forwarding table; router/fib has the words.
type FIB interface {
	apply.FIB
	observe.FIB
	report.FIB
	// Run writes to the kernel until ctx is done.
	Run(context.Context) error
}

// Flows is the table of connection tracking; nat/conntrack has the words.
type Flows interface {
	apply.Flows
	ports.Flows
}

// Translations is the log of translations; router/egress/translog has the words.
type Translations interface {
	report.Translations
	// Limit sets what is wanted of the log, and Use by which rules flows begin from now on.
	Limit(egress.Log)
	Use(nat.Config)
	// Run records until ctx is done.
	Run(context.Context) error
}

// Counters counts what was written since the start of the daemon.
type Counters = report.Counters

// Options are what a Router works with.
type Options struct {
	Store   *store.Store
	Drivers map[tunnel.Kind]tunnel.Driver
	BGP     bgp.Driver
	FIB     FIB
	NAT     nat.Driver
	// Flows lets new flows be placed by what is in use of the pools' ports, and ends flows. Nil: neither is done.
	Flows Flows
	// Translations remembers who talked to whom as which address. Nil: there is no log.
	Translations Translations
	Addresses    Addresses
	Host         Host
	Version      string
	Log          *slog.Logger
	// Charon returns what about charon does not fit, in words; nil: it is not asked. An error means that it does not answer.
	Charon func(context.Context) ([]string, error)
	// Callers returns the addresses that ask for a tunnel that is not there; nil: none is noticed.
	Callers func() []tunnel.Caller
	// NamesFile keeps the addresses of names for the next start. Empty: they are not kept.
	NamesFile string
	// Probe asks a target of health checks once, from an address and out by an interface. Default: health.Prober.
	Probe func(ctx context.Context, iface string, from netip.Addr, t egress.Target) error
	// Mover takes public addresses; nil: none can be taken.
	Mover takeover.Mover
	// SSH has the machine's SSH server take these keys and no others. Nil: it is not ours.
	SSH func(keys []string) error
	// APIPort is the TCP port of the API; 0: it has only its unix socket.
	APIPort uint16
	// Resolvers are the DNS servers that the machine itself uses.
	Resolvers func() []netip.Addr
	// Drop says that packets to the node that nothing lets in are dropped where a document does not say (access.input). Default: services
	// other than those of isthmus are reached as the machine has it.
	Drop bool
	// APIFrom are sources that may reach the API besides those that the document names.
	APIFrom []netip.Prefix
	// FirstAPI are sources that may reach the API as long as the document names none; see SetFirstAccess.
	FirstAPI []netip.Prefix
	// Safe carries nothing out: documents are taken and stored, and what runs stays as it is. Where no rules are, those are put in that close
	// the node.
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

// Router is one node. It is what the API stands in front of.
type Router struct {
	*report.Report
	o         Options
	documents *document.Manager
	applier   *apply.Applier
	observer  *observe.Observer
	keeper    *ports.Keeper // nil: ports are not kept
	takeover  *takeover.Runner
	health    *health.Checker
	proxies   *health.Checker
	names     *dns.Resolver
	bell      bell.Bell
}

// New returns a router with the stored document, if there is one, ready to Run.
func New(o Options) (*Router, error) {
	r := &Router{o: o}
	r.names = dns.New(dns.Options{File: o.NamesFile, Changed: r.namesChanged, Apply: func(ctx context.Context) error { return r.applier.PutRules(ctx) }, Log: o.Log})
	probe := o.Probe
	if probe == nil {
		probe = (&health.Prober{Resolve: r.names.Resolve}).Probe
	}
	r.health = health.New(health.Options{Probe: probe, Changed: r.changed("nat", "bgp"), Log: o.Log, What: "source address"})
	r.proxies = health.New(health.Options{Changed: r.changed("nat"), Log: o.Log, What: "proxy",
		Probe: func(ctx context.Context, iface string, proxy netip.Addr, t egress.Target) error {
			from := netip.IPv4Unspecified()
			if proxy.Is6() {
				from = netip.IPv6Unspecified()
			}
			return probe(ctx, iface, from, t)
		}})
	r.takeover = &takeover.Runner{Mover: o.Mover, Changed: r.bell.Ring, Log: o.Log.With("room", "takeover"), Echo: func(ctx context.Context, p egress.Path) error {
		return probe(ctx, p.Interface, p.From, egress.Target{Scheme: "icmp", Host: p.To.String()})
	}}
	if o.Flows != nil {
		r.keeper = ports.New(o.NAT, o.Flows, o.Log.With("room", "placement"), r.bell.Ring)
	}
	r.observer = observe.New(observe.Options{
		Machine: o.Addresses, FIB: o.FIB, NAT: o.NAT, Flows: o.Flows, Charon: o.Charon, Health: r.health, Proxies: r.proxies, Names: r.names,
		Resolvers: o.Resolvers, APIPort: o.APIPort, Nudge: func(jobs ...string) { r.applier.Again(jobs...) }, Retry: func() { r.applier.Retry() }, Bell: &r.bell, Log: o.Log,
	})
	ao := apply.Options{
		Drivers: o.Drivers, BGP: o.BGP, FIB: o.FIB, NAT: o.NAT, Addresses: o.Addresses, Host: o.Host, Names: r.names, Health: r.health, Proxies: r.proxies,
		Flows: o.Flows, SSH: o.SSH, Takeover: r.takeover.Use, Facts: r.observer.Facts, Mark: r.observer.Mark, Seen: r.observer.Seen,
		Applied: r.applied, Changed: r.bell.Ring, Log: o.Log,
	}
	if o.Translations != nil {
		ao.Limit = o.Translations.Limit
	}
	r.applier = apply.New(ao)
	r.documents = document.New(document.Options{
		Store: o.Store, Carrier: carrier{r}, Machine: previewed{r}, FirstAPI: o.FirstAPI, Facts: o.Facts, Safe: o.Safe, Log: o.Log,
		Plan: plan.Machine{Can: o.Host.Has, Drop: o.Drop, API: o.APIFrom, SSH: o.SSH != nil},
	})
	r.Report = report.New(report.Options{
		Documents: r.documents, Applied: r.applier, Observed: r.observer, Keeper: r.keeper, Takeover: r.takeover, Health: r.health, Resolver: r.names,
		Store: o.Store, BGP: o.BGP, FIB: o.FIB, NAT: o.NAT, Addresses: o.Addresses, Flows: o.Flows, Translations: o.Translations, Callers: o.Callers,
		Resolvers: o.Resolvers, Capabilities: o.Host.Capabilities, Counters: o.Counters, Notices: o.Notices, Platform: o.Platform, Version: o.Version,
		Bell: &r.bell, Log: o.Log,
	})
	closed := r.documents.Status().Target
	if err := r.applier.Close(context.Background(), &closed); err != nil {
		o.Log.Error("the node is not closed to strangers until rules can be put in", "err", err)
	}
	if err := r.documents.Load(); err != nil {
		return nil, err
	}
	return r, nil
}

// carrier has targets observed and carried out.
type carrier struct{ *Router }

func (c carrier) Carry(s *spec.Spec, t plan.Target, gone []nat.Pool) {
	c.observer.Use(s, t)
	c.applier.Set(apply.Wanted{Mode: apply.Carry, Target: t, Gone: gone})
}
func (c carrier) Clear(t plan.Target) {
	c.observer.Use(nil, plan.Target{})
	c.applier.Set(apply.Wanted{Mode: apply.Clear, Target: t})
}
func (c carrier) Hold(t plan.Target)       { c.applier.Set(apply.Wanted{Mode: apply.Hold, Target: t}) }
func (c carrier) EndFlows(gone []nat.Pool) { c.applier.EndFlows(gone) }
func (c carrier) Settled() bool            { return c.applier.Settled() }
func (c carrier) Tried() bool              { return c.applier.Tried() }

// previewed is what previews of documents look at.
type previewed struct{ *Router }

func (m previewed) Surroundings() fib.Surroundings  { return m.observer.Machine() }
func (m previewed) Listening(a netip.Addr) []string { return m.o.Host.Listening(a) }
func (m previewed) Count(ctx context.Context, sets []nat.Ending) ([]int, error) {
	return observe.CountFlows(ctx, m.o.Flows, sets)
}

// changed returns a function that has jobs look again.
func (r *Router) changed(jobs ...string) func() {
	return func() {
		r.applier.Again(jobs...)
		r.bell.Ring()
	}
}

func (r *Router) namesChanged(addresses bool) {
	if addresses {
		r.applier.Again("nat")
	}
	r.bell.Ring()
}

// applied hands the rules that are in force to those who follow them.
func (r *Router) applied(c nat.Config) {
	if r.keeper != nil {
		r.keeper.Use(c)
	}
	if r.o.Translations != nil {
		r.o.Translations.Use(c)
	}
}

// Run carries documents out until ctx is done. What is in the kernel and in charon then stays as it is.
func (r *Router) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	start := func(what string, run func(context.Context) error) {
		wg.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", what, err))
			}
		})
	}
	start("watching documents", r.documents.Run)
	if r.o.Safe {
		<-ctx.Done()
		wg.Wait()
		return nil
	}
	r.observer.ReadMachine() // before the first rules, which name the node's own addresses
	start("noting which document was carried out", r.documents.NoteCarried)
	for kind, d := range r.o.Drivers {
		start("running tunnels of kind "+string(kind), func(ctx context.Context) error { return d.Run(ctx, r.observer.Changed) })
	}
	start("running BGP", func(ctx context.Context) error { return r.o.BGP.Run(ctx, r.observer) })
	start("running the FIB", r.o.FIB.Run)
	start("probing", r.health.Run)
	start("probing proxies", r.proxies.Run)
	start("taking over", r.takeover.Run)
	start("resolving names", r.names.Run)
	if r.o.Translations != nil {
		start("recording translations", r.o.Translations.Run)
	}
	if r.keeper != nil {
		start("keeping ports", r.keeper.Run)
	}
	start("applying", func(ctx context.Context) error { r.applier.Run(ctx, r.passed); return nil })
	start("comparing", r.resync)
	start("watching the use of names", r.observer.WatchUse)
	start("watching charon", r.observer.WatchCharon)
	start("watching the machine", r.observer.WatchMachine)
	start("sampling dropped packets", r.SampleDrops)
	<-ctx.Done()
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// passed takes note of a pass of the applier.
func (r *Router) passed() {
	r.bell.Ring()
	r.documents.Passed()
}

// resyncPace is how often everything is read back although no event asked for it.
const resyncPace = time.Minute

func (r *Router) resync(ctx context.Context) error {
	tick := time.NewTicker(resyncPace)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			r.applier.Resync()
			r.observer.ReadMachine()
		}
	}
}

// Ready reports whether the rules of the document that is carried out are in the kernel, or nothing is to be carried out. It does not
// wait; while the documents are busy the answer may be no.
func (r *Router) Ready() bool { return r.o.Safe || r.applier.Ruled() || r.documents.Empty() }

// Alive returns nil when the documents and the applier make progress before ctx is done, else an error that says which does not. A long
// pass makes progress with each object that it has worked on.
func (r *Router) Alive(ctx context.Context) error {
	if err := r.documents.Alive(ctx); err != nil || r.o.Safe {
		return err
	}
	if err := r.applier.Alive(ctx); err != nil {
		return fmt.Errorf("the applier makes no progress: %w", err)
	}
	return nil
}

// CheckFirst returns the problems of a text as the first document, as an error that is spec.Problems.
func (r *Router) CheckFirst(ctx context.Context, text string) error {
	return r.documents.CheckFirst(ctx, text)
}

// ApplyFirst makes a text the first document; see document.Manager.
func (r *Router) ApplyFirst(ctx context.Context, text string) (uint64, error) {
	return r.documents.ApplyFirst(ctx, text)
}

// Generation returns the number of the newest accepted document; 0: there has never been one.
func (r *Router) Generation() uint64 { return r.documents.Generation() }

// SetFirstAccess sets which sources may reach the API as long as the document names none.
func (r *Router) SetFirstAccess(ctx context.Context, api []netip.Prefix) error {
	return r.documents.SetFirstAccess(ctx, api)
}

// SetFacts sets what the platform says of addresses now.
func (r *Router) SetFacts(ctx context.Context, p spec.Platform) error {
	return r.documents.SetFacts(ctx, p)
}

// SecretsOpened has the present document carried out with secrets that could not be read before.
func (r *Router) SecretsOpened(ctx context.Context) error { return r.documents.SecretsOpened(ctx) }

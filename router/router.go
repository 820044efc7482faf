// Package router wires a node together: the documents, the applier, the observer and the report.
// The stages are in separate rooms; see docs/architecture.md.
package router

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/capability"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/door"
	"github.com/isthmus-net/isthmus/router/echo"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/event/export"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/lane/proof"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/packets"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/ports"
	"github.com/isthmus-net/isthmus/router/report"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Router is one node. The API serves it.
type Router struct {
	*report.Report
	o         Options
	documents *document.Manager
	applier   *apply.Applier
	observer  *observe.Observer
	health    *health.Checker
	proxies   *health.Checker
	names     *dns.Resolver
	bell      bell.Bell
	// capabilities are the features of the node besides tunnels, routes and rules. A new one is a
	// line in New.
	capabilities []capability.Capability
}

// New returns a router with the stored document, if there is one, ready to Run.
func New(o Options) (*Router, error) {
	r := &Router{o: o}
	r.names = dns.New(dns.Options{File: o.NamesFile, Changed: r.namesChanged, Apply: func(ctx context.Context) error { return r.applier.PutRules(ctx) }, Log: o.Log})
	probe := o.Probe
	if probe == nil {
		probe = (&health.Prober{Resolve: r.names.Resolve}).Probe
	}
	ping := o.Ping
	if ping == nil {
		ping = echo.Ping
	}
	capture := o.Capture
	if capture == nil {
		capture = packets.Capture
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
	r.observer = observe.New(observe.Options{
		Machine: o.Addresses, FIB: o.FIB, NAT: o.NAT, Flows: o.Flows, Charon: o.Charon, Health: r.health, Proxies: r.proxies, Names: r.names,
		Resolvers: o.Resolvers, APIPort: o.APIPort, Nudge: func(jobs ...string) { r.applier.Again(jobs...) }, Retry: func() { r.applier.Retry() },
		Interfaces: o.Interfaces, Bell: &r.bell, Log: o.Log,
	})
	r.documents = document.New(document.Options{
		Store: o.Store, Carrier: carrier{r}, Machine: previewed{r}, FirstAPI: o.FirstAPI, Facts: o.Facts, Safe: o.Safe, Log: o.Log,
		Plan: plan.Machine{Can: o.Host.Has, Drop: o.Drop, API: o.APIFrom, SSH: o.SSH != nil},
	})
	used := capability.Ports{}
	if o.Flows != nil {
		used.Keeper = ports.New(o.NAT, o.Flows, o.Log.With("room", "placement"), r.bell.Ring)
	}
	domains := capability.Names{Resolver: r.names, Observed: r.observer, Conflicts: func() []live.Conflict { return r.applier.Conflicts() }}
	probes := capability.Probes{Health: r.health, Proxies: r.proxies, Observed: r.observer}
	translog := capability.Translog{Log: o.Translations, Documents: r.documents, History: o.Store.History}
	r.capabilities = []capability.Capability{
		capability.Takeover{Started: time.Now(), Runner: &takeover.Runner{
			Mover: o.Mover, Await: r.health.Await, Changed: r.bell.Ring, Log: o.Log.With("room", "takeover"), Echo: func(ctx context.Context, p egress.Path) error {
				return probe(ctx, p.Interface, p.From, egress.Target{Scheme: "icmp", Host: p.To.String()})
			}}}.Capability(),
		probes.Capability(), domains.Capability(), used.Capability(), translog.Capability(), capability.Transit(o.FIB, o.Addresses),
	}
	prover := o.Lanes
	if prover == nil {
		prover = func(changed func()) capability.LaneProver {
			return proof.New(proof.Options{Changed: changed, Log: o.Log.With("room", "lanes")})
		}
	}
	var lanes *capability.Links
	lanes = capability.NewLinks(capability.LinkOptions{
		Prover: prover(func() { lanes.Kick() }), Observed: r.observer, Shares: o.Shares, Heal: r.heal, Changed: r.bell.Ring, Log: o.Log.With("room", "lanes"),
	})
	r.capabilities = append(r.capabilities, lanes.Capability())
	var exports func() []export.State
	if o.Events != nil {
		x := export.New(export.Options{Log: o.Events, File: o.ExportFile, Secrets: o.Store.Lookup, Changed: r.bell.Ring, Logger: o.Log.With("room", "export")})
		r.capabilities, exports = append(r.capabilities, capability.Export(x)), x.States
	}
	if o.Metrics != nil {
		doors := door.New(door.Options{Page: o.Metrics, Changed: r.bell.Ring, Log: o.Log.With("room", "metrics")})
		r.capabilities = append(r.capabilities, capability.Metrics(doors))
	}
	if o.SSH != nil {
		r.capabilities = append(r.capabilities, capability.SSH(o.SSH))
	}
	allowances := capability.NewAllowances(capability.AllowanceOptions{Read: o.Allowances, Target: r.observer.Target, Changed: r.bell.Ring, Log: o.Log})
	r.capabilities = append(r.capabilities, allowances.Capability())
	ao := apply.Options{
		Drivers: o.Drivers, BGP: o.BGP, FIB: o.FIB, NAT: o.NAT, Addresses: o.Addresses, Host: o.Host, Names: r.names, Health: r.health, Proxies: r.proxies,
		Flows: o.Flows, Facts: r.observer.Facts, Mark: r.observer.Mark, Seen: r.observer.Seen, Applied: r.applied, Changed: r.bell.Ring, Log: o.Log,
	}
	for _, c := range r.capabilities {
		ao.Jobs = append(ao.Jobs, c.Jobs...)
	}
	r.applier = apply.New(ao)
	r.Report = report.New(report.Options{
		Documents: r.documents, Applied: r.applier, Observed: r.observer, Translog: translog, Capabilities: r.capabilities,
		Pools: probes.List, Ports: used.Counted, Allowances: allowances.Counters, Exports: exports,
		Store: o.Store, Drivers: o.Drivers, BGP: o.BGP, Tables: o.Tables, FIB: o.FIB, NAT: o.NAT, Addresses: o.Addresses, Flows: o.Flows, Callers: o.Callers, Ping: ping, Capture: capture,
		Resolvers: o.Resolvers, Kernel: o.Host.Capabilities, Counters: o.Counters, Notices: o.Notices, Platform: o.Platform, Version: o.Version,
		Bell: &r.bell, Log: o.Log,
	})
	closed := r.documents.Status().Target
	if err := r.applier.Close(context.Background(), &closed); err != nil {
		o.Log.Error("the node stays open to strangers until rules can be written", "err", err)
	}
	if err := r.documents.Load(); err != nil {
		return nil, err
	}
	return r, nil
}

// carrier has targets observed and applied.
type carrier struct{ *Router }

func (c carrier) Carry(s *spec.Spec, t plan.Target, onTrial bool) {
	c.observer.Use(s, t)
	c.applier.Set(apply.Wanted{Mode: apply.Carry, Target: t, OnTrial: onTrial})
}
func (c carrier) Clear(t plan.Target) {
	c.observer.Use(nil, plan.Target{})
	c.applier.Set(apply.Wanted{Mode: apply.Clear, Target: t})
}
func (c carrier) Hold(t plan.Target) { c.applier.Set(apply.Wanted{Mode: apply.Hold, Target: t}) }
func (c carrier) Confirmed()         { c.applier.Confirmed() }
func (c carrier) Settled() bool      { return c.applier.Settled() }
func (c carrier) Tried() bool        { return c.applier.Tried() }

// previewed is the machine for previews of documents.
type previewed struct{ *Router }

func (m previewed) Surroundings() fib.Surroundings  { return m.observer.Machine() }
func (m previewed) MTU(iface string) int            { return m.o.Host.MTU(iface) }
func (m previewed) Processors() int                 { return runtime.NumCPU() }
func (m previewed) Listening(a netip.Addr) []string { return m.o.Host.Listening(a) }
func (m previewed) Received(peer string) uint32 {
	for _, s := range m.o.BGP.Peers() {
		if s.Name == peer {
			return s.Received
		}
	}
	return 0
}
func (m previewed) Learned() map[netip.Prefix][]bgp.Path { return m.observer.Learned() }
func (m previewed) Count(ctx context.Context, sets []nat.Ending) ([]int, error) {
	return observe.CountFlows(ctx, m.o.Flows, sets)
}

// changed returns a function that runs jobs again.
func (r *Router) changed(jobs ...string) func() {
	return func() {
		r.applier.Again(jobs...)
		r.bell.Ring()
	}
}

// heal negotiates new keys of a tunnel, or makes its interface again.
func (r *Router) heal(ctx context.Context, name string, again bool) error {
	t := r.observer.Target()
	i, ok := t.Tunnel(name)
	if !ok {
		return fmt.Errorf("healing lane %s: %w", name, tunnel.ErrNotFound)
	}
	d := r.o.Drivers[t.Tunnels[i].Kind()]
	if !again {
		return d.Reset(ctx, name)
	}
	defer r.applier.Again("tunnel/" + name)
	return d.Remove(ctx, name)
}

func (r *Router) namesChanged(addresses bool) {
	if addresses {
		r.applier.Again("nat")
	}
	r.bell.Ring()
}

// applied passes the rules in force to the capabilities that follow them.
func (r *Router) applied(c nat.Config) {
	for _, one := range r.capabilities {
		if one.Rules != nil {
			one.Rules(c)
		}
	}
}

// Run applies documents until ctx is done, and then leaves the state of the kernel and of charon as
// it is.
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
	if r.o.Events != nil {
		start("recording events", func(ctx context.Context) error { return r.o.Events.Run(ctx, r.o.Version, r.Report) })
	}
	start("watching documents", r.documents.Run)
	if r.o.Safe {
		<-ctx.Done()
		wg.Wait()
		return nil
	}
	r.observer.ReadMachine() // before the first rules, which have the node's own addresses
	start("recording the applied document", r.documents.NoteCarried)
	for kind, d := range r.o.Drivers {
		start("running tunnels of kind "+string(kind), func(ctx context.Context) error { return d.Run(ctx, r.observer.Changed) })
	}
	start("running BGP", func(ctx context.Context) error { return r.o.BGP.Run(ctx, r.observer) })
	start("running the FIB", r.o.FIB.Run)
	for _, c := range r.capabilities {
		if c.Run != nil {
			start(c.Name, c.Run)
		}
	}
	start("applying", func(ctx context.Context) error { r.applier.Run(ctx, r.passed); return nil })
	start("comparing", r.resync)
	start("watching the use of names", r.observer.WatchUse)
	start("watching charon", r.observer.WatchCharon)
	start("watching the machine", r.observer.WatchMachine)
	start("watching the data of tunnels", r.observer.WatchData)
	start("sampling dropped packets", r.SampleDrops)
	<-ctx.Done()
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// passed is called after a pass of the applier.
func (r *Router) passed() {
	r.documents.Passed()
	r.bell.Ring() // last: the applied generation is part of the state that waiters read
}

// resyncPace is the interval of reading everything back without an event.
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

// Ready reports whether the rules of the applied document are in the kernel, or there is nothing to
// apply. It does not wait; while the documents are busy, it may return false.
func (r *Router) Ready() bool { return r.o.Safe || r.applier.Ruled() || r.documents.Empty() }

// Alive returns nil when the documents and the applier make progress before ctx is done, else an
// error that names the one that does not. A long pass makes progress with each object that it has
// worked on.
func (r *Router) Alive(ctx context.Context) error {
	if err := r.documents.Alive(ctx); err != nil || r.o.Safe {
		return err
	}
	if err := r.applier.Alive(ctx); err != nil {
		return fmt.Errorf("the applier makes no progress: %w", err)
	}
	return nil
}

// CheckFirst returns the problems of a text as the first document, as an error that is
// spec.Problems.
func (r *Router) CheckFirst(ctx context.Context, text string) error {
	return r.documents.CheckFirst(ctx, text)
}

// ApplyFirst makes a text the first document; see document.Manager.
func (r *Router) ApplyFirst(ctx context.Context, text string) (uint64, error) {
	return r.documents.ApplyFirst(ctx, text)
}

// SetFirstAccess sets the sources that may reach the API until the document names some.
func (r *Router) SetFirstAccess(ctx context.Context, api []netip.Prefix) error {
	return r.documents.SetFirstAccess(ctx, api)
}

// SetFacts sets the platform's present addresses.
func (r *Router) SetFacts(ctx context.Context, p spec.Platform) error {
	return r.documents.SetFacts(ctx, p)
}

// SecretsOpened applies the present document again, with secrets that could not be read before.
func (r *Router) SecretsOpened(ctx context.Context) error { return r.documents.SecretsOpened(ctx) }

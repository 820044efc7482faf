// Package observe keeps what was last seen of tunnels, sessions, learned paths, the machine and
// charon, and what follows from it at once: a next hop that is down leaves its groups before
// anything is planned or applied again. What it knows is the input of router/live and of
// router/report.
package observe

import (
	"context"
	"log/slog"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Machine reads what is not of isthmus.
type Machine interface {
	// Surroundings reads what the machine has of addresses, routes and rules that is not of
	// isthmus.
	Surroundings() (fib.Surroundings, error)
	// Around calls changed when addresses, interfaces, or routes that are not of isthmus may have
	// changed, until ctx is done.
	Around(ctx context.Context, changed func()) error
}

// FIB takes in what BGP and the tunnels report.
type FIB interface {
	// Update replaces the routes of prefixes learned by BGP; one without next hops is gone.
	Update([]fib.Route)
	// SetAlive tells whether a next hop carries traffic; one without a gateway stands for its
	// interface.
	SetAlive(h fib.NextHop, alive bool)
	// Restarted says that learned routes come again, Synced that they are complete.
	Restarted()
	Synced()
}

// Flows reads the table of connection tracking.
type Flows interface {
	// Dump calls f with every flow of a family (unix.AF_UNSPEC: all) until it returns false. f must
	// not keep the flow.
	Dump(ctx context.Context, family uint8, f func(*conntrack.Flow) bool) error
}

// Options are what an Observer works with.
type Options struct {
	Machine Machine
	FIB     FIB
	NAT     nat.Driver
	// Flows tells which addresses of names are in use. Nil: it is not known.
	Flows Flows
	// Charon returns what about charon does not fit, in words; an error means that it does not
	// answer. Nil: it is not asked.
	Charon    func(context.Context) ([]string, error)
	Health    *health.Checker // of pool addresses
	Proxies   *health.Checker
	Names     *dns.Resolver
	Resolvers func() []netip.Addr // DNS servers of the machine; nil: none
	APIPort   uint16
	// Nudge has jobs of router/apply look again, and Retry all that failed.
	Nudge func(jobs ...string)
	Retry func()
	// Bell rings when something that can be shown has changed.
	Bell *bell.Bell
	Log  *slog.Logger
}

// Observer keeps what was seen. Methods may be called from several goroutines.
type Observer struct {
	o        Options
	seen     State
	mu       sync.Mutex // guards seen and what follows
	tunnels  map[string]tunnel.Config
	peers    map[string]bgp.Peer
	told     map[string]uint64 // number of the last state of a tunnel
	states   uint64            // that have come
	telling  sync.Mutex        // serializes what follows from the states of tunnels
	around   around
	charon   charonHealth
	counters counters
}

// State is what was seen, with what it is compared with.
type State struct {
	Target  plan.Target
	Spec    *spec.Spec // that the target was made of; nil: none
	Tunnels map[string]tunnel.State
	Paths   map[netip.Prefix]Learned
}

// Learned is what BGP said of a prefix, and when.
type Learned struct {
	Paths []bgp.Path
	At    time.Time
}

// New returns an Observer that has seen nothing.
func New(o Options) *Observer {
	return &Observer{
		o:       o,
		seen:    State{Tunnels: map[string]tunnel.State{}, Paths: map[netip.Prefix]Learned{}},
		tunnels: map[string]tunnel.Config{}, peers: map[string]bgp.Peer{}, told: map[string]uint64{},
	}
}

// Use sets the target that what is seen belongs to, and the document that it was made of. States of
// tunnels that it does not have are forgotten.
func (o *Observer) Use(s *spec.Spec, t plan.Target) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.seen.Target, o.seen.Spec = t, s
	clear(o.tunnels)
	for _, c := range t.Tunnels {
		o.tunnels[c.Name] = c
	}
	for name, seen := range o.seen.Tunnels {
		if c, ok := o.tunnels[name]; !ok || c.Kind() != seen.Kind {
			delete(o.seen.Tunnels, name)
			delete(o.told, name)
		}
	}
	clear(o.peers)
	for _, p := range t.BGP.Peers {
		o.peers[p.Name] = p
	}
	o.o.Bell.Ring()
}

// Read calls f with what was seen. f must neither change nor keep its maps.
func (o *Observer) Read(f func(*State)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f(&o.seen)
}

// Target returns the target that was last used.
func (o *Observer) Target() (t plan.Target) {
	o.Read(func(s *State) { t = s.Target })
	return t
}

// Facts returns what the effective configuration follows from.
func (o *Observer) Facts() live.Facts {
	f := live.Facts{APIPort: o.o.APIPort, Pools: o.o.Health.Health(), Names: o.o.Names.Addresses, ProxiesDown: map[string]bool{}, TunnelsDown: o.down()}
	f.Machine, f.Read = o.around.get()
	if o.o.Resolvers != nil {
		f.Resolvers = o.o.Resolvers()
	}
	for name := range o.SickProxies() {
		f.ProxiesDown[name] = true
	}
	return f
}

// SickProxies returns the proxies that do not work, by the names of their policies.
func (o *Observer) SickProxies() map[string]health.Member {
	sick := map[string]health.Member{}
	for _, p := range o.o.Proxies.Pools() {
		if p.Usable() == 0 {
			sick[p.Name] = p.Members[0]
		}
	}
	return sick
}

// down returns the interfaces of the tunnels that are known to be down.
func (o *Observer) down() map[string]bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := map[string]bool{}
	for name, c := range o.tunnels {
		if s, seen := o.seen.Tunnels[name]; seen && s.Status == tunnel.Down {
			out[c.Interface] = true
		}
	}
	return out
}

// Mark returns a number for Seen: a state that is read from now on is newer than those that came
// before.
func (o *Observer) Mark() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.states
}

// Changed takes a tunnel's state from its driver.
func (o *Observer) Changed(s tunnel.State) { o.Seen(s, math.MaxUint64) }

// Seen takes a state that was read after a mark, unless a newer one came meanwhile.
func (o *Observer) Seen(s tunnel.State, mark uint64) {
	o.telling.Lock()
	defer o.telling.Unlock()
	iface, mapped, ok := o.setTunnel(s, mark)
	if !ok || s.Status == tunnel.Unknown {
		return
	}
	// Only a tunnel that is known to be down is taken out: while charon is away its tunnels still
	// work.
	o.o.FIB.SetAlive(fib.NextHop{Interface: iface}, s.Status != tunnel.Down)
	if mapped {
		o.o.Nudge("bgp")
	}
}

// setTunnel keeps a state. It returns the interface of the tunnel, whether a map of prefixes is
// behind it, and false when the tunnel is not wanted or a newer state has come since the mark.
func (o *Observer) setTunnel(s tunnel.State, mark uint64) (iface string, mapped, wanted bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c, ok := o.tunnels[s.Name]
	if !ok || c.Kind() != s.Kind || o.told[s.Name] > mark {
		return "", false, false
	}
	o.states++
	o.told[s.Name] = o.states
	o.seen.Tunnels[s.Name] = s
	o.o.Bell.Ring()
	mapped = slices.ContainsFunc(o.seen.Target.NAT.Maps, func(m nat.Map) bool { return slices.Contains(m.Interfaces, c.Interface) })
	return c.Interface, mapped, true
}

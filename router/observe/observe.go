// Package observe keeps the last observed state of tunnels, sessions, learned paths, the machine
// and charon, and reacts at once where it must: a next hop that is down leaves its groups before
// anything is planned or applied again. Its state is the input of router/live and router/report.
package observe

import (
	"context"
	"log/slog"
	"maps"
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
	"github.com/isthmus-net/isthmus/tunnel/liveness"
)

// Machine reads the state of the machine that isthmus did not make.
type Machine interface {
	// Surroundings reads addresses, routes and rules that isthmus did not make.
	Surroundings() (fib.Surroundings, error)
	// Around calls changed when addresses, interfaces, or routes that isthmus did not make may have
	// changed, until ctx is done.
	Around(ctx context.Context, changed func()) error
}

// FIB receives the reports of BGP and the tunnels.
type FIB interface {
	// Update replaces the routes of prefixes learned by BGP; an entry without next hops removes its
	// prefix.
	Update([]fib.Route)
	// SetAlive sets whether a next hop carries traffic; a next hop without a gateway stands for its
	// interface.
	SetAlive(h fib.NextHop, alive bool)
	// Restarted reports that learned routes come again, Synced that they are complete.
	Restarted()
	Synced()
}

// Flows reads the connection table.
type Flows interface {
	// Dump calls f with every flow of a family (unix.AF_UNSPEC: all) until f returns false. f must
	// not keep the flow.
	Dump(ctx context.Context, family uint8, f func(*conntrack.Flow) bool) error
}

// Options are the dependencies of an Observer.
type Options struct {
	Machine Machine
	FIB     FIB
	NAT     nat.Driver
	// Flows shows which addresses of names are in use. Nil: unknown.
	Flows Flows
	// Charon returns the problems of charon, as text; an error means that it does not answer. Nil:
	// charon is not queried.
	Charon    func(context.Context) ([]string, error)
	Health    *health.Checker // of pool addresses
	Proxies   *health.Checker
	Names     *dns.Resolver
	Resolvers func() []netip.Addr // DNS servers of the machine; nil: none
	APIPort   uint16
	// Nudge runs jobs of router/apply again, and Retry all that failed.
	Nudge func(jobs ...string)
	Retry func()
	// Interfaces reads the counters of the tunnels' interfaces, by name. Nil: whether tunnels carry
	// data is not watched.
	Interfaces func() (map[string]liveness.Counters, error)
	// Bell rings when a reported state has changed.
	Bell *bell.Bell
	Log  *slog.Logger
}

// Observer keeps the observed state. Its methods may be called from several goroutines.
type Observer struct {
	o        Options
	seen     State
	mu       sync.Mutex // guards the fields below
	tunnels  map[string]tunnel.Config
	peers    map[string]bgp.Peer
	raw      map[string]tunnel.State     // as their drivers report them
	data     map[string]data             // of tunnels
	sessions map[string]bgp.SessionState // by name of the peer
	told     map[string]uint64           // sequence number of the last state of each tunnel
	out      map[string]bool             // lanes that routes must not use, by name
	states   uint64                      // sequence number of the newest state
	telling  sync.Mutex                  // serializes reactions to tunnel states
	around   around
	charon   charonHealth
	counters counters
}

// State is the observed state, with the target that it belongs to.
type State struct {
	Target  plan.Target
	Spec    *spec.Spec // the target's source; nil: none
	Tunnels map[string]tunnel.State
	Paths   map[fib.Key]Learned
	// Since when tunnels are not up and sessions not established, by name. An unknown state changes
	// neither.
	LostTunnels, LostSessions map[string]time.Time
}

// Learned has the paths that BGP reported for a prefix, and when.
type Learned struct {
	Paths []bgp.Path
	At    time.Time
}

// New returns an Observer without observations.
func New(o Options) *Observer {
	return &Observer{
		o:       o,
		seen:    State{Tunnels: map[string]tunnel.State{}, Paths: map[fib.Key]Learned{}, LostTunnels: map[string]time.Time{}, LostSessions: map[string]time.Time{}},
		tunnels: map[string]tunnel.Config{}, peers: map[string]bgp.Peer{}, told: map[string]uint64{},
		raw: map[string]tunnel.State{}, data: map[string]data{}, sessions: map[string]bgp.SessionState{},
	}
}

// Use sets the target that observations belong to, and its document. States of other tunnels are
// forgotten.
func (o *Observer) Use(s *spec.Spec, t plan.Target) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.seen.Target, o.seen.Spec = t, s
	now := time.Now()
	former := maps.Clone(o.tunnels)
	clear(o.tunnels)
	for _, c := range t.Tunnels {
		o.tunnels[c.Name] = c
		if was, known := former[c.Name]; !c.Disabled && (!known || was.Disabled) {
			o.seen.LostTunnels[c.Name] = now
		}
	}
	maps.DeleteFunc(o.seen.LostTunnels, func(name string, _ time.Time) bool { _, ok := o.tunnels[name]; return !ok })
	for name, seen := range o.seen.Tunnels {
		if c, ok := o.tunnels[name]; !ok || c.Kind() != seen.Kind || c.Disabled != (seen.Status == tunnel.Disabled) {
			delete(o.seen.Tunnels, name)
			delete(o.raw, name)
			delete(o.data, name)
			delete(o.told, name)
		}
	}
	for name, c := range o.tunnels {
		if _, seen := o.seen.Tunnels[name]; c.Disabled && !seen {
			o.seen.Tunnels[name] = tunnel.State{Name: name, Kind: c.Kind(), Interface: c.Interface, Status: tunnel.Disabled, Since: now}
			delete(o.seen.LostTunnels, name)
		}
	}
	peers := maps.Clone(o.peers)
	clear(o.peers)
	for _, p := range t.BGP.Peers {
		o.peers[p.Name] = p
		if was, known := peers[p.Name]; p.Disabled {
			delete(o.seen.LostSessions, p.Name)
		} else if !known || was.Disabled {
			o.seen.LostSessions[p.Name] = now
		}
	}
	maps.DeleteFunc(o.seen.LostSessions, func(name string, _ time.Time) bool { _, ok := o.peers[name]; return !ok })
	maps.DeleteFunc(o.sessions, func(name string, _ bgp.SessionState) bool { _, ok := o.peers[name]; return !ok })
	o.o.Bell.Ring()
}

// Read calls f with the observed state. f must neither change nor keep its maps.
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

// Facts returns the facts for the effective configuration.
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

// SickProxies returns the proxies that do not work, by policy name.
func (o *Observer) SickProxies() map[string]health.Member {
	sick := map[string]health.Member{}
	for _, p := range o.o.Proxies.Pools() {
		if p.Usable() == 0 {
			sick[p.Name] = p.Members[0]
		}
	}
	return sick
}

// down returns the interfaces of the tunnels that are known not to carry data.
func (o *Observer) down() map[string]bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := map[string]bool{}
	for name, c := range o.tunnels {
		if s, seen := o.seen.Tunnels[name]; seen && !o.carries(name, s.Status) {
			out[c.Interface] = true
		}
	}
	return out
}

// Mark returns a mark for Seen: a state that is read from now on is newer than all states before.
func (o *Observer) Mark() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.states
}

// Changed receives a tunnel's state from its driver.
func (o *Observer) Changed(s tunnel.State) { o.Seen(s, math.MaxUint64) }

// Seen receives a state that was read after a mark, unless a newer one came meanwhile.
func (o *Observer) Seen(s tunnel.State, mark uint64) {
	o.telling.Lock()
	defer o.telling.Unlock()
	s, mapped, carries, ok := o.setTunnel(s, mark)
	if !ok || s.Status == tunnel.Unknown {
		return
	}
	o.o.FIB.SetAlive(fib.NextHop{Interface: s.Interface}, carries)
	if mapped {
		o.o.Nudge("bgp")
	}
}

// setTunnel stores a state. It returns the state with what is known about the tunnel's data,
// whether a map of prefixes is behind it, whether routes may use it, and false if the tunnel is not
// wanted, is disabled, or a newer state has come since the mark.
func (o *Observer) setTunnel(s tunnel.State, mark uint64) (effect tunnel.State, mapped, carries, wanted bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c, ok := o.tunnels[s.Name]
	if !ok || c.Disabled || c.Kind() != s.Kind || o.told[s.Name] > mark {
		return s, false, false, false
	}
	o.states++
	o.told[s.Name] = o.states
	o.raw[s.Name] = s
	if s.Status != tunnel.Up {
		delete(o.data, s.Name) // what was silent then says nothing about the next keys
	}
	s = effective(c, s, o.data[s.Name], time.Now())
	o.store(s)
	o.o.Bell.Ring()
	s.Interface = c.Interface
	return s, o.mapped(c), o.carries(s.Name, s.Status), true
}

// store keeps the state of a tunnel, and since when it is not up.
func (o *Observer) store(s tunnel.State) {
	o.seen.Tunnels[s.Name] = s
	_, lost := o.seen.LostTunnels[s.Name]
	switch {
	case s.Status == tunnel.Up:
		delete(o.seen.LostTunnels, s.Name)
	case s.Status != tunnel.Unknown && !lost:
		o.seen.LostTunnels[s.Name] = time.Now()
	}
}

// mapped reports whether a map of prefixes is behind a tunnel.
func (o *Observer) mapped(c tunnel.Config) bool {
	return slices.ContainsFunc(o.seen.Target.NAT.Maps, func(m nat.Map) bool { return slices.Contains(m.Interfaces, c.Interface) })
}

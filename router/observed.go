package router

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/explain"
)

// observed holds what was last seen, beside what is wanted, and wakes those who watch it.
type observed struct {
	mu      sync.Mutex
	target  plan.Target
	spec    *spec.Spec // that the target was made of; nil: none
	doc     explain.Document
	places  map[string]int // of tunnels in doc, by name
	tunnels map[string]tunnel.Config
	peers   map[string]bgp.Peer
	seen    map[string]tunnel.State
	told    map[string]uint64 // number of the last state that came of a tunnel
	states  uint64            // that have come
	paths   map[netip.Prefix]learnt
	bell    api.Bell
}

// learnt is what BGP said of a prefix, and when.
type learnt struct {
	paths []bgp.Path
	at    time.Time
}

func newObserved() *observed {
	return &observed{
		tunnels: map[string]tunnel.Config{}, peers: map[string]bgp.Peer{}, seen: map[string]tunnel.State{}, told: map[string]uint64{},
		paths: map[netip.Prefix]learnt{},
	}
}

// explain keeps the document that what is seen is held against.
func (o *observed) explain(s *spec.Spec) {
	doc := explanation(s)
	places := make(map[string]int, len(doc.Tunnels))
	for i, t := range doc.Tunnels {
		places[t.Name] = i
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.spec, o.doc, o.places = s, doc, places
}

func (o *observed) use(t plan.Target) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.target = t
	clear(o.tunnels)
	for _, c := range t.Tunnels {
		o.tunnels[c.Name] = c
	}
	clear(o.peers)
	for _, p := range t.BGP.Peers {
		o.peers[p.Name] = p
	}
	o.bell.Ring()
}

// mark returns what setTunnel is to be told about a state that is read from now on.
func (o *observed) mark() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.states
}

// setTunnel keeps a state and returns the interface of the tunnel, and false when nobody wants it, or when another has come
// since the mark.
func (o *observed) setTunnel(s tunnel.State, mark uint64) (iface string, wanted bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c, ok := o.tunnels[s.Name]
	if !ok || c.Kind() != s.Kind || o.told[s.Name] > mark {
		return "", false
	}
	o.states++
	o.told[s.Name] = o.states
	o.seen[s.Name] = s
	o.bell.Ring()
	return c.Interface, true
}

// down returns the interfaces of the tunnels that are known to be down.
func (o *observed) down() map[string]bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := map[string]bool{}
	for name, c := range o.tunnels {
		if s, seen := o.seen[name]; seen && s.Status == tunnel.Down {
			out[c.Interface] = true
		}
	}
	return out
}

// mapped says whether there is a map behind an interface.
func (o *observed) mapped(iface string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.ContainsFunc(o.target.NAT.Maps, func(m nat.Map) bool { return slices.Contains(m.Interfaces, iface) })
}

func (o *observed) forgetTunnel(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.seen, name)
	delete(o.told, name)
	o.bell.Ring()
}

// kind returns the kind of a wanted tunnel.
func (o *observed) kind(name string) (tunnel.Kind, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c, ok := o.tunnels[name]
	return c.Kind(), ok
}

// setPaths keeps what BGP said, and returns the same as routes into the tunnels of the sessions: what a peer says of
// next hops does not steer traffic.
func (o *observed) setPaths(updates []bgp.Update) []fib.Route {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	routes := make([]fib.Route, 0, len(updates))
	for _, u := range updates {
		r := fib.Route{Prefix: u.Prefix}
		for _, p := range u.Paths {
			if peer, ok := o.peers[p.Peer]; ok {
				hop := nextHop(peer, u.Prefix)
				if !slices.Contains(r.NextHops, hop) {
					r.NextHops = append(r.NextHops, hop)
				}
			}
		}
		if len(r.NextHops) == 0 {
			delete(o.paths, u.Prefix)
		} else {
			o.paths[u.Prefix] = learnt{u.Paths, now}
		}
		routes = append(routes, r)
	}
	o.bell.Ring()
	return routes
}

// nextHop is where a path of a peer leads: into the tunnel of its session. The peer's address is in it so that the death
// of the session is told from that of the tunnel; nothing is resolved by it.
func nextHop(p bgp.Peer, prefix netip.Prefix) fib.NextHop {
	if p.Address.Is4() != prefix.Addr().Is4() {
		return fib.NextHop{Interface: p.Interface}
	}
	return fib.NextHop{Interface: p.Interface, Gateway: p.Address}
}

func (o *observed) peer(name string) (bgp.Peer, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p, ok := o.peers[name]
	return p, ok
}

// reporter hands what BGP reports to the FIB.
type reporter struct{ r *Router }

// Peer takes the next hops of a session out as soon as it has ended: its paths are withdrawn one by one, and that takes
// a while when there are many.
func (p reporter) Peer(s bgp.PeerState) {
	if c, ok := p.r.state.peer(s.Name); ok && s.State != bgp.Unknown {
		alive := s.State == bgp.Established || s.Restarting
		p.r.FIB.SetAlive(fib.NextHop{Interface: c.Interface, Gateway: c.Address}, alive)
	}
	p.r.state.bell.Ring()
}

func (p reporter) Paths(updates []bgp.Update) { p.r.FIB.Update(p.r.state.setPaths(updates)) }

func (p reporter) Restarted() { p.r.FIB.Restarted() }

func (p reporter) Synced() { p.r.FIB.Synced() }

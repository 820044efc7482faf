package router

import (
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/tunnel"
)

// observed holds what was last seen, beside what is wanted, and wakes those who watch it.
type observed struct {
	mu      sync.Mutex
	target  plan.Target
	tunnels map[string]tunnel.Config
	peers   map[string]bgp.Peer
	seen    map[string]tunnel.State
	paths   map[netip.Prefix]learnt
	changed chan struct{} // closed and replaced at each change
}

// learnt is what BGP said of a prefix, and when.
type learnt struct {
	paths []bgp.Path
	at    time.Time
}

func newObserved() *observed {
	return &observed{
		tunnels: map[string]tunnel.Config{}, peers: map[string]bgp.Peer{}, seen: map[string]tunnel.State{},
		paths: map[netip.Prefix]learnt{}, changed: make(chan struct{}),
	}
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
	o.wakeLocked()
}

func (o *observed) wakeLocked() {
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *observed) nudge() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.wakeLocked()
}

// Changed returns a channel that is closed at the next change of anything observed.
func (r *Router) Changed() <-chan struct{} {
	r.state.mu.Lock()
	defer r.state.mu.Unlock()
	return r.state.changed
}

// setTunnel keeps a state and returns the interface of the tunnel, and false when nobody wants it.
func (o *observed) setTunnel(s tunnel.State) (iface string, wanted bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c, ok := o.tunnels[s.Name]
	if !ok || c.Kind() != s.Kind {
		return "", false
	}
	o.seen[s.Name] = s
	o.wakeLocked()
	return c.Interface, true
}

func (o *observed) forgetTunnel(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.seen, name)
	o.wakeLocked()
}

// kind returns the kind of a wanted tunnel.
func (o *observed) kind(name string) (string, bool) {
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
				hop := fib.NextHop{Interface: peer.Interface}
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
	o.wakeLocked()
	return routes
}

// reporter hands what BGP reports to the FIB.
type reporter struct{ r *Router }

func (p reporter) Peer(bgp.PeerState) { p.r.state.nudge() }

func (p reporter) Paths(updates []bgp.Update) { p.r.FIB.Update(p.r.state.setPaths(updates)) }

func (p reporter) Restarted() { p.r.FIB.Restarted() }

func (p reporter) Synced() { p.r.FIB.Synced() }

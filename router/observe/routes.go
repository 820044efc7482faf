package observe

import (
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/fib"
)

// NextHop returns where a path of a peer leads: into the tunnel of its session. The peer's address
// is in it so that the end of the session is told from that of the tunnel; nothing is resolved by
// it.
func NextHop(p bgp.Peer, prefix netip.Prefix) fib.NextHop {
	if p.Address.Is4() != prefix.Addr().Is4() {
		return fib.NextHop{Interface: p.Interface}
	}
	return fib.NextHop{Interface: p.Interface, Gateway: p.Address}
}

// setPaths keeps what BGP said, and returns the same as routes into the tunnels of the sessions:
// what a peer says of next hops does not steer traffic.
func (o *Observer) setPaths(updates []bgp.Update) []fib.Route {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	routes := make([]fib.Route, 0, len(updates))
	for _, u := range updates {
		r := fib.Route{Prefix: u.Prefix}
		for _, p := range u.Paths {
			if peer, ok := o.peers[p.Peer]; ok {
				hop := NextHop(peer, u.Prefix)
				if !slices.Contains(r.NextHops, hop) {
					r.NextHops = append(r.NextHops, hop)
				}
			}
		}
		if len(r.NextHops) == 0 {
			delete(o.seen.Paths, u.Prefix)
		} else {
			o.seen.Paths[u.Prefix] = Learned{u.Paths, now}
		}
		routes = append(routes, r)
	}
	o.o.Bell.Ring()
	return routes
}

// peer returns the configuration of a session, and false when there is none of that name.
func (o *Observer) peer(name string) (bgp.Peer, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p, ok := o.peers[name]
	return p, ok
}

// Peer implements bgp.Reporter. The next hops of a session leave their groups as soon as it has
// ended: its paths are withdrawn one by one, and that takes a while when there are many.
func (o *Observer) Peer(s bgp.PeerState) {
	if c, ok := o.peer(s.Name); ok && s.State != bgp.Unknown {
		alive := s.State == bgp.Established || s.Restarting
		o.o.FIB.SetAlive(fib.NextHop{Interface: c.Interface, Gateway: c.Address}, alive)
	}
	o.o.Bell.Ring()
}

// Paths implements bgp.Reporter.
func (o *Observer) Paths(updates []bgp.Update) { o.o.FIB.Update(o.setPaths(updates)) }

// Restarted implements bgp.Reporter.
func (o *Observer) Restarted() { o.o.FIB.Restarted() }

// Synced implements bgp.Reporter.
func (o *Observer) Synced() { o.o.FIB.Synced() }

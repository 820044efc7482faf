package observe

import (
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/fib"
)

// NextHops returns the next hops of a peer's path: the tunnel of its session, or each lane of its
// link. They include the peer's address only to distinguish the end of the session from the end of
// the tunnel; it is not resolved.
func NextHops(p bgp.Peer, prefix netip.Prefix) []fib.NextHop {
	interfaces := p.Lanes
	if len(interfaces) == 0 {
		interfaces = []string{p.Interface}
	}
	out := make([]fib.NextHop, 0, len(interfaces))
	for _, name := range interfaces {
		h := fib.NextHop{Interface: name}
		if p.Address.Is4() == prefix.Addr().Is4() {
			h.Gateway = p.Address
		}
		out = append(out, h)
	}
	return out
}

// setPaths stores the paths that BGP reported, and returns them as routes into the tunnels of the
// sessions: a peer's NEXT_HOP does not steer traffic.
func (o *Observer) setPaths(updates []bgp.Update) []fib.Route {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	routes := make([]fib.Route, 0, len(updates))
	for _, u := range updates {
		r := fib.Route{Key: fib.Main(u.Prefix)}
		for _, p := range u.Paths {
			if peer, ok := o.peers[p.Peer]; ok {
				// A flow of one link keeps its lane; paths by several are replaced as a whole.
				r.Resilient = len(u.Paths) == 1 && len(peer.Lanes) > 1
				for _, hop := range NextHops(peer, u.Prefix) {
					if !slices.Contains(r.NextHops, hop) {
						r.NextHops = append(r.NextHops, hop)
					}
				}
			}
		}
		if len(r.NextHops) == 0 {
			delete(o.seen.Paths, r.Key)
		} else {
			o.seen.Paths[r.Key] = Learned{u.Paths, now}
		}
		routes = append(routes, r)
	}
	o.o.Bell.Ring()
	return routes
}

// Learned returns the paths of the main table, by prefix.
func (o *Observer) Learned() map[netip.Prefix][]bgp.Path {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make(map[netip.Prefix][]bgp.Path, len(o.seen.Paths))
	for k, l := range o.seen.Paths {
		out[k.Prefix] = l.Paths
	}
	return out
}

// session stores the state of a session. It returns its configuration, and false if the name is
// unknown.
func (o *Observer) session(s bgp.PeerState) (bgp.Peer, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p, ok := o.peers[s.Name]
	if !ok {
		return p, false
	}
	o.sessions[s.Name] = s.State
	_, lost := o.seen.LostSessions[s.Name]
	switch {
	case s.State == bgp.Established:
		delete(o.seen.LostSessions, s.Name)
	case s.State != bgp.Unknown && !lost && !p.Disabled:
		o.seen.LostSessions[s.Name] = time.Now()
	}
	return p, true
}

// Peer implements bgp.Reporter. The next hops of a session leave their groups as soon as it ends:
// withdrawing its paths one by one takes long if there are many.
func (o *Observer) Peer(s bgp.PeerState) {
	c, ok := o.session(s)
	if ok && s.State != bgp.Unknown {
		alive := s.State == bgp.Established || s.Restarting
		for _, hop := range NextHops(c, netip.PrefixFrom(c.Address, c.Address.BitLen())) {
			o.o.FIB.SetAlive(hop, alive)
		}
	}
	o.o.Bell.Ring()
}

// Paths implements bgp.Reporter.
func (o *Observer) Paths(updates []bgp.Update) { o.o.FIB.Update(o.setPaths(updates)) }

// Restarted implements bgp.Reporter.
func (o *Observer) Restarted() { o.o.FIB.Restarted() }

// Synced implements bgp.Reporter.
func (o *Observer) Synced() { o.o.FIB.Synced() }

package gobgp

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/bgp"
)

// rib holds the paths that the child has reported, to count for each peer the prefixes used from
// it and announced to it.
type rib struct {
	asn       uint32
	peers     []bgp.Peer
	deciders  []bgp.Decider // one per peer, in the same order
	paths     map[netip.Prefix][]bgp.Path
	announce  map[netip.Prefix]bool
	used      map[string]uint32 // prefixes by peer
	announced map[string]uint32
	// limited holds the prefixes that the rules let pass to limited peers.
	limited map[string]map[netip.Prefix]struct{}
	readmit bool // limited has changed
}

func newRIB() *rib { return &rib{paths: make(map[netip.Prefix][]bgp.Path)} }

// configure sets the configuration and counts again.
func (r *rib) configure(c bgp.Config) {
	r.asn, r.peers = c.ASN, c.Peers
	r.deciders = make([]bgp.Decider, len(r.peers))
	for i := range r.peers {
		r.deciders[i] = r.peers[i].Decider(c.ASN)
	}
	r.announce = make(map[netip.Prefix]bool, len(c.Announce))
	for _, p := range c.Announce {
		r.announce[p] = true
	}
	r.used, r.announced = make(map[string]uint32), make(map[string]uint32)
	r.limited = make(map[string]map[netip.Prefix]struct{})
	for _, p := range c.Peers {
		if limited(p.Export) {
			r.limited[p.Name] = make(map[netip.Prefix]struct{})
		}
	}
	for p, ps := range r.paths {
		r.count(p, ps, 1)
	}
	for p := range r.announce {
		if _, ok := r.paths[p]; !ok {
			r.count(p, nil, 1)
		}
	}
}

// update stores the new paths of a prefix. It first removes paths that the import policy of their
// peer rejects, so that the policy does not depend on the child alone.
func (r *rib) update(u bgp.Update) bgp.Update {
	refused := func(p bgp.Path) bool {
		from := r.decider(p.Peer)
		if from == nil {
			return true
		}
		_, ok := from.Accept(route(u.Prefix, p))
		return !ok
	}
	if slices.ContainsFunc(u.Paths, refused) {
		u.Paths = slices.DeleteFunc(slices.Clone(u.Paths), refused)
	}
	old, ok := r.paths[u.Prefix]
	if ok || r.announce[u.Prefix] {
		r.count(u.Prefix, old, -1)
	}
	if len(u.Paths) > 0 {
		r.paths[u.Prefix] = u.Paths
	} else {
		delete(r.paths, u.Prefix)
	}
	if len(u.Paths) > 0 || r.announce[u.Prefix] {
		r.count(u.Prefix, u.Paths, 1)
	}
	return u
}

func route(prefix netip.Prefix, p bgp.Path) bgp.Route {
	return bgp.Route{Prefix: prefix, ASPath: p.ASPath, Kept: p.Kept}
}

// decider returns the decider of a peer by its name, or nil for an unknown peer.
func (r *rib) decider(peer string) *bgp.Decider {
	i, ok := slices.BinarySearchFunc(r.peers, peer, func(p bgp.Peer, name string) int {
		return strings.Compare(p.Name, name)
	})
	if !ok {
		return nil
	}
	return &r.deciders[i]
}

func (r *rib) count(p netip.Prefix, paths []bgp.Path, n int32) {
	for i := range paths {
		if !slices.ContainsFunc(paths[:i], func(q bgp.Path) bool { return q.Peer == paths[i].Peer }) {
			r.used[paths[i].Peer] += uint32(n)
		}
	}
	// The best path is announced. A prefix without a path is one of the node's own.
	best, from := bgp.Route{Prefix: p}, (*bgp.Peer)(nil)
	if len(paths) > 0 {
		best = route(p, paths[0])
		if d := r.decider(paths[0].Peer); d != nil {
			from = d.Peer
		}
	}
	for i := range r.peers {
		name := r.peers[i].Name
		if _, ok := r.deciders[i].Announce(from, best); !ok {
			continue
		}
		r.announced[name] += uint32(n)
		if l := r.limited[name]; l != nil && n > 0 {
			l[p], r.readmit = struct{}{}, true
		} else if l != nil {
			delete(l, p)
			r.readmit = true
		}
	}
}

package gobgp

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/bgp"
)

// rib is what the child reported, kept to count for each peer what is used of it and what it is told.
type rib struct {
	asn      uint32
	peers    []bgp.Peer
	paths    map[netip.Prefix][]bgp.Path
	announce map[netip.Prefix]bool
	used     map[string]uint32 // prefixes by peer
	told     map[string]uint32
	limited  map[string]map[netip.Prefix]struct{} // what the rules let out to peers that must not be told all of it
	readmit  bool                                 // limited has changed
}

func newRIB() *rib { return &rib{paths: make(map[netip.Prefix][]bgp.Path)} }

// configure takes the configuration over and counts again.
func (r *rib) configure(c bgp.Config) {
	r.asn, r.peers = c.ASN, c.Peers
	r.announce = make(map[netip.Prefix]bool, len(c.Announce))
	for _, p := range c.Announce {
		r.announce[p] = true
	}
	r.used, r.told = make(map[string]uint32), make(map[string]uint32)
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

// update takes a changed prefix over. Paths that no import rule of their peer allows are taken out first: what may get
// in does not depend on the child alone.
func (r *rib) update(u bgp.Update) bgp.Update {
	if slices.ContainsFunc(u.Paths, func(p bgp.Path) bool { return !r.allowed(p.Peer, u.Prefix) }) {
		u.Paths = slices.DeleteFunc(slices.Clone(u.Paths), func(p bgp.Path) bool { return !r.allowed(p.Peer, u.Prefix) })
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

func (r *rib) allowed(peer string, p netip.Prefix) bool {
	i, ok := slices.BinarySearchFunc(r.peers, peer, func(p bgp.Peer, name string) int {
		return strings.Compare(p.Name, name)
	})
	return ok && match(r.peers[i].Import.Allow, p)
}

func match(rules []bgp.Rule, p netip.Prefix) bool {
	for i := range rules {
		if rules[i].Match(p) {
			return true
		}
	}
	return false
}

func (r *rib) count(p netip.Prefix, paths []bgp.Path, n int32) {
	for i := range paths {
		if !slices.ContainsFunc(paths[:i], func(q bgp.Path) bool { return q.Peer == paths[i].Peer }) {
			r.used[paths[i].Peer] += uint32(n)
		}
	}
	for i := range r.peers {
		name := r.peers[i].Name
		if !r.tells(&r.peers[i], p, paths) {
			continue
		}
		r.told[name] += uint32(n)
		if l := r.limited[name]; l != nil && n > 0 {
			l[p], r.readmit = struct{}{}, true
		} else if l != nil {
			delete(l, p)
			r.readmit = true
		}
	}
}

// tells reports whether the best of paths, or our own when there is none, is announced to a peer.
func (r *rib) tells(to *bgp.Peer, p netip.Prefix, paths []bgp.Path) bool {
	if p.Addr().Is4() != to.Address.Is4() || !match(to.Export.Allow, p) {
		return false
	}
	if len(paths) == 0 {
		return true
	}
	best := paths[0]
	if best.Peer == to.Name || best.Kept && to.ASN != r.asn {
		return false
	}
	if to.ASN == r.asn {
		// What an internal peer said is not passed on to another.
		from := slices.IndexFunc(r.peers, func(q bgp.Peer) bool { return q.Name == best.Peer })
		return from < 0 || r.peers[from].ASN != r.asn
	}
	return to.ASOverride || !slices.Contains(best.ASPath, to.ASN)
}

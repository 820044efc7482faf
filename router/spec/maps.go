package spec

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

// prefixMap checks a map, and that this node has no route to the prefix that the spoke uses.
func (c *checker) prefixMap(path string, m *isthmusv1.PrefixMap) {
	out := PrefixMap{Tunnels: m.GetTunnels()}
	if len(m.GetTunnels()) == 0 {
		c.Missing(path+".tunnels", "name the tunnels to the spoke")
	}
	for i, name := range m.GetTunnels() {
		at := fmt.Sprintf("%s.tunnels[%d]", path, i)
		if !c.spend(i) {
			return
		}
		c.tunnelRef(at, name)
		if slices.Contains(m.GetTunnels()[:i], name) {
			c.Problem(at, name, "is named twice", "keep one of them")
		}
	}
	inside, ok := c.mapPrefix(path+".inside", m.GetInside(), "give the prefix that the spoke uses")
	mapped, fine := c.mapPrefix(path+".mapped", m.GetMapped(), "give the prefix that the other networks see")
	if !ok || !fine {
		return
	}
	if inside.Bits() != mapped.Bits() {
		c.Problem(path+".mapped", mapped.String(), fmt.Sprintf("is not as long as inside, /%d", inside.Bits()), "give a prefix of the same length")
		return
	}
	out.Inside, out.Mapped = inside, mapped
	mine := make(map[string]bool, len(out.Tunnels))
	for _, name := range out.Tunnels {
		mine[name] = true
	}
	for i, other := range c.s.Maps {
		if !c.spend(1 + len(other.Tunnels)) {
			return
		}
		shared := slices.ContainsFunc(other.Tunnels, func(t string) bool { return mine[t] })
		switch {
		case mapped.Overlaps(other.Mapped):
			c.Problem(path+".mapped", mapped.String(), fmt.Sprintf("overlaps %v of egress.maps[%d]", other.Mapped, i), "choose another")
		case shared && inside.Overlaps(other.Inside):
			c.Problem(path+".inside", inside.String(), fmt.Sprintf("overlaps %v of egress.maps[%d], which has the same tunnel", other.Inside, i), "map each address once")
		}
	}
	for _, p := range []netip.Prefix{inside, mapped} {
		if p.Overlaps(apipa.LinkLocal) {
			c.Problem(path, p.String(), "has link-local addresses (RFC 3927), which tunnels have inside", "choose a prefix without")
			return
		}
		if !c.spend(len(c.inside) + len(c.sources)) {
			return
		}
		for _, in := range c.inside {
			if p.Overlaps(in.prefix) {
				c.Problem(path, p.String(), "has an inside address, of "+in.path, "choose a prefix without")
			}
		}
	}
	for a, at := range c.sources {
		if mapped.Contains(a) {
			c.Problem(path+".mapped", mapped.String(), "has the address of "+at, "choose a prefix without")
		}
	}
	if a := c.s.Underlay.Address; mapped.Contains(a) {
		c.Problem(path+".mapped", mapped.String(), "has the node's own address "+a.String(), "choose a prefix without")
	}
	c.keepOut(out, mine)
	c.s.Maps = append(c.s.Maps, out)
}

func (c *checker) mapPrefix(path, text, remedy string) (netip.Prefix, bool) {
	if text == "" {
		c.Missing(path, remedy)
		return netip.Prefix{}, false
	}
	p, ok := c.Prefix(path, text)
	if ok && (!p.Addr().Is4() || p.Bits() == 0) {
		c.Problem(path, text, "is not a part of IPv4", "give an IPv4 prefix; an IPv6 spoke can have a prefix of its own")
		return netip.Prefix{}, false
	}
	return p, ok
}

// keepOut refuses routes to the prefix that the spoke uses, because several spokes may use it.
func (c *checker) keepOut(m PrefixMap, tunnels map[string]bool) {
	remedy := fmt.Sprintf("narrow it or leave it out: %v is routed and announced in its place", m.Mapped)
	if c.peersOf == nil {
		c.peersOf = map[string][]int{}
		for i, p := range c.s.Peers {
			c.peersOf[p.Tunnel] = append(c.peersOf[p.Tunnel], i)
		}
	}
	var peers []int
	for name := range tunnels {
		peers = append(peers, c.peersOf[name]...)
	}
	slices.Sort(peers)
	for _, i := range peers {
		p := &c.s.Peers[i]
		if !c.spend(1 + len(p.Import.Allow)) {
			return
		}
		for j, r := range p.Import.Allow {
			if allowsWithin(r, m.Inside) {
				c.Problem(fmt.Sprintf("peers[%d].import.allow[%d]", i, j), r.String(), fmt.Sprintf("accepts routes to %v, which is mapped to %v", m.Inside, m.Mapped), remedy)
			}
		}
	}
	for i, r := range c.s.Routes {
		if !c.spend(1 + len(r.Tunnels)) {
			return
		}
		at := fmt.Sprintf("staticRoutes[%d].prefix", i)
		if m.Inside.Overlaps(r.Prefix) && m.Inside.Bits() <= r.Prefix.Bits() && slices.ContainsFunc(r.Tunnels, func(t string) bool { return tunnels[t] }) {
			c.Problem(at, r.Prefix.String(), fmt.Sprintf("is behind a map from %v to %v", m.Inside, m.Mapped), remedy)
		}
		if r.Prefix == m.Mapped {
			c.Problem(at, r.Prefix.String(), "is the mapped prefix of a map, which routes it", "leave it out")
		}
	}
	for i, a := range c.s.Attachments {
		if !c.spend(1 + len(a.Routes)) {
			return
		}
		for j, r := range a.Routes {
			if r.Prefix == m.Mapped {
				c.Problem(fmt.Sprintf("attachments[%d].routes[%d].prefix", i, j), r.Prefix.String(), "is the mapped prefix of a map, which routes it", "leave it out")
			}
		}
	}
}

// allowsWithin reports whether a rule matches a prefix within another one.
func allowsWithin(r bgp.Rule, p netip.Prefix) bool {
	return r.Prefix.Overlaps(p) && int(r.Max) >= p.Bits()
}

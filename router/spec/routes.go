package spec

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (c *checker) route(path string, r *isthmusv1.StaticRoute) {
	if r.GetPrefix() == "" {
		c.Missing(path+".prefix", "give the destination")
		return
	}
	p, ok := c.Prefix(path+".prefix", r.GetPrefix())
	if !ok {
		return
	}
	if at, ok := c.dests[p]; ok {
		c.Problem(path+".prefix", p.String(), "is the destination of "+at+" too", "write one route with both tunnels")
	}
	c.dests[p] = path
	c.routable(path+".prefix", p)
	switch {
	case r.GetBlackhole() && len(r.GetTunnels()) > 0:
		c.Problem(path+".blackhole", "true", "conflicts with `tunnels`", "keep one of them")
	case !r.GetBlackhole() && len(r.GetTunnels()) == 0:
		c.Missing(path+".tunnels", "name the tunnels to use, or say `blackhole: true`")
	}
	for i, name := range r.GetTunnels() {
		at := fmt.Sprintf("%s.tunnels[%d]", path, i)
		if !c.spend(i) {
			return
		}
		c.carrierRef(at, name)
		if slices.Contains(r.GetTunnels()[:i], name) {
			c.Problem(at, name, "is named twice", "keep one of them")
		}
	}
	out := StaticRoute{Prefix: p, Blackhole: r.GetBlackhole()}
	for _, name := range r.GetTunnels() {
		if l, ok := c.links[name]; ok {
			out.Tunnels, out.Resilient = append(out.Tunnels, l.Lanes...), len(r.GetTunnels()) == 1
		} else {
			out.Tunnels = append(out.Tunnels, name)
		}
	}
	c.s.Routes = append(c.s.Routes, out)
}

// Unroutable are the prefixes that no route may lead to: this network, loopback, link-local,
// multicast and reserved addresses.
//
// Sources: RFC 1122 section 3.2.1.3, RFC 3927, RFC 1112, RFC 4291.
var Unroutable = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/128"), netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// routable refuses a destination that is Unroutable or that the platform uses.
func (c *checker) routable(path string, p netip.Prefix) {
	if p.Bits() == 0 {
		return
	}
	for _, u := range Unroutable {
		if u.Bits() <= p.Bits() && u.Contains(p.Addr()) {
			c.Problem(path, p.String(), "is in "+u.String()+", which no router forwards", "remove the route")
			return
		}
	}
	for _, u := range nat.Platform {
		if u.IsSingleIP() && p.Contains(u.Addr()) && p.Bits() > 8 {
			c.Problem(path, p.String(), "takes "+u.Addr().String()+", at which the cloud's platform serves this node", "give prefixes without it")
			return
		}
	}
}

// notPlatform refuses a server address at which the cloud's platform serves this node.
func (c *checker) notPlatform(path, text string, a netip.Addr) {
	if nat.PlatformOf(a).IsValid() {
		c.Problem(path, text, "is an address at which the cloud's platform serves this node", "give the address of a server of yours")
	}
}

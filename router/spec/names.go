package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/tunnel"
)

// resolution checks how names are resolved, and the timeout of flows without ports.
func (c *checker) resolution(e *isthmusv1.Egress) {
	c.s.PortlessTimeout = c.duration("egress.portlessTimeout", e.GetPortlessTimeout(), 0, 10*time.Second, 120*time.Hour)
	out := egress.DNS{
		Floor: c.duration("egress.nameFloor", e.GetNameFloor(), 30*time.Second, time.Second, time.Hour),
		Grace: c.duration("egress.nameGrace", e.GetNameGrace(), 24*time.Hour, 0, 720*time.Hour),
		Hold:  c.duration("egress.nameHold", e.GetNameHold(), 0, time.Minute, 720*time.Hour),
	}
	for i, text := range e.GetResolvers() {
		at := fmt.Sprintf("egress.resolvers[%d]", i)
		ap, err := netip.ParseAddrPort(text)
		if err != nil {
			var a netip.Addr
			a, err = netip.ParseAddr(text)
			ap = netip.AddrPortFrom(a, 53)
		}
		switch a := ap.Addr(); {
		case err != nil || ap.Port() == 0 || a.Zone() != "" || a.Is4In6():
			c.Problem(at, text, "is not the address of a DNS server", `write it as "10.9.0.2" or "10.9.0.2:5353"`)
			continue
		case a.IsUnspecified() || a.IsMulticast():
			c.Problem(at, text, "is not a unicast address of a host", "give the address of a DNS server")
			continue
		}
		if !c.spend(i) {
			return
		}
		if slices.Contains(out.Resolvers, ap) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Resolvers = append(out.Resolvers, ap)
	}
	if proxy := e.GetDnsProxy(); proxy != nil {
		c.proxy = true
		c.listeners(proxy, &out)
	}
	c.s.Names = out
}

// listeners checks the addresses and the clients of the DNS proxy.
func (c *checker) listeners(proxy *isthmusv1.DNSProxy, out *egress.DNS) {
	if len(proxy.GetListen()) == 0 {
		c.Missing("egress.dnsProxy.listen", "give local inside addresses of tunnels, or an address of the node that spokes have a route to")
	}
	routable := 0
	for i, text := range proxy.GetListen() {
		at := fmt.Sprintf("egress.dnsProxy.listen[%d]", i)
		a, ok := c.Address(at, text)
		if !ok {
			continue
		}
		if !c.spend(i + len(c.s.Tunnels)) {
			return
		}
		local := func(t Tunnel) bool {
			return slices.ContainsFunc(t.Inside, func(in tunnel.Inside) bool { return in.Local.Addr() == a })
		}
		remote := func(t Tunnel) bool {
			return slices.ContainsFunc(t.Inside, func(in tunnel.Inside) bool { return in.Remote == a })
		}
		switch {
		case slices.ContainsFunc(c.s.Tunnels, local):
		case a.IsLinkLocalUnicast() || slices.ContainsFunc(c.s.Tunnels, remote):
			c.Problem(at, text, "is not a local inside address of a tunnel", "write the address in the `inside` of a tunnel, or give an address of the node that spokes have a route to")
		case !a.IsGlobalUnicast():
			c.Problem(at, text, "is not a unicast address of a host", "give an address of the node that spokes have a route to")
		default:
			c.notPlatform(at, text, a)
			if routable++; routable == maxRoutable+1 {
				c.Problem(at, text, "is one more than 4 addresses that are not inside addresses", "keep those that spokes use")
			}
			if len(c.s.Tunnels)+len(c.s.Attachments) == 0 {
				c.Problem(at, text, "is served on tunnels and attachments, and there is none", "write the networks of the clients in `attachments`")
			}
		}
		if slices.ContainsFunc(out.Proxy, func(l egress.Listener) bool { return l.Address == a }) {
			c.Problem(at, text, "is listed twice", "keep one of them")
		}
		out.Proxy = append(out.Proxy, egress.Listener{Address: a})
	}
	if len(proxy.GetFrom()) > 0 && routable == 0 && len(proxy.GetListen()) > 0 {
		c.Problem("egress.dnsProxy.from", "", "has no meaning while `listen` has only inside addresses, because each is served on its tunnels", "remove it, or listen on an address of the node that spokes have a route to")
		return
	}
	for i, name := range proxy.GetFrom() {
		at := fmt.Sprintf("egress.dnsProxy.from[%d]", i)
		if !c.spend(i + len(c.s.Tunnels) + len(c.s.Attachments)) {
			return
		}
		switch {
		case slices.Contains(c.s.ProxyFrom, name):
			c.Problem(at, name, "is listed twice", "keep one of them")
		case !slices.ContainsFunc(c.s.Tunnels, func(t Tunnel) bool { return t.Name == name }) && !slices.ContainsFunc(c.s.Attachments, func(a Attachment) bool { return a.Name == name }):
			c.Problem(at, name, "is not a tunnel or attachment", "give the name of one")
		}
		c.s.ProxyFrom = append(c.s.ProxyFrom, name)
	}
}

// listenersAndPools refuses to listen on an address of a pool. It needs the pools.
func (c *checker) listenersAndPools() {
	for i, l := range c.s.Names.Proxy {
		for _, p := range c.s.Pools {
			has := func(a nat.PoolAddress) bool { return a.Address == l.Address }
			if l.Address != c.s.Underlay.Address && slices.ContainsFunc(p.Addresses, has) {
				c.Problem(fmt.Sprintf("egress.dnsProxy.listen[%d]", i), l.Address.String(), "is an address of pool "+p.Name+", on which the node itself does not answer", "give another address of the node")
			}
		}
	}
}

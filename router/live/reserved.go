package live

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
)

// alibaba is the metadata address of Alibaba Cloud's machines.
var alibaba = netip.MustParseAddr("100.100.100.200")

// reserved returns the prefixes that routes must not divert from the node.
func reserved(t *plan.Target, f Facts) (all []fib.Reserved) {
	one := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
	for _, p := range spec.Unroutable {
		all = append(all, fib.Reserved{Key: fib.Main(p), Why: "which no router forwards; have the peer not announce it"})
	}
	need := func(a netip.Addr, why string) {
		all = append(all, fib.Reserved{Key: fib.Main(one(a)), Covered: true, Own: max(0, f.Machine.Best(a)), Why: why})
	}
	for _, p := range nat.Platform {
		if !p.IsSingleIP() || p.Addr() == alibaba && !slices.Contains(f.Resolvers, alibaba) {
			// a prefix above, or a shared address (RFC 6598) that other networks use
			continue
		}
		need(p.Addr(), "at which the cloud's platform serves this node; announce more exact prefixes")
	}
	all = append(all, fib.Reserved{Key: fib.Main(one(alibaba)), Why: "at which Alibaba Cloud serves its machines; announce more exact prefixes"})
	for _, a := range f.Machine.Gateways(t.Underlay.Interface) {
		need(a, "a router of the underlay; announce more exact prefixes")
	}
	for _, a := range f.Resolvers {
		if !a.IsLoopback() {
			need(a, "a DNS server of this node; announce more exact prefixes")
		}
	}
	for _, a := range f.Machine.Addresses {
		if a.Prefix.Addr().IsLoopback() || a.Prefix.Addr().IsLinkLocalUnicast() {
			continue
		}
		all = append(all, fib.Reserved{Key: fib.Main(one(a.Prefix.Addr())), Why: "an address of this node; have the peer not announce it"})
		if !a.Prefix.IsSingleIP() {
			all = append(all, fib.Reserved{Key: fib.Main(a.Prefix.Masked()), Why: fmt.Sprintf("the network that interface %s is connected to; have the peer not announce it", a.Interface)})
		}
	}
	for _, p := range t.NAT.Pools {
		for _, a := range p.Addresses {
			all = append(all, fib.Reserved{Key: fib.Main(one(a.Address)), Why: "an address of pool " + p.Name + "; have the peer not announce it"})
		}
	}
	for _, c := range t.Tunnels {
		for _, in := range c.Inside {
			for _, a := range []netip.Addr{in.Local.Addr(), in.Remote} {
				all = append(all, fib.Reserved{Key: fib.Main(one(a)), Why: "an inside address of tunnel " + c.Name + "; have the peer not announce it"})
			}
		}
		if a := c.Outside().Addr(); a.IsValid() {
			all = append(all, fib.Reserved{Key: fib.Main(one(a)), Covered: true, Why: "the outside address of a tunnel, and would draw encrypted packets into a tunnel; announce more exact prefixes"})
		}
	}
	for _, l := range t.Links {
		for _, in := range l.Inside {
			for _, a := range []netip.Addr{in.Local.Addr(), in.Remote} {
				all = append(all, fib.Reserved{Key: fib.Main(one(a)), Why: "an inside address of link " + l.Name + "; have the peer not announce it"})
			}
		}
	}
	return all
}

// inside returns a function that reports whether a name of a policy or probe must not resolve to an
// address: the reserved ones (the node's own, those of pools and of the platform, connected
// networks, inside addresses of tunnels, routers of the underlay), DNS servers with a private
// address, and inside networks. A prefix of everything, as the sources of a tunnel may be, does not
// count as inside. A public DNS server or the outside address of a tunnel may be a partner's.
func inside(t *plan.Target, f Facts, own []netip.Addr, reserved []fib.Reserved) func(netip.Addr) bool {
	addrs := map[netip.Addr]bool{}
	for _, a := range own {
		addrs[a] = true
	}
	for _, p := range t.NAT.Pools {
		for _, a := range p.Addresses {
			addrs[a.Address], addrs[a.Public] = true, true
		}
	}
	resolvers := slices.Clone(f.Resolvers)
	for _, server := range t.Names.Resolvers {
		resolvers = append(resolvers, server.Addr())
	}
	for _, a := range resolvers {
		if a.IsPrivate() {
			addrs[a] = true
		}
	}
	for _, a := range f.Machine.Gateways(t.Underlay.Interface) {
		addrs[a] = true
	}
	var prefixes []netip.Prefix
	for _, p := range reserved {
		switch {
		case p.Covered: // a more specific prefix may be routed there
		case p.Key.Prefix.IsSingleIP():
			addrs[p.Key.Prefix.Addr()] = true
		case p.Key.Prefix.Bits() > 0:
			prefixes = append(prefixes, p.Key.Prefix)
		}
	}
	for _, a := range t.NAT.Attachments {
		for _, p := range a.Sources {
			if p.Bits() > 0 {
				prefixes = append(prefixes, p)
			}
		}
	}
	for _, m := range t.NAT.Maps {
		prefixes = append(prefixes, m.Mapped)
	}
	return func(a netip.Addr) bool {
		return addrs[a] || slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
	}
}

// Package live merges the plan with the facts observed since: which addresses are healthy, what
// names resolve to, which tunnels are down, what addresses the machine has. Its result is the
// configuration that drivers get. The package is pure: the same target and facts give the same
// result.
package live

import (
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
)

// Facts are the observed state. The zero Facts are those of a machine that has not been read yet.
type Facts struct {
	// Machine is the machine's state that isthmus did not make. Read reports whether it has been
	// read since the start.
	Machine fib.Surroundings
	Read    bool
	// Resolvers are the DNS servers that the machine itself uses.
	Resolvers []netip.Addr
	// APIPort is the TCP port of the API, 0 when it has only its unix socket.
	APIPort uint16
	// Pools are the results of the probes of pools.
	Pools []egress.PoolHealth
	// ProxiesDown are the policies whose proxy does not work.
	ProxiesDown map[string]bool
	// Names returns the addresses of a domain name. Nil: no name has any.
	Names func(name string) []netip.Addr
	// TunnelsDown are the interfaces of the tunnels that are known to be down.
	TunnelsDown map[string]bool
}

// Effective is the target merged with facts: the configuration to apply now.
type Effective struct {
	NAT nat.Config
	// Conflicts are the addresses of names that are not destinations of the policies with the
	// names.
	Conflicts []Conflict
	BGP       bgp.Config
	// Reserved are the prefixes that routes must not divert from the node.
	Reserved []fib.Reserved
	// PoolAddresses are the addresses that interfaces have for pools, by interface.
	PoolAddresses map[string][]netip.Addr
	// Names are the domain names whose addresses are needed, and Unused reports whether neither a
	// policy nor a probe can use the addresses of a name in one family.
	Names  []string
	Unused func(name string, ipv6 bool) bool
	// Inside reports whether no name may stand for an address; see inside.
	Inside func(netip.Addr) bool
}

// Of returns the effective configuration of a target under the given facts.
func Of(t *plan.Target, f Facts) (e Effective) {
	e.NAT, e.Conflicts = natOf(t.NAT, f)
	e.BGP = bgpOf(t, f)
	e.Reserved = reserved(t, f)
	e.PoolAddresses = poolAddresses(t)
	e.Names, e.Unused = names(t), unused(t)
	e.Inside = inside(t, f, e.NAT.Own, e.Reserved)
	return e
}

// natOf adds the addresses of names and the node's own addresses and links, and removes addresses
// and proxies that are down.
func natOf(c nat.Config, f Facts) (nat.Config, []Conflict) {
	addresses := f.Names
	if addresses == nil {
		addresses = func(string) []netip.Addr { return nil }
	}
	c, conflicts := Extend(c, addresses)
	c.Own, c.API.Port = own(c, f), f.APIPort
	c.Links = links(c, f)
	down := map[netip.Addr]bool{}
	for _, p := range f.Pools {
		for _, a := range p.Unusable {
			down[a] = true
		}
	}
	c.Pools = slices.Clone(c.Pools)
	for i := range c.Pools {
		p := &c.Pools[i]
		p.Addresses = slices.Clone(p.Addresses)
		for j := range p.Addresses {
			p.Addresses[j].Down = down[p.Addresses[j].Address]
		}
	}
	if len(f.ProxiesDown) > 0 { // there may be ten thousand policies
		c.Policies = slices.Clone(c.Policies)
		for i := range c.Policies {
			c.Policies[i].Down = f.ProxiesDown[c.Policies[i].Name]
		}
	}
	return c, conflicts
}

// bgpOf announces for a pool while one of its addresses is usable, and a mapped prefix while one of
// its tunnels is not known to be down.
func bgpOf(t *plan.Target, f Facts) bgp.Config {
	c := t.BGP
	c.Announce = slices.Clone(c.Announce)
	shared := len(t.Takeover.Paths) > 0
	for _, p := range t.Health {
		i := slices.IndexFunc(f.Pools, func(h egress.PoolHealth) bool { return h.Name == p.Name })
		switch {
		case i < 0 && shared:
		case i < 0:
			// no address yet: the pool counts as usable, like one that has not been probed
			c.Announce = append(c.Announce, p.Announce...)
		case shared && f.Pools[i].Healthy > 0, !shared && f.Pools[i].Usable > 0:
			// An address without a verdict may work; in a shared pool it may be the other node's.
			c.Announce = append(c.Announce, p.Announce...)
		}
	}
	for _, m := range t.NAT.Maps {
		if !slices.ContainsFunc(m.Interfaces, func(i string) bool { return !f.TunnelsDown[i] }) {
			c.Announce = slices.DeleteFunc(c.Announce, func(p netip.Prefix) bool { return p == m.Mapped })
		}
	}
	slices.SortFunc(c.Announce, netip.Prefix.Compare)
	return c
}

// own returns the node's own addresses: the one in the document, and those on interfaces that do
// not lead to networks, without those of pools.
func own(c nat.Config, f Facts) []netip.Addr {
	own := slices.Clone(c.Own)
	for _, a := range f.Machine.Own(c.Attached()) {
		pooled := slices.ContainsFunc(c.Pools, func(p nat.Pool) bool {
			return slices.ContainsFunc(p.Addresses, func(q nat.PoolAddress) bool { return q.Address == a })
		})
		if !pooled && !slices.Contains(own, a) {
			own = append(own, a)
		}
	}
	return own
}

// links returns the existing interfaces between which packets are forwarded.
func links(c nat.Config, f Facts) (all nat.Links) {
	for _, name := range slices.Sorted(slices.Values(append(c.Attached(), c.Underlay))) {
		if link, ok := f.Machine.Devices[name]; ok {
			all = append(all, nat.Link{Interface: name, Index: link.Index})
		}
	}
	return all
}

// poolAddresses returns the addresses that the underlay interface needs for pools. A pool may share
// the node's own address, which belongs to the machine.
func poolAddresses(t *plan.Target) map[string][]netip.Addr {
	out := map[string][]netip.Addr{}
	for _, p := range t.NAT.Pools {
		for _, a := range p.Addresses {
			if a.Address != t.Underlay.Address {
				out[t.Underlay.Interface] = append(out[t.Underlay.Interface], a.Address)
			}
		}
	}
	return out
}

// names returns the names of policies and probe targets, sorted.
func names(t *plan.Target) (out []string) {
	for i := range t.NAT.Policies {
		out = append(out, t.NAT.Policies[i].Names...)
	}
	for _, p := range slices.Concat(t.Health, t.Proxies) {
		for _, target := range p.Probes.Targets {
			if name, err := egress.ParseName(target.Host); err == nil { // else it is an address
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func unused(t *plan.Target) func(name string, ipv6 bool) bool {
	type use struct {
		name string
		ipv6 bool
	}
	used := map[use]bool{}
	for i := range t.NAT.Policies {
		p := &t.NAT.Policies[i]
		for _, name := range p.Names {
			for _, s := range p.Sources {
				if !p.To.IsValid() || p.To.Addr().Is6() == s.Addr().Is6() {
					used[use{name, s.Addr().Is6()}] = true
				}
			}
		}
	}
	for _, p := range slices.Concat(t.Health, t.Proxies) {
		for _, target := range p.Probes.Targets {
			name, err := egress.ParseName(target.Host)
			for _, a := range p.Addresses {
				if err == nil {
					used[use{name, a.Is6()}] = true
				}
			}
		}
	}
	return func(name string, ipv6 bool) bool { return !used[use{name, ipv6}] }
}

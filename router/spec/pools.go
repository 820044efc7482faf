package spec

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
)

func (c *checker) pool(path string, p *isthmusv1.Pool) {
	c.Name("pool", path+".name", p.GetName())
	out := nat.Pool{Name: p.GetName()}
	switch p.GetExhausted() {
	case "", "reject":
	case "drop":
		out.Silent = true
	default:
		c.Problem(path+".exhausted", p.GetExhausted(), "is not a valid value", `give "reject" or "drop", or leave it out`)
	}
	if len(p.GetAddresses()) == 0 {
		c.Missing(path+".addresses", "give at least one address")
	}
	for i, a := range p.GetAddresses() {
		at := fmt.Sprintf("%s.addresses[%d]", path, i)
		if a.GetAddress() == "" {
			c.Missing(at+".address", "give an address of the underlay interface")
			continue
		}
		addr, ok := c.Address(at+".address", a.GetAddress())
		if !ok {
			continue
		}
		if other, ok := c.sources[addr]; ok {
			c.Problem(at+".address", addr.String(), "is the address of "+other+" too", "an address belongs to one pool")
		}
		if in, ok := c.insideOf(addr); ok {
			c.Problem(at+".address", addr.String(), "is an inside address, of "+in.path, "give an address that partners can answer to")
		}
		if addr.IsLinkLocalUnicast() {
			c.Problem(at+".address", addr.String(), "is link-local, which no router forwards", "give an address that partners can answer to")
		}
		public := addr
		if a.GetPublicAddress() == Auto {
			public, _ = c.autoPublic(at+".publicAddress", addr)
		} else if a.GetPublicAddress() != "" {
			public, _ = c.Address(at+".publicAddress", a.GetPublicAddress())
			if public.IsValid() && public.Is4() != addr.Is4() {
				c.Problem(at+".publicAddress", public.String(), "is of another address family than address", "give both in the same family")
			}
		}
		other, twice := c.publics[public]
		if u := c.s.Underlay; !twice && public == u.PublicAddress && addr != u.Address {
			other, twice = "underlay", true
		}
		if _, same := c.sources[addr]; twice && public.IsValid() && !same {
			c.Problem(at+".publicAddress", public.String(), "is the public address of "+other+" too", "give each address its own: the platform translates one to one, and otherwise a port of it cannot be traced to one source")
		}
		c.sources[addr], c.publics[public] = at, at
		if z := a.GetZone(); z != "" && !c.zoneNames[z] {
			c.Reference(at+".zone", z, "egress.zones", "zone")
		}
		weight := c.Number(at+".weight", a.GetWeight(), 1, 1, 100)
		out.Addresses = append(out.Addresses, nat.PoolAddress{Address: addr, Public: public, Zone: a.GetZone(), Weight: weight})
	}
	if p.GetBlocks() != nil {
		out.Blocks = c.blocks(path+".blocks", p.GetBlocks(), out)
	}
	c.s.Pools = append(c.s.Pools, out)
	c.health(path, p, out)
}

// health checks the probes and the announcements of a pool.
func (c *checker) health(path string, p *isthmusv1.Pool, pool nat.Pool) {
	out := egress.ProbedPool{Name: pool.Name}
	for _, a := range pool.Addresses {
		out.Addresses = append(out.Addresses, a.Address)
	}
	for i, text := range p.GetAnnounce() {
		at := fmt.Sprintf("%s.announce[%d]", path, i)
		prefix, ok := c.Prefix(at, text)
		if !ok {
			continue
		}
		switch other, twice := c.announcing[prefix]; {
		case c.announce[prefix]:
			c.Problem(at, text, "is in `announce` too, which does not ask for health", "keep one of them")
		case twice:
			c.Problem(at, text, "is "+other+" too", "let it depend on one pool")
		}
		c.announcing[prefix] = at
		out.Announce = append(out.Announce, prefix)
	}
	if p.GetProbes() != nil {
		out.Probes = c.probes(path+".probes", p.GetProbes(), out.Addresses)
	}
	if len(out.Announce) > 0 || len(out.Probes.Targets) > 0 {
		c.s.Health = append(c.s.Health, out)
	}
}

// poolFacts are the facts of a pool that policies depend on.
type poolFacts struct {
	pool  *nat.Pool
	has   [2]bool // IPv4 addresses, and IPv6 addresses
	known map[netip.Addr]bool
	whole bool // all of its addresses are known
}

// poolNamed returns the facts of a pool of the document, and false when no pool has the name.
func (c *checker) poolNamed(name string) (*poolFacts, bool) {
	if c.pools == nil {
		c.pools = make(map[string]*poolFacts, len(c.s.Pools))
		for i := range c.s.Pools {
			p := &c.s.Pools[i]
			if c.pools[p.Name] != nil {
				continue
			}
			f := &poolFacts{pool: p, known: map[netip.Addr]bool{}}
			f.whole = !c.faulty(fmt.Sprintf("egress.pools[%d].addresses", i))
			for _, a := range p.Addresses {
				f.known[a.Address], f.known[a.Public] = true, true
				if a.Address.Is4() {
					f.has[0] = true
				} else {
					f.has[1] = true
				}
			}
			c.pools[p.Name] = f
		}
	}
	f, ok := c.pools[name]
	return f, ok
}

// hasFamily reports whether the pool has an address of the family of a, or may have one.
func (f *poolFacts) hasFamily(a netip.Addr) bool {
	if !f.whole {
		return true
	}
	if a.Is4() {
		return f.has[0]
	}
	return f.has[1]
}

// mostBlocks bounds the sources with a block in a pool.
const mostBlocks = 65536

func (c *checker) blocks(path string, b *isthmusv1.Blocks, pool nat.Pool) *nat.Blocks {
	out := &nat.Blocks{FirstPort: uint16(c.Number(path+".firstPort", b.GetFirstPort(), 1024, 1, 65535))}
	if b.GetSize() == 0 {
		c.Missing(path+".size", "give the number of ports of a block")
	}
	out.Size = uint16(c.Number(path+".size", b.GetSize(), 1, 1, 64512))
	if len(b.GetSources()) == 0 {
		c.Missing(path+".sources", "give the prefixes of the sources")
	}
	var list []placed
	for i, text := range b.GetSources() {
		at := fmt.Sprintf("%s.sources[%d]", path, i)
		p, ok := c.Prefix(at, text)
		if !ok {
			continue
		}
		list = append(list, placed{p, at})
	}
	late := map[int]bool{}
	overlaps(list, nil, func(i, j int) {
		c.Problem(list[i].path, list[i].prefix.String(), "overlaps "+list[j].prefix.String(), "name each source once")
		late[i] = true
	})
	for i, p := range list {
		if !late[i] {
			out.Sources = append(out.Sources, p.prefix)
		}
	}
	for _, ipv6 := range []bool{false, true} {
		var addresses uint64
		for _, a := range pool.Addresses {
			if a.Address.Is6() == ipv6 {
				addresses++
			}
		}
		sources, room := out.Count(ipv6), addresses*uint64(max(out.PerAddress(), 0))
		switch family := map[bool]string{false: "IPv4", true: "IPv6"}[ipv6]; {
		case sources > mostBlocks:
			c.Problem(path+".sources", fmt.Sprint(sources), fmt.Sprintf("are more %s sources than %d", family, mostBlocks), "name fewer")
		case sources > room:
			c.Problem(path+".sources", fmt.Sprint(sources), fmt.Sprintf("are more %s sources than the %d blocks that there are: %d addresses with %d blocks of %d ports each", family, room, addresses, out.PerAddress(), out.Size),
				"add addresses, make the blocks smaller, or name fewer sources")
		}
	}
	return out
}

// inBlocks checks that every source of a policy has a block of its pool, if the pool has blocks.
func (c *checker) inBlocks(path string, pool *nat.Pool, sources []netip.Prefix) {
	for i, src := range sources {
		if pool.Blocks == nil || !c.spend(len(pool.Blocks.Sources)) {
			return
		}
		if !slices.ContainsFunc(pool.Blocks.Sources, func(p netip.Prefix) bool { return p.Bits() <= src.Bits() && p.Contains(src.Addr()) }) {
			c.Problem(fmt.Sprintf("%s.sources[%d]", path, i), src.String(), "is not within the sources that have a block of pool "+pool.Name, "add it to the pool's `blocks.sources`, or take another pool")
		}
	}
}

package nat

import (
	"net/netip"
	"slices"
)

// Astray returns a function that returns why an established flow cannot continue under the
// configuration; empty means that it can. It checks only flows of connectionless protocols: each of
// their packets renews the entry in the connection table, so that the rules are not evaluated
// again, even if they have changed. leaves reports whether packets to an address leave by the
// underlay.
func (c *Config) Astray(leaves func(netip.Addr) bool) func(Track) (why string) {
	index := c.Index()
	var plain []*Policy
	for i := range c.Policies {
		if c.Policies[i].Action == NoNAT {
			plain = append(plain, &c.Policies[i])
		}
	}
	own := map[netip.Addr]bool{}
	for _, a := range c.addresses() {
		own[a] = true
	}
	// guarded reports whether the guard drops untranslated packets between two addresses.
	guarded := func(from, to netip.Addr) bool {
		return c.inside(from) && !own[to] && leaves(to) && !slices.ContainsFunc(plain, func(p *Policy) bool { return p.between(from, to) })
	}
	return func(t Track) string {
		switch {
		case !Connectionless(t.Protocol) || c.mapped(t.Destination):
			return ""
		case t.GoesTo != t.Destination:
			p := index.Find(Flow{Source: t.Source, Destination: t.Destination, Protocol: t.Protocol, Port: t.Port})
			if p == nil || !p.To.IsValid() || p.Does() == Reject {
				return "" // the removal of a policy ends no flow
			}
			if p.To.Addr() != t.GoesTo || t.Port != 0 && p.To.Port() != 0 && p.To.Port() != t.ServerPort {
				return "policy " + p.Name + " sends them to another server"
			}
		case t.LeavesAs == t.Source && (guarded(t.Source, t.GoesTo) || guarded(t.Destination, t.Source)):
			return "they are not translated, and no policy lets them leave so"
		}
		return ""
	}
}

// Orphaned returns a function that reports whether an established flow was translated to an address
// that the node had for a pool and no longer has. Such a flow is dead, whatever its protocol:
// answers to it do not reach the node. Its entry would stay in the connection table for days, and a
// client that continues to send would never get another address. A flow counts if it comes from
// inside or was forwarded to inside, so that translations by other software stay. has reports
// whether the machine has an address.
func (c *Config) Orphaned(has func(netip.Addr) bool) func(Track) bool {
	kept := map[netip.Addr]bool{}
	for _, a := range c.addresses() {
		kept[a] = true
	}
	gone := func(a netip.Addr) bool { return !kept[a] && !c.mapped(a) && !has(a) }
	return func(t Track) bool {
		switch {
		case t.LeavesAs == t.Destination: // turned back inside: it never leaves with this address
			return false
		case t.LeavesAs != t.Source:
			return c.inside(t.Source) && gone(t.LeavesAs)
		case t.GoesTo != t.Destination:
			return !c.inside(t.Source) && c.inside(t.GoesTo) && gone(t.Destination)
		}
		return false
	}
}

// inside reports whether an attachment may send from an address.
func (c *Config) inside(a netip.Addr) bool {
	return slices.ContainsFunc(c.Attachments, func(t Attachment) bool {
		return slices.ContainsFunc(t.Sources, func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// mapped reports whether an address is in the mapped prefix of a map.
func (c *Config) mapped(a netip.Addr) bool {
	return slices.ContainsFunc(c.Maps, func(m Map) bool { return m.Mapped.Contains(a) })
}

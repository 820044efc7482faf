package fib

import (
	"net/netip"
	"slices"
)

// Surroundings is what the machine has of addresses, routes and rules that is not isthmus's.
type Surroundings struct {
	Addresses []Assigned
	// Routes are those of every table but the kernel's own "local".
	Routes []Foreign
	// Rules are the routing rules of both families, in order of priority.
	Rules []Rule
}

// Assigned is an address of an interface, with the length of its network.
type Assigned struct {
	Interface string
	Prefix    netip.Prefix
}

// Foreign is a route of others. A route of several next hops is there once for each.
type Foreign struct {
	Table     uint32
	Prefix    netip.Prefix
	Interface string
	Gateway   netip.Addr // zero: none
}

// Rule is a routing rule (RFC 1812 section 5.2.4.3 calls it policy routing).
type Rule struct {
	IPv6     bool
	Priority uint32
	Table    uint32
	// Plain says that the rule looks at nothing: every packet goes to its table.
	Plain bool
}

// Tables of the kernel.
const (
	TableDefault = 253
	TableMain    = 254
	TableLocal   = 255
)

// Own returns the node's own addresses: those on interfaces that are not attachments, in order. Addresses of the loopback's network, and
// those that belong to one link, are everybody's.
func (s *Surroundings) Own(attached []string) (own []netip.Addr) {
	for _, a := range s.Addresses {
		addr := a.Prefix.Addr()
		if !slices.Contains(attached, a.Interface) && !addr.IsLoopback() && !addr.IsLinkLocalUnicast() {
			own = append(own, addr)
		}
	}
	slices.SortFunc(own, netip.Addr.Compare)
	return slices.Compact(own)
}

// Best returns the length of the most specific route of the main table to an address, -1 when there is none.
func (s *Surroundings) Best(a netip.Addr) (bits int) {
	bits = -1
	for _, r := range s.Routes {
		if r.Table == TableMain && r.Prefix.Contains(a) {
			bits = max(bits, r.Prefix.Bits())
		}
	}
	return bits
}

// Way returns the interface by which the main table sends to an address; empty when it has no route. Of equal routes it is the first that the kernel
// lists, which is the one with the smallest metric.
func (s *Surroundings) Way(a netip.Addr) (iface string) {
	bits := -1
	for _, r := range s.Routes {
		if r.Table == TableMain && r.Prefix.Contains(a) && r.Prefix.Bits() > bits {
			iface, bits = r.Interface, r.Prefix.Bits()
		}
	}
	return iface
}

// Gateways returns the next hops of the routes by an interface, in order.
func (s *Surroundings) Gateways(iface string) (all []netip.Addr) {
	for _, r := range s.Routes {
		if r.Interface == iface && r.Gateway.IsValid() {
			all = append(all, r.Gateway)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// Reserved is an address or a network that a route must not take away from the node.
type Reserved struct {
	// Prefix is reserved: a route to it, or into it, is withheld.
	Prefix netip.Prefix
	// Covered withholds also routes that cover the Prefix, a single address, and are longer than Own.
	Covered bool
	// Own is the length of the route that the machine has to the address without isthmus.
	Own int
	// Why completes "the prefix takes ADDRESS, ...".
	Why string
}

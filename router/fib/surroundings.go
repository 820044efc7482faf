package fib

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
)

// Surroundings has the addresses, routes and rules of the machine that do not belong to isthmus.
type Surroundings struct {
	// Devices has all interfaces by name, also those of isthmus, except Canary.
	Devices   map[string]Device
	Addresses []Assigned
	// Routes are those of every table except the kernel's "local".
	Routes []Foreign
	// Rules are the routing rules of both families, in order of priority.
	Rules []Rule
	// Transit is true for a family, IPv4 and IPv6, whose forwarded packets look for a default route
	// in the table of Transit first.
	Transit [2]bool
	// Filters describes the interfaces on which traffic control or XDP may change packets.
	Filters []string
}

// Canary is the interface of a proof's canary. It exists during a call, and Surroundings omits it.
const Canary = "canary0"

// Device is an interface.
type Device struct {
	Index uint32
	MTU   int // bytes
	// Down means that it is set down, or has no carrier (RFC 2863: down, lowerLayerDown or
	// notPresent).
	Down bool
}

// Assigned is an address of an interface with its prefix length.
type Assigned struct {
	Interface string
	Prefix    netip.Prefix
}

// Foreign is a route of others. A route with several next hops is listed once for each.
type Foreign struct {
	Table     uint32
	Prefix    netip.Prefix
	Interface string
	Gateway   netip.Addr // zero: none
	Metric    uint32
}

// Rule is a routing rule (RFC 1812 section 5.2.4.3 calls it policy routing).
type Rule struct {
	IPv6     bool
	Priority uint32
	Table    uint32
	// Plain is true when the rule has no selector: every packet goes to its table.
	Plain bool
}

// Tables of the kernel.
const (
	TableDefault = 253
	TableMain    = 254
	TableLocal   = 255
)

// Own returns the node's own addresses in order: those of interfaces that are not attachments. It
// omits loopback and link-local addresses, which are not unique to the node.
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

// Best returns the length of the most specific route of the main table to an address, -1: none.
func (s *Surroundings) Best(a netip.Addr) (bits int) {
	bits = -1
	for _, r := range s.Routes {
		if r.Table == TableMain && r.Prefix.Contains(a) {
			bits = max(bits, r.Prefix.Bits())
		}
	}
	return bits
}

// Way returns the interface of the main table's route to an address, empty when there is none.
// Among routes of one length, the one with the smallest metric counts.
func (s *Surroundings) Way(a netip.Addr) (iface string) {
	best := Foreign{Prefix: netip.PrefixFrom(a, -1)}
	for _, r := range s.Routes {
		if r.Table == TableMain && r.Prefix.Contains(a) && better(r, best) {
			best = r
		}
	}
	return best.Interface
}

// Outranking returns the routes of the main table that the kernel prefers to those of isthmus to
// the same prefixes, because their metrics are smaller.
func (s *Surroundings) Outranking() map[netip.Prefix]Foreign {
	out := map[netip.Prefix]Foreign{}
	for _, r := range s.Routes {
		if best, ok := out[r.Prefix]; r.Table == TableMain && r.Metric < Metric && (!ok || r.Metric < best.Metric) {
			out[r.Prefix] = r
		}
	}
	return out
}

func better(a, b Foreign) bool {
	if a.Prefix.Bits() != b.Prefix.Bits() {
		return a.Prefix.Bits() > b.Prefix.Bits()
	}
	return a.Metric < b.Metric
}

// Doubts describes why packets to a prefix may leave by another interface than the underlay. It
// does not consider the routes of isthmus.
func (s *Surroundings) Doubts(underlay string, to netip.Prefix) (why []string) {
	for _, r := range s.Rules {
		if r.IPv6 != to.Addr().Is6() {
			continue
		}
		known := r.Plain && (r.Priority == 0 && r.Table == TableLocal || r.Priority == 32766 && r.Table == TableMain || r.Priority == 32767 && r.Table == TableDefault && !s.inTable(TableDefault))
		if !known {
			why = append(why, fmt.Sprintf("routing rule %d sends some packets to table %d, which is not examined", r.Priority, r.Table))
		}
	}
	best := -1
	for _, r := range s.Routes {
		if r.Table == TableMain && r.Prefix.Bits() <= to.Bits() && r.Prefix.Contains(to.Addr()) {
			best = max(best, r.Prefix.Bits())
		}
	}
	if best < 0 {
		why = append(why, "no route leads to "+to.String())
	}
	metric := uint32(math.MaxUint32)
	for _, r := range s.Routes {
		if r.Table == TableMain && r.Prefix.Bits() == best && r.Prefix.Contains(to.Addr()) {
			metric = min(metric, r.Metric)
		}
	}
	for _, r := range s.Routes {
		covers := r.Prefix.Bits() == best && r.Prefix.Contains(to.Addr()) && r.Metric == metric
		within := r.Prefix.Bits() > to.Bits() && to.Contains(r.Prefix.Addr()) && !s.connected(r)
		if r.Table == TableMain && r.Interface != underlay && (covers || within) {
			why = append(why, fmt.Sprintf("the route to %v leads to interface %s, not to %s", r.Prefix, r.Interface, underlay))
		}
	}
	slices.Sort(why)
	return slices.Compact(why)
}

func (s *Surroundings) inTable(table uint32) bool {
	return slices.ContainsFunc(s.Routes, func(r Foreign) bool { return r.Table == table })
}

// connected reports whether a route leads to the network of an address of its interface.
func (s *Surroundings) connected(r Foreign) bool {
	return !r.Gateway.IsValid() && slices.ContainsFunc(s.Addresses, func(a Assigned) bool {
		return a.Interface == r.Interface && r.Prefix.Contains(a.Prefix.Addr())
	})
}

// Gateways returns the gateways of the routes by an interface, in order.
func (s *Surroundings) Gateways(iface string) (all []netip.Addr) {
	for _, r := range s.Routes {
		if r.Interface == iface && r.Gateway.IsValid() {
			all = append(all, r.Gateway)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// Reserved is an address or a network that a route must not divert from the node. It restricts
// routes of its own domain alone: encrypted packets and the node's own traffic use the main table,
// and a route in the table of another domain cannot divert them. The inside addresses of a domain's
// tunnels, for example, are reserved with its own Domain.
type Reserved struct {
	// Key is reserved: a route to it, or into it, is withheld.
	Key Key
	// Covered also withholds routes that cover the Key, a single address, and are longer than Own.
	Covered bool
	// Own is the length of the machine's own route to the address.
	Own int
	// Why completes "the prefix takes ADDRESS, ...".
	Why string
}

// Package nat holds the words and the contract for source NAT, the guard behind it, TCP MSS clamping, and where BGP may
// come from.
//
// The package knows no backend: nat/nftables implements Driver.
package nat

import "net/netip"

// Config is everything that is wanted of NAT and filtering on a node.
type Config struct {
	// Underlay is the egress interface. What leaves by it carries the source of a pool or one of Own, or the guard
	// drops it.
	Underlay string
	// Own are the node's own addresses on the underlay.
	Own []netip.Addr
	// Pools are all pools, by name, used or not.
	Pools []Pool
	// Policies, by name; which of them wins is decided by Match, not by their order.
	Policies []Policy
	// Clamps are the TCP MSS limits, by interface.
	Clamps []Clamp
	// Tunnels are the interfaces by which BGP (TCP port 179) may come in, beside the loopback; from any other it is
	// dropped unanswered.
	Tunnels []string
}

// Pool is a set of source addresses.
type Pool struct {
	Name      string
	Addresses []PoolAddress
}

// PoolAddress is one source address: as it is on the interface, and as the world sees it.
type PoolAddress struct {
	Address netip.Addr
	Public  netip.Addr
}

// Action is what happens to a flow.
type Action string

// The actions of a policy.
const (
	SNAT Action = "snat"
	Deny Action = "deny"
)

// Policy says who leaves as whom.
type Policy struct {
	Name         string
	Action       Action
	Sources      []netip.Prefix
	Destinations []netip.Prefix
	Protocol     string      // "tcp", "udp", "icmp"; empty: every one
	Ports        []PortRange // of the destination; empty: every one
	Pool         string      // with SNAT
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Clamp limits the MSS of TCP connections through an interface, in both directions.
type Clamp struct {
	Interface string
	IPv4      uint16 // bytes; 0: none
	IPv6      uint16
}

// Package nat holds the types and the contract of forwarding: between which interfaces and with
// which sources packets are forwarded, source NAT, the guard behind it, TCP MSS clamping, and the
// sources that may reach BGP and the API. The package has no backend: nat/nftables implements its
// interfaces.
package nat

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Config is the desired state of NAT and filtering on a node. Without an Underlay it has only API
// and Input: the node has no document, and its own forwarding stays as the machine has it, except
// to addresses of the platform; with Input.Drop nothing is forwarded.
type Config struct {
	// Underlay is the egress interface. Packets that leave by it have the source of a pool or one
	// of Own, or the guard drops them.
	Underlay string
	// Own are the node's own addresses: those on the underlay, and those on interfaces that are not
	// attachments.
	Own []netip.Addr
	// Attachments lead to the inside networks. An interface may be in several.
	Attachments []Attachment
	// Pools are all pools, by name, used or not.
	Pools []Pool
	// Zones are the zones of sources. Their prefixes do not overlap.
	Zones []Zone
	// Policies, sorted by name; Match, not their order, decides which of them wins.
	Policies []Policy
	// Maps translate the prefixes behind some interfaces.
	Maps []Map
	// Clamps are the TCP MSS limits, by interface.
	Clamps []Clamp
	// Sessions are the sources that may open BGP (TCP port 179), besides the loopback; packets from
	// elsewhere are dropped without an answer.
	Sessions []Session
	// Lanes are the sources that may send STAMP packets (UDP port 862), which prove the lanes of
	// links. With Input.Drop.
	Lanes []Session
	// API has the sources that may reach the node's own API.
	API API
	// DNS has the sources that may reach port 53 of addresses, over UDP and TCP, besides the
	// loopback. Port 53 of these addresses is closed to all others; other addresses are not
	// affected.
	DNS []Door
	// Metrics has the sources that may read the node's metrics.
	Metrics Metrics
	// Input decides which other packets may reach the node.
	Input Input
	// Tunnels are the interfaces of attachments that are tunnels.
	Tunnels []Tunnel
	// Links are the underlay and the interfaces of attachments that exist. Their indexes only make
	// rules faster: an interface with another index is matched by name.
	Links Links
}

// Link is an interface with its kernel index.
type Link struct {
	Interface string
	Index     uint32
}

// Links are sorted by name.
type Links []Link

// Of returns the index of an interface; 0: unknown.
func (l Links) Of(name string) uint32 {
	for _, link := range l {
		if link.Interface == name {
			return link.Index
		}
	}
	return 0
}

// Zone is a part of a cloud region with its sources.
type Zone struct {
	Name     string
	Prefixes []netip.Prefix
}

// Pool is a set of source addresses.
type Pool struct {
	Name      string
	Addresses []PoolAddress
	// Silent drops a new flow to a destination to which every address of the pool has used all its
	// ports. Default: the client receives a TCP RST or ICMP "administratively prohibited" (RFC 1812
	// section 5.2.7.1, RFC 4443 section 3.1).
	Silent bool
	// Shared means that another node may have begun flows with the pool's addresses. A late flow
	// has the address that its source has while every address of the pool works, whatever is down
	// and whatever is placed here: another address would not be that of its connection.
	Shared bool
	// Blocks give each source ports of its own and decide its address too: slots, zones and
	// placements do not apply. Nil: none.
	Blocks *Blocks
}

// PoolAddress is one source address: on the interface, and in public.
type PoolAddress struct {
	Address netip.Addr
	Public  netip.Addr
	// Zone is the zone of the address; sources of the same zone prefer it. Empty: none.
	Zone string
	// Weight is its share of the sources, relative to the other addresses. 0 counts as 1.
	Weight uint32
	// Down excludes it from new flows while another address of the pool is not down.
	Down bool
}

// String describes the address, as "10.9.0.5 (203.0.113.5, zone a, weight 2)".
func (a PoolAddress) String() string {
	var more []string
	if a.Public.IsValid() && a.Public != a.Address {
		more = append(more, a.Public.String())
	}
	if a.Zone != "" {
		more = append(more, "zone "+a.Zone)
	}
	if a.Weight > 1 {
		more = append(more, fmt.Sprint("weight ", a.Weight))
	}
	if a.Down {
		more = append(more, "down")
	}
	if len(more) == 0 {
		return a.Address.String()
	}
	return fmt.Sprintf("%v (%s)", a.Address, strings.Join(more, ", "))
}

// Placement makes new flows of a source to a destination leave with an address of a pool other than
// that of the source's slot.
type Placement struct {
	Pool                string
	Source, Destination netip.Addr
	Address             netip.Addr
}

// Service is a destination of a client's connection.
type Service struct {
	Destination netip.Addr
	Protocol    uint8  // IP protocol number: TCP, UDP, or one that is Portless
	Port        uint16 // of the destination; 0 of a Portless protocol
}

// String returns it as "198.51.100.7 tcp/443", or "198.51.100.7 esp" of a protocol without ports.
func (s Service) String() string {
	if Portless(s.Protocol) {
		return fmt.Sprintf("%s %s", s.Destination, ProtocolName(s.Protocol))
	}
	return fmt.Sprintf("%s %s/%d", s.Destination, ProtocolName(s.Protocol), s.Port)
}

// Exhausted is a service toward which no address of a pool has a free port. New flows to it are
// refused.
type Exhausted struct {
	Pool string
	Service
}

// Overload has the exhausted resources of a node.
type Overload struct {
	// Exhausted lists services; order and duplicates do not matter.
	Exhausted []Exhausted
	// TableFull refuses every new flow toward the underlay, because the table of connection
	// tracking is full.
	TableFull bool
}

// Action is the treatment of a flow.
type Action string

// The actions of a policy.
const (
	// SNAT translates the source to an address of a pool.
	SNAT Action = "snat"
	// NoNAT lets the flow leave with its own source. The guard passes packets from a source prefix
	// of the policy to a destination prefix of it, and no others.
	NoNAT Action = "no-nat"
	// Deny drops the flow.
	Deny Action = "deny"
	// Reject refuses the flow visibly: by a TCP reset, or by ICMP "administratively prohibited"
	// (RFC 1812 section 5.2.7.1, RFC 4443 section 3.1).
	Reject Action = "reject"
	// DNAT forwards packets for addresses of a pool, from outside or inside, to a server.
	DNAT Action = "dnat"
	// Redirect forwards packets that would leave by the underlay to a proxy.
	Redirect Action = "redirect"
)

// Policy selects flows and decides their action.
type Policy struct {
	Name         string
	Action       Action
	Sources      []netip.Prefix
	Destinations []netip.Prefix
	// Names are domain names whose addresses belong to Destinations: router/egress/dns adds them.
	// With names, a policy without destinations matches nothing.
	Names    []string
	Protocol string      // "tcp", "udp", "icmp"; empty: every one
	Ports    []PortRange // of the destination; empty: every one
	Pool     string      // with SNAT and DNAT
	// Pickup accepts TCP connections without their first packet. With SNAT and NoNAT.
	Pickup bool
	// Timeouts of its flows. With SNAT, NoNAT and DNAT.
	Timeouts Timeouts
	// To is the server or proxy; without a port, the port is unchanged. With DNAT and Redirect.
	To netip.AddrPort
	// Down means that the proxy does not work: new flows are rejected, or with Bypass decided as if
	// the policy did not exist. With Redirect.
	Down, Bypass bool
	// Ends ends established flows as soon as the policy matches them. With Deny and Reject.
	Ends bool
}

// Equal reports whether two policies are the same, with their prefixes, names and ports in the same
// order.
func (p *Policy) Equal(o *Policy) bool {
	return p.Name == o.Name && p.Action == o.Action && slices.Equal(p.Sources, o.Sources) && slices.Equal(p.Destinations, o.Destinations) &&
		slices.Equal(p.Names, o.Names) && p.Protocol == o.Protocol && slices.Equal(p.Ports, o.Ports) && p.Pool == o.Pool && p.Pickup == o.Pickup &&
		p.Timeouts == o.Timeouts && p.To == o.To && p.Down == o.Down && p.Bypass == o.Bypass && p.Ends == o.Ends
}

// EqualFrame reports whether two configurations differ only in their policies.
func (c Config) EqualFrame(o Config) bool {
	c.Policies, o.Policies = nil, nil
	return reflect.DeepEqual(c, o)
}

// Equal reports whether two configurations are the same, with their lists in the same order. There
// may be ten thousand policies.
func (c Config) Equal(o Config) bool {
	return c.EqualFrame(o) && slices.EqualFunc(c.Policies, o.Policies, func(a, b Policy) bool { return a.Equal(&b) })
}

// Timeouts are the idle times after which a flow is removed, in whole seconds; 0: the kernel's
// default.
type Timeouts struct {
	TCPEstablished time.Duration
	TCPClosing     time.Duration // FIN_WAIT, CLOSE_WAIT, LAST_ACK and TIME_WAIT
	UDP            time.Duration // packets in one direction
	UDPStream      time.Duration // packets in both
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// String returns the range in the form of a document.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Map translates the IPv4 addresses behind some interfaces one to one: on this node, a source of
// Inside that arrives by one of the interfaces is the corresponding one of Mapped, and a
// destination of Mapped that leaves by one of them becomes one of Inside. Both prefixes have the
// same length. The translation is stateless.
type Map struct {
	Interfaces     []string
	Inside, Mapped netip.Prefix
}

// Clamp limits the MSS of TCP connections through an interface, in both directions.
type Clamp struct {
	Interface string
	IPv4      uint16 // bytes; 0: none
	IPv6      uint16
}

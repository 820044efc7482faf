// Package nat holds the words and the contract for what a node forwards: between which interfaces,
// with which sources, source NAT, the guard behind it, TCP MSS clamping, and from where BGP and the
// API may be reached.
//
// The package knows no backend: nat/nftables implements Driver.
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

// Config is everything that is wanted of NAT and filtering on a node. Without an Underlay it has
// nothing but API and Input: the node has no document, its own forwarding is left as the machine
// has it, but for addresses of the platform, and with Input.Drop nothing is forwarded.
type Config struct {
	// Underlay is the egress interface. What leaves by it carries the source of a pool or one of
	// Own, or the guard drops it.
	Underlay string
	// Own are the node's own addresses: those on the underlay, and those on interfaces that are not
	// attachments.
	Own []netip.Addr
	// Attachments are the ways to the networks inside. An interface may be in several.
	Attachments []Attachment
	// Pools are all pools, by name, used or not.
	Pools []Pool
	// Zones tell where sources are. Their prefixes do not overlap.
	Zones []Zone
	// Policies, by name; which of them wins is decided by Match, not by their order.
	Policies []Policy
	// Maps show what is behind some interfaces under other prefixes.
	Maps []Map
	// Clamps are the TCP MSS limits, by interface.
	Clamps []Clamp
	// Sessions say from where BGP (TCP port 179) may come in, beside the loopback; from elsewhere
	// it is dropped unanswered.
	Sessions []Session
	// API says who may reach the node's own API.
	API API
	// DNS says who may reach port 53 of addresses, over UDP and TCP, beside the loopback. To
	// everything else port 53 of these addresses is closed; other addresses it does not concern.
	DNS []Door
	// Input says what else may reach the node.
	Input Input
	// Tunnels are the interfaces of attachments that are tunnels.
	Tunnels []Tunnel
	// Links are the underlay and interfaces of attachments, as far as they are there. Their indexes
	// make rules quicker, and decide nothing: an interface with another index is looked up by its
	// name.
	Links Links
}

// Link is an interface with the kernel's index of it.
type Link struct {
	Interface string
	Index     uint32
}

// Links are in order of names.
type Links []Link

// Of returns the index of an interface; 0: it is not known.
func (l Links) Of(name string) uint32 {
	for _, link := range l {
		if link.Interface == name {
			return link.Index
		}
	}
	return 0
}

// Zone is a part of a cloud region with the sources in it.
type Zone struct {
	Name     string
	Prefixes []netip.Prefix
}

// Pool is a set of source addresses.
type Pool struct {
	Name      string
	Addresses []PoolAddress
	// Silent drops a new flow to a destination to which every address of the pool has used up its
	// ports. Default: the client is told, by a TCP RST or by ICMP "administratively prohibited"
	// (RFC 1812 section 5.2.7.1, RFC 4443 section 3.1).
	Silent bool
	// Blocks give each source ports of its own, and decide its address too: slots, zones and
	// placements do not. Nil: none.
	Blocks *Blocks
}

// PoolAddress is one source address: as it is on the interface, and as the world sees it.
type PoolAddress struct {
	Address netip.Addr
	Public  netip.Addr
	// Zone is where the address is; sources of the same zone prefer it. Empty: nowhere.
	Zone string
	// Weight is its share of the sources, against the other addresses. 0 counts as 1.
	Weight uint32
	// Down takes new flows away from it while another address of the pool is not down.
	Down bool
}

// String says everything of it in words, as "10.9.0.5 (203.0.113.5, zone a, weight 2)".
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

// Placement has new flows of a source to a destination leave with an address of a pool that is not
// the one of the source's slot.
type Placement struct {
	Pool                string
	Source, Destination netip.Addr
	Address             netip.Addr
}

// Service is what a client connects to.
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

// Exhausted is a service to which no address of a pool has a port left. New flows to it are
// refused.
type Exhausted struct {
	Pool string
	Service
}

// Overload is what a node can take no more of.
type Overload struct {
	// Exhausted lists services; order and duplicates do not matter.
	Exhausted []Exhausted
	// TableFull refuses every new flow toward the underlay, because the table of connection
	// tracking is full.
	TableFull bool
}

// Action is what happens to a flow.
type Action string

// The actions of a policy.
const (
	// SNAT translates the source to an address of a pool.
	SNAT Action = "snat"
	// NoNAT lets the flow leave with the source that it has. The guard lets pass what is from a
	// source prefix of the policy to a destination prefix of it, nothing else.
	NoNAT Action = "no-nat"
	// Deny drops the flow.
	Deny Action = "deny"
	// Reject refuses the flow so that its source sees it: by a TCP reset, or by ICMP
	// "administratively prohibited" (RFC 1812 section 5.2.7.1, RFC 4443 section 3.1).
	Reject Action = "reject"
	// DNAT sends what comes for addresses of a pool, from outside or inside, to a server.
	DNAT Action = "dnat"
	// Redirect sends what would leave by the underlay to a proxy.
	Redirect Action = "redirect"
)

// Policy says who leaves as whom.
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
	// Pickup lets TCP connections pass whose beginning was not seen. With SNAT and NoNAT.
	Pickup bool
	// Timeouts of its flows. With SNAT, NoNAT and DNAT.
	Timeouts Timeouts
	// To is the server or proxy; without a port, the port stays. With DNAT and Redirect.
	To netip.AddrPort
	// Down says that the proxy does not work: new flows are rejected, or with Bypass decided as if
	// the policy were not there. With Redirect.
	Down, Bypass bool
	// Ends has flows that are under way end as soon as the policy decides on them. With Deny and
	// Reject.
	Ends bool
}

// Equal says whether two policies are the same, with their prefixes, names and ports in the same
// order.
func (p *Policy) Equal(o *Policy) bool {
	return p.Name == o.Name && p.Action == o.Action && slices.Equal(p.Sources, o.Sources) && slices.Equal(p.Destinations, o.Destinations) &&
		slices.Equal(p.Names, o.Names) && p.Protocol == o.Protocol && slices.Equal(p.Ports, o.Ports) && p.Pool == o.Pool && p.Pickup == o.Pickup &&
		p.Timeouts == o.Timeouts && p.To == o.To && p.Down == o.Down && p.Bypass == o.Bypass && p.Ends == o.Ends
}

// EqualFrame says whether two configurations differ in nothing but their policies.
func (c Config) EqualFrame(o Config) bool {
	c.Policies, o.Policies = nil, nil
	return reflect.DeepEqual(c, o)
}

// Equal says whether two configurations are the same, with their lists in the same order. There may
// be ten thousand policies.
func (c Config) Equal(o Config) bool {
	return c.EqualFrame(o) && slices.EqualFunc(c.Policies, o.Policies, func(a, b Policy) bool { return a.Equal(&b) })
}

// Timeouts are times without packets after which a flow is forgotten, in whole seconds; 0: the
// kernel's default.
type Timeouts struct {
	TCPEstablished time.Duration
	TCPClosing     time.Duration // FIN_WAIT, CLOSE_WAIT, LAST_ACK and TIME_WAIT
	UDP            time.Duration // packets in one direction
	UDPStream      time.Duration // packets in both
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// String returns the range as it is written in a document.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Map shows the IPv4 addresses behind some interfaces under others, one to one: a source of Inside
// that comes by one of the interfaces is one of Mapped for everything on this node, and a
// destination of Mapped that leaves by one of them becomes one of Inside. Both prefixes have the
// same length. Nothing is remembered for it.
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

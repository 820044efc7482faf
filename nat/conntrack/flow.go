// Package conntrack reads the kernel's connection tracking table through ctnetlink, and deletes
// flows in it. It is the only package of the tree that does.
package conntrack

import (
	"net/netip"
	"time"
)

// Flow is one tracked connection as the kernel reports it. Values that the kernel omits are zero.
type Flow struct {
	// Original is the flow as its first packet arrived. Reply is what answers look like before
	// they are translated back: with source NAT, its Destination is the source with which the flow
	// leaves. Its Source is the address the flow is sent to.
	Original, Reply Tuple
	Protocol        uint8 // IP protocol number
	TCPState        uint8 // enum tcp_conntrack of the kernel; 0 with other protocols
	Status          Status
	Mark            uint32
	Zone            uint16
	// ID distinguishes the flow from earlier and later ones with the same tuples.
	ID uint32
	// Timeout is how long the flow remains without a packet. Flows that have ended have none.
	Timeout time.Duration
	// Sent and Received count in the directions of Original and Reply. They are zero unless
	// net.netfilter.nf_conntrack_acct was 1 when the flow began.
	Sent, Received Counter
	// Start and End are zero unless net.netfilter.nf_conntrack_timestamp was 1 when the flow
	// began. End is also zero while the flow exists.
	Start, End time.Time
}

// Tuple is one direction of a flow. With ICMP and ICMPv6, the port of Source is the identifier of
// a query, and that of Destination its type and code, one byte each. Protocols without ports have
// port 0.
type Tuple struct{ Source, Destination netip.AddrPort }

// Counter counts packets and bytes, including the network headers.
type Counter struct{ Packets, Bytes uint64 }

// Status is a set of bits (enum ip_conntrack_status in the kernel's
// uapi/linux/netfilter/nf_conntrack_common.h).
type Status uint32

// The bits that isthmus uses.
const (
	SeenReply      Status = 1 << 1
	Assured        Status = 1 << 2 // not evicted early when the table is full
	SourceNAT      Status = 1 << 4 // the source is translated
	DestinationNAT Status = 1 << 5
	Dying          Status = 1 << 9
)

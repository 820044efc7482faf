// Package conntrack reads the kernel's connection tracking table through ctnetlink, and ends flows in it. Nothing else in the tree
// does.
package conntrack

import (
	"net/netip"
	"time"
)

// Flow is one tracked connection, as the kernel tells it. What it does not tell is zero.
type Flow struct {
	// Original is the flow as its first packet came in. Reply is what answers to it look like before they are translated
	// back: with source NAT its Destination is what the flow leaves with, and its Source whom it goes to.
	Original, Reply Tuple
	Protocol        uint8 // IP protocol number
	TCPState        uint8 // enum tcp_conntrack of the kernel; 0 with other protocols
	Status          Status
	Mark            uint32
	Zone            uint16
	// ID tells the flow from others with the same tuples, before and after it.
	ID uint32
	// Timeout is how long the flow lives on without a packet. Flows that have ended have none.
	Timeout time.Duration
	// Sent and Received count in the direction of Original and of Reply. They are zero unless net.netfilter.nf_conntrack_acct
	// was 1 when the flow began.
	Sent, Received Counter
	// Start and End are zero unless net.netfilter.nf_conntrack_timestamp was 1 when the flow began; End also while it lives.
	Start, End time.Time
}

// Tuple is one direction of a flow. With ICMP and ICMPv6, the port of Source is the identifier of a query, and that of
// Destination its type and code, one byte each. Protocols without ports have none.
type Tuple struct{ Source, Destination netip.AddrPort }

// Counter counts packets and bytes, the latter from the network header on.
type Counter struct{ Packets, Bytes uint64 }

// Status is a set of bits (enum ip_conntrack_status in the kernel's uapi/linux/netfilter/nf_conntrack_common.h).
type Status uint32

// The bits that isthmus looks at.
const (
	SeenReply      Status = 1 << 1
	Assured        Status = 1 << 2 // not given up early when the table is full
	SourceNAT      Status = 1 << 4 // the source is another one outside
	DestinationNAT Status = 1 << 5
	Dying          Status = 1 << 9
)

// Package lane judges the lanes of a link between two nodes, from the STAMP packets (RFC 8762) and
// the echo replies that arrive. It does no input or output, and gets the time from its caller; see
// package proof.
package lane

import (
	"net/netip"
	"time"
)

const (
	// Interval is the time between two requests on a lane, and between two judgements.
	Interval = 100 * time.Millisecond
	// DeadAfter is the silence after which a direction is dead: three requests are lost.
	DeadAfter = 3 * Interval
	// UpAfter is the number of judgements in a row for which packets must come before a dead
	// direction is ok again, so that a direction that flaps stays out.
	UpAfter = 10
	// FirstProof is how long a lane is usable before it was proved once, while another lane of its
	// link is.
	FirstProof = time.Second
)

// Link is a link to another node.
type Link struct {
	Name, Node string
	Lanes      []Lane
}

// Lane is one lane of a link.
type Lane struct {
	Name          string // of the tunnel
	Number        int    // from 1
	Interface     string
	Local, Remote netip.Addr // inside addresses
	MTU           int        // in bytes; 0: the path MTU is not probed
}

// Status is the state of one direction of a lane.
type Status string

// The states. A direction that never carried a packet is unknown, not dead.
const (
	Unknown Status = "unknown"
	OK      Status = "ok"
	Dead    Status = "dead"
	// MTU: small packets arrive, and those of the size of the MTU do not.
	MTU Status = "mtu"
)

// Direction is the state of one direction of a lane.
type Direction struct {
	Status Status
	Since  time.Time
	Why    string
	// Loss is the part of the last 128 packets that did not arrive, 0 to 1; -1: unknown.
	Loss float64
}

// LaneState is the state of a lane.
type LaneState struct {
	Lane
	Out, In Direction // from this node, and to it
	// Usable says that routes may use the lane; Why says why they may not.
	Usable bool
	Why    string
	// Silent says that the other node sends no STAMP packets on this lane, while its kernel answers
	// echo requests.
	Silent bool
	// PathMTU is the size of the largest packets that arrive at the other node, in bytes. Zero:
	// unknown.
	PathMTU int
	// RTT are percentiles of the last round trips; zero: none.
	RTT RTT
	Err error // of the last attempt to send
}

// RTT are percentiles of round trips.
type RTT struct {
	Samples  int
	P50, P99 time.Duration
}

// LinkState is the state of a link.
type LinkState struct {
	Name, Node string
	Lanes      []LaneState
	// Silent is the time since when the daemon of the other node sends nothing, while its kernel
	// answers. Zero: it sends.
	Silent time.Time
	// Restarts counts the starts of the other node's daemon that were seen, after the first.
	Restarts int
	// Stalls counts the times that this daemon was not scheduled for longer than DeadAfter allows.
	// They do not count as silence.
	Stalls int
}

// Usable returns the number of usable lanes.
func (s *LinkState) Usable() (n int) {
	for _, l := range s.Lanes {
		if l.Usable {
			n++
		}
	}
	return n
}

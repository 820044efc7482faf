package egress

import (
	"net/netip"
	"time"
)

// SharedAddress is an address of a pool that two nodes share: as it is on this node's interface,
// and as partners see it.
type SharedAddress struct{ Address, Public netip.Addr }

// Path leads to the other node of a pair: through an interface, from an address of this node to one
// of the other's.
type Path struct {
	Interface string
	From, To  netip.Addr
}

// Takeover configures when a node takes the public addresses of the node that shares its pools.
type Takeover struct {
	// Paths lead to the other node, which is alive while it answers on one of them. Empty: nothing
	// is taken.
	Paths []Path
	// Interval is the time between two requests on each path, and the timeout of each answer.
	Interval time.Duration
	// Fall is the number of requests in a row that no path answers before the addresses are taken.
	Fall int
	// Addresses are the addresses to take.
	Addresses []SharedAddress
}

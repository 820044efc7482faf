package nat

import "net/netip"

// State is the state read back from the kernel.
type State struct {
	// Present is false if our table does not exist.
	Present bool
	// Guarded is true if the guard of a document is in the kernel.
	Guarded  bool
	Policies []PolicyState
	// Guard counts packets that were dropped because their source belongs neither to a pool nor to
	// the node.
	Guard Counter
	// Drops counts dropped packets by reason; Guard is among them.
	Drops map[Reason]Counter
	// Placements are the placements in the kernel.
	Placements []Placement
}

// PolicyState has the counters of one policy.
type PolicyState struct {
	Name string
	// Flows counts the first packets of the flows that the policy matched.
	Flows Counter
}

// Counter counts packets and bytes.
type Counter struct{ Packets, Bytes uint64 }

// Meter counts the beginnings of flows. Counts only grow, except that a use that was idle for a
// minute starts again from 0, and all do when our table was removed. There is room for 65,536 uses;
// flows of further ones are only in Begun.
type Meter struct {
	Begun map[Use]uint64
	// Refused counts the packets of new flows that were refused because a service was exhausted.
	// The Use has no source if the pool is Silent, and no pool otherwise.
	Refused map[Use]uint64
	// TableFull counts those refused because connection tracking was full.
	TableFull uint64
}

// Use is a source that uses a service through a pool.
type Use struct {
	Pool   string
	Source netip.Addr
	Service
}

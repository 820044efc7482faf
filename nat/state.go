package nat

import "net/netip"

// State is what was read back.
type State struct {
	// Present is false when our table is not there at all.
	Present bool
	// Guarded is true when the rules of a document are there, which keep inside addresses in.
	Guarded  bool
	Policies []PolicyState
	// Guard counts what was kept from leaving with a source that is no pool's and not the node's.
	Guard Counter
	// Drops counts what was dropped, by reason; Guard is among them.
	Drops map[Reason]Counter
	// Placements are the placements that the kernel has.
	Placements []Placement
}

// PolicyState is what one policy has done.
type PolicyState struct {
	Name string
	// Flows counts the first packets of the flows that the policy decided.
	Flows Counter
}

// Counter counts packets and bytes.
type Counter struct{ Packets, Bytes uint64 }

// Meter counts beginnings of flows. Counts only grow, but those of a use that has been idle for a
// minute start from 0, and all do when someone removed our table. There is room for 65,536 uses;
// flows of further ones are only in Begun.
type Meter struct {
	Begun map[Use]uint64
	// Refused counts the packets of new flows that were refused because a service was exhausted.
	// There is no source with a pool that is Silent, and no pool with others.
	Refused map[Use]uint64
	// TableFull counts those that were refused because connection tracking was full.
	TableFull uint64
}

// Use is a source that uses a service through a pool.
type Use struct {
	Pool   string
	Source netip.Addr
	Service
}

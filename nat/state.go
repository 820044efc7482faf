package nat

// State is what was read back.
type State struct {
	// Present is false when our table is not there at all.
	Present  bool
	Policies []PolicyState
	// Guard counts what was kept from leaving with a source that is no pool's and not the node's.
	Guard Counter
}

// PolicyState is what one policy has done.
type PolicyState struct {
	Name string
	// Flows counts the first packets of the flows that the policy decided.
	Flows Counter
}

// Counter counts packets and bytes.
type Counter struct{ Packets, Bytes uint64 }

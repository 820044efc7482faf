package fib

import "net/netip"

// State is the kernel's state. Except for Links and Taken, it has only objects with Protocol.
type State struct {
	Links    []Link
	NextHops []Object
	Groups   []Group
	Routes   []Installed
	// Taken are the ids of nexthop objects of others, which ours must not use.
	Taken []uint32
}

// Link is a network interface of the kernel.
type Link struct {
	Name  string
	Index uint32
	Up    bool // administratively, and with carrier
}

// Object is a nexthop object of the kernel that is not a group.
type Object struct {
	ID        uint32
	Link      uint32     // interface index
	Gateway   netip.Addr // zero: straight into the interface
	IPv6      bool
	Blackhole bool // then Link and Gateway are zero
}

// Group is a nexthop group of the kernel.
type Group struct {
	ID      uint32
	Members []uint32 // ids of nexthop objects, ascending
	Buckets uint16   // of a resilient group; 0: it is not one
}

// Installed is a route of the kernel with our Metric, of any table.
type Installed struct {
	Key       Key
	NextHop   uint32 // id of a nexthop object or group; 0: none
	Blackhole bool   // the type of the route
}

// RouteState is a route as wanted and as the kernel has it.
type RouteState struct {
	Key       Key
	Source    Source    // 0: of a former run, and not wanted yet
	NextHops  []NextHop // wanted, sorted
	Alive     []NextHop // those of NextHops that carry traffic; none: the route is a black hole
	Blackhole bool      // wanted as one
	// Transit is true for a default route of the main table that is for forwarded packets alone.
	Transit bool
	// Takes is what the route would divert from the node: it is withheld from the kernel. Nil:
	// nothing.
	Takes *Reserved
	// Installed is true when the kernel has the route as wanted.
	Installed bool
}

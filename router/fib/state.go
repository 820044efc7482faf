package fib

import "net/netip"

// State is what was read back from the kernel. Only what carries Protocol is in it, but for Links and Taken.
type State struct {
	Links    []Link
	NextHops []Object
	Groups   []Group
	Routes   []Installed
	// Taken are ids of nexthop objects of others in our range.
	Taken []uint32
}

// Link is a network interface of the kernel.
type Link struct {
	Name  string
	Index uint32
	Up    bool // administratively, and with carrier
}

// Object is a nexthop object of the kernel that is no group.
type Object struct {
	ID        uint32
	Link      uint32     // interface index
	Gateway   netip.Addr // zero: straight into the interface
	IPv6      bool
	Blackhole bool // then Link and Gateway are not set
}

// Group is a nexthop group of the kernel.
type Group struct {
	ID      uint32
	Members []uint32 // ids of nexthop objects, ascending
}

// Installed is a route of the kernel with our Metric, of any table.
type Installed struct {
	Key       Key
	NextHop   uint32 // id of a nexthop object or group; 0: none
	Blackhole bool   // the type of the route
}

// RouteState is one route as wanted and as it stands.
type RouteState struct {
	Key       Key
	Source    Source    // 0: a route of a former run that was not asked for yet
	NextHops  []NextHop // wanted, sorted
	Alive     []NextHop // those of NextHops that carry traffic now; none: the route is a black hole
	Blackhole bool      // wanted as one
	// Takes is what the route would take away from the node: it is withheld from the kernel. Nil: nothing.
	Takes *Reserved
	// Installed is true when the kernel has the route as wanted.
	Installed bool
}

// Package fib holds the words and the contract for the kernel's forwarding table, and the pure table that turns
// routes into nexthop objects, groups and changes.
//
// Routes share nexthop groups, and a dead tunnel is repaired by replacing the groups it was in. The cost of a failure
// grows with the number of groups, not with the number of routes.
package fib

import "net/netip"

// Protocol is the route protocol number (rtm_protocol) of everything that isthmus puts into the kernel. Nothing with
// another number is ever changed or removed.
const Protocol = 0x49

// Source says where a route comes from. The smaller one wins.
type Source uint8

// The sources of routes, best first.
const (
	Static Source = 1
	BGP    Source = 2
)

// NextHop is one way out of the node.
type NextHop struct {
	Interface string
	Gateway   netip.Addr // zero: straight into the interface
}

// Route is what is wanted for one prefix: next hops that are used together, or a black hole.
type Route struct {
	Prefix    netip.Prefix
	NextHops  []NextHop // in any order, without duplicates
	Blackhole bool
}

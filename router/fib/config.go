// Package fib holds the words and the contract for the kernel's forwarding table, and the pure table that turns
// routes into nexthop objects, groups and changes.
//
// Routes share nexthop groups, and a dead tunnel is repaired by replacing the groups it was in. The cost of a failure
// grows with the number of groups, not with the number of routes.
//
// A group whose next hops are all dead becomes a black hole, so that traffic for a tunnel that is down does not fall
// through to the default route of the underlay before BGP withdraws. The kernel itself knows no such care: it removes
// groups, and the routes on them, when an interface goes away. A tunnel should therefore be reported dead before its
// interface is deleted.
package fib

import "net/netip"

// Protocol is the route protocol number (rtm_protocol, nhm_protocol) of everything that isthmus puts into the
// kernel. Nothing with another number is ever changed or removed.
const Protocol = 0x49

// Metric is the priority (RTA_PRIORITY) of every route of ours, in both families. It is larger, and so weaker, than what
// the kernel (0; 256 and 1024 in IPv6), DHCP clients (100 to 1024) and router advertisements (1024) use: a prefix
// learnt in a tunnel never beats a connected network or the default route of the underlay that carries the tunnels.
const Metric = 2048

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

// Route is what is wanted for one key: next hops that are used together, or a black hole.
type Route struct {
	Key       Key
	NextHops  []NextHop // in any order; duplicates count once
	Blackhole bool
}

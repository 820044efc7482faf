// Package fib defines the kernel's forwarding table and the contract of its driver, and has the
// pure table that turns routes into nexthop objects, groups and changes.
//
// Routes share nexthop groups. When a tunnel dies, only the groups with its next hops are replaced:
// the cost of a failure grows with the number of groups, not with the number of routes.
//
// A group with only dead next hops becomes a black hole. Traffic for a tunnel that is down then
// does not fall through to the default route of the underlay before BGP withdraws. The kernel does
// not do this: it removes groups, and the routes on them, when an interface is deleted. Report a
// tunnel dead before its interface is deleted.
package fib

import "net/netip"

// Protocol is the route protocol number (rtm_protocol, nh_protocol) of the routes and nexthop
// objects of isthmus. It changes or removes none with another number.
const Protocol = 0x49

// Metric is the priority (RTA_PRIORITY) of every route of ours, in both families. It is larger, and
// so weaker, than those of the kernel (0; 256 and 1024 in IPv6), DHCP clients (100 to 1024) and
// router advertisements (1024): a prefix learnt in a tunnel never wins over the same prefix of a
// connected network, nor over the underlay's default route, which carries the tunnels.
const Metric = 2048

// Source is the origin of a route. The smaller one wins.
type Source uint8

// The sources of routes, best first.
const (
	Static Source = 1
	BGP    Source = 2
)

// NextHop is a next hop of a route.
type NextHop struct {
	Interface string
	Gateway   netip.Addr // zero: directly on the interface
}

// Route is a wanted route: next hops that share the traffic, or a black hole.
type Route struct {
	Key       Key
	NextHops  []NextHop // in any order; duplicates count once
	Blackhole bool
	// Resilient means that a next hop that dies moves no flow of the others, and one that returns
	// takes only flows that pause: the next hops are the lanes of one link.
	Resilient bool
	// Own means that the node needs the static route for itself: it is not withheld.
	Own bool
}

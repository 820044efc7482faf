package fib

import "context"

// OpKind is a kind of change.
type OpKind uint8

// The kinds of changes.
const (
	SetNextHop    OpKind = iota + 1 // create or replace Object
	SetGroup                        // create or replace the group ID with Members
	AddRoute                        // new route Key via group ID, or a black hole if ID is 0
	ReplaceRoute                    // the same for an existing route
	DeleteRoute                     // Key
	DeleteGroup                     // ID, which no route uses
	DeleteNextHop                   // ID, which no group has
)

// Op is one change of the kernel's state.
type Op struct {
	Kind    OpKind
	ID      uint32
	Object  Object
	Members []uint32
	// Buckets is the number of buckets of a resilient group, which never changes; 0: the group is
	// not one. The kernel assigns flows to buckets by a hash, and buckets to members: a member that
	// leaves loses its buckets, and one that joins takes idle buckets only (Linux,
	// Documentation/networking/nexthop-group-resilient.rst).
	Buckets uint16
	Key     Key
}

// Event is what others may have changed in the kernel. It triggers a new read, and carries no
// state.
type Event uint8

// The events. They can be combined.
const (
	LinkEvent  Event = 1 << iota
	RouteEvent       // routes, nexthop objects or groups of ours
)

// Driver reads and writes the kernel's forwarding state. One goroutine calls its methods, except
// for Watch and Writes.
type Driver interface {
	// Observe reads the state. An error means that the state is unknown, not that it is empty.
	Observe(ctx context.Context) (State, error)

	// Links reads the interfaces.
	Links(ctx context.Context) ([]Link, error)

	// Execute makes changes in order, and continues after one that fails. It returns one error per
	// change, nil for those that were made; or nil when all were made.
	Execute(ctx context.Context, ops []Op) []error

	// Watch reports changes that this driver did not make until ctx is done. It calls notify once
	// with all events when it has begun to listen, and again after it may have lost some.
	Watch(ctx context.Context, notify func(Event)) error

	// Writes returns the number of changes sent to the kernel.
	Writes() uint64
}

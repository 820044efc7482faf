package fib

import "context"

// OpKind is a kind of change.
type OpKind uint8

// The kinds of changes.
const (
	SetNextHop    OpKind = iota + 1 // create or replace Object
	SetGroup                        // create or replace the group ID with Members
	AddRoute                        // Key through group ID, or a black hole when ID is 0; it must not be there yet
	ReplaceRoute                    // the same for a route that must be there
	DeleteRoute                     // Key
	DeleteGroup                     // ID, in which no route is
	DeleteNextHop                   // ID, which is in no group
)

// Op is one change of the kernel's state.
type Op struct {
	Kind    OpKind
	ID      uint32
	Object  Object
	Members []uint32
	Key     Key
}

// Event says what may have changed in the kernel by another hand. It is a nudge; the truth is read again.
type Event uint8

// The events. They can be combined.
const (
	LinkEvent  Event = 1 << iota
	RouteEvent       // routes, nexthop objects or groups of ours
)

// Driver reads and writes the kernel's forwarding state. One goroutine calls its methods, except for Watch and
// Writes.
type Driver interface {
	// Observe reads everything back. An error means that nothing is known, never that nothing is there.
	Observe(ctx context.Context) (State, error)

	// Links reads the interfaces back.
	Links(ctx context.Context) ([]Link, error)

	// Execute makes changes in order, goes on after one that fails, and returns one error per change, nil for those
	// that were made; or nil when all were.
	Execute(ctx context.Context, ops []Op) []error

	// Watch reports changes by other hands than this driver's until ctx is done. It calls notify once with all
	// events when it has begun to listen, and again after it may have lost some.
	Watch(ctx context.Context, notify func(Event)) error

	// Writes returns how many changes were sent to the kernel.
	Writes() uint64
}

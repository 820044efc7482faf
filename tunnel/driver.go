package tunnel

import (
	"context"
	"errors"
)

// ErrNotFound means that a driver has no tunnel of that name.
var ErrNotFound = errors.New("no such tunnel")

// Driver makes tunnels of one kind. Methods may be called from several goroutines.
type Driver interface {
	// Observe reads back every tunnel that carries our mark, wanted or not. An error means that the
	// state is unknown, never that no tunnel exists.
	Observe(ctx context.Context) ([]State, error)

	// Apply brings one tunnel to its configuration and touches no other. It writes only
	// differences. Disabled tunnels are removed, not applied. A peer that does not answer is not an
	// error; it shows in the state.
	Apply(ctx context.Context, c Config) error

	// Remove removes a tunnel with its interface. Removing a missing tunnel is not an error.
	Remove(ctx context.Context, name string) error

	// Reset has the keys of an applied tunnel negotiated again, and returns before that is done. A
	// tunnel that is not applied is an error that wraps ErrNotFound.
	Reset(ctx context.Context, name string) error

	// Run keeps the applied tunnels up until ctx is done, and reports each change of a state.
	// Reports are made in order and must not block for long.
	Run(ctx context.Context, report func(State)) error

	// Writes returns the number of changes that the driver has made, for tests and metrics that
	// show that an unchanged document writes nothing.
	Writes() uint64
}

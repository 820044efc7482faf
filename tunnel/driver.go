package tunnel

import "context"

// Driver makes tunnels of one kind. Methods may be called from several goroutines.
type Driver interface {
	// Observe reads back every tunnel that carries our mark, wanted or not. An error means that
	// nothing is known, never that nothing is there.
	Observe(ctx context.Context) ([]State, error)

	// Apply makes one tunnel be as configured and touches no other. It writes only what differs
	// from what is there. That the peer does not answer is not an error; it shows in the state.
	Apply(ctx context.Context, c Config) error

	// Remove takes a tunnel away with its interface. Removing what is not there is not an error.
	Remove(ctx context.Context, name string) error

	// Run keeps the applied tunnels up until ctx is done, and reports each change of a state.
	// Reports are made in order and must not block for long.
	Run(ctx context.Context, report func(State)) error

	// Writes returns how many changes the driver has made to what it drives, for the tests and
	// metrics that show that an unchanged document writes nothing.
	Writes() uint64
}

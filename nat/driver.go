package nat

import "context"

// Driver carries out a Config. Methods may be called from several goroutines.
type Driver interface {
	// Apply makes the kernel's rules be as configured, in one transaction, and keeps the counters of the policies
	// that stay. When the rules are already there it writes nothing.
	Apply(ctx context.Context, c Config) error

	// Observe reads back what is there.
	Observe(ctx context.Context) (State, error)

	// Writes returns how many transactions were made.
	Writes() uint64
}

package nat

import (
	"context"
	"net/netip"
)

// Driver carries out a Config. Methods may be called from several goroutines.
type Driver interface {
	// Apply makes the kernel's rules be as configured, in one transaction, and keeps the counters of the policies
	// that stay. When the rules are already there it writes nothing.
	Apply(ctx context.Context, c Config) error

	// Observe reads back what is there.
	Observe(ctx context.Context) (State, error)

	// Differences says how what is in the kernel differs from a Config. Empty: in nothing.
	Differences(ctx context.Context, c Config) ([]string, error)

	// Departures says with which source addresses new flows may leave by the underlay, from any of the sources toward any
	// of the destinations, by the rules that are in the kernel. It may say too much, never too little.
	Departures(ctx context.Context, underlay string, sources, destinations []netip.Prefix) ([]Departure, error)

	// Predict says the same of the rules that a Config would lead to.
	Predict(c Config, sources, destinations []netip.Prefix) ([]Departure, error)

	// Writes returns how many transactions were made.
	Writes() uint64
}

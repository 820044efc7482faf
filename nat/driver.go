package nat

import (
	"context"
	"net/netip"
)

// Driver applies a Config. Methods of this and the other interfaces may be called from several
// goroutines.
type Driver interface {
	// Apply brings the kernel's rules to the configuration, in one transaction, and keeps the
	// counters of the policies that stay. If the rules match already, it writes nothing.
	Apply(ctx context.Context, c Config) error

	// Remove removes the rules.
	Remove(ctx context.Context) error

	// Observe reads back the state in the kernel.
	Observe(ctx context.Context) (State, error)

	// Watch calls changed when another process may have changed the rules, and once at the
	// beginning, until ctx is done. present reports whether our table exists.
	Watch(ctx context.Context, changed func(present bool)) error

	// Writes returns the number of transactions.
	Writes() uint64
}

// PortKeeper counts the flows that use ports of the pools' addresses, and assigns addresses to new
// flows or refuses them. It needs rules that a Driver has applied.
type PortKeeper interface {
	// Place sets the placements, also for later calls of Apply; but it omits one to an address that
	// its pool does not have, or that is down while another is not. Established flows keep their
	// address.
	Place(ctx context.Context, p []Placement) error

	// Refuse sets the overload, also for later calls of Apply.
	Refuse(ctx context.Context, o Overload) error

	// Begun returns the number of flows of TCP and UDP with a pool's address that began since the
	// kernel counts, and the number of packets that tried to begin one of a Portless protocol, in a
	// few microseconds.
	Begun(ctx context.Context) (flows, portless uint64, err error)

	// Meter returns the flows that Begun consists of, and the refused ones.
	Meter(ctx context.Context) (Meter, error)
}

// Prover analyses the rules, without changing any.
type Prover interface {
	// Differences returns the differences between the kernel and a Config. Empty: none.
	Differences(ctx context.Context, c Config) ([]string, error)

	// Departures returns the source addresses with which new flows may leave by the underlay, from
	// any of the sources toward any of the destinations, under the rules in the kernel. It may
	// return too many, never too few.
	Departures(ctx context.Context, underlay string, sources, destinations []netip.Prefix) ([]Departure, error)

	// Predict returns the same for the rules that a Config would lead to.
	Predict(c Config, sources, destinations []netip.Prefix) ([]Departure, error)

	// Foreign describes everything outside our own table that may change the packets that leave.
	// Empty: nothing does.
	Foreign(ctx context.Context) ([]string, error)
}

// Sampler shows packets that the rules drop.
type Sampler interface {
	// Sample calls dropped for some of the dropped packets, at most a few in a second for each
	// reason, until ctx is done.
	Sample(ctx context.Context, dropped func(Reason, Flow)) error
}

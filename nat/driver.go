package nat

import (
	"context"
	"net/netip"
)

// Driver carries out a Config. Methods of this and the other interfaces may be called from several
// goroutines.
type Driver interface {
	// Apply makes the kernel's rules be as configured, in one transaction, and keeps the counters
	// of the policies that stay. When the rules are already there it writes nothing.
	Apply(ctx context.Context, c Config) error

	// Remove removes the rules.
	Remove(ctx context.Context) error

	// Observe reads back what is there.
	Observe(ctx context.Context) (State, error)

	// Watch calls changed when another process may have changed the rules, and once at the
	// beginning, until ctx is done. present says whether our table is there.
	Watch(ctx context.Context, changed func(present bool)) error

	// Writes returns how many transactions were made.
	Writes() uint64
}

// PortKeeper counts the flows that take ports of the pools' addresses, and says which new flows get
// which address or none. It needs rules that a Driver has applied.
type PortKeeper interface {
	// Place makes the placements be exactly these, also over later calls of Apply; but one to an
	// address that its pool does not have, or that is down while another is not, goes. Flows that
	// are under way keep their address.
	Place(ctx context.Context, p []Placement) error

	// Refuse makes the overload be exactly this, also over later calls of Apply.
	Refuse(ctx context.Context, o Overload) error

	// Begun returns how many flows of TCP and UDP with a pool's address began since the kernel has
	// counted, and how many packets tried to begin one of a Portless protocol, in a few
	// microseconds.
	Begun(ctx context.Context) (flows, portless uint64, err error)

	// Meter returns of which flows Begun consists, and what was refused.
	Meter(ctx context.Context) (Meter, error)
}

// Prover says what the rules do, without changing any.
type Prover interface {
	// Differences says how what is in the kernel differs from a Config. Empty: in nothing.
	Differences(ctx context.Context, c Config) ([]string, error)

	// Departures says with which source addresses new flows may leave by the underlay, from any of
	// the sources toward any of the destinations, by the rules that are in the kernel. It may say
	// too much, never too little.
	Departures(ctx context.Context, underlay string, sources, destinations []netip.Prefix) ([]Departure, error)

	// Predict says the same of the rules that a Config would lead to.
	Predict(c Config, sources, destinations []netip.Prefix) ([]Departure, error)

	// Foreign says what outside our own table may change the packets that leave, in words. Empty:
	// nothing does.
	Foreign(ctx context.Context) ([]string, error)
}

// Sampler shows packets that the rules drop.
type Sampler interface {
	// Sample calls dropped for some of the packets that are dropped, at most a few in a second for
	// each reason, until ctx is done.
	Sample(ctx context.Context, dropped func(Reason, Flow)) error
}

package router

import (
	"context"
	"log/slog"
	"net/netip"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/capability"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/ports"
	"github.com/isthmus-net/isthmus/router/report"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Addresses are the machine's addresses and links.
type Addresses interface {
	apply.Addresses
	observe.Machine
	report.Addresses
}

// Host is the machine.
type Host interface {
	apply.Host
	// Has reports whether the kernel has a capability.
	Has(capability string) bool
	// Capabilities lists what the kernel has.
	Capabilities() []string
	// Listening returns what listens at an address of the machine, as "tcp/22".
	Listening(netip.Addr) []string
}

// FIB is the forwarding table; router/fib has the words.
type FIB interface {
	apply.FIB
	observe.FIB
	report.FIB
	// Run writes to the kernel until ctx is done.
	Run(context.Context) error
}

// NAT are the rules; package nat has the words.
type NAT interface {
	nat.Driver
	nat.PortKeeper
	nat.Prover
	nat.Sampler
}

// Flows is the table of connection tracking; nat/conntrack has the words.
type Flows interface {
	apply.Flows
	ports.Flows
}

// Translations is the log of translations; router/egress/translog has the words.
type Translations = capability.Translations

// Counters counts what was written since the start of the daemon.
type Counters = report.Counters

// Options are what a Router works with.
type Options struct {
	Store   *store.Store
	Drivers map[tunnel.Kind]tunnel.Driver
	BGP     bgp.Driver
	FIB     FIB
	NAT     NAT
	// Flows lets new flows be placed by what is in use of the pools' ports, and ends flows. Nil: neither is done.
	Flows Flows
	// Translations remembers who talked to whom as which address. Nil: there is no log.
	Translations Translations
	Addresses    Addresses
	Host         Host
	Version      string
	Log          *slog.Logger
	// Charon returns what about charon does not fit, in words; nil: it is not asked. An error means that it does not answer.
	Charon func(context.Context) ([]string, error)
	// Callers returns the addresses that ask for a tunnel that is not there; nil: none is noticed.
	Callers func() []tunnel.Caller
	// NamesFile keeps the addresses of names for the next start. Empty: they are not kept.
	NamesFile string
	// Probe asks a target of health checks once, from an address and out by an interface. Default: health.Prober.
	Probe func(ctx context.Context, iface string, from netip.Addr, t egress.Target) error
	// Mover takes public addresses; nil: none can be taken.
	Mover takeover.Mover
	// SSH has the machine's SSH server take these keys and no others. Nil: it is not ours.
	SSH func(keys []string) error
	// APIPort is the TCP port of the API; 0: it has only its unix socket.
	APIPort uint16
	// Resolvers are the DNS servers that the machine itself uses.
	Resolvers func() []netip.Addr
	// Drop says that packets to the node that nothing lets in are dropped where a document does not say (access.input). Default: services
	// other than those of isthmus are reached as the machine has it.
	Drop bool
	// APIFrom are sources that may reach the API besides those that the document names.
	APIFrom []netip.Prefix
	// FirstAPI are sources that may reach the API as long as the document names none; see SetFirstAccess.
	FirstAPI []netip.Prefix
	// Safe carries nothing out: documents are taken and stored, and what runs stays as it is. Where no rules are, those are put in that close
	// the node.
	Safe bool
	// Notices returns conditions of what is around the router, such as access to it; nil: there are none.
	Notices func() []*isthmusv1.Condition
	// Facts is what the platform said of addresses when it was last asked; see SetFacts.
	Facts spec.Platform
	// Platform returns what the platform says of the machine; nil: it is not asked.
	Platform func() *isthmusv1.PlatformStatus
	// Counters fills in what the drivers have written.
	Counters func() Counters
}

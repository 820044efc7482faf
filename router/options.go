package router

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/capability"
	"github.com/isthmus-net/isthmus/router/echo"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/takeover"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/packets"
	"github.com/isthmus-net/isthmus/router/ports"
	"github.com/isthmus-net/isthmus/router/report"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/liveness"
)

// Addresses are the machine's addresses and links.
type Addresses interface {
	apply.Addresses
	// RouteTransit sets the routing rules of forwarded packets; see capability.Transit.
	RouteTransit(on bool) error
	observe.Machine
	report.Addresses
}

// Host is the machine.
type Host interface {
	apply.Host
	// Has reports whether the kernel has a capability.
	Has(capability string) bool
	// Capabilities returns the capabilities of the kernel.
	Capabilities() []string
	// Listening returns the ports that are open at an address of the machine, as "tcp/22".
	Listening(netip.Addr) []string
	// MTU returns the MTU of an interface in bytes, 0 if the machine does not have the interface.
	MTU(iface string) int
}

// FIB is the forwarding table; see router/fib.
type FIB interface {
	apply.FIB
	observe.FIB
	report.FIB
	// SetTransit sets whether default routes are for forwarded packets alone.
	SetTransit(on bool)
	// Run writes to the kernel until ctx is done.
	Run(context.Context) error
}

// NAT are the rules; see package nat.
type NAT interface {
	nat.Driver
	nat.PortKeeper
	nat.Prover
	nat.Sampler
}

// Flows is the conntrack table; see nat/conntrack.
type Flows interface {
	apply.Flows
	ports.Flows
}

// Translations is the log of translations; see router/egress/translog.
type Translations = capability.Translations

// Counters counts the writes since the start of the daemon.
type Counters = report.Counters

// Options configure a Router.
type Options struct {
	Store   *store.Store
	Drivers map[tunnel.Kind]tunnel.Driver
	BGP     bgp.Driver
	// Tables reads the tables of BGP. Nil: paths cannot be listed.
	Tables bgp.Tables
	FIB    FIB
	NAT    NAT
	// Flows places new flows by the use of the pools' ports, and ends flows. Nil: neither is done.
	Flows Flows
	// Translations logs which source used which outside address. Nil: nothing is logged.
	Translations Translations
	Addresses    Addresses
	Host         Host
	Version      string
	// Events records the changes of the node's state. Nil: nothing does.
	Events *event.Log
	Log    *slog.Logger
	// Metrics is the page of the metrics. Nil: it is not served over plain HTTP.
	Metrics http.Handler
	// Charon returns what about charon does not fit, in words; nil: it is not checked. An error
	// means that charon does not answer.
	Charon func(context.Context) ([]string, error)
	// Interfaces reads the counters of the tunnels' interfaces, by name; nil: whether tunnels carry
	// data is not watched.
	Interfaces func() (map[string]liveness.Counters, error)
	// Lanes proves the lanes of links. It calls changed after the state of a lane has changed.
	// Default: proof.New.
	Lanes func(changed func()) capability.LaneProver
	// Shares counts the buckets of groups of next hops, by interface. Nil: unknown.
	Shares func(context.Context) (map[string]int, error)
	// Allowances reads the driver's counters of packets beyond the cloud's allowances of an
	// interface, by kind; see router/link. Nil: they are not read.
	Allowances func(iface string) (map[string]uint64, error)
	// Callers returns the addresses that request an unknown tunnel; nil: they are not recorded.
	Callers func() []tunnel.Caller
	// NamesFile keeps the addresses of names for the next start. Empty: they are not kept.
	NamesFile string
	// ExportFile keeps how far the receivers of events are.
	ExportFile string
	// Probe probes a target of health checks once, from an address and through an interface.
	// Default: health.Prober.
	Probe func(ctx context.Context, iface string, from netip.Addr, t egress.Target) error
	// Ping sends the echo requests that a caller of the API asks for. Default: echo.Ping.
	Ping func(context.Context, echo.Request, func(echo.Result) error) error
	// Capture copies the packets that a caller of the API asks for. Default: packets.Capture.
	Capture func(context.Context, packets.Request, func([]packets.Packet, int) error) (packets.End, error)
	// Mover takes public addresses; nil: none can be taken.
	Mover takeover.Mover
	// SSH sets the keys that the machine's SSH server accepts. Nil: the server is not ours.
	SSH func(keys []string) error
	// APIPort is the TCP port of the API; 0: it has only its unix socket.
	APIPort uint16
	// Resolvers are the DNS servers that the machine itself uses.
	Resolvers func() []netip.Addr
	// Drop drops packets to the node that no rule accepts, unless a document sets access.input.
	// Default: services other than those of isthmus stay reachable.
	Drop bool
	// APIFrom are sources that may reach the API besides those in the document.
	APIFrom []netip.Prefix
	// FirstAPI are sources that may reach the API until the document names some; see
	// SetFirstAccess.
	FirstAPI []netip.Prefix
	// Safe accepts and stores documents without applying them, and leaves the running configuration
	// alone. Where there are no rules, it adds those that close the node.
	Safe bool
	// Notices returns conditions outside the router, such as access to it; nil: there are none.
	Notices func() []*isthmusv1.Condition
	// Facts are the last addresses from the platform; see SetFacts.
	Facts spec.Platform
	// Platform returns the platform's facts about the machine; nil: there are none.
	Platform func() *isthmusv1.PlatformStatus
	// Counters returns the writes of the drivers.
	Counters func() Counters
}

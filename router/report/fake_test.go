package report

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/plan"
)

// documents has a certain status.
type documents struct {
	Documents
	status document.Status
}

func (d *documents) Status() document.Status { return d.status }

// machine has nothing around it.
type machine struct{}

func (machine) Surroundings() (fib.Surroundings, error)    { return fib.Surroundings{}, nil }
func (machine) Around(ctx context.Context, _ func()) error { <-ctx.Done(); return nil }

// observer returns an Observer for the rules of a target.
func observer(t *testing.T, m observe.Machine, c nat.Config) *observe.Observer {
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	o := observe.New(observe.Options{
		Machine: m, FIB: idle{}, Health: health.New(health.Options{Log: log}), Proxies: health.New(health.Options{Log: log}),
		Names: dns.New(dns.Options{Changed: func(bool) {}, Log: log}), Nudge: func(...string) {}, Retry: func() {}, Bell: &bell.Bell{}, Log: log,
	})
	o.Use(nil, plan.Target{NAT: c})
	return o
}

func (n *nest) newApplier(addresses apply.Addresses, log *slog.Logger) *apply.Applier {
	return apply.New(apply.Options{
		BGP: idle{}, FIB: idle{}, NAT: n.Driver, Addresses: addresses, Host: idle{}, Names: dns.New(dns.Options{Changed: func(bool) {}, Log: log}), Health: idle{}, Proxies: idle{},
		Facts: n.observer.Facts, Mark: n.observer.Mark, Seen: n.observer.Seen, Applied: func(nat.Config) {}, Changed: func() {}, Log: log,
	})
}

// idle is a host, a forwarding table, a BGP driver and a prober that take everything and do
// nothing.
type idle struct{ bgp.Driver }

func (idle) Prepare(string, []string, time.Duration) error { return nil }
func (idle) Forward(bool) error                            { return nil }
func (idle) SetStatic([]fib.Route)                         {}
func (idle) SetReserved([]fib.Reserved)                    {}
func (idle) SetAlive(fib.NextHop, bool)                    {}
func (idle) Update([]fib.Route)                            {}
func (idle) Restarted()                                    {}
func (idle) Best(netip.Addr) int                           { return -1 }
func (idle) Synced()                                       {}
func (idle) Routes() []fib.RouteState                      { return nil }
func (idle) Apply(context.Context, bgp.Config) error       { return nil }
func (idle) Set(string, []egress.ProbedPool)               {}

// Package apply applies a target. Each of its jobs gets the effective configuration, reads what is
// there, changes what differs, and removes what carries our mark and is not wanted. A job does not
// know the former target: it finds the remains of a replaced document, a failure or an earlier
// daemon in the kernel and in charon.
package apply

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Addresses keeps pool addresses on the underlay interface.
type Addresses interface {
	// AddPool adds the missing pool addresses to interfaces.
	AddPool(wanted map[string][]netip.Addr) error
	// PrunePool removes every other pool address from every interface, whichever process added it.
	PrunePool(wanted map[string][]netip.Addr) error
	// RemoveCanary removes the host from which a canary called. A missing host is not an error.
	RemoveCanary() error
}

// Host sets the kernel parameters of the machine.
type Host interface {
	// Prepare sets the kernel parameters of a router, except forwarding. attached are the
	// interfaces other than the underlay and tunnels that lead to networks. portless is the timeout
	// of flows without ports; 0: the machine's own, from before a document set it.
	Prepare(underlay string, attached []string, portless time.Duration) error
	// Forward turns forwarding on or off.
	Forward(on bool) error
}

// FIB is the forwarding table; see router/fib.
type FIB interface {
	// SetStatic replaces the static routes.
	SetStatic([]fib.Route)
	// SetReserved sets the prefixes that no route may divert from the node.
	SetReserved([]fib.Reserved)
	// SetAlive sets whether a next hop carries traffic; a next hop without a gateway stands for its
	// interface.
	SetAlive(h fib.NextHop, alive bool)
	// Synced reports that the learned routes are complete.
	Synced()
	// Best returns the length of the most specific prefix of ours that contains an address and that
	// the kernel has, or -1.
	Best(netip.Addr) int
}

// Flows ends flows in the connection table.
type Flows interface {
	// End deletes the entries that f selects from the connection table, and returns their number.
	// family is unix.AF_UNSPEC for all.
	End(ctx context.Context, family uint8, f func(*conntrack.Flow) bool) (int, error)
}

// Names resolves domain names; see router/egress/dns.
type Names interface {
	Set(c egress.DNS, names []string, unused func(name string, ipv6 bool) bool)
	SetInside(inside func(netip.Addr) bool) (gone bool)
	Listeners() []egress.Listener
}

// Prober probes the addresses of pools.
type Prober interface {
	Set(iface string, pools []egress.ProbedPool)
}

// Options are the dependencies of an Applier.
type Options struct {
	Drivers   map[tunnel.Kind]tunnel.Driver
	BGP       bgp.Driver
	FIB       FIB
	NAT       nat.Driver
	Addresses Addresses
	Host      Host
	Names     Names
	Health    Prober // of pool addresses
	Proxies   Prober // of the proxies of redirect policies
	// Flows ends flows that cannot continue. Nil: none ends.
	Flows Flows
	// Jobs are the jobs of capabilities.
	Jobs []Job
	// Facts returns the observed facts.
	Facts func() live.Facts
	// Mark returns a mark for Seen: Seen accepts a tunnel's state only if it was read after the
	// mark.
	Mark func() uint64
	Seen func(s tunnel.State, mark uint64)
	// Applied is called with the configuration whose rules are in force.
	Applied func(nat.Config)
	// Changed is called when a reported state has changed.
	Changed func()
	Log     *slog.Logger
}

// Mode says how a target is applied.
type Mode int

// The modes.
const (
	// Hold keeps the present configuration. Only if the kernel has no rules, it installs those of
	// the target, which close the node.
	Hold Mode = iota
	// Clear removes everything except the rules of the target, which close the node.
	Clear
	// Carry applies the target.
	Carry
)

// Wanted is a target and how to apply it.
type Wanted struct {
	Mode   Mode
	Target plan.Target
	// OnTrial means that the former document comes back unless this one is confirmed. Until then,
	// flows of addresses that it has removed do not end.
	OnTrial bool
}

// verdictTime is the time after the start that BGP waits for the first probes of shared pools. A
// graceful restart takes longer, and announcing too little in the meantime would send the spokes to
// the other node.
const verdictTime = 5 * time.Second

// Applier applies what is wanted. Its methods may be called from several goroutines.
type Applier struct {
	o         Options
	started   time.Time
	work      *scheduler
	unsticker *unsticker // nil: flows are not ended
	rules     rules
	cleaned   []netip.Addr // addresses whose orphaned flows have ended; used by the job "nat" only
	lost      guardLoss
	ruled     atomic.Bool // rules of a document have been applied since the start
	// the guard is in place, from this daemon or an earlier one
	guard atomic.Bool

	mu     sync.Mutex // held to replace jobs
	wanted Wanted
	set    bool // wanted is set
}

// New returns an Applier that does nothing before it runs.
func New(o Options) *Applier {
	a := &Applier{o: o, started: time.Now(), work: newScheduler()}
	if o.Flows != nil {
		a.unsticker = newUnsticker(o.Flows, o.Log)
	}
	return a
}

// young reports whether the daemon started so recently that probes may have no first answers yet.
func (a *Applier) young() bool { return time.Since(a.started) < verdictTime }

// Set replaces what is wanted.
func (a *Applier) Set(w Wanted) {
	a.mu.Lock()
	defer a.mu.Unlock()
	former, fresh := a.wanted, !a.set || a.wanted.Mode != w.Mode
	a.wanted, a.set = w, true
	a.work.replace(a.jobs(&w), func(o *object) bool { return !fresh && o.same != nil && o.same(&former.Target) })
	if former.OnTrial && !w.OnTrial {
		a.work.again("nat") // the flows of removed addresses may end now
	}
}

// Wanted returns what was last set, and false if nothing was.
func (a *Applier) Wanted() (Wanted, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.wanted, a.set
}

// Effective returns the target and the effective configuration under the present facts.
func (a *Applier) Effective() (plan.Target, live.Effective) {
	w, _ := a.Wanted()
	return w.Target, live.Of(&w.Target, a.o.Facts())
}

// Confirmed reports that the former document does not come back.
func (a *Applier) Confirmed() {
	w, _ := a.Wanted()
	w.OnTrial = false
	a.Set(w)
}

// Again runs jobs again, because something that they depend on has changed.
func (a *Applier) Again(keys ...string) {
	for _, k := range keys {
		a.work.again(k)
	}
}

// Retry runs every failed job again at once.
func (a *Applier) Retry() {
	for _, o := range a.work.failed() {
		a.work.again(o.key)
	}
}

// Failure describes a job whose last attempt failed.
type Failure struct {
	Key   string // such as "nat" or "tunnel/aws-0"
	Err   error
	Since time.Time
	Next  time.Time // of the next attempt
}

// Failures returns the jobs whose last attempt failed, by key.
func (a *Applier) Failures() (out []Failure) {
	for _, o := range a.work.failed() {
		out = append(out, Failure{o.key, o.err, o.since, o.due})
	}
	return out
}

// Settled reports whether every job has succeeded.
func (a *Applier) Settled() bool { return a.work.settled() }

// Tried reports whether every job has been tried once, with or without success.
func (a *Applier) Tried() bool { return !a.work.has(triedKey) }

// Alive returns nil as soon as a job has run, and the cause of ctx if none does before it is done.
func (a *Applier) Alive(ctx context.Context) error { return a.work.alive(ctx) }

// Ruled reports whether the rules of a document have been installed since the start.
func (a *Applier) Ruled() bool { return a.ruled.Load() }

// Run applies what is wanted until ctx is done. It calls passed after each pass that did work.
func (a *Applier) Run(ctx context.Context, passed func()) {
	var wg sync.WaitGroup
	defer wg.Wait()
	if a.unsticker != nil {
		wg.Go(func() { a.unsticker.run(ctx) })
	}
	wg.Go(func() { a.watchRules(ctx) })
	wg.Go(func() {
		pause(ctx, verdictTime-time.Since(a.started))
		a.work.again("bgp")
	})
	a.work.run(ctx, passed)
}

// Resync compares the kernel with what is wanted, whether or not an event reported a change.
func (a *Applier) Resync() {
	a.Again("tunnels", "removal", "nat", "host", "forwarding", "transit")
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

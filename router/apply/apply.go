// Package apply carries a target out. Each of its jobs gets the effective configuration, reads what
// is there, changes what differs, and removes what carries our mark and is not wanted. A job does
// not know what was wanted before: whatever a document that was replaced, a failure or an earlier
// daemon left behind is found in the kernel and in charon.
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
	// AddPool gives interfaces the pool addresses that they lack.
	AddPool(wanted map[string][]netip.Addr) error
	// PrunePool takes every pool address from every interface that is not to have it, whoever added
	// it.
	PrunePool(wanted map[string][]netip.Addr) error
	// RemoveCanary removes the host from which a canary called. That it is not there is not an
	// error.
	RemoveCanary() error
}

// Host is the machine.
type Host interface {
	// Prepare sets the kernel parameters that a router needs, all but forwarding. attached are
	// interfaces other than the underlay and tunnels that lead to networks. portless is how long
	// flows without ports are remembered; 0: as long as the machine did before a document said so.
	Prepare(underlay string, attached []string, portless time.Duration) error
	// Forward has the kernel forward packets, or not.
	Forward(on bool) error
}

// FIB is the forwarding table; router/fib has the words.
type FIB interface {
	// SetStatic replaces the static routes.
	SetStatic([]fib.Route)
	// SetReserved sets what no route may take away from the node.
	SetReserved([]fib.Reserved)
	// SetAlive tells whether a next hop carries traffic; one without a gateway stands for its
	// interface.
	SetAlive(h fib.NextHop, alive bool)
	// Synced says that learned routes are complete.
	Synced()
	// Best returns the length of the most specific prefix of ours that holds an address and that
	// the kernel has, -1 when there is none.
	Best(netip.Addr) int
}

// Flows ends flows in the table of connection tracking.
type Flows interface {
	// End takes the flows out of the table that f selects, and returns how many. family is
	// unix.AF_UNSPEC for all.
	End(ctx context.Context, family uint8, f func(*conntrack.Flow) bool) (int, error)
}

// Names resolves domain names; router/egress/dns has the words.
type Names interface {
	Set(c egress.DNS, names []string, unused func(name string, ipv6 bool) bool)
	SetInside(inside func(netip.Addr) bool) (gone bool)
	Listeners() []egress.Listener
}

// Prober probes the addresses of pools.
type Prober interface {
	Set(iface string, pools []egress.ProbedPool)
}

// Options are what an Applier works with.
type Options struct {
	Drivers   map[tunnel.Kind]tunnel.Driver
	BGP       bgp.Driver
	FIB       FIB
	NAT       nat.Driver
	Addresses Addresses
	Host      Host
	Names     Names
	Health    Prober // of pool addresses
	Proxies   Prober // of the proxies of redirecting policies
	// Flows ends flows that cannot go on. Nil: none ends.
	Flows Flows
	// Jobs are those of capabilities.
	Jobs []Job
	// Facts returns what was observed.
	Facts func() live.Facts
	// Mark returns a number for Seen, which takes the state of a tunnel that was read after it.
	Mark func() uint64
	Seen func(s tunnel.State, mark uint64)
	// Applied is called with the rules that are in force.
	Applied func(nat.Config)
	// Changed is called when something that can be shown has changed.
	Changed func()
	Log     *slog.Logger
}

// Mode says what is done with a target.
type Mode int

// The modes.
const (
	// Hold leaves what runs as it is. Only where no rules are, those of the target are put in,
	// which close the node.
	Hold Mode = iota
	// Clear removes everything but the rules of the target, which close the node.
	Clear
	// Carry carries the target out.
	Carry
)

// Wanted is what is to be done.
type Wanted struct {
	Mode   Mode
	Target plan.Target
	// OnTrial says that the former document comes back unless this one is confirmed. Flows of
	// addresses that it has taken away do not end meanwhile.
	OnTrial bool
}

// verdictTime is how long after the start BGP waits for the first probes of shared pools. A
// graceful restart takes longer, and announcing too little in the meantime would send the spokes to
// the other node.
const verdictTime = 5 * time.Second

// Applier carries out what is wanted. Methods may be called from several goroutines.
type Applier struct {
	o         Options
	started   time.Time
	work      *scheduler
	unsticker *unsticker // nil: flows are not ended
	rules     rules
	cleaned   []netip.Addr // for which orphaned flows have ended; of the job "nat" alone
	lost      guardLoss
	ruled     atomic.Bool // rules of a document have been applied since the start
	// something keeps inside addresses in: this daemon or a former one put it there
	guard atomic.Bool

	mu     sync.Mutex // held while jobs are replaced
	wanted Wanted
	set    bool // wanted was set
}

// New returns an Applier that does nothing before it runs.
func New(o Options) *Applier {
	a := &Applier{o: o, started: time.Now(), work: newScheduler()}
	if o.Flows != nil {
		a.unsticker = newUnsticker(o.Flows, o.Log)
	}
	return a
}

// young reports whether the start was so short ago that probes may not have had their first
// answers.
func (a *Applier) young() bool { return time.Since(a.started) < verdictTime }

// Set has something be carried out in place of what was wanted before.
func (a *Applier) Set(w Wanted) {
	a.mu.Lock()
	defer a.mu.Unlock()
	former, fresh := a.wanted, !a.set || a.wanted.Mode != w.Mode
	a.wanted, a.set = w, true
	a.work.replace(a.jobs(&w), func(o *object) bool { return !fresh && o.same != nil && o.same(&former.Target) })
	if former.OnTrial && !w.OnTrial {
		a.work.again("nat") // flows may end
	}
}

// Wanted returns what was last set, and false when nothing was.
func (a *Applier) Wanted() (Wanted, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.wanted, a.set
}

// Effective returns what is to be carried out of the target by what was observed.
func (a *Applier) Effective() (plan.Target, live.Effective) {
	w, _ := a.Wanted()
	return w.Target, live.Of(&w.Target, a.o.Facts())
}

// Confirmed takes note that the former document does not come back.
func (a *Applier) Confirmed() {
	w, _ := a.Wanted()
	w.OnTrial = false
	a.Set(w)
}

// Again has jobs look again at what they carry out: something changed that they depend on.
func (a *Applier) Again(keys ...string) {
	for _, k := range keys {
		a.work.again(k)
	}
}

// Retry has everything that failed tried again at once.
func (a *Applier) Retry() {
	for _, o := range a.work.failed() {
		a.work.again(o.key)
	}
}

// Failure is an object that is not as wanted.
type Failure struct {
	Key   string // such as "nat" or "tunnel/aws-0"
	Err   error
	Since time.Time
	Next  time.Time // of the next attempt
}

// Failures returns the objects whose last attempt failed, by key.
func (a *Applier) Failures() (out []Failure) {
	for _, o := range a.work.failed() {
		out = append(out, Failure{o.key, o.err, o.since, o.due})
	}
	return out
}

// Settled reports whether everything is as wanted.
func (a *Applier) Settled() bool { return a.work.settled() }

// Tried reports whether everything that is wanted has been tried once, with success or not.
func (a *Applier) Tried() bool { return !a.work.has(triedKey) }

// Alive returns nil as soon as an object was worked on, and the cause of ctx when none is until it
// is done.
func (a *Applier) Alive(ctx context.Context) error { return a.work.alive(ctx) }

// Ruled reports whether the rules of a document have been put in since the start.
func (a *Applier) Ruled() bool { return a.ruled.Load() }

// Run carries out what is wanted until ctx is done. passed is called after each pass that worked on
// something.
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

// Resync has what is there compared with what is wanted, whether or not an event said that
// something changed.
func (a *Applier) Resync() {
	a.Again("tunnels", "removal", "nat", "host", "forwarding")
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// Package health finds out which source addresses of a pool work, by probes from the address itself
// to the configured targets. In the same way, but from the node itself, it finds out which proxies
// work.
package health

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

// hurry is the interval of probes of a target whose state is unknown.
const hurry = time.Second

const (
	// awaitInterval and awaitTimeout are those of the probes of an address that is awaited. A probe
	// that was sent before the address leads here is never answered, so it must not take long.
	awaitInterval = 200 * time.Millisecond
	awaitTimeout  = 400 * time.Millisecond
	// awaitLimit is how long an address is awaited. A platform may report success before packets
	// take the new way: AWS needs 5 to 6 s (NGINX, "Active-passive HA for NGINX Plus on AWS").
	awaitLimit = 30 * time.Second
)

// Options configure a Checker.
type Options struct {
	// Probe probes a target once, from an address and through an interface; see Prober.
	Probe func(ctx context.Context, iface string, from netip.Addr, t egress.Target) error
	// Changed is called when a state has changed, from several goroutines and never under a lock.
	Changed func()
	// Log receives addresses that go down and come back; its messages begin with What.
	Log  *slog.Logger
	What string
}

// Checker probes the addresses of pools, and has their states. Its methods are safe for concurrent
// use.
type Checker struct {
	options Options

	mu      sync.Mutex
	ctx     context.Context // of Run; nil: not running
	wg      sync.WaitGroup
	iface   string
	pools   []egress.ProbedPool
	members map[key]*worker
}

type key struct {
	pool    string
	address netip.Addr
}

// worker probes one address.
type worker struct {
	key
	iface  string
	probes egress.Probes
	member *Member // guarded by Checker.mu
	// awaited is the time until which a failed probe of a target that has not answered does not
	// count; see Await.
	awaited time.Time
	cancel  context.CancelFunc
}

// New returns a Checker without pools.
func New(o Options) *Checker {
	return &Checker{options: o, members: map[key]*worker{}}
}

// Run probes until ctx is done.
func (c *Checker) Run(ctx context.Context) error {
	c.mu.Lock()
	c.ctx = ctx
	for _, w := range c.members {
		c.startLocked(w)
	}
	c.mu.Unlock()
	<-ctx.Done()
	c.mu.Lock()
	c.ctx = nil
	c.mu.Unlock()
	c.wg.Wait()
	return nil
}

// Set replaces the pools and the interface through which probes leave. Addresses whose probes stay
// the same are not disturbed, and those whose probes change keep their state.
func (c *Checker) Set(iface string, pools []egress.ProbedPool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.iface, c.pools = iface, pools
	former := c.members
	c.members = map[key]*worker{}
	for _, p := range pools {
		if len(p.Probes.Targets) == 0 {
			continue
		}
		for _, a := range p.Addresses {
			k := key{p.Name, a}
			w := former[k]
			if w == nil || w.iface != iface || !reflect.DeepEqual(w.probes, p.Probes) {
				next := &worker{key: k, iface: iface, probes: p.Probes}
				var known *Member
				if w != nil {
					known, next.awaited = w.member, w.awaited
				}
				next.member = newMember(a, p.Probes, known, time.Now())
				c.startLocked(next)
				if w != nil {
					w.stop()
				}
				w = next
			}
			c.members[k] = w
			delete(former, k)
		}
	}
	for _, w := range former {
		w.stop()
	}
}

// Await forgets what is known of the addresses that are not healthy: the platform has just led them
// to this node. Until its first answer such an address has the state Unknown, so it is usable, and
// the answer makes it healthy, without a hold-down. For 30 s probes are frequent, and those that
// fail do not count.
func (c *Checker) Await(addresses []netip.Addr) {
	c.mu.Lock()
	for k, w := range c.members {
		if !slices.Contains(addresses, k.address) || w.member.Status == Healthy {
			continue
		}
		w.stop()
		next := &worker{key: k, iface: w.iface, probes: w.probes, member: newMember(k.address, w.probes, nil, time.Now()), awaited: time.Now().Add(awaitLimit)}
		c.members[k] = next
		c.startLocked(next)
	}
	c.mu.Unlock()
	c.options.Changed()
}

func (w *worker) stop() {
	if w.cancel != nil {
		w.cancel()
	}
}

func (c *Checker) startLocked(w *worker) {
	if c.ctx == nil {
		return
	}
	var ctx context.Context
	ctx, w.cancel = context.WithCancel(c.ctx)
	for i := range w.member.Targets {
		c.wg.Go(func() { c.probe(ctx, w, i) })
	}
	if w.member.Status == Returning {
		c.returnsLocked(ctx, w)
	}
}

// probe probes one target periodically.
func (c *Checker) probe(ctx context.Context, w *worker, target int) {
	// Avoid that all targets are probed at the same time.
	delay := rand.N(min(hurry, w.probes.Interval))
	if !w.awaited.IsZero() {
		delay = 0
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
		began := time.Now()
		timeout, awaited := w.probes.Timeout, c.awaits(w, target)
		if awaited {
			timeout = min(timeout, awaitTimeout)
		}
		limited, cancel := context.WithTimeout(ctx, timeout)
		err := c.options.Probe(limited, w.iface, w.address, w.member.Targets[target].Target)
		cancel()
		if ctx.Err() != nil {
			return
		}
		every := w.probes.Interval
		switch {
		case awaited && err != nil:
			every = min(every, awaitInterval)
		case c.record(ctx, w, target, err) == Unknown:
			every = min(every, hurry)
		}
		every += every/10 - rand.N(every/5+1)
		delay = max(0, every-time.Since(began))
	}
}

// awaits reports whether a failed probe of a target does not count.
func (c *Checker) awaits(w *worker, target int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Before(w.awaited) && w.member.Targets[target].Status == Unknown
}

// record takes a result, and returns the state of the target.
func (c *Checker) record(ctx context.Context, w *worker, target int, err error) Status {
	c.mu.Lock()
	if c.members[w.key] != w {
		c.mu.Unlock()
		return Healthy // it was replaced meanwhile, and its state was copied
	}
	was := w.member.Status
	changed := w.member.record(target, err, time.Now())
	status := w.member.Targets[target].Status
	if was != w.member.Status {
		c.logLocked(w)
		if w.member.Status == Returning {
			c.returnsLocked(ctx, w)
		}
	}
	c.mu.Unlock()
	if changed {
		c.options.Changed()
	}
	return status
}

// returnsLocked ends the hold-down when it expires.
func (c *Checker) returnsLocked(ctx context.Context, w *worker) {
	after := time.Until(w.member.Since.Add(w.probes.HoldDown))
	c.wg.Go(func() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(after):
		}
		c.mu.Lock()
		changed := c.members[w.key] == w && w.member.advance(time.Now())
		if changed {
			c.logLocked(w)
		}
		c.mu.Unlock()
		if changed {
			c.options.Changed()
		}
	})
}

func (c *Checker) logLocked(w *worker) {
	level := slog.LevelInfo
	if w.member.Status == Down {
		level = slog.LevelWarn
	}
	c.options.Log.Log(context.Background(), level, c.options.What+" is "+string(w.member.Status), "of", w.pool, "address", w.address, "why", w.member.Reason())
}

// PoolState is the state of a pool.
type PoolState struct {
	egress.ProbedPool
	// Members are the probed addresses, in the order of Addresses; none without probes.
	Members []Member
}

// Usable counts the addresses that new flows may get.
func (p *PoolState) Usable() int {
	n := len(p.Addresses)
	for i := range p.Members {
		if !p.Members[i].Usable() {
			n--
		}
	}
	return n
}

// Health returns figures of each pool, in the order in which the pools were given.
func (c *Checker) Health() (out []egress.PoolHealth) {
	for _, p := range c.Pools() {
		h := egress.PoolHealth{Name: p.Name, Usable: p.Usable()}
		for _, m := range p.Members {
			if m.Status == Healthy {
				h.Healthy++
			}
			if m.Status != Unknown {
				h.Known++
			}
			if !m.Usable() {
				h.Unusable = append(h.Unusable, m.Address)
			}
		}
		out = append(out, h)
	}
	return out
}

// Pools returns the states of the pools, in the order in which they were given.
func (c *Checker) Pools() []PoolState {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]PoolState, 0, len(c.pools))
	for _, p := range c.pools {
		s := PoolState{ProbedPool: p}
		for _, a := range p.Addresses {
			if w := c.members[key{p.Name, a}]; w != nil {
				m := *w.member
				m.Targets = slices.Clone(m.Targets)
				s.Members = append(s.Members, m)
			}
		}
		out = append(out, s)
	}
	return out
}

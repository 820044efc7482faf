// Package health finds out which source addresses of a pool work, by requests from the address itself to the targets
// that matter, and in the same way, but from the node itself, which proxies work.
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

// hurry is the time between two probes of a target whose state is not known.
const hurry = time.Second

// Options are what a Checker works with.
type Options struct {
	// Probe asks a target once, from an address and out by an interface; Prober has one.
	Probe func(ctx context.Context, iface string, from netip.Addr, t egress.Target) error
	// Changed is called when a state has changed, from several goroutines and never under a lock.
	Changed func()
	// Log hears of addresses that go down and come back, under the word What.
	Log  *slog.Logger
	What string
}

// Checker probes the addresses of pools, and knows how they do. Methods may be called from several goroutines.
type Checker struct {
	options Options

	mu      sync.Mutex
	ctx     context.Context // of Run; nil: it does not run
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
	member *Member // under the checker's lock
	cancel context.CancelFunc
}

// New returns a Checker of no pools.
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

// Set replaces the pools, and the interface by which probes leave. Addresses whose probes stay the same are not disturbed, and what is
// known of those whose probes change stays known.
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
				var known *Member
				if w != nil {
					known = w.member
				}
				next := &worker{key: k, iface: iface, probes: p.Probes, member: newMember(a, p.Probes, known, time.Now())}
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

// probe asks one target again and again.
func (c *Checker) probe(ctx context.Context, w *worker, target int) {
	// Targets are not asked in step.
	delay := rand.N(min(hurry, w.probes.Interval))
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(delay):
		}
		began := time.Now()
		limited, cancel := context.WithTimeout(ctx, w.probes.Timeout)
		err := c.options.Probe(limited, w.iface, w.address, w.member.Targets[target].Target)
		cancel()
		if ctx.Err() != nil {
			return
		}
		every := w.probes.Interval
		if c.record(ctx, w, target, err) == Unknown {
			every = min(every, hurry)
		}
		every += every/10 - rand.N(every/5+1)
		delay = max(0, every-time.Since(began))
	}
}

// record takes a result, and returns the state of the target.
func (c *Checker) record(ctx context.Context, w *worker, target int, err error) Status {
	c.mu.Lock()
	if c.members[w.key] != w {
		c.mu.Unlock()
		return Healthy // it was replaced meanwhile, and what it knew was handed on
	}
	was := w.member.Status
	changed := w.member.record(target, err, time.Now())
	status := w.member.Targets[target].Status
	if was != w.member.Status {
		c.tellLocked(w)
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

// returnsLocked ends the hold-down when its time has come.
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
			c.tellLocked(w)
		}
		c.mu.Unlock()
		if changed {
			c.options.Changed()
		}
	})
}

func (c *Checker) tellLocked(w *worker) {
	level := slog.LevelInfo
	if w.member.Status == Down {
		level = slog.LevelWarn
	}
	c.options.Log.Log(context.Background(), level, c.options.What+" is "+string(w.member.Status), "of", w.pool, "address", w.address, "why", w.member.Reason())
}

// PoolState is what is known of a pool.
type PoolState struct {
	egress.ProbedPool
	// Members are the probed addresses, in the order of Addresses; none when there are no probes.
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

// Health returns what is known in figures, in the order in which the pools were given.
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

// Pools returns what is known, in the order in which the pools were given.
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

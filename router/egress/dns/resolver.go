// Package dns resolves the domain names in egress policies. It repeats queries as their time to
// live requires, keeps the last good addresses while no resolver answers, and runs a DNS proxy for
// spokes that opens the addresses that it returns.
package dns

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/disk"
	"github.com/isthmus-net/isthmus/router/egress"
)

const (
	// parallel limits the node's own pending queries. A query that is silent for serverTimeout
	// moves to one of parallelLate other places, so that it delays no others. A name whose last
	// query failed starts only while more than spared places are free.
	parallel     = 256
	spared       = 32
	parallelLate = 1024
	// maxRest bounds the pause between two writings of the rules while clients wait for them.
	maxRest = 250 * time.Millisecond
)

// maxUnsaved bounds how long the file may lack the last use of addresses.
const maxUnsaved = time.Minute

// Options configure a Resolver.
type Options struct {
	// File keeps the addresses for the next run. Empty: they are not kept.
	File string
	// Changed is called after a change; addresses is true if addresses of names have changed. It is
	// never called under a lock.
	Changed func(addresses bool)
	// Apply makes new addresses of names destinations before it returns. The proxy calls it before
	// it answers.
	Apply func(context.Context) error
	// Log receives names that cannot be resolved.
	Log *slog.Logger
	// ResolvConf is the file with the system's servers. Default: /etc/resolv.conf.
	ResolvConf string
}

// Resolver has the addresses of names. Its methods are safe for concurrent use.
type Resolver struct {
	options Options
	client  client
	kick    chan struct{}

	mu          sync.Mutex
	inside      func(netip.Addr) bool  // see SetInside
	flights     map[string]*flight     // pending queries and cached answers of clients, by question
	attachments map[string]*attachment // those with a listener, by interface
	dropped     drops
	ctx         context.Context // of Run; nil: not running
	wg          sync.WaitGroup
	config      egress.DNS
	table       *table
	loaded      bool // the file has been read
	dirty       bool // the file is older than the table
	saved       time.Time
	news        uint64 // counts changes with new addresses
	applied     uint64 // news at the last call of Apply
	listeners   map[egress.Listener]context.CancelFunc
	deaf        map[egress.Listener]listenFailure // listeners that do not listen
	// next writing of the rules, not yet started; nil: no client waits for one
	upcoming *round
	applying bool // rules are being written
}

// New returns a Resolver without names.
func New(o Options) *Resolver {
	if o.ResolvConf == "" {
		o.ResolvConf = resolvConf
	}
	return &Resolver{options: o, client: client{dial: (&net.Dialer{}).DialContext}, kick: make(chan struct{}, 1), table: newTable(), listeners: map[egress.Listener]context.CancelFunc{}, attachments: map[string]*attachment{}, deaf: map[egress.Listener]listenFailure{}, flights: map[string]*flight{}}
}

// loadLocked reads the file of an earlier run.
func (r *Resolver) loadLocked() *table {
	t := newTable()
	if r.options.File == "" {
		return t
	}
	data, err := os.ReadFile(r.options.File)
	if err == nil {
		err = t.decode(data, time.Now())
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.options.Log.Warn("the stored addresses of names are unusable; querying them again", "err", err)
		return newTable()
	}
	return t
}

// Set replaces the names and the configuration. The first call also loads the addresses of an
// earlier run. Families for which unused returns true are not queried; nil: all are used.
func (r *Resolver) Set(c egress.DNS, names []string, unused func(name string, ipv6 bool) bool) {
	r.mu.Lock()
	if !r.loaded {
		r.table, r.loaded = r.loadLocked(), true
		r.table.inside = r.inside
	}
	r.config = c
	r.dirty = r.table.set(names, c, time.Now()) || r.dirty
	r.table.use(unused, time.Now())
	for l, cancel := range r.listeners {
		if !slices.Contains(c.Proxy, l) {
			cancel()
			delete(r.listeners, l)
		}
	}
	r.listenLocked()
	r.mu.Unlock()
	r.wake()
}

// Listeners returns where the proxy listens or tries to.
func (r *Resolver) Listeners() []egress.Listener {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.config.Proxy)
}

// SetInside sets which addresses names must not have, besides those of the loopback, of links and
// of the cloud's platform. It reports whether a name had such an address, which is then removed.
// Otherwise the owner of a zone could reach into the node and the inside: the rules would let
// packets through, and probes or a client's browser would go there (DNS rebinding).
func (r *Resolver) SetInside(inside func(netip.Addr) bool) (gone bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inside, r.table.inside = inside, inside
	for _, record := range r.table.records {
		for a := range record.entries {
			if !r.table.allowed(a) {
				r.table.drop(record, a)
				gone = true
			}
		}
	}
	r.dirty = r.dirty || gone
	return gone
}

func (r *Resolver) listenLocked() {
	if r.ctx == nil {
		return
	}
	for _, l := range r.config.Proxy {
		if r.listeners[l] == nil {
			ctx, cancel := context.WithCancel(r.ctx)
			r.listeners[l] = cancel
			r.wg.Go(func() { r.serve(ctx, l) })
		}
	}
}

func (r *Resolver) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// Run resolves and serves until ctx is done.
func (r *Resolver) Run(ctx context.Context) error {
	r.mu.Lock()
	r.ctx = ctx
	r.listenLocked()
	r.mu.Unlock()
	slots, late := make(chan struct{}, parallel), make(chan struct{}, parallelLate)
	for ctx.Err() == nil {
		now := time.Now()
		r.mu.Lock()
		// first, so that a queried address does not expire before the answer, however late the
		// query is
		asks := r.table.due(now)
		gone := r.table.expire(now)
		next := r.table.next()
		r.dirty = r.dirty || gone
		r.mu.Unlock()
		r.save()
		if gone {
			r.options.Changed(true)
		}
		for _, a := range asks {
			r.mu.Lock()
			later := r.table.fails(a) && len(slots) >= parallel-spared
			if later {
				r.table.putOff(a, now)
			}
			r.mu.Unlock()
			if later {
				continue
			}
			slot := slots
			select {
			case slot <- struct{}{}:
			case <-ctx.Done():
				continue
			}
			r.wg.Go(func() {
				done := make(chan struct{})
				r.wg.Go(func() { defer close(done); r.query(ctx, a) })
				select {
				case <-done:
				case <-time.After(serverTimeout):
					select {
					case late <- struct{}{}:
						<-slot
						slot = late
					default:
					}
				}
				<-done
				<-slot
			})
		}
		wait := time.Hour
		if !next.IsZero() {
			wait = max(0, time.Until(next))
		}
		select {
		case <-ctx.Done():
		case <-r.kick:
		case <-time.After(wait):
		}
	}
	r.mu.Lock()
	r.ctx = nil
	clear(r.listeners) // they end with ctx
	r.mu.Unlock()
	r.wg.Wait()
	r.save()
	return nil
}

// servers returns the DNS servers to query.
func (r *Resolver) servers() ([]netip.AddrPort, error) {
	r.mu.Lock()
	servers := r.config.Resolvers
	r.mu.Unlock()
	if len(servers) > 0 {
		return servers, nil
	}
	return system(r.options.ResolvConf)
}

// query resolves a name and stores the answer.
func (r *Resolver) query(ctx context.Context, a ask) {
	servers, err := r.servers()
	var addrs []netip.Addr
	var ttl time.Duration
	if err == nil {
		addrs, ttl, err = r.client.resolve(ctx, servers, a.name, a.ipv6)
	}
	if ctx.Err() != nil {
		return
	}
	now := time.Now()
	r.mu.Lock()
	record := r.table.records[a.name]
	if record == nil {
		r.mu.Unlock()
		return
	}
	was, differed := record.queries[b2i(a.ipv6)], r.table.differs(record, now)
	news := false
	if err != nil {
		r.table.failed(a.name, a.ipv6, err, now)
	} else {
		news = r.table.answered(a.name, a.ipv6, addrs, ttl, now)
	}
	r.notedLocked(news)
	differs := r.table.differs(record, now)
	refused := len(record.queries[b2i(a.ipv6)].refused) > 0
	r.mu.Unlock()
	switch {
	case err != nil && was.err == "":
		r.options.Log.Warn("a name cannot be resolved; its addresses stay for a while", "name", a.name, "ipv6", a.ipv6, "err", err)
	case err == nil && was.err != "":
		r.options.Log.Info("a name can be resolved again", "name", a.name, "ipv6", a.ipv6)
	}
	if news || (err != nil) != (was.err != "") || differs != differed || err == nil && refused != (len(was.refused) > 0) {
		r.options.Changed(news)
	}
	r.wake()
}

// save writes the file when it is out of date. A failure is logged once a change.
func (r *Resolver) save() {
	r.mu.Lock()
	dirty := r.dirty && r.options.File != ""
	r.dirty, r.saved = false, time.Now()
	var data []byte
	var err error
	if dirty {
		data, err = r.table.encode()
	}
	r.mu.Unlock()
	if !dirty {
		return
	}
	if err == nil {
		err = disk.Replace(r.options.File, data, 0o600)
	}
	if err != nil {
		r.options.Log.Warn("the addresses of names cannot be stored for the next start", "err", err)
	}
}

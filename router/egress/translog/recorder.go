package translog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/egress"
)

const (
	// eventBuffer is the memory in bytes for events between two reads, some 60,000 events.
	eventBuffer = 64 << 20
	// lookEvery is short enough that the pending events fit into the caches of a CPU at 30,000 ends
	// a second, and long enough that idle reads cost nothing.
	lookEvery = 20 * time.Millisecond
	syncEvery = time.Second
	// A checkpoint is made once a minute, or as rarely as needed to keep its cost below a hundredth
	// of a CPU.
	checkpointEvery = time.Minute
	checkpointShare = 100
	// rulesKept is how many configurations are kept, to find the policy by which a flow began.
	rulesKept = 32
)

// Recorder writes the log of translations from the kernel's events for the ends of flows. It also
// keeps a checkpoint of live flows, with which it logs flows whose end it missed, for example
// because the daemon did not run.
type Recorder struct {
	dir string
	log *slog.Logger

	store  *Store
	conn   *conntrack.Conn
	events *conntrack.Events
	// switched receives a value when recording is turned on or off.
	switched chan struct{}

	unheard atomic.Uint64 // flows of a checkpoint without an event for their end
	lossy   atomic.Bool   // ends may have been missed since the last checkpoint

	mu     sync.Mutex
	config egress.Log
	rules  []rules
	live   *checkpoint
	ended  map[key]bool // flows that ended while a checkpoint is made; nil otherwise
	err    error        // of the last attempt to write
}

// rules is a configuration and the time from which it is in force.
type rules struct {
	since  time.Time
	config nat.Config
	index  *nat.Index // nil: not needed yet
}

// Status is the state of the log.
type Status struct {
	Records  uint64
	Bytes    int64
	Overruns uint64   // how often the kernel's event buffer overflowed
	Lost     uint64   // records dropped because the disk was too slow
	Damaged  uint64   // events that could not be read
	Unheard  uint64   // flows without an event for their end; start and tuples are known
	Problems []string // damage found when the log was opened, and the last write error
}

// Open opens the log in a directory and connects to the kernel in the network namespace of the
// calling thread. It records nothing before Run. It needs CAP_NET_ADMIN.
func Open(dir string, log *slog.Logger) (*Recorder, error) {
	store, err := OpenStore(dir, egress.Log{MaxAge: egress.DefaultLogAge, MaxBytes: egress.DefaultLogBytes})
	if err != nil {
		return nil, err
	}
	r := &Recorder{dir: dir, log: log, store: store, switched: make(chan struct{}, 1), live: &checkpoint{at: map[key]int{}}}
	for _, note := range store.Notes() {
		log.Warn("the log of translations is damaged", "err", note)
	}
	if r.conn, err = conntrack.Open(); err == nil {
		r.events, err = conntrack.Subscribe(eventBuffer)
	}
	if err == nil {
		err = r.load()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening the log of translations: %w", err), r.Close())
	}
	return r, nil
}

// Close closes what Open opened. Call it after Run has returned.
func (r *Recorder) Close() error {
	errs := []error{r.store.Close()}
	if r.conn != nil {
		errs = append(errs, r.conn.Close())
	}
	if r.events != nil {
		errs = append(errs, r.events.Close())
	}
	return errors.Join(errs...)
}

// Limit sets the configuration of the log. When the log is disabled, its records stay until they
// are too old.
func (r *Recorder) Limit(c egress.Log) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.Enabled {
		r.store.Limit(c)
	}
	if c.Enabled && !r.config.Enabled {
		r.lossy.Store(true)
	}
	if c.Enabled != r.config.Enabled {
		select {
		case r.switched <- struct{}{}:
		default:
		}
	}
	r.config = c
}

// Use sets the rules by which flows begin from now on. c must not be changed afterwards.
func (r *Recorder) Use(c nat.Config) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.rules); n > 0 && r.rules[n-1].config.Equal(c) {
		return
	}
	r.rules = append(r.rules, rules{since: time.Now(), config: c})
	if n := len(r.rules); n > rulesKept {
		r.rules = slices.Clone(r.rules[n-rulesKept:])
	}
}

// Run records until ctx is done.
func (r *Recorder) Run(ctx context.Context) error {
	if err := r.events.Keep(true); err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() { r.keep(ctx) })
	defer wg.Wait()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	listens, overruns, damaged := true, r.events.Overruns(), r.events.Damaged()
	// No error ends the loop: flows whose ends are not read would fill the kernel's table.
	failing := false
	note := func(err error) {
		if err != nil {
			r.lossy.Store(true)
		}
		if err != nil && !failing {
			r.log.Error("ends of flows may be missing from the log of translations", "err", err)
		}
		failing = err != nil
	}
	for {
		if on := r.enabled(); on != listens {
			note(r.events.Listen(on))
			if listens = on; on {
				look.Reset(lookEvery)
			} else {
				look.Stop()
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.switched:
			continue
		case <-look.C:
		}
		note(r.look(ctx))
		if n := r.events.Overruns(); n != overruns {
			overruns = n
			r.relieve(ctx)
		}
		if n := r.events.Damaged(); n != damaged {
			note(fmt.Errorf("%d events could not be read", n-damaged))
			damaged = n
		}
	}
}

// relieve keeps the log from stopping traffic. Flows whose end event is not delivered yet stay in
// the conntrack table. When the table is nearly full, the kernel must free them without delivery.
func (r *Recorder) relieve(ctx context.Context) {
	stats, err := r.conn.Stats(ctx)
	full := err == nil && uint64(stats.Entries)*10 > uint64(stats.Limit)*9
	if full {
		r.lossy.Store(true)
	}
	r.log.Warn("the recorder read ends of flows too slowly", "times", r.events.Overruns(), "table", stats.Entries, "of", stats.Limit, "given up", full)
	if err := errors.Join(err, r.events.Keep(!full)); err != nil {
		r.log.Warn("relieving the connection table", "err", err)
	}
}

// keep writes to disk.
func (r *Recorder) keep(ctx context.Context) {
	tick := time.NewTicker(syncEvery)
	defer tick.Stop()
	var next time.Time
	for {
		now := time.Now()
		err := r.store.Sync(now)
		if r.enabled() && !now.Before(next) {
			err = errors.Join(err, r.checkpoint(ctx, now))
			next = now.Add(max(checkpointEvery, checkpointShare*time.Since(now)))
		}
		r.mu.Lock()
		if err != nil && ctx.Err() == nil && r.err == nil {
			r.log.Error("the log of translations cannot be written", "err", err)
		}
		r.err = err
		r.mu.Unlock()
		select {
		case <-ctx.Done():
			// With this checkpoint, the next start finds the flows that ended in between.
			var err error
			if r.enabled() {
				err = r.checkpoint(context.WithoutCancel(ctx), time.Now())
			}
			if err = errors.Join(err, r.store.Sync(time.Now())); err != nil {
				r.log.Error("the log of translations cannot be written", "err", err)
			}
			return
		case <-tick.C:
		}
	}
}

func (r *Recorder) enabled() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.config.Enabled
}

// look reads the pending ends of flows. It may be called from several goroutines.
func (r *Recorder) look(ctx context.Context) error {
	for more := true; more && ctx.Err() == nil; {
		now := time.Now()
		r.mu.Lock()
		var err error
		more, err = r.events.Read(func(f *conntrack.Flow) { r.endedLocked(f, now) })
		r.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// endedLocked records the end of a flow; ended is the time of the event.
func (r *Recorder) endedLocked(f *conntrack.Flow, ended time.Time) {
	if f.Status&conntrack.SourceNAT == 0 || !r.config.Enabled {
		return
	}
	rec := r.recordLocked(f)
	if rec.End.IsZero() {
		rec.End = ended
	}
	k := keyOf(rec)
	delete(r.live.at, k)
	if r.ended != nil {
		r.ended[k] = true
	}
	r.store.Append(rec, ended)
}

// ends returns the outside source and the remote end of a translated flow. The identifier of an
// ICMP query is the source port of both directions.
func ends(f *conntrack.Flow) (outside, destination netip.AddrPort) {
	outside, destination = f.Reply.Destination, f.Reply.Source
	if f.Protocol == unix.IPPROTO_ICMP || f.Protocol == unix.IPPROTO_ICMPV6 {
		return netip.AddrPortFrom(outside.Addr(), destination.Port()), netip.AddrPortFrom(destination.Addr(), 0)
	}
	return outside, destination
}

// recordLocked makes a record of a translated flow. The destination is the one that the flow
// reached, after destination NAT if there was any.
func (r *Recorder) recordLocked(f *conntrack.Flow) Record {
	outside, destination := ends(f)
	rec := Record{
		Start: f.Start, End: f.End, Inside: f.Original.Source, Outside: outside, Destination: destination, Protocol: f.Protocol,
		Sent: nat.Counter(f.Sent), Received: nat.Counter(f.Received),
	}
	i := len(r.rules) - 1
	for i > 0 && f.Start.Before(r.rules[i].since) {
		i--
	}
	if i < 0 {
		return rec
	}
	if r.rules[i].index == nil {
		r.rules[i].index = r.rules[i].config.Index()
	}
	p := r.rules[i].index.Find(nat.Flow{Source: rec.Inside.Addr(), Destination: rec.Destination.Addr(), Protocol: rec.Protocol, Port: rec.Destination.Port()})
	// The rules of the flow's first packet may be older than those in r.rules.
	if p != nil && slices.ContainsFunc(r.rules[i].config.Pool(p.Pool).Addresses, func(a nat.PoolAddress) bool { return a.Address == rec.Outside.Addr() }) {
		rec.Policy = p.Name
	}
	return rec
}

// Who returns the flows that answer a query, live and logged, in order of time. The error covers
// what cannot be read; the other flows are returned with it.
func (r *Recorder) Who(ctx context.Context, q Query) ([]Record, error) {
	family := uint8(unix.AF_INET)
	if q.Outside.Addr().Is6() {
		family = unix.AF_INET6
	}
	live := map[key]Record{}
	dump := r.conn.Dump(ctx, family, func(f *conntrack.Flow) bool {
		if outside, _ := ends(f); f.Status&conntrack.SourceNAT != 0 && (outside == q.Outside || q.AnyPort && outside.Addr() == q.Outside.Addr()) && !q.full(len(live)) && (q.Protocol == 0 || f.Protocol == q.Protocol) &&
			(!q.Destination.IsValid() || f.Reply.Source.Addr() == q.Destination) && !f.Start.After(q.To) {
			r.mu.Lock()
			rec := r.recordLocked(f)
			r.mu.Unlock()
			live[keyOf(rec)] = rec
		}
		return true
	})
	// The order is kernel, events, log, so that a flow that ends meanwhile is in at least one of
	// them.
	look := r.look(ctx)
	found, err := r.store.Find(ctx, q)
	for _, rec := range found {
		delete(live, keyOf(rec))
	}
	found = slices.AppendSeq(found, maps.Values(live))
	slices.SortStableFunc(found, byTime)
	return found, errors.Join(err, look, dump)
}

// Status returns the state of the log.
func (r *Recorder) Status() Status {
	records, size := r.store.Size()
	s := Status{Records: records, Bytes: size, Overruns: r.events.Overruns(), Lost: r.store.Lost(), Damaged: r.events.Damaged(), Unheard: r.unheard.Load()}
	for _, note := range r.store.Notes() {
		s.Problems = append(s.Problems, note.Error())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		s.Problems = append(s.Problems, r.err.Error())
	}
	return s
}

// Package ports keeps a port free for every new flow: it counts the ports in use of pool addresses,
// places new flows where ports are left, and refuses those that have none. nat/placement makes the
// decisions.
package ports

import (
	"context"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/nat/placement"
)

// Rules places sources and refuses flows; see package nat.
type Rules interface {
	nat.PortKeeper
	// Observe reads back the rules.
	Observe(ctx context.Context) (nat.State, error)
}

// Flows reads the connection table; see nat/conntrack.
type Flows interface {
	// Dump calls f with every flow of a family (unix.AF_UNSPEC: all) until f returns false. f must
	// not keep the flow.
	Dump(ctx context.Context, family uint8, f func(*conntrack.Flow) bool) error
	// Stats returns the counters of the table.
	Stats(ctx context.Context) (conntrack.Stats, error)
}

// Keeper counts ports, places sources and refuses flows. Its methods may be called from several
// goroutines.
type Keeper struct {
	nat      Rules
	flows    Flows
	log      *slog.Logger
	recounts chan chan struct{} // requests for fresh figures; each is closed when they are ready
	changed  chan struct{}      // full until run has read the new configuration
	onCensus func()             // called after each census

	mu      sync.Mutex
	config  nat.Config
	version int     // of config
	shown   Figures // the last figures; immutable

	// Used by run only.
	bookVersion int // version of config that the book has
	book        *placement.Book
	overload    nat.Overload
	placed      []nat.Placement
	cost        time.Duration // of a census
	reading     time.Duration // of the meter
	asOf        time.Time     // of shown.stats
}

// Alarm is a service under an address that runs out of ports.
type Alarm struct {
	Pool    string
	Address netip.Addr
	nat.Service
}

// New returns a Keeper that does nothing before it runs. onCensus is called after each census; nil:
// nothing is.
func New(driver Rules, flows Flows, log *slog.Logger, onCensus func()) *Keeper {
	return &Keeper{nat: driver, flows: flows, log: log, recounts: make(chan chan struct{}), changed: make(chan struct{}, 1), onCensus: onCensus}
}

// Use sets the configuration that is in force.
func (k *Keeper) Use(c nat.Config) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.config = c
	k.version++
	select {
	case k.changed <- struct{}{}:
	default: // run reads both changes at once
	}
}

// Run works until ctx is done.
func (k *Keeper) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var done chan struct{}
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-k.changed:
		case done = <-k.recounts:
		}
		wait, err := k.step(ctx, done != nil)
		if done != nil {
			close(done)
		}
		k.note(err)
		timer.Reset(wait)
	}
}

// note logs an error when it begins and when it ends. Earlier decisions stay in force meanwhile.
func (k *Keeper) note(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err != nil && k.shown.Err == nil:
		k.shown.Since = time.Now()
		k.log.Warn("counting ports failed; placements stay as they are", "err", err)
	case err == nil && k.shown.Err != nil:
		k.log.Info("counting ports works again")
	}
	k.shown.Err = err
}

// Recount counts the flows, unless they were counted a moment ago, and waits for the result until
// ctx is done, or for a moment.
func (k *Keeper) Recount(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	done := make(chan struct{})
	select {
	case k.recounts <- done:
	case <-ctx.Done():
		return
	}
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// freshness is the maximum age of figures that are shown.
const freshness = 2 * time.Second

// step reads the due figures and decides. It returns the time of the next step.
func (k *Keeper) step(ctx context.Context, asked bool) (time.Duration, error) {
	const later = time.Second
	k.mu.Lock()
	config, version, stats := k.config, k.version, k.shown.Stats
	k.mu.Unlock()
	if len(config.Pools) == 0 {
		return later, k.rest(ctx)
	}
	now := time.Now()
	if k.book == nil {
		state, err := k.nat.Observe(ctx)
		if err != nil || !state.Present {
			return later, err
		}
		k.book, k.placed = placement.New(state.Placements, now), state.Placements
	}
	if k.bookVersion != version {
		k.book.Configure(config)
		k.bookVersion = version
	}
	begun, portless, err := k.nat.Begun(ctx)
	if err != nil {
		return later, err
	}
	k.book.Begun(begun, portless)
	news := false
	if k.book.WantsMeter() {
		if err := k.meter(ctx, k.book.Meter); err != nil {
			return later, err
		}
		news = true
	}
	if now.Sub(k.asOf) >= time.Second {
		if stats, err = k.flows.Stats(ctx); err != nil {
			return later, err
		}
		k.asOf, news = now, true
	}
	if asked && now.Sub(k.book.At()) >= max(freshness, k.cost) || k.book.WantsCensus(now, stats.Entries, stats.Limit, k.cost) {
		if err := k.census(ctx); err != nil {
			return later, err
		}
		news = true
	}
	if placed := k.book.Place(now); !slices.Equal(placed, k.placed) {
		if err := k.nat.Place(ctx, placed); err != nil {
			return later, err
		}
		k.log.Debug("new flows placed", "placements", len(placed))
		k.placed, news = placed, true
	}
	if o := k.book.Overload(stats.Entries, stats.Limit); !reflect.DeepEqual(o, k.overload) {
		if err := k.nat.Refuse(ctx, o); err != nil {
			return later, err
		}
		k.refused(o)
		news = true
	}
	if news {
		k.show(config, stats, now)
	}
	return k.book.Wait(k.reading), nil
}

// rest clears placements and refusals once there are no pools, because nothing re-evaluates them.
func (k *Keeper) rest(ctx context.Context) error {
	if k.book == nil {
		return nil
	}
	if err := k.nat.Refuse(ctx, nat.Overload{}); err != nil {
		return err
	}
	k.refused(nat.Overload{})
	k.book, k.placed, k.asOf = nil, nil, time.Time{}
	k.mu.Lock()
	k.shown = Figures{Err: k.shown.Err, Since: k.shown.Since}
	k.mu.Unlock()
	return nil
}

func (k *Keeper) meter(ctx context.Context, note func(nat.Meter, time.Time)) error {
	began := time.Now()
	m, err := k.nat.Meter(ctx)
	if err != nil {
		return err
	}
	note(m, began)
	k.reading = time.Since(began)
	return nil
}

// census counts all flows. It reads the meter before, so that no flow is missed in between, and
// after.
func (k *Keeper) census(ctx context.Context) error {
	began := time.Now()
	if err := k.meter(ctx, k.book.Meter); err != nil {
		return err
	}
	c := placement.Census{Flows: map[placement.Holding]uint32{}}
	err := k.flows.Dump(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
		c.Entries++
		if f.Status&conntrack.Assured != 0 {
			c.Assured++
		}
		to := f.Reply.Source
		if leaves := f.Reply.Destination.Addr(); nat.Portless(f.Protocol) && f.Status&conntrack.SourceNAT != 0 && k.book.Has(leaves) {
			c.Portless = append(c.Portless, placement.Holding{Address: leaves, Source: f.Original.Source.Addr(), Service: nat.Service{Destination: to.Addr(), Protocol: f.Protocol}})
			return true
		}
		if leaves := f.Reply.Destination.Addr(); f.Status&conntrack.SourceNAT != 0 && (f.Protocol == unix.IPPROTO_TCP || f.Protocol == unix.IPPROTO_UDP) && k.book.Has(leaves) {
			c.Flows[placement.Holding{Address: leaves, Source: f.Original.Source.Addr(), Service: nat.Service{Destination: to.Addr(), Protocol: f.Protocol, Port: to.Port()}}]++
		}
		return true
	})
	if err != nil {
		return err
	}
	k.book.Census(c, began)
	k.cost = time.Since(began)
	return k.meter(ctx, k.book.Overlap)
}

// reported bounds the uses that are shown.
const reported = 1000

// show publishes the figures, and begins and ends the episodes in which an address runs out of
// ports.
func (k *Keeper) show(c nat.Config, stats conntrack.Stats, now time.Time) {
	r := k.book.Report(reported)
	k.mu.Lock()
	former := k.shown
	k.mu.Unlock()
	alarms := map[Alarm]time.Time{}
	for _, u := range r.Uses {
		if !u.Alarm {
			continue
		}
		alarm := Alarm{u.Pool, u.Address, u.Service}
		since, known := former.Alarms[alarm]
		if !known {
			since = now
			k.log.Warn("an address runs out of ports", "pool", u.Pool, "address", u.Address, "service", u.Service, "used", u.Used, "free", u.Free(), "exhausted_in", u.ExhaustedIn)
		}
		alarms[alarm] = since
	}
	for alarm := range former.Alarms {
		if _, goes := alarms[alarm]; !goes {
			k.log.Info("an address has ports again", "pool", alarm.Pool, "address", alarm.Address, "service", alarm.Service)
		}
	}
	tableFull := former.TableFullSince
	if r.TableFull != former.TableFull {
		tableFull = now
		if r.TableFull {
			k.log.Warn("the connection table is full; new flows are refused", "entries", stats.Entries, "limit", stats.Limit)
		} else {
			k.log.Info("the connection table has room again", "entries", stats.Entries, "limit", stats.Limit)
		}
	}
	k.mu.Lock()
	k.shown = Figures{Report: r, Stats: stats, Config: c, Alarms: alarms, TableFullSince: tableFull, Err: k.shown.Err, Since: k.shown.Since}
	k.mu.Unlock()
	if k.onCensus != nil && !r.At.Equal(former.At) {
		k.onCensus()
	}
}

// refused records the refused services.
func (k *Keeper) refused(o nat.Overload) {
	for _, x := range o.Exhausted {
		if !slices.Contains(k.overload.Exhausted, x) {
			k.log.Warn("a service has no port left in a pool; new flows are refused", "pool", x.Pool, "service", x.Service)
		}
	}
	for _, x := range k.overload.Exhausted {
		if !slices.Contains(o.Exhausted, x) {
			k.log.Info("a service has ports again", "pool", x.Pool, "service", x.Service)
		}
	}
	k.overload = o
}

// Figures are the observed use of ports.
type Figures struct {
	placement.Report
	Stats          conntrack.Stats
	Config         nat.Config          // the configuration in force
	Alarms         map[Alarm]time.Time // since when
	TableFullSince time.Time           // when the table became full, or stopped being full
	Err            error               // of the last attempt
	Since          time.Time           // of Err
}

// Figures returns the last figures.
func (k *Keeper) Figures() Figures {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.shown
}

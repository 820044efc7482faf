package router

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/nat/placement"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// Flows reads the table of connection tracking, and ends flows in it; nat/conntrack has the words.
type Flows interface {
	// Dump calls f with every flow of a family (unix.AF_UNSPEC: all) until it returns false. f must not keep the flow.
	Dump(ctx context.Context, family uint8, f func(*conntrack.Flow) bool) error
	// End takes the flows out of the table of which f says so, and returns how many.
	End(ctx context.Context, family uint8, f func(*conntrack.Flow) bool) (int, error)
	// Stats returns figures of the table.
	Stats(ctx context.Context) (conntrack.Stats, error)
}

// placer counts the ports in use of pool addresses, places new flows where ports are left, and refuses those that have none.
type placer struct {
	nat   nat.Driver
	flows Flows
	log   *slog.Logger
	asked chan chan struct{} // somebody wants to see figures; closed when they are there
	given chan struct{}      // a configuration, of which run has not heard
	seen  func()             // called after each census

	mu      sync.Mutex
	config  nat.Config
	version int         // of config
	shown   portFigures // what was found last; nothing in it is changed

	// Of run alone.
	used     int // version of config that the book has
	book     *placement.Book
	overload nat.Overload
	placed   []nat.Placement
	cost     time.Duration // of a census
	reading  time.Duration // of the meter
	asOf     time.Time     // of shown.stats
}

// alarmKey is what has one alarm: a service under an address.
type alarmKey struct {
	pool    string
	address netip.Addr
	nat.Service
}

func newPlacer(driver nat.Driver, flows Flows, log *slog.Logger, seen func()) *placer {
	return &placer{nat: driver, flows: flows, log: log, asked: make(chan chan struct{}), given: make(chan struct{}, 1), seen: seen}
}

// use sets the configuration that is in force.
func (e *placer) use(c nat.Config) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.config = c
	e.version++
	select {
	case e.given <- struct{}{}:
	default: // it will hear of both at once
	}
}

// run works until ctx is done.
func (e *placer) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var done chan struct{}
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-e.given:
		case done = <-e.asked:
		}
		wait, err := e.step(ctx, done != nil)
		if done != nil {
			close(done)
		}
		e.note(err)
		timer.Reset(wait)
	}
}

// note logs an error when it begins and when it ends. What was decided before stays in force meanwhile.
func (e *placer) note(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case err != nil && e.shown.err == nil:
		e.shown.since = time.Now()
		e.log.Warn("counting ports failed; placements stay as they are", "err", err)
	case err == nil && e.shown.err != nil:
		e.log.Info("counting ports works again")
	}
	e.shown.err = err
}

// recount has the flows counted unless that was done a moment ago, and waits for it until ctx is done, or for a moment.
func (e *placer) recount(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	done := make(chan struct{})
	select {
	case e.asked <- done:
	case <-ctx.Done():
		return
	}
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// freshness is how old the figures may be that somebody looks at.
const freshness = 2 * time.Second

// step reads what has to be read, and decides. It returns when to look next.
func (e *placer) step(ctx context.Context, asked bool) (time.Duration, error) {
	const later = time.Second
	e.mu.Lock()
	config, version, stats := e.config, e.version, e.shown.stats
	e.mu.Unlock()
	if len(config.Pools) == 0 {
		return later, e.rest(ctx)
	}
	now := time.Now()
	if e.book == nil {
		state, err := e.nat.Observe(ctx)
		if err != nil || !state.Present {
			return later, err
		}
		e.book, e.placed = placement.New(state.Placements, now), state.Placements
	}
	if e.used != version {
		e.book.Configure(config)
		e.used = version
	}
	begun, portless, err := e.nat.Begun(ctx)
	if err != nil {
		return later, err
	}
	e.book.Begun(begun, portless)
	news := false
	if e.book.WantsMeter() {
		if err := e.meter(ctx, e.book.Meter); err != nil {
			return later, err
		}
		news = true
	}
	if now.Sub(e.asOf) >= time.Second {
		if stats, err = e.flows.Stats(ctx); err != nil {
			return later, err
		}
		e.asOf, news = now, true
	}
	if asked && now.Sub(e.book.At()) >= max(freshness, e.cost) || e.book.WantsCensus(now, stats.Entries, stats.Limit, e.cost) {
		if err := e.census(ctx); err != nil {
			return later, err
		}
		news = true
	}
	if placed := e.book.Place(now); !slices.Equal(placed, e.placed) {
		if err := e.nat.Place(ctx, placed); err != nil {
			return later, err
		}
		e.log.Debug("new flows placed", "placements", len(placed))
		e.placed, news = placed, true
	}
	if o := e.book.Overload(stats.Entries, stats.Limit); !reflect.DeepEqual(o, e.overload) {
		if err := e.nat.Refuse(ctx, o); err != nil {
			return later, err
		}
		e.refused(o)
		news = true
	}
	if news {
		e.show(config, stats, now)
	}
	return e.book.Wait(e.reading), nil
}

// rest ends what was decided while there were pools, since nobody looks any more whether it is still right.
func (e *placer) rest(ctx context.Context) error {
	if e.book == nil {
		return nil
	}
	if err := e.nat.Refuse(ctx, nat.Overload{}); err != nil {
		return err
	}
	e.refused(nat.Overload{})
	e.book, e.placed, e.asOf = nil, nil, time.Time{}
	e.mu.Lock()
	e.shown = portFigures{err: e.shown.err, since: e.shown.since}
	e.mu.Unlock()
	return nil
}

func (e *placer) meter(ctx context.Context, note func(nat.Meter, time.Time)) error {
	began := time.Now()
	m, err := e.nat.Meter(ctx)
	if err != nil {
		return err
	}
	note(m, began)
	e.reading = time.Since(began)
	return nil
}

// census counts all flows. The meter is read before, so that nothing is missed in between, and after.
func (e *placer) census(ctx context.Context) error {
	began := time.Now()
	if err := e.meter(ctx, e.book.Meter); err != nil {
		return err
	}
	c := placement.Census{Flows: map[placement.Holding]uint32{}}
	err := e.flows.Dump(ctx, unix.AF_UNSPEC, func(f *conntrack.Flow) bool {
		c.Entries++
		if f.Status&conntrack.Assured != 0 {
			c.Assured++
		}
		to := f.Reply.Source
		if leaves := f.Reply.Destination.Addr(); nat.Portless(f.Protocol) && f.Status&conntrack.SourceNAT != 0 && e.book.Has(leaves) {
			c.Portless = append(c.Portless, placement.Holding{Address: leaves, Source: f.Original.Source.Addr(), Service: nat.Service{Destination: to.Addr(), Protocol: f.Protocol}})
			return true
		}
		if leaves := f.Reply.Destination.Addr(); f.Status&conntrack.SourceNAT != 0 && (f.Protocol == unix.IPPROTO_TCP || f.Protocol == unix.IPPROTO_UDP) && e.book.Has(leaves) {
			c.Flows[placement.Holding{Address: leaves, Source: f.Original.Source.Addr(), Service: nat.Service{Destination: to.Addr(), Protocol: f.Protocol, Port: to.Port()}}]++
		}
		return true
	})
	if err != nil {
		return err
	}
	e.book.Census(c, began)
	e.cost = time.Since(began)
	return e.meter(ctx, e.book.Overlap)
}

// reported is how many uses are shown.
const reported = 1000

// show keeps what is known for those who ask, and begins and ends the episodes in which an address runs out of ports.
func (e *placer) show(c nat.Config, stats conntrack.Stats, now time.Time) {
	r := e.book.Report(reported)
	e.mu.Lock()
	former := e.shown
	e.mu.Unlock()
	alarms := map[alarmKey]time.Time{}
	for _, u := range r.Uses {
		if !u.Alarm {
			continue
		}
		k := alarmKey{u.Pool, u.Address, u.Service}
		since, known := former.alarms[k]
		if !known {
			since = now
			e.log.Warn("an address runs out of ports", "pool", u.Pool, "address", u.Address, "service", u.Service, "used", u.Used, "free", u.Free(), "exhausted_in", u.ExhaustedIn)
		}
		alarms[k] = since
	}
	for k := range former.alarms {
		if _, goes := alarms[k]; !goes {
			e.log.Info("an address has ports again", "pool", k.pool, "address", k.address, "service", k.Service)
		}
	}
	tableFull := former.tableFull
	if r.TableFull != former.TableFull {
		tableFull = now
		if r.TableFull {
			e.log.Warn("the connection table is full; new flows are refused", "entries", stats.Entries, "limit", stats.Limit)
		} else {
			e.log.Info("the connection table has room again", "entries", stats.Entries, "limit", stats.Limit)
		}
	}
	e.mu.Lock()
	e.shown = portFigures{Report: r, stats: stats, config: c, alarms: alarms, tableFull: tableFull, err: e.shown.err, since: e.shown.since}
	e.mu.Unlock()
	if e.seen != nil && !r.At.Equal(former.At) {
		e.seen()
	}
}

// refused notes what is refused now.
func (e *placer) refused(o nat.Overload) {
	for _, x := range o.Exhausted {
		if !slices.Contains(e.overload.Exhausted, x) {
			e.log.Warn("a service has no port left in a pool; new flows are refused", "pool", x.Pool, "service", x.Service)
		}
	}
	for _, x := range e.overload.Exhausted {
		if !slices.Contains(o.Exhausted, x) {
			e.log.Info("a service has ports again", "pool", x.Pool, "service", x.Service)
		}
	}
	e.overload = o
}

// portFigures are what is known of the ports.
type portFigures struct {
	placement.Report
	stats     conntrack.Stats
	config    nat.Config
	alarms    map[alarmKey]time.Time // since when
	tableFull time.Time              // since when it is, or is not
	err       error                  // of the last attempt
	since     time.Time              // of err
}

func (e *placer) status() portFigures {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.shown
}

// portStatus returns what is known of the ports, and false when nobody counts them.
func (r *Router) portStatus() (portFigures, bool) {
	if r.placer == nil {
		return portFigures{}, false
	}
	return r.placer.status(), true
}

// public returns an address of a pool as partners see it.
func public(c nat.Config, pool string, a netip.Addr) string {
	p := c.Pool(pool)
	if i := slices.IndexFunc(p.Addresses, func(o nat.PoolAddress) bool { return o.Address == a }); i >= 0 {
		return p.Addresses[i].Public.String()
	}
	return ""
}

// ports returns what is used of the ports, in order.
func (r *Router) ports() []*isthmusv1.PortUse {
	s, _ := r.portStatus()
	out := make([]*isthmusv1.PortUse, 0, len(s.Uses))
	told := map[nat.Service]bool{} // what was refused is of a service, not of an address
	for _, u := range s.Uses {
		if told[u.Service] {
			u.Refused = 0
		}
		told[u.Service] = true
		p := &isthmusv1.PortUse{
			Pool: u.Pool, Address: u.Address.String(), PublicAddress: public(s.config, u.Pool, u.Address),
			Destination: u.Destination.String(), Protocol: nat.ProtocolName(u.Protocol), Port: uint32(u.Port),
			Used: u.Used, Free: u.Free(), Percent: 100 * float64(u.Used) / float64(u.Room()), Growth: u.Growth, State: "ok", Refused: u.Refused,
		}
		if u.ExhaustedIn > 0 {
			p.ExhaustedIn = durationpb.New(u.ExhaustedIn)
		}
		switch {
		case u.Exhausted:
			p.State = "exhausted"
		case u.Alarm:
			p.State = "low"
		}
		out = append(out, p)
	}
	return out
}

// portTotals returns what was counted beside the uses.
func (r *Router) portTotals() *isthmusv1.ListPortsResponse {
	s, ok := r.portStatus()
	if !ok {
		return &isthmusv1.ListPortsResponse{}
	}
	out := &isthmusv1.ListPortsResponse{
		Counted: stamp(s.At), Placements: uint32(s.Placements),
		Table: &isthmusv1.ConnectionTable{
			Entries: s.stats.Entries, Assured: s.Assured, Limit: s.stats.Limit, Full: s.TableFull, Refused: s.TableRefused,
			InsertFailed: s.stats.InsertFailed, Dropped: s.stats.Dropped,
		},
	}
	for _, t := range s.Totals {
		out.Addresses = append(out.Addresses, &isthmusv1.AddressUse{
			Pool: t.Pool, Address: t.Address.String(), PublicAddress: public(s.config, t.Pool, t.Address), Flows: t.Flows, Services: t.Services,
		})
	}
	return out
}

// portConditions says what is running out.
func (r *Router) portConditions() (out []*isthmusv1.Condition) {
	s, ok := r.portStatus()
	if !ok {
		return nil
	}
	add := func(kind, severity string, since time.Time, format string, args ...any) {
		out = append(out, &isthmusv1.Condition{Type: kind, Severity: severity, Since: stamp(since), Message: fmt.Sprintf(format, args...)})
	}
	const remedy = "add an address to the pool, or spread the clients over more destinations"
	for _, u := range s.Uses {
		since := s.alarms[alarmKey{u.Pool, u.Address, u.Service}]
		switch {
		case u.Exhausted && nat.Portless(u.Protocol):
			add("PortsExhausted", "error", since, "address %s of pool %s is taken toward %s by one flow without ports, as all others are; flows of other sources are refused: add an address to the pool", u.Address, u.Pool, u.Service)
		case u.Exhausted:
			add("PortsExhausted", "error", since, "address %s of pool %s uses %d of %d ports to %s, and no other one has more; new flows are refused: %s", u.Address, u.Pool, u.Used, placement.Ports, u.Service, remedy)
		case u.Alarm:
			add("PortsLow", "warning", since, "address %s of pool %s uses %d of %d ports to %s: %s", u.Address, u.Pool, u.Used, placement.Ports, u.Service, remedy)
		}
	}
	switch used := uint64(s.stats.Entries) * 100; {
	case s.TableFull:
		add("ConnectionTableFull", "error", s.tableFull, "connection tracking has %d of %d flows; new ones are refused: raise net.netfilter.nf_conntrack_max", s.stats.Entries, s.stats.Limit)
	case s.stats.Limit > 0 && used >= 85*uint64(s.stats.Limit):
		add("ConnectionTableLow", "warning", time.Time{}, "connection tracking has %d of %d flows: raise net.netfilter.nf_conntrack_max", s.stats.Entries, s.stats.Limit)
	}
	if s.Overflow {
		add("PlacementsFull", "warning", time.Time{}, "%d sources are placed, which is all that there is room for; others may find no port", s.Placements)
	}
	if s.err != nil {
		add("PortsUnknown", "warning", s.since, "counting ports: %v; placements stay as they are", s.err)
	}
	return out
}

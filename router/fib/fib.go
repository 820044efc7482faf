package fib

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
)

// batch bounds the routes that are changed at a time: a dead tunnel waits for no more than that.
const batch = 2048

// FIB keeps the kernel's forwarding state equal to that of a Table. Its methods may be called from
// several goroutines and do not wait for the kernel.
type FIB struct {
	driver Driver
	log    *slog.Logger
	wake   chan struct{}

	mu     sync.Mutex
	table  *Table
	events Event
	err    error         // of the last full attempt
	idle   chan struct{} // closed when no change is pending
	isOpen bool          // idle is still open
}

// New returns a FIB that writes nothing until Run.
func New(d Driver, log *slog.Logger) *FIB {
	return &FIB{driver: d, log: log, table: NewTable(), wake: make(chan struct{}, 1), idle: make(chan struct{}), isOpen: true}
}

// SetStatic replaces all static routes. See Table.SetStatic.
func (f *FIB) SetStatic(routes []Route) { f.change(func(t *Table) { t.SetStatic(routes) }) }

// Update replaces the BGP routes of the given keys. See Table.Update.
func (f *FIB) Update(routes []Route) {
	for part := range slices.Chunk(routes, batch) { // a dead tunnel can be reported in between
		f.change(func(t *Table) { t.Update(part) })
	}
}

// SetAlive sets whether a next hop carries traffic. See Table.SetAlive.
func (f *FIB) SetAlive(h NextHop, alive bool) { f.change(func(t *Table) { t.SetAlive(h, alive) }) }

// SetTransit sets whether default routes are for forwarded packets alone. See Table.SetTransit.
func (f *FIB) SetTransit(on bool) { f.change(func(t *Table) { t.SetTransit(on) }) }

// SetReserved sets the keys that routes must not divert from the node. See Table.SetReserved.
func (f *FIB) SetReserved(all []Reserved) { f.change(func(t *Table) { t.SetReserved(all) }) }

// Restarted announces that all BGP routes will be reported again. See Table.Restarted.
func (f *FIB) Restarted() { f.change((*Table).Restarted) }

// Synced announces that all BGP routes have been reported. See Table.Synced.
func (f *FIB) Synced() { f.change((*Table).Synced) }

// Writes returns the number of changes sent to the kernel.
func (f *FIB) Writes() uint64 { return f.driver.Writes() }

// Routes returns every route, in no order.
func (f *FIB) Routes() []RouteState {
	f.mu.Lock()
	defer f.mu.Unlock()
	routes := make([]RouteState, 0, len(f.table.routes))
	for r := range f.table.Routes {
		routes = append(routes, r)
	}
	return routes
}

// Counts are numbers of routes.
type Counts struct {
	Routes    int
	Installed int // the kernel has them
	Withheld  int // see RouteState.Takes
}

// Installed reports whether the kernel has a wanted route.
func (f *FIB) Installed(k Key) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	e := f.table.routes[f.table.place(k)]
	if e == nil {
		return false
	}
	w := e.winner()
	return w != nil && w.has(e) && !w.dirty
}

// Count counts the routes.
func (f *FIB) Count() (c Counts) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.table.routes {
		c.Routes++
		if w := e.winner(); w != nil && w.has(e) && !w.dirty {
			c.Installed++
		}
		if e.withheld {
			c.Withheld++
		}
	}
	return c
}

// Best returns the length of our most specific route in the main table. See Table.Best.
func (f *FIB) Best(a netip.Addr) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.table.Best(a)
}

// Err returns why the kernel differs from the table; nil if it does not, or before the first
// attempt.
func (f *FIB) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Wait waits until all changes that were requested before the call have been tried, and returns
// Err. Only tests and benchmarks use it; it is here because those of kernel cannot see the tests of
// this package, and because routes do not show whether a group is as wanted.
func (f *FIB) Wait(ctx context.Context) error {
	f.mu.Lock()
	idle := f.idle
	f.mu.Unlock()
	select {
	case <-idle:
		return f.Err()
	case <-ctx.Done():
		return fmt.Errorf("waiting for the forwarding table: %w", ctx.Err())
	}
}

func (f *FIB) change(do func(*Table)) {
	f.mu.Lock()
	do(f.table)
	f.nudgeLocked()
	f.mu.Unlock()
}

func (f *FIB) nudgeLocked() {
	if !f.isOpen {
		f.idle, f.isOpen = make(chan struct{}), true
	}
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// gather is how long changes by others are collected before the kernel is read again.
const gather = 20 * time.Millisecond

// retries is the back-off of changes that have failed.
var retries = backoff.Backoff{First: 250 * time.Millisecond, Last: 30 * time.Second}

// Run reads the kernel's state, and keeps it equal to the table until ctx is done. On return, the
// routes stay in the kernel.
func (f *FIB) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	defer func() { cancel(); <-watched }()
	go func() {
		defer close(watched)
		for ctx.Err() == nil {
			err := f.driver.Watch(ctx, func(e Event) {
				f.mu.Lock()
				f.events |= e
				f.nudgeLocked()
				f.mu.Unlock()
			})
			if err != nil && ctx.Err() == nil {
				f.log.Warn("watching the forwarding table", "error", err)
				sleep(ctx, retries.First)
			}
		}
	}()

	var (
		known    bool
		failures int              // in a row
		retry    <-chan time.Time // set while something has failed
	)
	for {
		err := f.pass(ctx, &known)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		switch {
		case err != nil:
			if f.Err() == nil {
				f.log.Warn("writing the forwarding table", "error", err)
			}
			retry = time.After(retries.Delay(failures))
			failures++
			f.finish(err)
		case retry != nil: // this pass did not try the failed changes
			f.finish(f.Err())
		default:
			if f.Err() != nil {
				f.log.Info("the forwarding table is correct again")
			}
			failures = 0
			f.finish(nil)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-f.wake:
		case <-retry:
			retry, known = nil, false
		}
	}
}

// pass makes all pending changes. After a failure it reads the kernel again and tries once more.
func (f *FIB) pass(ctx context.Context, known *bool) error {
	for failed := false; ; {
		f.mu.Lock()
		events := f.events
		f.mu.Unlock()
		if events&RouteEvent != 0 && *known {
			sleep(ctx, gather)
		}
		f.mu.Lock()
		events |= f.events
		f.events = 0
		f.mu.Unlock()
		if err := f.read(ctx, events, known); err != nil {
			return err
		}

		f.mu.Lock()
		ops := f.table.Ops(batch)
		more := f.events != 0
		f.mu.Unlock()
		if len(ops) == 0 {
			if more {
				continue
			}
			return nil
		}
		errs := f.driver.Execute(ctx, ops)
		f.mu.Lock()
		ok := f.table.Done(ops, errs)
		f.mu.Unlock()
		if ok {
			continue
		}
		if failed {
			return join(errs)
		}
		failed, *known = true, false
	}
}

// join joins the first eight errors.
func join(errs []error) error {
	var few []error
	for _, err := range errs {
		if err != nil && len(few) < 8 {
			few = append(few, err)
		}
	}
	return errors.Join(few...)
}

// read reads the state that may have changed.
func (f *FIB) read(ctx context.Context, events Event, known *bool) error {
	switch {
	case !*known || events&RouteEvent != 0:
		state, err := f.driver.Observe(ctx)
		if err != nil {
			return fmt.Errorf("reading the forwarding table: %w", err)
		}
		f.mu.Lock()
		f.table.Adopt(state)
		f.mu.Unlock()
		*known = true
	case events&LinkEvent != 0:
		links, err := f.driver.Links(ctx)
		if err != nil {
			return fmt.Errorf("reading the interfaces: %w", err)
		}
		f.mu.Lock()
		f.table.SetLinks(links)
		f.mu.Unlock()
	}
	return nil
}

func (f *FIB) finish(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
	if f.isOpen && len(f.wake) == 0 {
		close(f.idle)
		f.isOpen = false
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

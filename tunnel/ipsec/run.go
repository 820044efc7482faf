package ipsec

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
)

const (
	gather   = 20 * time.Millisecond // events within this time are handled by one read
	watchful = 2 * time.Second       // between reads of a tunnel whose SA is being negotiated
	fullRead = 10 * time.Second      // minimum time between reads of everything
	// many is the number of tunnels to read from which on everything is read instead.
	many = 16
)

var events = []string{"ike-updown", "ike-rekey", "ike-update", "child-updown", "child-rekey", "log"}

// Run implements tunnel.Driver. While charon is away, the states are Unknown and Run takes no
// decisions. When charon is back, Run loads what it lacks, and SAs that exist only in the kernel
// carry the traffic until there are new ones.
func (d *Driver) Run(ctx context.Context, report func(tunnel.State)) error {
	d.mu.Lock()
	d.running = true
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.running = false
		d.mu.Unlock()
	}()
	changed := make(chan link.Change, 1024)
	watched := make(chan error, 1)
	go func() {
		watched <- d.o.Links.Watch(ctx, func(c link.Change) {
			if c.Name != "" && !strings.HasPrefix(c.Alias, tunnel.Mark) {
				return
			}
			select {
			case changed <- c:
			case <-ctx.Done():
			}
		})
	}()
	r := &runner{d: d, report: report, reported: map[string]tunnel.State{}, again: map[string]time.Time{}, changed: changed, watched: watched, standIn: encap{divert: d.o.Divert}}
	defer r.standIn.end()
	for _, six := range []bool{false, true} {
		c, err := newCatcher(d.o.Log, six, d.o.Links.Inbound)
		// a kernel without IPv6 has no such tunnels
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			d.o.Log.Warn("some packets may be lost while SAs are replaced", "ipv6", six, "error", err)
			continue
		}
		defer c.close()
		r.catchers = append(r.catchers, c)
	}
	reconnect, failures := backoff.Backoff{First: 50 * time.Millisecond, Last: time.Second}, 0
	for {
		began := time.Now()
		err := r.session(ctx)
		if ctx.Err() == nil {
			if err := r.standIn.begin(); err != nil {
				d.o.Log.Warn("packets in UDP are lost until charon is back", "error", err)
			}
		}
		r.lost(ctx)
		if ctx.Err() != nil {
			<-watched
			return nil
		}
		if errors.Is(err, errWatch) {
			return err
		}
		if time.Since(began) > time.Second {
			failures = 0
		}
		if failures == 0 { // only the first of a series; the router shows lasting failures
			d.o.Log.Warn("charon is not reachable", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(reconnect.Delay(failures)):
		}
		failures++
	}
}

var errWatch = errors.New("watching interfaces ended")

// runner is the state of one Run.
type runner struct {
	d        *Driver
	report   func(tunnel.State)
	reported map[string]tunnel.State
	again    map[string]time.Time // when to read a tunnel again, by connection
	sas      map[string][]ikeSA   // all SAs, just read; nil: not read yet
	catchers []*catcher           // one for each family that the kernel has
	changed  chan link.Change
	watched  chan error
	standIn  encap // replaces charon's sockets
}

// session serves one connection to charon until it is lost.
func (r *runner) session(ctx context.Context) error {
	d := r.d
	s, _, err := dial(d.o.Socket)
	if err != nil {
		return err
	}
	defer s.Close()
	received := make(chan vici.Event, eventBuffer)
	s.NotifyEvents(received)
	if err := s.Subscribe(events...); err != nil {
		return fmt.Errorf("subscribing to events: %w", err)
	}
	d.client.answers()
	for i := range d.loaders {
		d.loaders[i].answers()
	}
	if version, err := d.client.call(ctx, "version", nil); err == nil {
		d.o.Log.Info("connected to charon", "socket", d.o.Socket, "version", text(version, "version"), "system", text(version, "sysname"), "release", text(version, "release"))
	}
	if words, err := d.Conditions(ctx); err == nil {
		for _, w := range words {
			d.o.Log.Warn("charon does not fit", "why", w)
		}
	}
	r.standIn.end()
	r.hold()
	r.reload(ctx)
	d.mu.Lock()
	d.all = true
	d.listening = time.Now()
	d.peerLog.pending = map[string]*pendingSA{}
	d.mu.Unlock()
	timer := time.NewTimer(0)
	defer timer.Stop()
	links := map[string]bool{} // aliases of interfaces that changed
	var full, due time.Time
	var cost time.Duration
	wake := func(t time.Time) {
		if due.IsZero() || t.Before(due) {
			due = t
			timer.Reset(max(time.Until(t), 0))
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-r.watched:
			r.watched <- err
			return errors.Join(errWatch, err)
		case c := <-r.changed:
			links[c.Alias] = true
			wake(time.Now())
			continue
		case e, ok := <-received:
			if !ok {
				return errors.New("the connection was closed")
			}
			if len(received) >= cap(received)-1 { // some events were dropped
				d.mu.Lock()
				d.all = true
				d.mu.Unlock()
			}
			if d.handleEvent(e) {
				wake(time.Now().Add(gather))
			}
			continue
		case <-d.kick:
			wake(time.Now().Add(gather))
			continue
		case <-timer.C:
			due = time.Time{}
		}
		if len(links) > 0 {
			r.heal(links)
			clear(links)
		}
		began := time.Now()
		if began.Sub(full) >= max(d.fullRead, 100*cost) {
			full = began
			if err := r.everything(ctx); err != nil {
				return err
			}
		}
		r.catch()
		if err := r.look(ctx); err != nil {
			return err
		}
		cost = time.Since(began)
		soon := time.Now().Add(4 * cost) // leaves charon time for its work
		wake(full.Add(max(d.fullRead, 100*cost)))
		for _, t := range r.again {
			if t.Before(soon) {
				t = soon
			}
			wake(t)
		}
	}
}

// catch updates the addresses of the peers from which early packets are caught.
func (r *runner) catch() {
	d := r.d
	var peers []netip.Addr
	add := func(a netip.Addr) { peers = append(peers, a.Unmap().WithZone("")) }
	d.mu.Lock()
	for _, rec := range d.records {
		add(rec.cfg.IPsec.RemoteAddress)
		for _, ike := range rec.sas {
			add(ike.Remote.Addr())
		}
	}
	d.mu.Unlock()
	for _, c := range r.catchers {
		if err := c.from(peers); err != nil {
			d.o.Log.Warn("some packets may be lost while SAs are replaced", "ipv6", c.six, "error", err)
		}
	}
}

// lost sets all states to Unknown, because nothing is read any longer.
func (r *runner) lost(ctx context.Context) {
	d := r.d
	d.client.close()
	if ctx.Err() != nil {
		return
	}
	d.mu.Lock()
	var states []tunnel.State
	for _, rec := range d.records {
		rec.known = false
		rec.decide(time.Now(), nil)
		states = append(states, rec.state)
	}
	d.mu.Unlock()
	for _, s := range states {
		r.reportChange(s)
	}
}

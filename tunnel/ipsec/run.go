package ipsec

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/strongswan/govici/vici"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
)

const (
	gather   = 20 * time.Millisecond // events that come together are answered by one read
	watchful = 2 * time.Second       // between reads of a tunnel whose SA is being made
	fullRead = 10 * time.Second      // between reads of everything, at least
	many     = 16                    // tunnels to read, from which on everything is read instead
)

var events = []string{"ike-updown", "ike-rekey", "ike-update", "child-updown", "child-rekey", "log"}

// Run implements tunnel.Driver. While charon is away the states are Unknown and nothing is concluded; when it is back,
// what it no longer has is loaded again, and SAs that only the kernel still knows carry the traffic until there are new
// ones.
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
		if errors.Is(err, unix.EAFNOSUPPORT) { // a kernel without IPv6 has no such tunnel
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
		if failures == 0 { // the first of a row; the router shows what lasts
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
	again    map[string]time.Time // when to look at a tunnel again, by connection
	sas      map[string][]ikeSA   // all, just read; nil: to be read
	catchers []*catcher           // one for each family that the kernel has
	changed  chan link.Change
	watched  chan error
	standIn  encap // for charon's sockets
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
			if len(received) >= cap(received)-1 { // some were dropped
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
		soon := time.Now().Add(4 * cost) // charon is to have time for its work
		wake(full.Add(max(d.fullRead, 100*cost)))
		for _, t := range r.again {
			if t.Before(soon) {
				t = soon
			}
			wake(t)
		}
	}
}

// reload loads what the running charon does not have of what is wanted.
func (r *runner) reload(ctx context.Context) {
	d := r.d
	d.load.Lock()
	err := d.connectLocked(ctx) // the ledger may be that of a former charon
	d.load.Unlock()
	if err != nil {
		d.o.Log.Warn("reading what charon has failed", "error", err)
		return
	}
	d.mu.Lock()
	var missing []string
	for name, rec := range d.records {
		if d.ledger == nil || d.ledger.entries[name] != rec.want {
			missing = append(missing, name)
		}
	}
	d.mu.Unlock()
	for _, name := range missing {
		d.load.Lock()
		d.mu.Lock()
		rec := d.records[name]
		var c tunnel.Config
		var want loaded
		if rec != nil {
			c, want = rec.cfg, rec.want // what Apply made of it meanwhile
		}
		d.mu.Unlock()
		if rec != nil {
			conn, err := compile(c)
			if err == nil {
				err = d.loadLocked(ctx, c, conn, want)
			}
			if err != nil {
				d.o.Log.Warn("loading a connection failed", "tunnel", c.Name, "error", err)
				d.mu.Lock()
				rec.because(tunnel.Local, "loading the connection failed: "+err.Error(), time.Now())
				d.mu.Unlock()
			}
		}
		d.load.Unlock()
	}
}

// hold finds the tunnels for which the kernel has SAs, which go on carrying traffic whether charon knows them or not.
func (r *runner) hold() {
	d := r.d
	sas, err := d.o.Links.SAs()
	if err != nil {
		d.o.Log.Warn("reading the kernel's IPsec states failed", "error", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.carried, d.carriedUntil = map[uint32]bool{}, time.Now().Add(hold)
	for _, sa := range sas {
		d.carried[sa.IfID] = true
	}
	for _, rec := range d.records {
		if d.carried[rec.cfg.ID] {
			rec.held = d.carriedUntil
		}
	}
}

// catch has early packets caught from the peers there are.
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

// heal makes interfaces be as configured again; an empty alias stands for all.
func (r *runner) heal(aliases map[string]bool) {
	d := r.d
	d.load.Lock() // so that none is made again that Remove takes away
	defer d.load.Unlock()
	d.mu.Lock()
	var wanted []tunnel.Config
	for name, rec := range d.records {
		if aliases[""] || aliases[tunnel.Mark+name] {
			wanted = append(wanted, rec.cfg)
		}
	}
	d.mu.Unlock()
	for _, c := range wanted {
		if err := d.o.Links.Ensure(compileLink(c)); err != nil {
			d.o.Log.Warn("healing an interface failed", "tunnel", c.Name, "error", err)
		}
	}
}

// everything loads what was unloaded by hand, has all tunnels read, removes SAs that charon does not know, and ends those
// that the kernel has lost.
func (r *runner) everything(ctx context.Context) error {
	d := r.d
	d.load.Lock()
	err := d.connectLocked(ctx)
	d.mu.Lock()
	l := d.ledger
	d.mu.Unlock()
	if err == nil && l != nil {
		err = d.verify(ctx, l)
	}
	d.load.Unlock()
	if err != nil {
		return err
	}
	r.reload(ctx)
	// First the kernel, then charon: what charon adds between the two is not taken for an orphan.
	kernel, unread := d.o.Links.SAs()
	if unread != nil {
		d.o.Log.Warn("reading the kernel's IPsec states failed", "error", unread)
	}
	sas, err := d.client.listSAs(ctx, "")
	if err != nil {
		return err
	}
	now := time.Now()
	known := map[uint32]bool{}
	for _, conn := range sas {
		for _, ike := range conn {
			for _, c := range ike.Children {
				known[c.In], known[c.Out] = true, true
			}
		}
	}
	d.mu.Lock()
	ours := map[uint32]bool{}
	for name, rec := range d.records {
		rec.known, rec.sas = true, sas[connection(name)]
		// Of a tunnel that is not up, or just so, the old SAs may be all there is, or packets on them be under way.
		ours[rec.cfg.ID] = now.After(rec.held) && (rec.upSince.IsZero() || now.Sub(rec.upSince) > settled)
	}
	present := map[uint32]bool{}
	var gone []link.SA
	for _, sa := range kernel {
		if !ours[sa.IfID] || known[sa.SPI] {
			continue
		}
		present[sa.SPI] = true
		if since, seen := d.orphans[sa.SPI]; !seen {
			d.orphans[sa.SPI] = now
		} else if now.Sub(since) > overlap {
			gone = append(gone, sa)
		}
	}
	for spi := range d.orphans {
		if !present[spi] {
			delete(d.orphans, spi)
		}
	}
	var lost []childSA
	if unread == nil {
		lost = d.lostLocked(kernel, sas, now)
	}
	d.all, r.sas = true, sas
	d.mu.Unlock()
	for _, c := range lost {
		d.o.Log.Warn("ending an SA that the kernel lost, for a new one", "spi", fmt.Sprintf("%08x", c.In))
		if err := d.terminate(ctx, action{terminateChild: c.ID}); err != nil {
			return err
		}
	}
	for _, sa := range gone {
		if err := d.o.Links.DeleteSA(sa); err != nil {
			d.o.Log.Warn("removing an SA that charon lost failed", "error", err)
			continue
		}
		d.writes.Add(1)
		d.o.Log.Info("removed an SA that charon lost", "if_id", sa.IfID, "spi", fmt.Sprintf("%08x", sa.SPI), "dst", sa.Dst)
	}
	return nil
}

// lostLocked returns the live CHILD SAs that the kernel has no more, as after somebody flushed its states: charon is not told
// and goes on holding them for good. A kernel that never had one is none that tells. d.mu is held.
func (d *Driver) lostLocked(kernel []link.SA, sas map[string][]ikeSA, now time.Time) (lost []childSA) {
	has := map[uint32]bool{}
	for _, sa := range kernel {
		has[sa.SPI] = true
	}
	former := d.missing
	d.missing = map[uint32]time.Time{}
	for name := range d.records {
		for _, ike := range sas[connection(name)] {
			for _, c := range ike.Children {
				switch since, missed := former[c.In]; {
				case !c.live():
				case has[c.In] && has[c.Out]:
					d.shown = true
				case !missed:
					d.missing[c.In] = now
				default:
					d.missing[c.In] = since
					if d.shown && now.Sub(since) > overlap {
						lost = append(lost, c)
					}
				}
			}
		}
	}
	return lost
}

// look reads the tunnels that may have changed, decides about them, does it, and reports the states that changed.
func (r *runner) look(ctx context.Context) error {
	d := r.d
	now := time.Now()
	d.mu.Lock()
	for conn, t := range r.again {
		if !t.After(now) {
			d.dirty[conn] = true
			delete(r.again, conn)
		}
	}
	all := d.all || len(d.dirty) > many
	conns := d.dirty
	d.dirty, d.all = map[string]bool{}, false
	if all {
		for name := range d.records {
			conns[connection(name)] = true
		}
	}
	d.mu.Unlock()
	sas := r.sas
	r.sas = nil
	if all && sas == nil {
		var err error
		if sas, err = d.client.listSAs(ctx, ""); err != nil {
			return err
		}
	}
	for conn := range conns {
		of := sas
		if !all {
			var err error
			if of, err = d.client.listSAs(ctx, conn); err != nil {
				return err
			}
		}
		mine, err := r.sure(ctx, conn, of[conn])
		if err != nil {
			return err
		}
		if err := r.act(ctx, conn, mine); err != nil {
			return err
		}
	}
	return nil
}

// rereads is how often a list is read again that shows a tunnel without a CHILD SA.
const rereads = 2

// sure returns the SAs of a connection as they were read, or as they are read again. charon lists IKE SAs one after the other: when the peer renews one,
// the CHILD SA moves from it to the new one, and a list that is made meanwhile has it in neither. A tunnel must not go down for that.
func (r *runner) sure(ctx context.Context, conn string, sas []ikeSA) ([]ikeSA, error) {
	d := r.d
	d.mu.Lock()
	rec := d.records[strings.TrimPrefix(conn, tunnel.Mark)]
	up := rec != nil && rec.state.Status == tunnel.Up
	d.mu.Unlock()
	for range rereads {
		if !up || len(sas) == 0 || slices.ContainsFunc(sas, func(s ikeSA) bool { return slices.ContainsFunc(s.Children, childSA.live) }) {
			break
		}
		of, err := d.client.listSAs(ctx, conn)
		if err != nil {
			return nil, err
		}
		sas = of[conn]
	}
	return sas, nil
}

func (r *runner) act(ctx context.Context, conn string, sas []ikeSA) error {
	d := r.d
	name := strings.TrimPrefix(conn, tunnel.Mark)
	now := time.Now()
	d.mu.Lock()
	rec := d.records[name]
	if rec == nil {
		d.mu.Unlock()
		delete(r.reported, name)
		delete(r.again, conn)
		return nil
	}
	rec.known, rec.sas, rec.listening = true, sas, d.listening
	for id := range rec.stale {
		if !has(sas, id) {
			delete(rec.stale, id)
		}
	}
	var actions []action
	var again time.Time
	if d.ledger != nil && d.ledger.entries[name].Conn != "" {
		actions, again = rec.decide(now, rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())))
	} else if rec.reason != "" { // it cannot be loaded; otherwise Apply is about to
		rec.down(tunnel.Down, now)
	}
	if !rec.initiated.IsZero() {
		again = earliest(again, now.Add(watchful))
	}
	state := rec.state
	d.mu.Unlock()
	if again.IsZero() {
		delete(r.again, conn)
	} else {
		r.again[conn] = again
	}
	for _, a := range actions {
		var err error
		if a.initiate {
			err = d.write(ctx, "initiate", build("child", conn, "ike", conn, "timeout", "-1", "init-limits", "no"))
		} else {
			d.o.Log.Info("ending an SA that should not be", "tunnel", name, "ike", a.terminateIKE, "child", a.terminateChild)
			err = d.terminate(ctx, a)
		}
		if errors.Is(err, errRefused) {
			d.mu.Lock()
			rec.because(tunnel.Local, err.Error(), now)
			d.mu.Unlock()
		} else if err != nil {
			return err
		}
	}
	r.tell(state)
	return nil
}

func has(sas []ikeSA, id uint32) bool {
	for _, s := range sas {
		if s.ID == id {
			return true
		}
	}
	return false
}

func earliest(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// tell reports a state when it is another than the last one.
func (r *runner) tell(s tunnel.State) {
	if r.reported[s.Name] == s {
		return
	}
	former := r.reported[s.Name]
	r.reported[s.Name] = s
	if former.Status != s.Status {
		r.d.o.Log.Info("tunnel is "+string(s.Status), "tunnel", s.Name, "reason", s.LastError)
	}
	if link, err := r.d.o.Links.Get(s.Interface); err == nil {
		s.RxBytes, s.TxBytes, s.RxPackets, s.TxPackets = link.RxBytes, link.TxBytes, link.RxPackets, link.TxPackets
	}
	r.report(s)
}

// lost makes all states Unknown, since nothing is read any more.
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
		r.tell(s)
	}
}

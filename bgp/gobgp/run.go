package gobgp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// Run implements bgp.Driver. It returns nil when ctx is done.
func (d *Driver) Run(ctx context.Context, r bgp.Reporter) error {
	select {
	case <-d.ready:
	case <-ctx.Done():
		return nil
	}
	restarting, failures := d.o.Adopting(), 0
	d.mu.Lock()
	for name, s := range d.peers {
		s.Restarting = restarting
		if restarting {
			d.expectLocked(time.Now(), name)
		}
	}
	d.mu.Unlock()
	for ctx.Err() == nil {
		p, err := d.start()
		var delay time.Duration
		if err == nil {
			var worked bool
			if delay, worked = d.session(ctx, r, p, restarting); worked {
				failures, restarting = 0, true
			} else {
				delay = restart.Delay(failures)
				failures++
			}
		} else {
			delay = restart.Delay(failures)
			failures++
			d.o.Log.Error("BGP cannot be started", "error", err, "next", delay)
		}
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
	}
	return nil
}

// expectLocked makes Synced wait for a peer's End-of-RIB.
func (d *Driver) expectLocked(now time.Time, name string) {
	if _, ok := d.disabled[name]; ok {
		return
	}
	wait := restartTime
	for _, p := range d.want.Peers {
		if p.Name == name && p.GracefulRestart > 0 {
			wait = p.GracefulRestart
		}
	}
	d.expect[name] = now.Add(wait)
}

// session serves one process until it ends. It returns how long to wait before the next one, and
// whether the process got as far as accepting its configuration.
func (d *Driver) session(ctx context.Context, r bgp.Reporter, p *process, restarting bool) (time.Duration, bool) {
	connections := d.openRelay(p)
	if connections != nil {
		defer connections.Close()
	}
	d.mu.Lock()
	d.starts++
	d.relay = connections
	d.proc, d.replace, d.sent, d.restart = p, false, nil, restarting
	d.synced, d.freed = false, false
	d.rib = newRIB()
	d.rib.configure(d.want)
	d.mu.Unlock()
	r.Restarted()

	events := make(chan event, 16)
	var malformed error
	go func() {
		defer close(events)
		err := d.read(p, events)
		if errors.Is(err, errMalformed) {
			malformed = err
		}
		p.kill() // its messages are no longer read
	}()
	configured := make(chan error, 1)
	go func() { configured <- d.push(ctx) }()

	worked := false
	timer := time.NewTimer(0)
	defer timer.Stop()
	watch, hung := time.NewTicker(time.Second), false
	defer watch.Stop()
	readmit, waiting := time.NewTimer(time.Hour), false
	defer readmit.Stop()
	stop := ctx.Done()
	for open := true; open; {
		select {
		case <-stop:
			p.kill()
			stop = nil
		case err := <-configured:
			worked = !errors.Is(err, errEnded)
			if err != nil && ctx.Err() == nil {
				d.o.Log.Error("BGP is not as configured", "error", err)
			}
			configured = nil
			timer.Reset(0)
		case e, ok := <-events:
			if open = ok; ok {
				d.handle(r, e)
				if e.t == framePaths && !waiting {
					waiting = true
					readmit.Reset(gatherAdmission)
				}
				if e.t == frameState || e.t == frameEnd || e.t == frameCounters {
					timer.Reset(0)
				}
			}
		case <-watch.C:
			if hung = hung || p.hangs(); hung {
				p.kill()
			}
		case <-d.wake:
			timer.Reset(0)
		case <-readmit.C:
			waiting = false
			if d.readmit() {
				d.pushLater(ctx)
			}
		case now := <-timer.C:
			if next := d.tick(ctx, r, p, now, worked); !next.IsZero() {
				timer.Reset(max(time.Until(next), time.Millisecond))
			}
		}
	}
	<-p.done
	p.conn.Close()
	var known *evidence
	if connections != nil {
		e := evidenceOf(time.Now(), connections.Passed())
		known = &e
		connections.Close()
	}
	d.mu.Lock()
	d.relay = nil
	d.mu.Unlock()
	end := p.end()
	if malformed != nil {
		end = crash{reason: malformed.Error()}
	} else if hung {
		end.reason = fmt.Sprintf("it hung and was killed: nothing came from it for %d seconds", mostSilent)
	}
	if ctx.Err() != nil {
		d.mu.Lock()
		d.proc = nil
		d.mu.Unlock()
		return 0, true
	}
	return d.ended(r, end, known, worked)
}

// tick does what is due by now, and returns when it must be called next; zero: at the next event.
func (d *Driver) tick(ctx context.Context, r bgp.Reporter, p *process, now time.Time, configured bool) time.Time {
	var reports []bgp.PeerState
	d.mu.Lock()
	next, changed := d.sup.tick(now, d.nameListLocked())
	waiting := false // for a peer that may still come
	for name, end := range d.expect {
		s := d.peers[name]
		if now.Before(end) {
			if next.IsZero() || end.Before(next) {
				next = end
			}
			waiting = waiting || d.sup.held(name) == nil
			continue
		}
		delete(d.expect, name)
		if s.Restarting {
			s.Restarting = false
			reports = append(reports, d.stateLocked(name))
		}
	}
	free := configured && !waiting && !d.freed
	synced := configured && len(d.expect) == 0 && !d.synced
	d.freed, d.synced = d.freed || free, d.synced || synced
	d.mu.Unlock()
	if changed {
		d.pushLater(ctx)
	}
	if free {
		go func() {
			<-d.pushLater(ctx) // limited peers get their prefixes before GoBGP announces
			// Only this goroutine and push write, and each frame is one write.
			if err := writeFrame(p.conn, frameRelease, nil); err != nil {
				p.kill()
			}
		}()
	}
	for _, s := range reports {
		r.Peer(s)
	}
	if synced {
		r.Synced()
	}
	return next
}

// ended handles the unexpected end of the process. It returns how long to wait before the next
// start, and whether this process got so far that its end was not a failure to start. known holds
// the relay's evidence; nil without a relay.
func (d *Driver) ended(r bgp.Reporter, end crash, known *evidence, worked bool) (time.Duration, bool) {
	now := time.Now()
	d.mu.Lock()
	d.proc = nil
	var delay time.Duration
	culprit := ""
	for _, p := range d.want.Peers {
		// A label alone is not enough to blame a peer that has sent nothing.
		if a, _ := inner(d.ids[p.Name], p); a == end.peer && (known == nil || known.sent[p.Name]) {
			culprit = p.Name
		}
	}
	worked = worked || end.peer.IsValid() // a session was up before the configuration was complete
	if !d.replace && worked {
		var recent map[string]bool
		if known != nil {
			recent = known.recent
		}
		culprit, delay = d.sup.crashed(now, culprit, clip(end.reason), recent)
	}
	planned := d.replace
	if !planned {
		d.o.Log.Error("the BGP process ended", "reason", clip(end.reason), "peer", culprit)
	}
	var reports []bgp.PeerState
	for name, s := range d.peers {
		if s.State == bgp.Established || s.Restarting {
			s.Restarting = true
			if _, ok := d.expect[name]; !ok || s.State == bgp.Established {
				d.expectLocked(now, name)
			}
		}
		if name == culprit {
			s.LastError, s.LastErrorAt = clip(end.reason), now
		}
		if s.State != bgp.Unknown {
			s.State, s.Since = bgp.Unknown, now
		}
		s.MessagesIn, s.MessagesOut, s.Received = 0, 0, 0
		reports = append(reports, d.stateLocked(name))
	}
	d.mu.Unlock()
	slices.SortFunc(reports, func(a, b bgp.PeerState) int { return strings.Compare(a.Name, b.Name) })
	for _, s := range reports {
		r.Peer(s)
	}
	return delay, worked || planned
}

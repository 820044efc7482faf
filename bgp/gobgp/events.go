package gobgp

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

type event struct {
	t       frameType
	body    any
	updates []bgp.Update
}

// read passes the child's messages to events, and its replies to their callers.
func (d *Driver) read(p *process, events chan<- event) error {
	name := func(id uint32) (string, bool) {
		d.mu.Lock()
		defer d.mu.Unlock()
		name, ok := d.names[id]
		return name, ok
	}
	dec := pathDecoder{name: name}
	for {
		t, body, err := readFrame(p.conn, maxFromChild)
		if err != nil {
			return err
		}
		e := event{t: t}
		p.silent.Store(0)
		switch t {
		case frameAlive:
			p.beats.Store(true)
			continue
		case framePaths:
			e.updates, err = dec.decode(body)
		case frameAnswer:
			var a answer
			if a, err = decodeAnswer(body, name); err == nil {
				d.answered(a)
			}
		case frameReply:
			var m replyMessage
			if err = parse(body, &m); err == nil {
				d.mu.Lock()
				c := d.replies[m.ID]
				delete(d.replies, m.ID)
				d.mu.Unlock()
				if c != nil {
					c <- m
				}
			}
		case frameState:
			e.body, err = parsed[stateMessage](body)
		case frameCounters:
			e.body, err = parsed[[]countersMessage](body)
		case frameEnd:
			e.body, err = parsed[endMessage](body)
		case frameLog:
			e.body, err = parsed[logMessage](body)
		default:
			err = fmt.Errorf("%w: type %d", errMalformed, t)
		}
		if err != nil {
			return err
		}
		if t != frameReply && t != frameAnswer {
			events <- e
		}
	}
}

func parse(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %v", errMalformed, err)
	}
	return nil
}

func parsed[T any](b []byte) (T, error) {
	var v T
	err := parse(b, &v)
	return v, err
}

func (d *Driver) handle(r bgp.Reporter, e event) {
	switch m := e.body.(type) {
	case nil:
		d.mu.Lock()
		us := e.updates[:0]
		for _, u := range e.updates {
			us = append(us, d.rib.update(u))
		}
		d.mu.Unlock()
		r.Paths(us)
	case stateMessage:
		d.handleState(r, m)
	case []countersMessage:
		d.handleCounters(r, m)
	case endMessage:
		d.mu.Lock()
		delete(d.expect, d.names[m.Peer])
		d.mu.Unlock()
	case logMessage:
		var level slog.Level
		if level.UnmarshalText([]byte(m.Level)) != nil {
			level = slog.LevelError
		}
		d.mu.Lock()
		name := d.names[m.Peer]
		d.mu.Unlock()
		d.o.Log.Log(context.Background(), level, "GoBGP: "+clip(m.Text), "peer", name)
	}
}

// clip bounds text that a peer may have influenced.
func clip(s string) string { return strings.ToValidUTF8(s[:min(len(s), 500)], "?") }

func (d *Driver) handleState(r bgp.Reporter, m stateMessage) {
	now := time.Now()
	d.mu.Lock()
	name := d.names[m.Peer]
	s := d.peers[name]
	if s == nil {
		d.mu.Unlock()
		return
	}
	if m.Error != "" {
		s.LastError, s.LastErrorAt = clip(m.Error), now
	}
	connections := d.relay
	switch m.State {
	case "":
	case bgp.PrefixLimit:
		if d.sup.held(name) != nil {
			break
		}
		d.sup.strike(now, name, bgp.PrefixLimit, fmt.Sprintf("more than %d prefixes", d.limitLocked(name)))
		delete(d.expect, name)
		s.Restarting, s.Since = false, now
	case bgp.Idle, bgp.Connect, bgp.Active, bgp.OpenSent, bgp.OpenConfirm, bgp.Established:
		if s.State != m.State {
			s.State, s.Since = m.State, now
		}
	}
	switch {
	case m.State == bgp.Established:
		s.Restarting = false
		s.TimesUp++
		d.sup.established(now, name)
		if end, ok := d.expect[name]; ok {
			d.expect[name] = later(end, now.Add(endTime))
		}
	case m.Down:
		s.Restarting = m.Restarting
		delete(d.expect, name)
	case m.Expired:
		s.Restarting = false
	case m.State == bgp.Idle && s.Restarting:
		// A session that does not come back, for example because its OPEN is refused: GoBGP has
		// dropped the paths. While our own process restarts, the FIB keeps them until expect ends.
		_, own := d.expect[name]
		s.Restarting = own
	}
	if m.State == "" && !m.Expired {
		d.mu.Unlock()
		return // a new last error alone is not reported
	}
	state := d.stateLocked(name)
	d.mu.Unlock()
	// It has no counterpart: GoBGP's report of the end of a replaced peer may come after the
	// Active of the new one.
	if connections != nil && m.State == bgp.Active {
		connections.Ready(name)
	}
	r.Peer(state)
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (d *Driver) limitLocked(name string) uint32 {
	for _, p := range d.want.Peers {
		if p.Name == name {
			return p.MaxPrefixes
		}
	}
	return 0
}

func (d *Driver) handleCounters(r bgp.Reporter, ms []countersMessage) {
	var changed []bgp.PeerState
	d.mu.Lock()
	for _, m := range ms {
		name := d.names[m.Peer]
		s := d.peers[name]
		if s == nil {
			continue
		}
		s.Received, s.MessagesIn, s.MessagesOut = m.Received, m.In, m.Out
		if s.State != bgp.Established {
			continue
		}
		hold := time.Duration(m.HoldTime) * time.Second
		if s.RouterID != m.RouterID || s.HoldTime != hold || s.GracefulRestart != m.GracefulRestart || s.BothFamilies != m.BothFamilies {
			s.RouterID, s.HoldTime, s.GracefulRestart, s.BothFamilies = m.RouterID, hold, m.GracefulRestart, m.BothFamilies
			changed = append(changed, d.stateLocked(name))
		}
		if _, ok := d.expect[name]; ok && !m.GracefulRestart {
			d.expect[name] = earlier(d.expect[name], s.Since.Add(settleTime))
		}
	}
	d.mu.Unlock()
	for _, s := range changed {
		r.Peer(s)
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

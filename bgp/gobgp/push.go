package gobgp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/bgp/filter"
	"github.com/isthmus-net/isthmus/bgp/relay"
)

// push gives the child the wanted configuration, without the peers that are held out, and waits
// for the answer. It must not be called by Run's goroutine, which may have to receive events
// before the answer can be read.
func (d *Driver) push(ctx context.Context) error {
	d.pushing.Lock()
	defer d.pushing.Unlock()

	// Prefixes that leave must be withdrawn before new ones are announced, so that the peer never
	// has too many.
	d.mu.Lock()
	leaving := d.shrinkLocked()
	d.mu.Unlock()
	if leaving {
		if err := d.pushOnce(ctx); err != nil {
			return err
		}
	}
	d.mu.Lock()
	d.admitted = d.rib.admit()
	d.mu.Unlock()
	return d.pushOnce(ctx)
}

// pushOnce sends one configuration. Its caller holds pushing.
func (d *Driver) pushOnce(ctx context.Context) error {
	d.mu.Lock()
	p := d.proc
	if p == nil || d.replace {
		d.mu.Unlock()
		return nil // the next process starts with the configuration wanted then
	}
	m := configMessage{
		ASN: d.want.ASN, RouterID: d.want.RouterID,
		Announce: d.want.Announce, Restarting: d.restart,
	}
	var connected []relay.Peer
	shut := map[string]*filter.Notification{}
	for _, w := range d.want.Peers {
		if w.Disabled {
			shut[w.Name] = filter.Shutdown(d.want.Reason)
			continue
		}
		if limited(w.Export) {
			w.Export.Allow = exactly(d.admitted[w.Name])
		}
		if d.sup.admit(w.Name) {
			connected = append(connected, d.relayPeerLocked(w))
			c := peerConfig{ID: d.ids[w.Name], Outside: [2]netip.Addr{w.Address, w.LocalAddress}, Key: d.keyNo[w.Name]}
			w.Address, w.LocalAddress = inner(c.ID, w)
			c.Peer = w
			m.Peers = append(m.Peers, c)
		}
	}
	same, err := json.Marshal(m)
	if err != nil || string(same) == string(d.sent) {
		d.mu.Unlock()
		return err
	}
	d.sent = nil // until the answer arrives
	m.ID = d.expectReplyLocked()
	r := d.relay
	d.mu.Unlock()
	// Before GoBGP reports that it waits for a connection.
	if r != nil {
		r.Apply(connected, shut)
	}

	reply, err := d.call(ctx, p, frameConfig, m.ID, m)
	if err != nil {
		return fmt.Errorf("configuring BGP: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.proc == p && len(reply.Errors) == 0 {
		d.sent = same
	}
	d.writes += reply.Changes
	errs := make([]error, len(reply.Errors))
	for i, e := range reply.Errors {
		errs[i] = fmt.Errorf("configuring BGP: %s", e)
	}
	return errors.Join(errs...)
}

var errEnded = errors.New("the BGP process ended")

// expectReplyLocked returns the number of a new message.
func (d *Driver) expectReplyLocked() uint64 {
	d.message++
	d.replies[d.message] = make(chan replyMessage, 1)
	return d.message
}

// call sends a message and waits for the reply.
func (d *Driver) call(ctx context.Context, p *process, t frameType, id uint64, m any) (replyMessage, error) {
	d.mu.Lock()
	c := d.replies[id]
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.replies, id)
		d.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(ctx, replyTimeout)
	defer cancel()
	// A frame cannot be sent in part, so the only remedy against a child that does not read is to
	// kill it.
	unread := time.AfterFunc(readTimeout, p.kill)
	err := writeJSON(p.conn, t, m)
	unread.Stop()
	if err != nil {
		return replyMessage{}, errors.Join(errEnded, err)
	}
	select {
	case r := <-c:
		return r, nil
	case <-p.done:
		return replyMessage{}, errEnded
	case <-ctx.Done():
		return replyMessage{}, ctx.Err()
	}
}

// pushLater is push for Run's goroutine. It closes the channel when push is done.
func (d *Driver) pushLater(ctx context.Context) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := d.push(ctx); err != nil && ctx.Err() == nil {
			d.o.Log.Error("BGP is not as configured", "error", err)
		}
	}()
	return done
}

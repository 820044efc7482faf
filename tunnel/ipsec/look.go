package ipsec

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
)

// look reads the tunnels that may have changed, decides, acts, and reports the states that have
// changed.
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

// rereads is how often a list that shows a tunnel without a CHILD SA is read again.
const rereads = 2

// sure returns the SAs of a connection, and reads them again if necessary. charon lists IKE SAs
// one after the other. When the peer renews one, the CHILD SA moves from it to the new one, and a
// list made at that moment has it in neither. The tunnel must not go down because of that.
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
	} else if rec.reason != "" { // it cannot be loaded; otherwise Apply is about to load it
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
			d.o.Log.Info("ending a superfluous SA", "tunnel", name, "ike", a.terminateIKE, "child", a.terminateChild)
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
	r.reportChange(state)
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

// reportChange reports a state that differs from the last one reported.
func (r *runner) reportChange(s tunnel.State) {
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

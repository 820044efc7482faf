package observe

import (
	"context"
	"fmt"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/liveness"
)

// data is the liveness of a tunnel's data path.
type data struct {
	liveness.Report
	silent  bool
	changed time.Time // of silent
}

// WatchData watches whether tunnels carry data until ctx is done.
func (o *Observer) WatchData(ctx context.Context) error {
	if o.o.Interfaces == nil {
		<-ctx.Done()
		return nil
	}
	return liveness.Watch(ctx, liveness.Options{Targets: o.dataTargets, Counters: o.o.Interfaces, Report: o.setData, Log: o.o.Log})
}

// dataTargets returns the wanted tunnels.
func (o *Observer) dataTargets() []liveness.Target {
	o.mu.Lock()
	defer o.mu.Unlock()
	talks := map[string]time.Duration{}
	for _, p := range o.seen.Target.BGP.Peers {
		switch state := o.sessions[p.Name]; {
		case state == bgp.Established, state == bgp.OpenSent, state == bgp.OpenConfirm,
			!p.Passive && (state == bgp.Connect || state == bgp.Active):
			// A session over a link uses any one of its lanes.
			talks[p.Tunnel] = max(talks[p.Tunnel], p.Keepalive)
		}
	}
	out := make([]liveness.Target, 0, len(o.seen.Target.Tunnels))
	for _, c := range o.seen.Target.Tunnels {
		if c.Disabled {
			continue
		}
		out = append(out, liveness.Target{
			Name: c.Name, Interface: c.Interface, Inside: c.Inside, Probe: c.Probe, Talks: talks[c.Name], Up: o.raw[c.Name].Status == tunnel.Up,
		})
	}
	return out
}

// setData receives the liveness of all tunnels.
func (o *Observer) setData(reports map[string]liveness.Report) {
	o.telling.Lock()
	defer o.telling.Unlock()
	for name, t := range o.setReports(reports, time.Now()) {
		o.o.Log.Info("tunnel is "+string(t.state.Status), "tunnel", name, "reason", t.state.LastError)
		o.o.FIB.SetAlive(fib.NextHop{Interface: t.config.Interface}, t.carries)
		if t.mapped {
			o.o.Nudge("bgp")
		}
	}
}

// turn is a change of a tunnel's status.
type turn struct {
	config  tunnel.Config
	state   tunnel.State
	mapped  bool // a map of prefixes is behind the tunnel
	carries bool // routes may use it
}

// setReports stores the reports, and returns the tunnels whose status has changed.
func (o *Observer) setReports(reports map[string]liveness.Report, now time.Time) map[string]turn {
	o.mu.Lock()
	defer o.mu.Unlock()
	turns := map[string]turn{}
	for name, r := range reports {
		c, ok := o.tunnels[name]
		if !ok {
			continue
		}
		d := o.data[name]
		if silent := r.Silence != (tunnel.Silence{}); silent != d.silent {
			d.silent, d.changed = silent, now
		}
		if d.silent && r.Silence.Inbound == d.Silence.Inbound && r.Silence.Since.Equal(d.Silence.Since) {
			r.Silence = d.Silence // its growing count would be a change each time
		}
		d.Report = r
		o.data[name] = d
		raw, known := o.raw[name]
		if !known {
			continue
		}
		former := o.seen.Tunnels[name]
		s := effective(c, raw, d, now)
		o.store(s)
		// A state that the driver has changed is reported by Seen.
		if s.Status != former.Status {
			turns[name] = turn{c, s, o.mapped(c), o.carries(name, s.Status)}
			o.o.Bell.Ring()
		}
	}
	return turns
}

// alive reports whether routes may use a tunnel. Only one that is known not to carry data leaves
// its groups: while charon does not answer, its tunnels still work.
func alive(s tunnel.Status) bool {
	return s != tunnel.Down && s != tunnel.Suspect && s != tunnel.Disabled
}

// effective returns the state of a tunnel: that of its driver, together with what is known about
// its data.
func effective(c tunnel.Config, s tunnel.State, d data, now time.Time) tunnel.State {
	if k := d.Counters; k.Index != 0 {
		s.RxBytes, s.TxBytes, s.RxPackets, s.TxPackets = k.RxBytes, k.TxBytes, k.RxPackets, k.TxPackets
	}
	if s.Status != tunnel.Up {
		return s
	}
	s.Data, s.Answers = d.Data, d.Probe
	if d.changed.After(s.Since) {
		s.Since = d.changed
	}
	if !d.silent {
		return s
	}
	s.Silence = d.Silence
	s.Status = tunnel.Suspect
	since := d.Silence.Since.UTC().Format(time.RFC3339)
	if w := c.WireGuard; w != nil && d.Silence.Inbound && !s.Keyed.After(d.Silence.Since) && now.Sub(d.Silence.Since) >= silenceOf(w) {
		// Neither data nor a handshake has come: the peer is gone.
		s.Status = tunnel.Down
		s.Since = d.Silence.Since.Add(silenceOf(w))
		s.Failure = tunnel.Failure{Reason: tunnel.NoHandshake, Since: d.Silence.Since}
		s.LastError = fmt.Sprintf("no packet from %s since %s", s.Remote, since)
		return s
	}
	if d.Silence.Inbound {
		s.Failure = tunnel.Failure{Reason: tunnel.NoData, Since: d.Silence.Since}
		s.LastError = fmt.Sprintf("no data has come since %s, and %d packets were sent", since, d.Silence.Sent)
	} else {
		s.Failure = tunnel.Failure{Reason: tunnel.OneWay, Since: d.Silence.Since}
		s.LastError = fmt.Sprintf("data comes, but none of %d echo requests was answered since %s", d.Silence.Sent, since)
	}
	return s
}

// silenceOf returns the time after which a silent WireGuard peer counts as gone. A peer answers
// data within 10 s even if it has none to send (Keepalive-Timeout, WireGuard paper, section 6.5),
// so that less would be too early.
func silenceOf(w *tunnel.WireGuard) time.Duration {
	keepalive := w.Keepalive
	if keepalive == 0 {
		keepalive = 25 * time.Second
	}
	return max(2*keepalive+5*time.Second, 15*time.Second)
}

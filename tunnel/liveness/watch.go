package liveness

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
)

const (
	// Interval is the time between two echo requests to one peer.
	Interval = 2 * time.Second
	// most is the number of echo requests in a second, from which on Interval grows.
	most = 500
	// pace is the time between two reads of the counters.
	pace = time.Second
)

// Counters are the counters of an interface.
type Counters struct {
	Index                int // of the interface
	RxBytes, TxBytes     uint64
	RxPackets, TxPackets uint64
	// Handshakes means that they include the handshakes of WireGuard.
	Handshakes bool
}

// Target is a tunnel whose keys are negotiated.
type Target struct {
	Name, Interface string
	Inside          []tunnel.Inside
	Probe           tunnel.Probe
	Talks           time.Duration // see Rules
	Up              bool          // its keys are negotiated; otherwise only its counters are reported
}

// Report is the result of one read of a tunnel.
type Report struct {
	Counters Counters
	Silence  tunnel.Silence
	Data     time.Time // when data last came; zero: not since it came up
	Probe    string    // see Track.Probe; empty while the tunnel is not up
}

// Options are the dependencies of Watch.
type Options struct {
	// Targets returns the wanted tunnels that have an interface.
	Targets func() []Target
	// Counters reads the counters of all interfaces of tunnels, by name.
	Counters func() (map[string]Counters, error)
	// Report receives the results, by name of tunnel, in one call for each read.
	Report func(map[string]Report)
	Log    *slog.Logger
	// Pinger sends the echo requests. Nil: one is opened.
	Pinger Pinger
}

// Pinger sends echo requests and counts their answers.
type Pinger interface {
	// Ping sends an echo request to an address through the interface with an index, and forgets the
	// request before it.
	Ping(iface int, from, to netip.Addr) error
	// Answers returns how many requests to the address were answered through the interface.
	Answers(iface int, to netip.Addr) uint64
	// Lost reports whether answers may have been lost on this node since the last call.
	Lost() bool
	// Keep forgets the interfaces that are not in the set.
	Keep(interfaces map[int]bool)
	Close()
}

// watch is the state of Watch.
type watch struct {
	o      Options
	tracks map[string]*tracked
	warned bool
}

type tracked struct {
	Track
	iface    int
	requests uint64
	due      time.Time
}

// Watch reports on the tunnels until ctx is done.
func Watch(ctx context.Context, o Options) error {
	if o.Pinger == nil {
		p, err := newPinger()
		if err != nil {
			return fmt.Errorf("opening the sockets for echo requests: %w", err)
		}
		o.Pinger = p
	}
	defer o.Pinger.Close()
	w := &watch{o: o, tracks: map[string]*tracked{}}
	timer := time.NewTimer(pace)
	defer timer.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		began := time.Now()
		w.round(began, began.Sub(last) > 3*pace)
		last = began
		// A read of thousands of interfaces takes long; it is not to take all the time.
		timer.Reset(max(pace, 20*time.Since(began)))
	}
}

// round reads all tunnels once. late means that this process had no time to read answers since the
// round before.
func (w *watch) round(now time.Time, late bool) {
	counters, err := w.o.Counters()
	if err != nil {
		if !w.warned {
			w.o.Log.Warn("whether tunnels carry data is not known", "err", err)
		}
		w.warned = true
		return
	}
	w.warned = false
	unsure := w.o.Pinger.Lost() || late
	targets := w.o.Targets()
	interval := max(Interval, time.Duration(len(targets))*time.Second/most)
	reports := make(map[string]Report, len(targets))
	present := make(map[int]bool, len(targets))
	for _, t := range targets {
		c, ok := counters[t.Interface]
		if !ok {
			continue
		}
		present[c.Index] = true
		r := Report{Counters: c}
		if t.Up {
			w.step(now, interval, t, c, unsure, &r)
		} else {
			delete(w.tracks, t.Name)
		}
		reports[t.Name] = r
	}
	for name, t := range w.tracks {
		if !present[t.iface] {
			delete(w.tracks, name)
		}
	}
	w.o.Pinger.Keep(present)
	w.o.Report(reports)
}

func (w *watch) step(now time.Time, interval time.Duration, t Target, c Counters, unsure bool, r *Report) {
	k := w.tracks[t.Name]
	if k == nil || k.iface != c.Index {
		k = &tracked{iface: c.Index}
		w.tracks[t.Name] = k
	}
	rules := Rules{Probe: t.Probe, Talks: t.Talks, Handshakes: c.Handshakes}
	s := Sample{RxPackets: c.RxPackets, TxPackets: c.TxPackets, RxBytes: c.RxBytes, Unsure: unsure}
	for _, in := range t.Inside {
		s.Answers += w.o.Pinger.Answers(c.Index, in.Remote)
	}
	if rules.Probe != tunnel.ProbeOff && len(t.Inside) > 0 && !now.Before(k.due) {
		k.due = now.Add(interval)
		// An address that the interface does not have yet is an error here, as a lost request is.
		if err := w.o.Pinger.Ping(c.Index, t.Inside[0].Local.Addr(), t.Inside[0].Remote); err == nil {
			k.requests++
		}
	}
	s.Requests = k.requests
	r.Silence = k.Step(now, s, rules)
	if k.ever {
		r.Data = k.silent
	}
	r.Probe = k.Probe(rules)
}

// answers counts answers by interface and address.
type answers struct {
	mu    sync.Mutex
	peers map[key]*peer
}

type key struct {
	iface int
	to    netip.Addr
}

// peer is the state of the echo requests to one peer.
type peer struct {
	sequence uint16
	token    [tokenSize]byte // of the newest request
	answered bool
	answers  uint64
}

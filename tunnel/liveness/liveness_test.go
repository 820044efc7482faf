package liveness

import (
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/root"
	"github.com/isthmus-net/isthmus/tunnel"
)

// second is what happens within one second of a tunnel: packets that the peer sends, packets that
// this side sends besides echo requests, and whether a request is answered.
type second struct {
	rx, tx   uint64
	answered bool
	unsure   bool
	reset    bool // the interface is a new one
}

// TestStep follows a tunnel second by second. An echo request is sent every other second.
func TestStep(t *testing.T) {
	const auto, strict, off = tunnel.ProbeAuto, tunnel.ProbeStrict, tunnel.ProbeOff
	times := func(n int, s second) (out []second) {
		for range n {
			out = append(out, s)
		}
		return out
	}
	healthy := second{rx: 5, tx: 5, answered: true}
	for name, tt := range map[string]struct {
		rules   Rules
		seconds [][]second
		want    string // "", "no data" or "one way"
		ever    bool
		from    int // the silence begins in this second
	}{
		"healthy":                                 {Rules{Probe: auto}, [][]second{times(60, healthy)}, "", false, 0},
		"only answers":                            {Rules{Probe: auto}, [][]second{times(60, second{answered: true})}, "", false, 0},
		"never any data":                          {Rules{Probe: auto}, [][]second{times(10, second{})}, "no data", false, 0},
		"too early":                               {Rules{Probe: auto}, [][]second{times(5, second{})}, "", false, 0},
		"data ends":                               {Rules{Probe: auto}, [][]second{times(20, healthy), times(10, second{tx: 5})}, "no data", true, 20},
		"data comes back":                         {Rules{Probe: auto}, [][]second{times(20, healthy), times(20, second{tx: 5}), times(3, healthy)}, "", false, 0},
		"drops echo requests":                     {Rules{Probe: auto}, [][]second{times(60, second{rx: 1, tx: 1})}, "", false, 0},
		"drops echo requests, idle at night":      {Rules{Probe: auto}, [][]second{times(20, second{rx: 1, tx: 1}), times(60, second{})}, "", false, 0},
		"drops echo requests, strict":             {Rules{Probe: strict}, [][]second{times(20, second{rx: 1, tx: 1})}, "one way", true, 0},
		"one way out":                             {Rules{Probe: auto}, [][]second{times(20, healthy), times(20, second{rx: 3, tx: 3})}, "one way", true, 20},
		"one way out, healed":                     {Rules{Probe: auto}, [][]second{times(20, healthy), times(20, second{rx: 3, tx: 3}), times(3, healthy)}, "", false, 0},
		"one way out, this node lost the answers": {Rules{Probe: auto}, [][]second{times(20, healthy), times(20, second{rx: 3, tx: 3, unsure: true})}, "", false, 0},
		"no probes, one-way traffic":              {Rules{Probe: off}, [][]second{times(60, second{tx: 50})}, "", false, 0},
		"no probes, BGP without an answer":        {Rules{Probe: off, Talks: 10 * time.Second}, [][]second{times(20, second{rx: 1, tx: 1}), times(17, second{tx: 1})}, "no data", true, 20},
		"no probes, BGP between two keepalives":   {Rules{Probe: off, Talks: 10 * time.Second}, [][]second{times(20, second{rx: 1, tx: 1}), times(13, second{tx: 50})}, "", false, 0},
		"no probes, BGP, nothing sent":            {Rules{Probe: off, Talks: 10 * time.Second}, [][]second{times(20, second{rx: 1, tx: 1}), times(60, second{})}, "", false, 0},
		"a new interface":                         {Rules{Probe: auto}, [][]second{times(20, healthy), times(4, second{tx: 5}), {{reset: true}}, times(4, second{tx: 5})}, "", false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
			var track Track
			var sum Sample
			var got tunnel.Silence
			n := 0
			for _, part := range tt.seconds {
				for _, s := range part {
					if s.reset {
						sum = Sample{Requests: sum.Requests, Answers: sum.Answers}
					}
					sum.RxPackets, sum.TxPackets, sum.RxBytes, sum.Unsure = sum.RxPackets+s.rx, sum.TxPackets+s.tx, sum.RxBytes+100*s.rx, s.unsure
					// An answer comes before the next request.
					if s.answered && n%2 == 1 {
						sum.Answers++
						sum.RxPackets++
					}
					if tt.rules.Probe != off && n%2 == 0 {
						sum.Requests++
						sum.TxPackets++
					}
					got = track.Step(start.Add(time.Duration(n)*time.Second), sum, tt.rules)
					n++
				}
			}
			is := ""
			switch {
			case got.Inbound:
				is = "no data"
			case got != (tunnel.Silence{}):
				is = "one way"
			}
			if is != tt.want {
				t.Fatalf("%q, want %q: %+v", is, tt.want, got)
			}
			if is == "" {
				return
			}
			if got.Ever != tt.ever || got.Sent == 0 || got.Since.Before(start.Add(time.Duration(tt.from-2)*time.Second)) || got.Since.After(start.Add(time.Duration(tt.from+1)*time.Second)) {
				t.Errorf("%+v, want since second %d", got, tt.from)
			}
		})
	}
}

// TestHandshakes checks that handshakes of a WireGuard device do not count as data.
func TestHandshakes(t *testing.T) {
	for _, tt := range []struct {
		packets, bytes uint64
		want           bool
	}{
		{1, 92, true}, {1, 148, true}, {2, 184, true}, {2, 240, true}, {3, 332, true},
		{1, 32, false}, {1, 128, false}, {2, 124, false}, {2, 180, false}, {9, 9 * 92, false},
	} {
		if got := handshakes(tt.packets, tt.bytes); got != tt.want {
			t.Errorf("%d packets with %d bytes: %v", tt.packets, tt.bytes, got)
		}
	}
	var track Track
	start := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	rules := Rules{Probe: tunnel.ProbeAuto, Handshakes: true}
	var got tunnel.Silence
	for i := range uint64(40) { // a handshake every 5 s, and nothing else
		got = track.Step(start.Add(time.Duration(i)*time.Second), Sample{RxPackets: i / 5, RxBytes: i / 5 * 92, TxPackets: 2 * i, Requests: i / 2}, rules)
	}
	if !got.Inbound {
		t.Error("handshakes count as data")
	}
}

// fakePinger answers the requests to some addresses.
type fakePinger struct {
	answer  bool
	answers map[netip.Addr]uint64
	pings   int
	kept    map[int]bool
}

func (f *fakePinger) Ping(_ int, _, to netip.Addr) error {
	f.pings++
	if f.answer {
		f.answers[to]++
	}
	return nil
}
func (f *fakePinger) Answers(_ int, to netip.Addr) uint64 { return f.answers[to] }
func (f *fakePinger) Lost() bool                          { return false }
func (f *fakePinger) Keep(kept map[int]bool)              { f.kept = kept }
func (f *fakePinger) Close()                              {}

// TestRounds checks the reports of tunnels that are up, down, gone and new.
func TestRounds(t *testing.T) {
	pinger := &fakePinger{answers: map[netip.Addr]uint64{}}
	up := true
	var broken error
	var reports map[string]Report
	inside := []tunnel.Inside{{Local: netip.MustParsePrefix("169.254.64.2/30"), Remote: netip.MustParseAddr("169.254.64.1")}}
	counters := map[string]Counters{"t-a": {Index: 7, RxPackets: 1}, "t-b": {Index: 8, RxPackets: 2}}
	targets := []Target{{Name: "a", Interface: "t-a", Inside: inside, Probe: tunnel.ProbeAuto}, {Name: "b", Interface: "t-b", Inside: inside}, {Name: "c", Interface: "t-c", Up: true}}
	w := &watch{tracks: map[string]*tracked{}, o: Options{
		Targets:  func() []Target { targets[0].Up = up; return targets },
		Counters: func() (map[string]Counters, error) { return counters, broken },
		Report:   func(r map[string]Report) { reports = r }, Log: slog.New(slog.DiscardHandler), Pinger: pinger,
	}}
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	rounds := func(n int, late bool) {
		for range n {
			now = now.Add(time.Second)
			w.round(now, late)
		}
	}
	rounds(60, true)
	if r := reports["a"]; r.Silence != (tunnel.Silence{}) {
		t.Errorf("a process that gets no time reports silence: %+v", r)
	}
	rounds(20, false)
	if r := reports["a"]; !r.Silence.Inbound || r.Probe != "unanswered" || !r.Data.IsZero() || r.Counters.RxPackets != 1 {
		t.Errorf("%+v", r)
	}
	if r, ok := reports["b"]; !ok || r.Probe != "" || r.Counters.RxPackets != 2 {
		t.Errorf("a tunnel that is down: %+v", r)
	}
	if _, ok := reports["c"]; ok || len(pinger.kept) != 2 {
		t.Errorf("a tunnel without an interface is reported: %v", pinger.kept)
	}
	if pinger.pings < 35 || pinger.pings > 45 {
		t.Errorf("%d requests within 80 s", pinger.pings)
	}
	pinger.answer = true
	rounds(4, false)
	if r := reports["a"]; r.Silence != (tunnel.Silence{}) || r.Probe != "answered" || r.Data.IsZero() {
		t.Errorf("with answers: %+v", r)
	}
	pinger.answer = false
	rounds(12, false)
	up = false
	rounds(1, false)
	up = true
	rounds(3, false)
	if r := reports["a"]; r.Silence != (tunnel.Silence{}) {
		t.Errorf("new keys begin with the silence of former ones: %+v", r)
	}
	reports = nil
	broken = errors.New("no")
	if rounds(1, false); reports != nil {
		t.Error("counters that cannot be read are reported")
	}
}

// TestEcho sends requests over the loopback interface, with another process's replies in between.
func TestEcho(t *testing.T) {
	root.Need(t, "raw sockets")
	p, err := newPinger()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	other, err := newPinger()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	const loopback = 1
	for _, text := range []string{"127.0.0.1", "::1"} {
		a := netip.MustParseAddr(text)
		if a.Is6() && p.six == nil {
			continue
		}
		for i := range uint64(3) {
			for _, from := range []*sockets{other, p} {
				if err := from.Ping(loopback, a, a); err != nil {
					t.Fatal(err)
				}
			}
			for end := time.Now().Add(time.Minute); p.Answers(loopback, a) != i+1; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%s: %d answers, want %d", a, p.Answers(loopback, a), i+1)
				}
			}
		}
		if p.Answers(2, a) != 0 {
			t.Errorf("%s: answers through another interface", a)
		}
	}
	if p.Lost() {
		t.Error("answers were lost")
	}
	if err := p.Ping(0x7fffffff, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.1")); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("a request through a missing interface: %v", err)
	}
	p.Keep(map[int]bool{})
	if p.Answers(loopback, netip.MustParseAddr("127.0.0.1")) != 0 {
		t.Error("an interface that is gone is kept")
	}
}

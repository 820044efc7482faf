// Package liveness finds out whether tunnels whose keys are negotiated carry data in both
// directions. IKE and the handshakes of WireGuard have other packets than the data: a path can pass
// the ones and drop the others. The package counts the packets of each interface, and sends echo
// requests through it to the remote inside address.
package liveness

import (
	"time"

	"github.com/isthmus-net/isthmus/tunnel"
)

// Sample has the counters of one tunnel at one time. They grow while the tunnel exists.
type Sample struct {
	RxPackets, TxPackets uint64 // of the interface
	RxBytes              uint64
	Requests             uint64 // echo requests sent
	Answers              uint64 // echo requests answered
	// Unsure means that answers may have been lost on this node since the sample before.
	Unsure bool
}

// Rules say what silence of a tunnel proves.
type Rules struct {
	Probe tunnel.Probe
	// Talks is the longest time between packets of the peer while a BGP session sends through the
	// tunnel; 0: none does.
	Talks time.Duration
	// Handshakes means that the counters of the interface include handshakes (WireGuard in the
	// kernel).
	Handshakes bool
}

const (
	// lost is the number of echo requests without an answer, and of other packets, from which on
	// silence counts.
	lost = 3
	// lostOneWay is the same while data comes: many answers are lost together if a path is full.
	lostOneWay = 5
	// slack is how much later than expected a packet of the peer may come.
	slack = 5 * time.Second
)

// Track is the history of one tunnel since it came up. The zero Track has none.
type Track struct {
	last     Sample
	began    bool
	silent   time.Time // since when no data has come
	sent     uint64    // packets sent since then, without echo requests
	ever     bool      // data has come
	answered bool      // an echo request was answered
	missing  uint64    // echo requests since the last answer, without the newest
	mute     time.Time // since when none was answered
}

// Step adds a sample, and returns the silence of the tunnel: zero if data passes, or if nothing
// proves that it does not.
func (t *Track) Step(now time.Time, s Sample, r Rules) tunnel.Silence {
	last := t.last
	t.last = s
	if !t.began || s.RxPackets < last.RxPackets || s.TxPackets < last.TxPackets { // new, or a new interface
		*t = Track{last: s, began: true, silent: now, mute: now, ever: t.ever, answered: t.answered}
		return tunnel.Silence{}
	}
	requests, answers := s.Requests-last.Requests, s.Answers-last.Answers
	t.sent += max(s.TxPackets-last.TxPackets, requests) - requests
	packets := s.RxPackets - last.RxPackets
	if packets > 0 && !(r.Handshakes && handshakes(packets, s.RxBytes-last.RxBytes)) || answers > 0 {
		t.silent, t.sent, t.ever = now, 0, true
	}
	switch {
	case answers > 0:
		t.answered, t.missing, t.mute = true, 0, now
	case !s.Unsure:
		t.missing += requests
	}
	return t.silence(now, r)
}

func (t *Track) silence(now time.Time, r Rules) tunnel.Silence {
	quiet := now.Sub(t.silent)
	probed := r.Probe == tunnel.ProbeStrict || r.Probe == tunnel.ProbeAuto && (t.answered || !t.ever)
	// The newest request may still be answered.
	missing := max(t.missing, 1) - 1
	switch {
	case probed && missing >= lost && quiet >= lost*Interval,
		r.Talks > 0 && t.sent >= lost && quiet >= r.Talks+slack:
		return tunnel.Silence{Since: t.silent, Sent: t.sent + t.missing, Inbound: true, Ever: t.ever}
	case probed && r.Probe != tunnel.ProbeOff && (t.answered || r.Probe == tunnel.ProbeStrict) && missing >= lostOneWay && now.Sub(t.mute) >= lostOneWay*Interval:
		return tunnel.Silence{Since: t.mute, Sent: t.missing, Ever: t.ever}
	}
	return tunnel.Silence{}
}

// Probe describes the answers to echo requests, for users.
func (t *Track) Probe(r Rules) string {
	switch {
	case r.Probe == tunnel.ProbeOff:
		return "off"
	case t.answered && t.missing <= lost:
		return "answered"
	case !t.answered && t.ever && r.Probe == tunnel.ProbeAuto:
		return "never answered"
	}
	return "unanswered"
}

// handshakes reports whether packets of a WireGuard device that have so many bytes together are
// handshake messages: initiations have 148 bytes, responses 92 (WireGuard paper, section 5.4). A
// data packet has a multiple of 16 bytes.
func handshakes(packets, bytes uint64) bool {
	const initiation, response = 148, 92
	if packets > 8 {
		return false
	}
	for i := range packets + 1 {
		if i*initiation+(packets-i)*response == bytes {
			return true
		}
	}
	return false
}

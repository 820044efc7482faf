package ipsec

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/tunnel"
)

// record is the driver's state of one wanted tunnel.
type record struct {
	loading *sync.Mutex // held during a load of the tunnel

	cfg   tunnel.Config
	want  loaded       // the digests of its configuration
	state tunnel.State // without counters

	known bool // sas was read from the running charon
	sas   []ikeSA

	tries     int       // attempts since the tunnel was last stable
	next      time.Time // of the next attempt; zero: at once
	initiated time.Time // start of the current attempt; zero: none
	missing   time.Time // since when no CHILD SA is live
	double    time.Time // since when more than one CHILD SA is live
	ended     int       // how often such an SA was ended recently
	endedAt   time.Time // when one was last ended
	upSince   time.Time
	spis      spis   // of the SAs that the state describes
	adopted   bool   // it was already up when it was first seen
	reason    string // why it is down, from charon's log
	reasonAt  time.Time
	failure   tunnel.Failure // the same, as a Failure
	evidence  tunnel.Evidence
	heard     time.Time      // when the peer's address last sent an IKE packet
	listening time.Time      // since when such packets would have been seen
	rekey     tunnel.Failure // why the live CHILD SA is not renewed
	rekeyOf   uint32         // the ID of that CHILD SA; 0: the one that is live next
	held      time.Time      // until when SAs that exist only in the kernel may carry traffic
	stale     map[uint32]time.Time
}

// spis names an IKE SA and a CHILD SA: charon counts its own identifiers from 1 after a restart.
type spis struct {
	ike   string
	child uint32
}

// describe sets the state from the SAs that carry the tunnel.
func (r *record) describe(c carrier) {
	r.state.Remote = c.ike.Remote
	r.state.NATTraversal = c.ike.NAT || c.child.Encap
	r.state.Algorithms = "IKE " + c.ike.Algorithms + ", ESP " + c.child.Algorithms
	of := spis{c.ike.SPI, c.child.In}
	r.state.Established = steady(r.state.Established, c.ike.Established, of.ike == r.spis.ike)
	r.state.Keyed = steady(r.state.Keyed, c.child.Installed, of.child == r.spis.child)
	r.spis = of
}

// steady returns the time at which an SA was made, without the error of a reading: charon gives
// ages in whole seconds, and on a busy machine its answer is read some seconds late. The time of an
// SA that is still the same changes only when the clock was set.
func steady(former, t time.Time, same bool) time.Time {
	if same && !former.IsZero() && t.Sub(former).Abs() < time.Minute {
		return former
	}
	return t
}

// fail schedules the next attempt.
func (r *record) fail(now time.Time, jitter *rand.Rand) {
	r.next = now.Add(backoff.Below(retry.Delay(r.tries), jitter.Int64N))
	r.tries++
}

// down sets a status other than Up, with the reason, unless SAs that exist only in the kernel may
// still carry traffic.
func (r *record) down(s tunnel.Status, now time.Time) {
	if r.state.Status == tunnel.Up && now.Sub(r.reasonAt) > stableAfter {
		r.because(tunnel.Other, "the CHILD SA was closed", now)
	}
	if r.reason != "" {
		r.state.LastError, r.state.Failure = r.reason, r.failure
	}
	r.state.Evidence, r.state.Heard, r.state.Listening = r.evidence, r.heard, r.listening
	if r.state.LastError == noAnswer && r.cfg.IPsec.RemoteAddress.IsValid() {
		r.state.LastError = fmt.Sprintf("no answer from %s", r.cfg.IPsec.RemoteAddress)
	}
	r.state.NextTry = r.next
	if now.Before(r.held) {
		r.set(tunnel.Unknown, now)
		return
	}
	r.state.Established, r.state.Keyed, r.state.Algorithms, r.state.NATTraversal = time.Time{}, time.Time{}, "", false
	r.set(s, now)
}

func (r *record) set(s tunnel.Status, now time.Time) {
	former := r.state.Status
	if s == tunnel.Up {
		r.state.NextTry = time.Time{}
		r.reason, r.failure, r.state.LastError = "", tunnel.Failure{}, ""
		if former != tunnel.Up {
			r.evidence, r.heard, r.rekey, r.rekeyOf = tunnel.Evidence{}, time.Time{}, tunnel.Failure{}, 0
		}
		r.state.Evidence, r.state.Heard, r.state.Listening = r.evidence, time.Time{}, time.Time{}
	}
	if s == former {
		return
	}
	r.state.Status = s
	r.state.Since = now
	if s == tunnel.Up {
		r.state.Since = r.upSince
	}
}

// vaguer lists, by an answer of the peer, the more precise reasons that the peer's own attempts
// reveal.
var vaguer = map[tunnel.Reason][]tunnel.Reason{
	tunnel.AuthRefused: {tunnel.Identity, tunnel.KeyDiffers, tunnel.Certificate},
	tunnel.IKERefused:  {tunnel.IKEUnacceptable, tunnel.IKEVersion},
	tunnel.ESPRefused:  {tunnel.ESPUnacceptable},
	tunnel.TSRefused:   {tunnel.TSUnacceptable},
}

// note stores the reason that a line of charon's log gives. A reason from the peer has precedence
// over its later silence.
func (r *record) note(words string, now time.Time) bool {
	why, reason := reasonOf(words)
	if why == "" {
		return false
	}
	if r.state.Status == tunnel.Up && (reason == tunnel.ESPRefused || reason == tunnel.ESPUnacceptable) {
		if r.rekey.Reason == "" {
			r.rekey = tunnel.Failure{Reason: tunnel.RekeyRefused, Since: now}
		}
		return true
	}
	if why == noAnswer {
		switch {
		case r.state.Status == tunnel.Up:
			reason = tunnel.PeerLost
		case reason == tunnel.NoAnswer && (r.failure.Reason == tunnel.NoAnswerAuth || r.failure.Reason == tunnel.PeerLost) && !strings.HasPrefix(words, "retransmit"):
			reason = r.failure.Reason // giving up reveals nothing new
		}
	}
	recent := now.Sub(r.reasonAt) < stableAfter
	if recent && (why == noAnswer && r.reason != "" && r.reason != noAnswer || why == peerClosed && r.reason == closedHere) {
		return false // the peer's answer to our DELETE is also a DELETE
	}
	if slices.Contains(vaguer[reason], r.failure.Reason) && now.Sub(r.reasonAt) < exactFor {
		return false
	}
	r.because(reason, why, now)
	return true
}

// because stores a reason.
func (r *record) because(reason tunnel.Reason, words string, now time.Time) {
	r.reason, r.reasonAt = words, now
	if r.failure.Reason != reason {
		r.failure = tunnel.Failure{Reason: reason, Since: now}
	}
}

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

// record is what the driver knows of one wanted tunnel.
type record struct {
	loading *sync.Mutex // one load of the tunnel at a time

	cfg   tunnel.Config
	want  loaded       // what is to be loaded for it
	state tunnel.State // without counters

	known bool // whether sas was read from the present charon
	sas   []ikeSA

	tries     int       // attempts since it was last settled
	next      time.Time // of the next attempt; zero: at once
	initiated time.Time // of the attempt under way; zero: none
	missing   time.Time // since when no CHILD SA is live
	double    time.Time // since when more than one is
	ended     int       // how often a double was ended lately
	endedAt   time.Time // the last time
	upSince   time.Time
	adopted   bool   // it was up when it was first seen
	reason    string // why it is down, from charon's log
	reasonAt  time.Time
	failure   tunnel.Failure // the same
	evidence  tunnel.Evidence
	heard     time.Time      // when the peer's address last sent an IKE packet
	listening time.Time      // since when that would have been seen
	rekey     tunnel.Failure // why the CHILD SA that is up is not renewed
	rekeyOf   uint32         // which that is; 0: the live one
	held      time.Time      // until when traffic may continue on SAs that only the kernel knows
	stale     map[uint32]time.Time
}

// fail plans the next attempt.
func (r *record) fail(now time.Time, jitter *rand.Rand) {
	r.next = now.Add(backoff.Below(retry.Delay(r.tries), jitter.Int64N))
	r.tries++
}

// down sets a status that is not Up, with the reason, unless SAs that only the kernel knows may still carry traffic.
func (r *record) down(s tunnel.Status, now time.Time) {
	if r.state.Status == tunnel.Up && now.Sub(r.reasonAt) > settled {
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
		r.reason, r.failure = "", tunnel.Failure{}
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

// vaguer are the answers that say less than what the peer's own calls taught.
var vaguer = map[tunnel.Reason][]tunnel.Reason{
	tunnel.AuthRefused: {tunnel.Identity, tunnel.KeyDiffers},
	tunnel.IKERefused:  {tunnel.IKEUnacceptable, tunnel.IKEVersion},
	tunnel.ESPRefused:  {tunnel.ESPUnacceptable},
	tunnel.TSRefused:   {tunnel.TSUnacceptable},
}

// note keeps the reason that a line of charon's log gives. What the peer says stands against its later silence.
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
			reason = r.failure.Reason // giving up says nothing more
		}
	}
	recent := now.Sub(r.reasonAt) < settled
	if recent && (why == noAnswer && r.reason != "" && r.reason != noAnswer || why == peerClosed && r.reason == closedHere) {
		return false // the peer's answer to our DELETE is one as well
	}
	if slices.Contains(vaguer[reason], r.failure.Reason) && now.Sub(r.reasonAt) < exactFor {
		return false
	}
	r.because(reason, why, now)
	return true
}

// because keeps a reason.
func (r *record) because(reason tunnel.Reason, words string, now time.Time) {
	r.reason, r.reasonAt = words, now
	if r.failure.Reason != reason {
		r.failure = tunnel.Failure{Reason: reason, Since: now}
	}
}

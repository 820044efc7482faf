package ipsec

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/tunnel"
)

// retry is the pace of attempts to bring a tunnel up.
var retry = backoff.Backoff{First: time.Second, Last: time.Minute}

const (
	// settled is how long a tunnel must have been up for the next attempt after a loss to be made at once.
	settled = 10 * time.Second
	// begin is the time in which an SA that was asked for must show.
	begin = 500 * time.Millisecond
	// blink is how long a CHILD SA may be missing before that counts: an IKE SA that is rekeyed hands its children over.
	blink = 300 * time.Millisecond
	// overlap is how long two live CHILD SAs are left alone: a rekeying has two for a moment.
	overlap = 5 * time.Second
	// lastOverlap is how long they are left alone at most, when the peer makes another for each that is ended, and
	// forgiven when that is forgotten.
	lastOverlap = time.Hour
	forgiven    = 10 * time.Minute
	// apart is the least difference in age, given in whole seconds, that both ends see alike.
	apart = 2 * time.Second
	// stuck is when an SA that is still being made is given up: retransmissions have long ended by then.
	stuck = 3 * time.Minute
	// replace is how long SAs with former addresses or identities carry traffic while the new ones are not up.
	replace = 30 * time.Second
	// hold is how long SAs that only the kernel knows are left to carry traffic after charon began again.
	hold = time.Minute
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

// action is what decide wants of charon; exactly one field is set.
type action struct {
	initiate       bool
	terminateIKE   uint32
	terminateChild uint32
}

// decide looks at what was read of a tunnel, updates its record and state, and returns what to do about it, and when to
// look again at the latest; zero: no time is known. It has no side effects but on r.
func (r *record) decide(now time.Time, jitter *rand.Rand) (actions []action, again time.Time) {
	wake := func(t time.Time) {
		if t.After(now) && (again.IsZero() || t.Before(again)) {
			again = t
		}
	}
	if !r.known {
		r.set(tunnel.Unknown, now)
		r.initiated = time.Time{} // whatever was begun, is gone with the charon that did
		return nil, time.Time{}
	}
	type carrier struct {
		ike   ikeSA
		child childSA
	}
	var live, old []carrier
	var pending, bare []ikeSA
	for _, ike := range r.sas {
		_, stale := r.stale[ike.ID]
		some := false
		for _, c := range ike.Children {
			some = some || c.pending() || c.live()
			switch {
			case !c.live():
			case stale:
				old = append(old, carrier{ike, c})
			case ike.State != "DELETING":
				live = append(live, carrier{ike, c})
			}
		}
		if stale {
			continue
		}
		if ike.pending() || ike.established() && slices.ContainsFunc(ike.Children, childSA.pending) {
			pending = append(pending, ike)
		}
		if ike.established() && !some {
			bare = append(bare, ike)
		}
	}
	// Which of several is kept is chosen so that both ends choose the same: the newer one, which both kernels send on, and
	// among those made at about the same time the one with the greatest SPIs.
	slices.SortFunc(live, func(a, b carrier) int {
		if d := b.child.Installed.Sub(a.child.Installed); d > apart || d < -apart {
			return cmp.Compare(d, 0)
		}
		if c := strings.Compare(b.ike.SPI, a.ike.SPI); c != 0 {
			return c
		}
		return cmp.Compare(max(b.child.In, b.child.Out), max(a.child.In, a.child.Out))
	})

	// Exactly one live CHILD SA.
	if len(live) < 2 && (len(live) == 0 || len(bare) == 0) {
		r.double = time.Time{}
		if now.Sub(r.endedAt) > forgiven {
			r.ended = 0
		}
	} else if r.double.IsZero() {
		r.double = now
	}
	if !r.double.IsZero() {
		// A peer that opens another SA for each that is ended is not fought with: two that work are better than one that
		// never rests.
		pause := backoff.Backoff{First: overlap, Last: lastOverlap}.Delay(2 * r.ended)
		if due := r.double.Add(pause); now.Before(due) {
			wake(due)
		} else {
			r.ended, r.endedAt = r.ended+1, now
			r.double = now // the next try, should this one be without effect
			wake(now.Add(overlap))
			for _, c := range live[1:] {
				if c.ike.ID == live[0].ike.ID || len(c.ike.Children) > 1 {
					actions = append(actions, action{terminateChild: c.child.ID})
				} else {
					actions = append(actions, action{terminateIKE: c.ike.ID})
				}
			}
			for _, ike := range bare {
				actions = append(actions, action{terminateIKE: ike.ID})
			}
		}
	}

	// SAs with former addresses or identities go when the new ones are up, or late.
	for _, ike := range r.sas {
		since, stale := r.stale[ike.ID]
		if !stale || ike.State == "DELETING" {
			continue
		}
		if due := since.Add(replace); len(live) > 0 || !now.Before(due) {
			actions = append(actions, action{terminateIKE: ike.ID})
			wake(now.Add(overlap))
		} else {
			wake(due)
		}
	}

	fresh := len(live) > 0
	if !fresh {
		live = old
	}
	carried := len(live) > 0
	if carried {
		if r.upSince.IsZero() {
			r.upSince = now
			r.adopted = r.state.TimesUp == 0 && r.initiated.IsZero()
			if r.adopted && !live[0].ike.Established.IsZero() {
				r.upSince = live[0].ike.Established // it has been up for longer than we know of it
			}
			r.state.TimesUp++
		}
		if now.Sub(r.upSince) >= settled {
			r.tries = 0
		} else {
			wake(r.upSince.Add(settled))
		}
		r.missing, r.held = time.Time{}, time.Time{}
		describe(&r.state, live[0].ike, live[0].child)
		r.set(tunnel.Up, now)
		if r.rekeyOf == 0 {
			r.rekeyOf = live[0].child.ID
		} else if r.rekeyOf != live[0].child.ID {
			r.rekey, r.rekeyOf = tunnel.Failure{}, live[0].child.ID
			if r.state.LastError == notRenewed {
				r.state.LastError = ""
			}
		}
		r.state.Failure = r.rekey
		if r.rekey.Reason != "" {
			r.state.LastError = notRenewed
		}
		if want := strings.Join(selectors(r.cfg), ", "); live[0].child.Selectors != want {
			if r.state.Failure.Reason == "" {
				r.state.Failure = tunnel.Failure{Reason: tunnel.TSNarrowed, Since: r.upSince}
				r.state.Evidence.Selectors = live[0].child.Selectors
			}
			r.state.LastError = fmt.Sprintf("the peer narrowed our traffic selectors %s to %s: the rest is dropped", want, live[0].child.Selectors)
		}
		if fresh {
			r.initiated, r.next = time.Time{}, time.Time{}
			return actions, again
		}
	} else if !r.upSince.IsZero() { // it was up: is it a loss, or the moment between two?
		if r.missing.IsZero() {
			r.missing = now
		}
		if due := r.missing.Add(blink); len(bare) > 0 && now.Before(due) {
			wake(due)
			return actions, again
		}
		if !r.adopted && now.Sub(r.upSince) < settled { // accepted and dropped at once: do not run in circles
			r.fail(now, jitter)
		}
		r.upSince = time.Time{}
	}

	down := func(s tunnel.Status) {
		if !carried {
			r.down(s, now)
		}
	}
	if len(pending) > 0 {
		if r.initiated.IsZero() {
			r.initiated = now // also one that the peer began
		}
		if due := r.initiated.Add(stuck); now.Before(due) {
			wake(due)
		} else {
			for _, ike := range pending {
				actions = append(actions, action{terminateIKE: ike.ID})
			}
		}
		r.next = time.Time{}
		down(tunnel.Connecting)
		return actions, again
	}
	if !r.initiated.IsZero() {
		if due := r.initiated.Add(begin); now.Before(due) && r.reasonAt.Before(r.initiated) {
			wake(due)
			down(tunnel.Connecting)
			return actions, again
		}
		r.initiated = time.Time{}
		r.fail(now, jitter)
	}
	switch {
	case r.cfg.IPsec.RespondOnly:
		r.next = time.Time{}
		if r.reason == "" {
			r.because(tunnel.Waiting, "waiting for the peer to connect", now)
		}
		down(tunnel.Down)
	case now.Before(r.next):
		wake(r.next)
		down(tunnel.Down)
	default:
		r.initiated, r.next = now, time.Time{}
		actions = append(actions, action{initiate: true})
		wake(now.Add(begin))
		down(tunnel.Connecting)
	}
	return actions, again
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

package ipsec

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/tunnel"
)

// retry is the back-off between attempts to bring a tunnel up.
var retry = backoff.Backoff{First: time.Second, Last: time.Minute}

const (
	// stableAfter is how long a tunnel must have been up for the first attempt after a loss to
	// be made at once.
	stableAfter = 10 * time.Second
	// begin is how long an initiated SA may take to appear.
	begin = 500 * time.Millisecond
	// blink is how long a CHILD SA may be missing without being lost: the rekeying of an IKE SA
	// moves its children to the new one.
	blink = 300 * time.Millisecond
	// overlap is how long two live CHILD SAs are tolerated: during a rekeying there are briefly
	// two.
	overlap = 5 * time.Second
	// lastOverlap is the longest time for which they are tolerated, when the peer creates another
	// one whenever one is ended. After forgiven without one, the time is reset.
	lastOverlap = time.Hour
	forgiven    = 10 * time.Minute
	// apart is the difference in age, which charon gives in whole seconds, from which both ends
	// agree which SA is newer.
	apart = 2 * time.Second
	// stuck is when an SA that is still being negotiated is given up. Retransmissions have long
	// ended by then.
	stuck = 3 * time.Minute
	// replace is how long SAs with former addresses or identities carry traffic while the new ones
	// are not up.
	replace = 30 * time.Second
	// hold is how long SAs that exist only in the kernel may carry traffic after a restart of
	// charon.
	hold = time.Minute
)

// action is a command to charon; exactly one field is set.
type action struct {
	initiate       bool
	terminateIKE   uint32
	terminateChild uint32
}

// decision is the result of one call of decide.
type decision struct {
	now    time.Time
	jitter *rand.Rand
	// carried is set when SAs that are to be replaced carry traffic: the tunnel stays up while new
	// ones are negotiated.
	carried bool
	actions []action
	again   time.Time // when to decide again at the latest; zero: at the next event
}

// wake makes decide be called again at a time in the future.
func (d *decision) wake(t time.Time) {
	if t.After(d.now) && (d.again.IsZero() || t.Before(d.again)) {
		d.again = t
	}
}

func (d *decision) terminate(ikes []ikeSA) {
	for _, ike := range ikes {
		d.actions = append(d.actions, action{terminateIKE: ike.ID})
	}
}

// decide evaluates the SAs that were read of a tunnel, updates its record and state, and returns
// the actions to take, and when it must be called again at the latest (zero: at the next event).
// It has no side effects except on r.
//
// First it ends superfluous SAs, whether the tunnel is up or not. Then the tunnel is either up,
// with SAs that stay or SAs that are to be replaced, or it is not, which may be a loss. When no SA
// stays, then one is being negotiated, or one was initiated a moment ago, or the next attempt is
// due now or later.
func (r *record) decide(now time.Time, jitter *rand.Rand) (actions []action, again time.Time) {
	if !r.known {
		r.set(tunnel.Unknown, now)
		r.initiated = time.Time{} // an attempt that had begun has ended with its charon
		return nil, time.Time{}
	}
	d := &decision{now: now, jitter: jitter}
	s := classify(r.sas, r.stale)
	r.endDoubles(d, s)
	r.endStale(d, len(s.live) > 0)
	switch {
	case len(s.live) > 0:
		r.up(d, s.live[0])
		r.initiated, r.next = time.Time{}, time.Time{}
		return d.actions, d.again
	case len(s.old) > 0:
		d.carried = true
		r.up(d, s.old[0])
	case !r.upSince.IsZero() && r.betweenTwo(d, len(s.bare) > 0):
		return d.actions, d.again
	}
	switch {
	case len(s.pending) > 0:
		r.await(d, s.pending)
	case !r.initiated.IsZero() && r.beginning(d):
	default:
		r.attempt(d)
	}
	return d.actions, d.again
}

// carrier is a CHILD SA that carries traffic, with its IKE SA.
type carrier struct {
	ike   ikeSA
	child childSA
}

// found holds the SAs that were read of a tunnel, by their use. An SA that is neither live nor
// being negotiated is in no field.
type found struct {
	live []carrier // SAs that stay; the first one is the one to keep
	// old are SAs with former addresses or identities, which carry traffic until new ones do.
	old     []carrier
	pending []ikeSA // IKE SAs that are being negotiated, or whose CHILD SA is
	bare    []ikeSA // established IKE SAs without a CHILD SA
}

// classify sorts the SAs of a tunnel. stale holds the IKE SAs with former addresses or identities.
func classify(sas []ikeSA, stale map[uint32]time.Time) (s found) {
	for _, ike := range sas {
		_, former := stale[ike.ID]
		some := false
		for _, c := range ike.Children {
			some = some || c.pending() || c.live()
			switch {
			case !c.live():
			case former:
				s.old = append(s.old, carrier{ike, c})
			case ike.State != "DELETING":
				s.live = append(s.live, carrier{ike, c})
			}
		}
		if former {
			continue
		}
		if ike.pending() || ike.established() && slices.ContainsFunc(ike.Children, childSA.pending) {
			s.pending = append(s.pending, ike)
		}
		if ike.established() && !some {
			s.bare = append(s.bare, ike)
		}
	}
	slices.SortFunc(s.live, keepFirst)
	return s
}

// keepFirst orders live CHILD SAs so that the first one is kept, and both ends choose the same:
// the newer one, which both kernels send on, and among those of about the same age the one with
// the greatest SPIs.
func keepFirst(a, b carrier) int {
	if d := b.child.Installed.Sub(a.child.Installed); d > apart || d < -apart {
		return cmp.Compare(d, 0)
	}
	if c := strings.Compare(b.ike.SPI, a.ike.SPI); c != 0 {
		return c
	}
	return cmp.Compare(max(b.child.In, b.child.Out), max(a.child.In, a.child.Out))
}

// endDoubles makes sure that there is exactly one live CHILD SA, and no further IKE SA without
// one. It tolerates two of them for as long as a rekeying takes. If the peer opens another SA
// whenever one is ended, endDoubles does not fight it: two working SAs are better than constant
// changes, so the pause grows with each SA that was ended recently.
func (r *record) endDoubles(d *decision, s found) {
	if len(s.live) == 0 || len(s.live) == 1 && len(s.bare) == 0 {
		r.double = time.Time{}
		if d.now.Sub(r.endedAt) > forgiven {
			r.ended = 0
		}
		return
	}
	if r.double.IsZero() {
		r.double = d.now
	}
	pause := backoff.Backoff{First: overlap, Last: lastOverlap}.Delay(2 * r.ended)
	if due := r.double.Add(pause); d.now.Before(due) {
		d.wake(due)
		return
	}
	r.ended, r.endedAt = r.ended+1, d.now
	r.double = d.now // the next attempt, in case this one has no effect
	d.wake(d.now.Add(overlap))
	for _, c := range s.live[1:] {
		if c.ike.ID == s.live[0].ike.ID || len(c.ike.Children) > 1 {
			d.actions = append(d.actions, action{terminateChild: c.child.ID})
		} else {
			d.actions = append(d.actions, action{terminateIKE: c.ike.ID})
		}
	}
	d.terminate(s.bare)
}

// endStale ends SAs with former addresses or identities when the new ones are up or late. Until
// then they carry the traffic.
func (r *record) endStale(d *decision, replaced bool) {
	for _, ike := range r.sas {
		since, stale := r.stale[ike.ID]
		if !stale || ike.State == "DELETING" {
			continue
		}
		if due := since.Add(replace); replaced || !d.now.Before(due) {
			d.actions = append(d.actions, action{terminateIKE: ike.ID})
			d.wake(d.now.Add(overlap))
		} else {
			d.wake(due)
		}
	}
}

// up records that a CHILD SA carries the tunnel's traffic. Once the tunnel has been up for a
// while, the count of attempts is reset. The state may still have a failure: the peer refuses to
// renew the SA, or has narrowed the traffic selectors.
func (r *record) up(d *decision, c carrier) {
	if r.upSince.IsZero() {
		r.upSince = d.now
		r.adopted = r.state.TimesUp == 0 && r.initiated.IsZero()
		if r.adopted && !c.ike.Established.IsZero() {
			r.upSince = c.ike.Established // it came up before this process first saw it
		}
		r.state.TimesUp++
	}
	if d.now.Sub(r.upSince) >= stableAfter {
		r.tries = 0
	} else {
		d.wake(r.upSince.Add(stableAfter))
	}
	r.missing, r.held = time.Time{}, time.Time{}
	r.describe(c)
	r.set(tunnel.Up, d.now)
	if r.rekeyOf == 0 {
		r.rekeyOf = c.child.ID
	} else if r.rekeyOf != c.child.ID {
		r.rekey, r.rekeyOf = tunnel.Failure{}, c.child.ID
		if r.state.LastError == notRenewed {
			r.state.LastError = ""
		}
	}
	r.state.Failure = r.rekey
	if r.rekey.Reason != "" {
		r.state.LastError = notRenewed
	}
	if want := strings.Join(selectors(r.cfg), ", "); c.child.Selectors != want {
		if r.state.Failure.Reason == "" {
			r.state.Failure = tunnel.Failure{Reason: tunnel.TSNarrowed, Since: r.upSince}
			r.state.Evidence.Selectors = c.child.Selectors
		}
		r.state.LastError = fmt.Sprintf("the peer narrowed our traffic selectors %s to %s: the rest is dropped", want, c.child.Selectors)
	}
}

// betweenTwo reports whether a tunnel that was up may soon be up again: the rekeying of an IKE SA
// moves its children, and meanwhile the new one is bare. Otherwise the tunnel is lost. If the peer
// had accepted the SA and then dropped it at once, this counts as a failed attempt, so that
// attempts do not repeat without a pause. After any other loss the next attempt is made at once.
func (r *record) betweenTwo(d *decision, bare bool) bool {
	if r.missing.IsZero() {
		r.missing = d.now
	}
	if due := r.missing.Add(blink); bare && d.now.Before(due) {
		d.wake(due)
		return true
	}
	if !r.adopted && d.now.Sub(r.upSince) < stableAfter {
		r.fail(d.now, d.jitter)
	}
	r.upSince = time.Time{}
	return false
}

// await leaves SAs alone that this node or the peer is negotiating, until they are stuck.
func (r *record) await(d *decision, pending []ikeSA) {
	if r.initiated.IsZero() {
		r.initiated = d.now // also one that the peer began
	}
	if due := r.initiated.Add(stuck); d.now.Before(due) {
		d.wake(due)
	} else {
		d.terminate(pending)
	}
	r.next = time.Time{}
	r.notUp(d, tunnel.Connecting)
}

// beginning reports whether an initiated SA may still appear: charon takes a moment, and logs it
// if it gives up earlier. Otherwise the attempt has failed.
func (r *record) beginning(d *decision) bool {
	if due := r.initiated.Add(begin); d.now.Before(due) && r.reasonAt.Before(r.initiated) {
		d.wake(due)
		r.notUp(d, tunnel.Connecting)
		return true
	}
	r.initiated = time.Time{}
	r.fail(d.now, d.jitter)
	return false
}

// attempt initiates an SA once the next attempt is due and no SA exists or is being negotiated. If
// the tunnel only responds, it waits for the peer.
func (r *record) attempt(d *decision) {
	switch {
	case r.cfg.IPsec.RespondOnly:
		r.next = time.Time{}
		if r.reason == "" {
			r.because(tunnel.Waiting, "waiting for the peer to connect", d.now)
		}
		r.notUp(d, tunnel.Down)
	case d.now.Before(r.next):
		d.wake(r.next)
		r.notUp(d, tunnel.Down)
	default:
		r.initiated, r.next = d.now, time.Time{}
		d.actions = append(d.actions, action{initiate: true})
		d.wake(d.now.Add(begin))
		r.notUp(d, tunnel.Connecting)
	}
}

// notUp sets a status other than Up, unless old SAs still carry the tunnel.
func (r *record) notUp(d *decision, s tunnel.Status) {
	if !d.carried {
		r.down(s, d.now)
	}
}

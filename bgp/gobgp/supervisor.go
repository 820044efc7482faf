package gobgp

import (
	"maps"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/backoff"
)

var (
	// holding is how long a peer is held out, by its strikes.
	holding = backoff.Backoff{First: time.Minute, Last: time.Hour}
	// restart is the time between two starts of a process that keeps ending, or cannot be started.
	restart = backoff.Backoff{First: time.Second, Last: 30 * time.Second}
)

const (
	// After carefulAfter crashes within carefulWindow that name no peer, the suspects are let in one at a time, after
	// all others. A suspect is who has sent something just before such a crash.
	carefulAfter  = 2
	carefulWindow = time.Minute

	// A suspect that is let in has proved itself trialUp after its session came up, or trialWait after it was let in.
	trialUp   = 20 * time.Second
	trialWait = 30 * time.Second

	// After recordAfter crashes within recordWindow just before which always the same peer, and no other, has sent
	// something, it is this peer. Crashes within settleAfter of a session's coming up do not count: what another has
	// sent before may do its work then.
	recordAfter  = 3
	recordWindow = 10 * time.Minute
	settleAfter  = 5 * time.Second
)

// supervisor decides which peers may have a session and when the process starts again. It knows time only as an argument.
//
// A crash that names no peer convicts none by itself, since what one peer has sent may end the process when another
// comes up. A suspect during whose trial the process ends is accused: it is let in alone, and convicted if the process
// ends then too, just after the suspect has sent something. If it does not end, the others come back.
type supervisor struct {
	holds   map[string]*hold
	dirty   bool      // admit has changed since the last tick
	crashes []unnamed // within recordWindow
	lastUp  time.Time // when the last session came up

	careful bool
	suspect map[string]int // crashes just before which the peer has sent something
	proved  map[string]bool
	trial   string          // the suspect that was let in last; empty: none
	accused string          // the suspect that is alone; empty: none
	cleared map[string]bool // were accused and behaved; they are not accused again while careful
	since   time.Time
	up      time.Time // when the session of the suspect came up
}

// unnamed is a crash that names no peer.
type unnamed struct {
	at      time.Time
	only    string // the peer that alone has sent something just before; empty: none or several
	settled bool   // no session had come up just before
}

// hold keeps a peer out.
type hold struct {
	state   bgp.SessionState // Quarantined or PrefixLimit
	reason  string
	strikes int
	until   time.Time
	active  bool
}

func newSupervisor() *supervisor {
	return &supervisor{holds: make(map[string]*hold), proved: make(map[string]bool), cleared: make(map[string]bool), suspect: make(map[string]int)}
}

// strike holds a peer out for a minute, and for twice as long each time, up to an hour. A peer that behaved for an
// hour after its last time starts again.
func (s *supervisor) strike(now time.Time, name string, state bgp.SessionState, reason string) *hold {
	h := s.holds[name]
	if h == nil || now.Sub(h.until) > holding.Last {
		h = &hold{}
		s.holds[name] = h
	}
	h.until = now.Add(holding.Delay(h.strikes))
	h.strikes++
	s.dirty = true
	h.state, h.reason, h.active = state, reason, true
	return h
}

// held returns the hold that keeps a peer out, or nil.
func (s *supervisor) held(name string) *hold {
	if h := s.holds[name]; h != nil && h.active {
		return h
	}
	return nil
}

// reset lets a peer in again and forgets what it did. It reports whether it was held.
func (s *supervisor) reset(name string) bool {
	h := s.held(name)
	delete(s.holds, name)
	return h != nil
}

// crashed takes note that the process has ended, of itself, and returns the name of the peer that is now quarantined
// for it, if any, and how long to wait before the next start. recent are the peers that have sent something just before.
func (s *supervisor) crashed(now time.Time, culprit, reason string, recent map[string]bool) (string, time.Duration) {
	if culprit == "" {
		culprit = s.judge(now, recent)
		if culprit != "" {
			reason = "BGP process ended after a message of this peer, and of no other: " + reason
		}
	}
	if culprit != "" {
		if culprit == s.trial {
			s.trial = ""
		}
		if culprit == s.accused {
			s.accused = ""
		}
		delete(s.proved, culprit)
		delete(s.suspect, culprit)
		s.crashes = slices.DeleteFunc(s.crashes, func(c unnamed) bool { return c.only == culprit })
		s.strike(now, culprit, bgp.Quarantined, reason)
		return culprit, 0
	}
	n := 0
	for _, c := range s.crashes {
		if now.Sub(c.at) <= carefulWindow {
			n++
		}
	}
	if n >= carefulAfter {
		s.careful = true
	}
	if n <= 1 {
		return "", 0
	}
	return "", restart.Delay(n - 2)
}

// judge takes a crash that names no peer into account and returns the peer that is convicted of it, if any.
func (s *supervisor) judge(now time.Time, recent map[string]bool) string {
	c := unnamed{at: now, settled: now.Sub(s.lastUp) >= settleAfter}
	if len(recent) == 1 {
		for name := range recent {
			c.only = name
		}
	}
	alone := s.accused
	s.accused = ""
	if alone != "" && c.only == alone {
		return alone
	}
	s.crashes = slices.DeleteFunc(append(s.crashes, c), func(c unnamed) bool { return now.Sub(c.at) > recordWindow })
	if last := s.crashes[max(0, len(s.crashes)-recordAfter):]; c.only != "" && len(last) == recordAfter &&
		!slices.ContainsFunc(last, func(x unnamed) bool { return x.only != c.only || !x.settled }) {
		return c.only
	}
	for name := range recent {
		s.suspect[name]++
		delete(s.proved, name)
	}
	if s.careful && s.trial != "" && recent[s.trial] && !s.cleared[s.trial] {
		s.accused, s.since, s.up = s.trial, now, time.Time{}
	}
	s.trial = ""
	return ""
}

// tick lets in who may come in by now, of the peers in names, and returns when to call it next; zero: never. It reports
// whether admit has changed.
func (s *supervisor) tick(now time.Time, names []string) (next time.Time, changed bool) {
	earliest := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	changed, s.dirty = s.dirty, false
	for _, h := range s.holds {
		if h.active && !now.Before(h.until) {
			h.active, changed = false, true
		}
		if h.active {
			earliest(h.until)
		}
	}
	if !s.careful {
		return next, changed
	}
	// Whether a suspect has proved itself by now, or is gone.
	over := func(name string) bool {
		end := s.since.Add(trialWait)
		if !s.up.IsZero() {
			end = s.up.Add(trialUp)
		}
		if now.Before(end) && slices.Contains(names, name) && s.held(name) == nil {
			earliest(end)
			return false
		}
		return true
	}
	if s.accused != "" {
		if !over(s.accused) {
			return next, changed
		}
		s.cleared[s.accused], s.proved[s.accused] = true, true
		s.accused, changed = "", true
	}
	if s.trial != "" {
		if !over(s.trial) {
			return next, changed
		}
		s.proved[s.trial], s.trial = true, ""
	}
	waiting := slices.DeleteFunc(slices.Clone(names), func(n string) bool {
		return s.suspect[n] == 0 || s.proved[n] || s.held(n) != nil
	})
	if len(waiting) > 0 {
		// The most suspect comes last.
		slices.SortStableFunc(waiting, func(a, b string) int { return s.suspect[a] - s.suspect[b] })
		s.trial, s.since, s.up = waiting[0], now, time.Time{}
		earliest(now.Add(trialWait))
		return next, true
	}
	// All are in. Stay careful until it has been quiet for a while.
	end := now
	if len(s.crashes) > 0 {
		end = s.crashes[len(s.crashes)-1].at.Add(2 * carefulWindow)
	}
	if now.Before(end) {
		earliest(end)
	} else {
		s.careful = false
		clear(s.suspect)
		clear(s.proved)
		clear(s.cleared)
	}
	return next, changed
}

// established takes note that the session of a peer has come up.
func (s *supervisor) established(now time.Time, name string) {
	s.lastUp = now
	if (name == s.trial || name == s.accused) && s.up.IsZero() {
		s.up = now
	}
}

// admit reports whether a peer may have a session now.
func (s *supervisor) admit(name string) bool {
	switch {
	case s.held(name) != nil:
		return false
	case s.accused != "":
		return name == s.accused
	}
	return !s.careful || s.suspect[name] == 0 || s.proved[name] || s.trial == name
}

// keep forgets the peers that are not in names.
func (s *supervisor) keep(names []string) {
	gone := func(name string) bool { return !slices.Contains(names, name) }
	maps.DeleteFunc(s.holds, func(name string, _ *hold) bool { return gone(name) })
	maps.DeleteFunc(s.proved, func(name string, _ bool) bool { return gone(name) })
	maps.DeleteFunc(s.cleared, func(name string, _ bool) bool { return gone(name) })
	maps.DeleteFunc(s.suspect, func(name string, _ int) bool { return gone(name) })
	if s.trial != "" && gone(s.trial) {
		s.trial = ""
	}
	if s.accused != "" && gone(s.accused) {
		s.accused = ""
	}
}

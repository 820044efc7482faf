package gobgp

import (
	"maps"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

const (
	holdMin = time.Minute
	holdMax = time.Hour

	// delayMax is the longest time between two starts of a process that keeps ending.
	delayMax = 30 * time.Second

	// After carefulAfter crashes within carefulWindow that name nobody, peers are let in one at a time.
	carefulAfter  = 2
	carefulWindow = time.Minute

	// A peer that is let in has proved itself trialUp after its session came up, or trialWait after it was let in.
	trialUp   = 3 * time.Second
	trialWait = 10 * time.Second
)

// supervisor decides who may have a session and when the process starts again. It knows time only as an argument.
type supervisor struct {
	holds   map[string]*hold
	dirty   bool        // admit has changed since the last tick
	crashes []time.Time // that named nobody, within carefulWindow

	careful bool
	proved  map[string]bool
	trial   string // the peer that was let in last; empty: none
	since   time.Time
	up      time.Time // when its session came up
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
	return &supervisor{holds: make(map[string]*hold), proved: make(map[string]bool)}
}

// strike holds a peer out for a minute, and for twice as long each time, up to an hour. A peer that behaved for an
// hour after its last time starts anew.
func (s *supervisor) strike(now time.Time, name string, state bgp.SessionState, reason string) *hold {
	h := s.holds[name]
	if h == nil || now.Sub(h.until) > holdMax {
		h = &hold{}
		s.holds[name] = h
	}
	h.strikes++
	s.dirty = true
	h.state, h.reason, h.active = state, reason, true
	h.until = now.Add(min(holdMin<<min(h.strikes-1, 10), holdMax))
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
// for it, if any, and how long to wait before the next start.
func (s *supervisor) crashed(now time.Time, culprit, reason string) (string, time.Duration) {
	if culprit == "" && s.careful && s.trial != "" {
		culprit = s.trial
		reason = "BGP process ended while the session came up: " + reason
	}
	if culprit != "" {
		if culprit == s.trial {
			s.trial = ""
		}
		delete(s.proved, culprit)
		s.strike(now, culprit, bgp.Quarantined, reason)
		return culprit, 0
	}
	s.crashes = slices.DeleteFunc(append(s.crashes, now), func(t time.Time) bool { return now.Sub(t) > carefulWindow })
	n := len(s.crashes)
	if n >= carefulAfter {
		s.careful, s.trial = true, ""
		clear(s.proved)
	}
	if n == 1 {
		return "", 0
	}
	return "", min(time.Second<<min(n-2, 10), delayMax)
}

// startDelay is how long to wait after the process could not be started n times in a row.
func startDelay(n int) time.Duration { return min(time.Second<<min(n, 10), delayMax) }

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
	if s.trial != "" {
		end := s.since.Add(trialWait)
		if !s.up.IsZero() {
			end = s.up.Add(trialUp)
		}
		if now.Before(end) && slices.Contains(names, s.trial) {
			earliest(end)
			return next, changed
		}
		s.proved[s.trial] = true
		s.trial = ""
	}
	for _, name := range names {
		if !s.proved[name] && s.held(name) == nil {
			s.trial, s.since, s.up = name, now, time.Time{}
			earliest(now.Add(trialWait))
			return next, true
		}
	}
	// Everyone is in. Stay careful until it has been quiet for a while.
	if end := s.crashes[len(s.crashes)-1].Add(2 * carefulWindow); now.Before(end) {
		earliest(end)
	} else {
		s.careful = false
	}
	return next, changed
}

// established takes note that the session of a peer has come up.
func (s *supervisor) established(now time.Time, name string) {
	if name == s.trial && s.up.IsZero() {
		s.up = now
	}
}

// admit reports whether a peer may have a session now.
func (s *supervisor) admit(name string) bool {
	return s.held(name) == nil && (!s.careful || s.proved[name] || s.trial == name)
}

// keep forgets the peers that are not in names.
func (s *supervisor) keep(names []string) {
	gone := func(name string) bool { return !slices.Contains(names, name) }
	maps.DeleteFunc(s.holds, func(name string, _ *hold) bool { return gone(name) })
	maps.DeleteFunc(s.proved, func(name string, _ bool) bool { return gone(name) })
	if s.trial != "" && gone(s.trial) {
		s.trial = ""
	}
}

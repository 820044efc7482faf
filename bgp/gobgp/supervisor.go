package gobgp

import (
	"maps"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/backoff"
)

var (
	// holding is how long a peer is held out, by the number of its strikes.
	holding = backoff.Backoff{First: time.Minute, Last: time.Hour}
	// restart is the delay between two starts of a process that keeps ending or cannot be started.
	restart = backoff.Backoff{First: time.Second, Last: 30 * time.Second}
)

const (
	// After carefulAfter crashes within carefulWindow that name no peer, suspects are admitted one
	// at a time, after all other peers. A suspect is a peer that sent something just before such a
	// crash.
	carefulAfter  = 2
	carefulWindow = time.Minute

	// A suspect has passed its trial when the process has not ended trialUp after its session came
	// up, or trialWait after it was admitted.
	trialUp   = 20 * time.Second
	trialWait = 30 * time.Second

	// A peer is also blamed after recordAfter crashes within recordWindow if this peer, and no
	// other, sent something just before each of them. Crashes within steadyAfter of a session's
	// start do not count: they may be due to an earlier message of another peer.
	recordAfter  = 3
	recordWindow = 10 * time.Minute
	steadyAfter  = 5 * time.Second
)

// supervisor decides which peers may have a session and when the process starts again. It gets the
// time only as an argument.
//
// A crash that names no peer is not enough to blame one, since a message of one peer may end the
// process when another peer comes up. A suspect during whose trial the process ends is accused: it
// is admitted alone, and blamed if the process then ends again just after the suspect has sent
// something. If the process does not end, the others are admitted again.
type supervisor struct {
	holds   map[string]*hold
	dirty   bool      // the result of admit has changed since the last tick
	crashes []unnamed // within recordWindow
	lastUp  time.Time // when a session last came up

	careful bool
	suspect map[string]int // by peer, the number of crashes just before which it sent something
	proved  map[string]bool
	trial   string          // the suspect that was admitted last; empty: none
	accused string          // the suspect that is admitted alone; empty: none
	cleared map[string]bool // accused before without a crash; not accused again while careful
	since   time.Time
	up      time.Time // when the session of the suspect came up
}

// unnamed is a crash that names no peer.
type unnamed struct {
	at     time.Time
	only   string // the only peer that sent something just before; empty: none or several
	steady bool   // no session had come up just before
}

// hold keeps a peer from having a session.
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

// strike holds a peer out for a minute, and for twice as long each further time, up to an hour.
// After an hour without a strike, it starts again at a minute.
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

// held returns the active hold of a peer, or nil.
func (s *supervisor) held(name string) *hold {
	if h := s.holds[name]; h != nil && h.active {
		return h
	}
	return nil
}

// reset admits a peer again and clears its strikes. It reports whether the peer was held out.
func (s *supervisor) reset(name string) bool {
	h := s.held(name)
	delete(s.holds, name)
	return h != nil
}

// crashed records a crash of the process. It returns the name of the peer that is now quarantined
// for it, if any, and how long to wait before the next start. recent holds the peers that sent
// something just before.
func (s *supervisor) crashed(now time.Time, culprit, reason string, recent map[string]bool) (string, time.Duration) {
	if culprit == "" {
		culprit = s.judge(now, recent)
		if culprit != "" {
			reason = "BGP process ended after a message from this peer alone: " + reason
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

// judge records a crash that names no peer, and returns the peer that is to blame, if any.
func (s *supervisor) judge(now time.Time, recent map[string]bool) string {
	c := unnamed{at: now, steady: now.Sub(s.lastUp) >= steadyAfter}
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
		!slices.ContainsFunc(last, func(x unnamed) bool { return x.only != c.only || !x.steady }) {
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

// tick admits the peers in names that may have a session by now. It returns when it must be called
// next (zero: never), and whether the result of admit has changed.
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
	// over reports whether a trial is over, because the suspect has passed it, or is gone.
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
		// The most suspect peer comes last.
		slices.SortStableFunc(waiting, func(a, b string) int { return s.suspect[a] - s.suspect[b] })
		s.trial, s.since, s.up = waiting[0], now, time.Time{}
		earliest(now.Add(trialWait))
		return next, true
	}
	// All peers are admitted. Stay careful until no crash has occurred for a while.
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

// established records that the session of a peer has come up.
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

// keep drops all records of peers that are not in names.
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

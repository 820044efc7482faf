package health

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

// Status is the state of an address or a target.
type Status string

// The states. A target is never Returning.
const (
	// Unknown: no verdict yet. It counts as usable, because a daemon that restarts must not move
	// flows.
	Unknown Status = "unknown"
	Healthy Status = "healthy"
	Down    Status = "down"
	// Returning: healthy again, and held down.
	Returning Status = "returning"
)

// Statuses lists every state.
var Statuses = []Status{Healthy, Down, Returning, Unknown}

// TargetState is the state of one target from one address.
type TargetState struct {
	Target egress.Target
	Status Status
	Since  time.Time
	// LastError and Failed are the error and the time of the last failed probe; both stay when the
	// target answers again.
	LastError string
	Failed    time.Time

	answers, failures int // in a row
}

// Member is the state of one address. It has no clock and does no I/O.
type Member struct {
	Address netip.Addr
	Status  Status
	Since   time.Time
	Targets []TargetState

	probes egress.Probes
	quorum int
}

// newMember returns the state of an address. It takes over the state of the address and of the same
// targets from former.
func newMember(a netip.Addr, p egress.Probes, former *Member, now time.Time) *Member {
	m := &Member{Address: a, Status: Unknown, Since: now, probes: p}
	if former != nil {
		m.Status, m.Since = former.Status, former.Since
	}
	targets, quorum := p.For(a)
	m.quorum = quorum
	for _, t := range targets {
		s := TargetState{Target: t, Status: Unknown, Since: now}
		if former != nil {
			for _, f := range former.Targets {
				if f.Target == t {
					s = f
				}
			}
		}
		m.Targets = append(m.Targets, s)
	}
	m.advance(now)
	return m
}

// Usable reports whether new flows may get the address.
func (m *Member) Usable() bool { return m.Status == Unknown || m.Status == Healthy }

// record takes the result of a probe, nil for an answer, and reports whether a state changed.
func (m *Member) record(target int, err error, now time.Time) bool {
	t := &m.Targets[target]
	was := t.Status
	if err == nil {
		t.answers, t.failures = t.answers+1, 0
		// Rise applies only to a target that was down.
		if t.Status == Unknown || t.answers >= m.probes.Rise {
			t.Status = Healthy
		}
	} else {
		t.answers, t.failures = 0, t.failures+1
		t.LastError, t.Failed = err.Error(), now
		if t.failures >= m.probes.Fall {
			t.Status = Down
		}
	}
	if t.Status != was {
		t.Since = now
	}
	return m.advance(now) || t.Status != was
}

// advance derives the state from the targets and the time, and reports whether it changed.
func (m *Member) advance(now time.Time) bool {
	up, unknown := 0, 0
	for _, t := range m.Targets {
		switch t.Status {
		case Healthy:
			up++
		case Unknown:
			unknown++
		}
	}
	next := m.Status
	switch {
	case up+unknown < m.quorum:
		next = Down
	case up < m.quorum:
		// Not decided: the state stays.
	case m.Status == Down && m.probes.HoldDown > 0:
		next = Returning
	case m.Status == Returning && now.Sub(m.Since) < m.probes.HoldDown:
	default:
		next = Healthy
	}
	if next == m.Status {
		return false
	}
	m.Status, m.Since = next, now
	return true
}

// Reason returns why the address is not usable; empty when it is.
func (m *Member) Reason() string {
	switch m.Status {
	case Returning:
		return fmt.Sprintf("held down until %s", m.Since.Add(m.probes.HoldDown).UTC().Format(time.RFC3339))
	case Down:
		var down []string
		for _, t := range m.Targets {
			if t.Status == Down {
				down = append(down, fmt.Sprintf("%v: %s", t.Target, t.LastError))
			}
		}
		return fmt.Sprintf("reaches %d of %d targets, needs %d (%s)", len(m.Targets)-len(down), len(m.Targets), m.quorum, strings.Join(down, "; "))
	}
	return ""
}

// errTimeout stands for every probe without an answer.
var errTimeout = errors.New("no answer in time")

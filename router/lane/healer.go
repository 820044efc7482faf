package lane

import (
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
)

// Healer decides when lanes that are dead are healed, by name of the lane.
type Healer map[string]*Healing

// Healing is what was done for a lane since it died.
type Healing struct {
	Count int
	At    time.Time // of the last attempt
	How   string    // "new keys" or "new interface"
	Err   error     // of the last attempt

	due  time.Time // of the next one
	good time.Time // since when the lane is not dead; zero: it is
}

// Heal is an attempt to heal a lane.
type Heal struct {
	Lane string
	// Again says that the interface is made again. Otherwise new keys are negotiated.
	Again bool
}

// How describes the attempt.
func (h Heal) How() string {
	if h.Again {
		return "new interface"
	}
	return "new keys"
}

const (
	// healAfter is how long a lane must be dead before the first attempt.
	healAfter = time.Second
	// healedAfter is how long a lane must work before its next death begins with the first pause
	// again.
	healedAfter = time.Minute
	// renewEvery is the number of attempts from one new interface to the next.
	renewEvery = 3
)

var healPause = backoff.Backoff{First: healAfter, Last: 5 * time.Minute}

// Due returns the attempts to make now. A lane is healed only while another lane of its link works:
// otherwise the node or its network is down, and not the lane.
func (h Healer) Due(states []LinkState, now time.Time) (out []Heal) {
	present := map[string]bool{}
	for _, s := range states {
		for _, one := range s.Lanes {
			present[one.Name] = true
			dead := one.Out.Status == Dead || one.In.Status == Dead
			state := h[one.Name]
			if !dead {
				if state == nil {
					continue
				}
				if state.good.IsZero() {
					state.good = now
				}
				if now.Sub(state.good) >= healedAfter {
					delete(h, one.Name)
				}
				continue
			}
			if state == nil {
				state = &Healing{due: now.Add(healAfter)}
				h[one.Name] = state
			}
			if !state.good.IsZero() { // it works no longer
				state.good = time.Time{}
				state.due = latest(state.due, now.Add(healAfter))
			}
			if now.Before(state.due) || s.Usable() == 0 {
				continue
			}
			state.Count++
			attempt := Heal{one.Name, state.Count%renewEvery == 0}
			state.At, state.due, state.How, state.Err = now, now.Add(healPause.Delay(state.Count-1)), attempt.How(), nil
			out = append(out, attempt)
		}
	}
	for name := range h {
		if !present[name] {
			delete(h, name)
		}
	}
	return out
}

// Failed keeps the error of an attempt.
func (h Healer) Failed(lane string, err error) {
	if s := h[lane]; s != nil {
		s.Err = err
	}
}

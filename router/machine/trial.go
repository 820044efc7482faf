package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/image/helper"
	"github.com/isthmus-net/isthmus/image/slot"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

// before is the state before an upgrade, which the machine needs after the reboot to judge the new
// slot.
type before struct {
	Trial   slot.Name `json:"trial"`
	Applied bool      `json:"applied"`
	Tunnels []string  `json:"tunnels,omitempty"` // that were up
	Peers   []string  `json:"peers,omitempty"`   // whose sessions were established
	// Missing is why the trial was not good at the last check.
	Missing []string `json:"missing,omitempty"`
}

const record = "upgrade"

// now returns the present state.
func (m *Machine) now() (b before) {
	s, _ := m.Node.Status()
	b.Applied = s.GetGeneration() == s.GetAppliedGeneration()
	tunnels, _ := m.Node.Tunnels()
	for _, t := range tunnels {
		if t.GetState() == "up" {
			b.Tunnels = append(b.Tunnels, t.GetName())
		}
	}
	peers, _ := m.Node.Peers()
	for _, p := range peers {
		if p.GetState() == "established" {
			b.Peers = append(b.Peers, p.GetName())
		}
	}
	return b
}

// listed bounds the names of one kind in a message.
const listed = 5

// missing returns why a slot is not good yet: what does not work, and what differs from before.
func missing(was, is before, ready bool, serves error, conditions []*isthmusv1.Condition) (out []string) {
	if serves != nil {
		out = append(out, "the API does not answer: "+serves.Error())
	}
	if !ready {
		out = append(out, "the rules of the document are not in the kernel")
	}
	for _, c := range conditions {
		if c.GetType() == "CharonUnreachable" || c.GetType() == "GuardMissing" || c.GetType() == "GenerationHeldBack" || c.GetType() == "DocumentUnusable" {
			out = append(out, c.GetType()+": "+c.GetMessage())
		}
	}
	if was.Applied && !is.Applied {
		out = append(out, "the document is not applied without an error, as it was before")
	}
	gone := func(kind string, was, is []string) {
		var names []string
		for _, n := range was {
			if !slices.Contains(is, n) {
				names = append(names, n)
			}
		}
		if n := len(names); n > listed {
			names = append(names[:listed], fmt.Sprintf("and %d more", n-listed))
		}
		if len(names) > 0 {
			out = append(out, kind+strings.Join(names, ", "))
		}
	}
	gone("tunnels that were up before and are not: ", was.Tunnels, is.Tunnels)
	gone("peers that were established before and are not: ", was.Peers, is.Peers)
	return out
}

const (
	judgePace = 2 * time.Second
	// steady is how long everything has to be as before until a slot is good.
	steady = 10 * time.Second
)

// Judge marks the running slot good once everything is as it was before the upgrade, and reports
// what is missing until then. It returns when there is nothing to judge, or ctx is done. The helper
// gives up a trial that is not marked good in time.
func (m *Machine) Judge(ctx context.Context) {
	pace := time.NewTicker(judgePace)
	defer pace.Stop()
	var good time.Time // since when
	var reported string
	for {
		st, err := m.Helper.Status(ctx)
		switch {
		case errors.Is(err, slot.ErrNoSlots):
			return
		case err != nil:
			m.Log.Warn("querying the system helper failed", "err", err)
		case st.Env.Trial == slot.None || st.Env.Trial != st.Running:
			m.endTrial(st)
			return
		default:
			was := m.read()
			lacks := missing(was, m.now(), m.Node.Ready(), m.Serves(ctx), m.conditions())
			m.onTrial(st, lacks)
			if text := strings.Join(lacks, "; "); text != reported {
				reported = text
				m.Log.Info("a slot is on trial", "slot", st.Running, "until", st.Deadline, "missing", text)
				was.Missing = lacks
				m.write(was)
			}
			switch now := time.Now(); {
			case len(lacks) > 0:
				good = time.Time{}
			case good.IsZero():
				good = now
			case now.Sub(good) >= steady:
				if err := m.Helper.Do(ctx, helper.DoGood); err != nil {
					m.Log.Warn("marking the slot good failed", "slot", st.Running, "err", err)
				} else {
					m.Log.Info("the slot is good", "slot", st.Running, "version", st.Slots[st.Running].Version)
					continue // the next loop clears its condition at once
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
	}
}

func (m *Machine) conditions() []*isthmusv1.Condition {
	s, _ := m.Node.Status()
	return s.GetConditions()
}

func (m *Machine) read() (b before) {
	text, err := m.Records.Private(record)
	if err == nil {
		err = json.Unmarshal(text, &b)
	}
	if err != nil {
		// Without a record, it is enough that the slot works at all.
		return before{}
	}
	return b
}

func (m *Machine) write(b before) {
	text, err := json.Marshal(b)
	if err == nil {
		err = m.Records.SetPrivate(record, text, time.Now())
	}
	if err != nil {
		m.Log.Warn("storing the state before or after an upgrade failed", "err", err)
	}
}

func (m *Machine) onTrial(st *helper.Status, lacks []string) {
	text := fmt.Sprintf("slot %s (version %s) is on trial until %s: ", st.Running, st.Slots[st.Running].Version, st.Deadline.UTC().Format(time.RFC3339))
	if len(lacks) == 0 {
		text += "everything is as it was before the upgrade; the slot is marked good in a moment"
	} else {
		text += strings.Join(lacks, "; ") + "; if this does not change, the machine returns to the other slot (`isthmus system rollback` does it now)"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trial, m.missed = condition.SlotOnTrial.Warning(time.Time{}, "%s", text), lacks
}

// endTrial sets the conditions of a machine whose slot is not on trial.
func (m *Machine) endTrial(st *helper.Status) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trial, m.missed, m.failed = nil, nil, nil
	if st.Env.Failed != slot.None {
		m.failed = condition.SlotFailed.Warning(time.Time{}, "slot %s (version %s) was given up, and the machine has returned to slot %s: %s; run `isthmus system upgrade` with a slot that works",
			st.Env.Failed, st.Slots[st.Env.Failed].Version, st.Running, m.why(st))
	}
}

// why returns why a trial was given up.
func (m *Machine) why(st *helper.Status) string {
	b := m.read()
	if b.Trial != st.Env.Failed || len(b.Missing) == 0 {
		return "its daemon did not report why: it did not start, it ended again and again, or the kernel did not start it"
	}
	return strings.Join(b.Missing, "; ")
}

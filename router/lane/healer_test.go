package lane

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// pair returns a link whose lanes have the directions out and in, as "ok dead".
func pair(lanes ...string) LinkState {
	s := LinkState{Name: "pair", Node: "b"}
	for i, text := range lanes {
		out, in, _ := strings.Cut(text, " ")
		s.Lanes = append(s.Lanes, LaneState{
			Lane: Lane{Name: fmt.Sprintf("pair-%d", i+1)},
			Out:  Direction{Status: Status(out)},
			In:   Direction{Status: Status(in)},
		})
		s.Lanes[i].Usable = out == "ok" && in == "ok"
	}
	return s
}

// TestHealer heals a dead lane while another one works: after a second, with pauses that double,
// and each third time with a new interface.
func TestHealer(t *testing.T) {
	h := Healer{}
	begun := time.Unix(1000, 0)
	var at []string
	watch := func(from, to time.Duration, lanes ...string) {
		at = nil
		for d := from; d < to; d += 100 * time.Millisecond {
			for _, one := range h.Due([]LinkState{pair(lanes...)}, begun.Add(d)) {
				at = append(at, fmt.Sprintf("%v %s %s", d, one.Lane, one.How()))
			}
		}
	}
	want := func(text string) {
		t.Helper()
		if got := strings.Join(at, ", "); got != text {
			t.Errorf("%s, want %s", got, text)
		}
	}
	watch(0, 20*time.Second, "ok ok", "dead ok")
	want("1s pair-2 new keys, 2s pair-2 new keys, 4s pair-2 new interface, 8s pair-2 new keys, 16s pair-2 new keys")
	h.Failed("pair-2", errors.New("no"))
	if h["pair-2"].Err == nil || h["pair-2"].Count != 5 {
		t.Errorf("%+v", h["pair-2"])
	}
	// It works for a while, and dies again before it counts as healed: the pause stays.
	watch(20*time.Second, 25*time.Second, "ok ok", "ok ok")
	want("")
	watch(25*time.Second, 40*time.Second, "ok ok", "ok dead")
	want("32s pair-2 new interface")
	watch(40*time.Second, 110*time.Second, "ok ok", "ok ok")
	if len(h) != 0 {
		t.Errorf("%v", h)
	}
	watch(110*time.Second, 112*time.Second, "ok ok", "ok dead")
	want("1m51s pair-2 new keys")
	// No lane works: the node is down.
	watch(112*time.Second, 200*time.Second, "dead dead", "dead dead")
	want("")
	watch(200*time.Second, 201*time.Second, "dead dead", "ok ok")
	want("3m20s pair-1 new keys")
	if watch(201*time.Second, 202*time.Second, "ok ok"); len(h) != 1 || h["pair-1"] == nil {
		t.Errorf("a lane that was removed is still healed: %v", h)
	}
}

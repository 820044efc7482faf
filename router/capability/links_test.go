package capability

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/lane"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/tunnel"
)

// fakeLanes is a prover and an observer.
type fakeLanes struct {
	states []lane.LinkState
	out    map[string]bool
}

func (f *fakeLanes) Use([]lane.Link)           {}
func (f *fakeLanes) State() []lane.LinkState   { return f.states }
func (f *fakeLanes) Run(context.Context) error { return nil }
func (f *fakeLanes) SetLanes(out map[string]bool) {
	f.out = out
}
func (f *fakeLanes) TunnelStates() map[string]tunnel.State {
	return map[string]tunnel.State{"pair-1": {TxBytes: 7}}
}

// pair returns a link whose lanes have the directions out and in, as "ok dead".
func pair(lanes ...string) lane.LinkState {
	s := lane.LinkState{Name: "pair", Node: "b"}
	for i, text := range lanes {
		out, in, _ := strings.Cut(text, " ")
		l := lane.LaneState{
			Lane: lane.Lane{Name: fmt.Sprintf("pair-%d", i+1), Number: i + 1, Interface: fmt.Sprintf("w%d", i+1)},
			Out:  lane.Direction{Status: lane.Status(out), Since: time.Unix(100, 0), Why: "out is " + out, Loss: -1},
			In:   lane.Direction{Status: lane.Status(in), Since: time.Unix(200, 0), Why: "in is " + in, Loss: 0.5},
		}
		if l.Usable = out == "ok" && in == "ok"; !l.Usable {
			l.Why = "a reason"
		}
		s.Lanes = append(s.Lanes, l)
	}
	return s
}

// TestLinks shows states to the observer, in conditions and in the API.
func TestLinks(t *testing.T) {
	f := &fakeLanes{}
	changes := 0
	l := NewLinks(LinkOptions{Prover: f, Observed: f, Changed: func() { changes++ }, Log: slog.New(slog.DiscardHandler),
		Shares: func(context.Context) (map[string]int, error) { return map[string]int{"w1": 96}, nil },
		Heal:   func(context.Context, string, bool) error { return errors.New("no") }})
	for name, k := range map[string]struct {
		state lane.LinkState
		out   string
		want  string // the conditions
	}{
		"all work": {pair("ok ok", "ok ok"), "map[]", "[]"},
		"one way":  {pair("ok ok", "dead ok"), "map[pair-2:true]", "[LaneDead warning link pair: lane pair-2 is dead to b since 00:01:40 (out is dead); its flows use 1 other lanes]"},
		"both ways": {pair("dead dead", "ok ok"), "map[pair-1:true]",
			"[LaneDead warning link pair: lane pair-1 is dead to b since 00:01:40 (out is dead) and from b since 00:03:20 (in is dead); its flows use 1 other lanes]"},
		"mtu": {pair("ok ok", "mtu ok"), "map[pair-2:true]", "[LaneMTU warning link pair: lane pair-2: out is mtu]"},
		"unproved": {pair("ok ok", "unknown ok"), "map[pair-2:true]",
			"[LaneUnproved warning link pair: lane pair-2 has not been proved since it exists: unknown to b, ok from it]"},
		"down": {pair("ok dead", "dead dead"), "map[pair-1:true pair-2:true]", "[LinkDown error link pair: link pair: no lane carries packets both ways to b: a reason]"},
		"silent": {func() lane.LinkState { s := pair("ok ok"); s.Silent = time.Unix(300, 0); return s }(), "map[]",
			"[LinkSilent warning link pair: link pair: the daemon of b has sent nothing since 00:05:00, and its kernel answers: lanes that die one way are not recognized]"},
		"silent for a moment": {func() lane.LinkState { s := pair("ok ok"); s.Silent = time.Now(); return s }(), "map[]", "[]"},
	} {
		f.states = []lane.LinkState{k.state}
		l.look(t.Context(), true)
		var got []string
		for _, c := range l.conditions() {
			got = append(got, fmt.Sprintf("%s %s %s: %s", c.Type, c.Severity, c.Object, c.Message))
		}
		if fmt.Sprint(f.out) != k.out || fmt.Sprint(got) != k.want {
			t.Errorf("%s: out %v, conditions %v", name, f.out, got)
		}
	}
	l.count(t.Context())
	f.states = []lane.LinkState{pair("ok dead")}
	if !l.look(t.Context(), false) {
		t.Error("there is no link")
	}
	s := l.List()[0]
	one := s.Lanes[0]
	if s.Usable != 0 || one.Buckets != 96 || one.TxBytes != 7 || one.Out.Loss != nil || *one.In.Loss != 0.5 || one.In.Status != "dead" || one.In.Since.AsTime().Unix() != 200 {
		t.Errorf("%v", s)
	}
	if changes == 0 {
		t.Error("no change was reported")
	}
}

// TestLinksOf reads the links of a target, without lanes that are disabled.
func TestLinksOf(t *testing.T) {
	inside := []tunnel.Inside{{Local: netip.MustParsePrefix("169.254.96.2/31"), Remote: netip.MustParseAddr("169.254.96.3")}}
	target := &plan.Target{
		Links:   []plan.Link{{Name: "pair", Node: "b", Lanes: []string{"pair-1", "pair-2"}}, {Name: "west", Node: "c", Lanes: []string{"west-1"}}},
		Tunnels: []tunnel.Config{{Name: "pair-1", Number: 1, Interface: "w1", Inside: inside, MTU: 1420}, {Name: "pair-2", Disabled: true}, {Name: "west-1", Disabled: true}},
	}
	if got, want := fmt.Sprint(links(target)), "[{pair b [{pair-1 1 w1 169.254.96.2 169.254.96.3 1420}]}]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

package event

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

var noon = time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)

// history applies snapshots to a state, and returns the events as text.
type history struct {
	*State
	at time.Time
}

func newHistory() *history { return &history{newState(), noon} }

func (h *history) look(s Snapshot) string {
	h.at = h.at.Add(10 * time.Second)
	s.Now = h.at
	if s.Started.IsZero() {
		s.Started = noon.Add(-time.Hour)
	}
	var out []string
	for _, e := range Compare(h.State, s) {
		text := fmt.Sprintf("%s %s %s", e.Type, e.Object, e.Severity)
		if e.Lasted > 0 {
			text += fmt.Sprintf(" %v", e.Lasted)
		}
		out = append(out, text+": "+e.Message)
		h.apply(e)
	}
	h.State.look(s)
	return strings.Join(out, "\n")
}

// restart forgets everything that is not in the log.
func (h *history) restart() {
	for k, o := range h.objects {
		o.seen, o.timesUp = false, 0
		h.objects[k] = o
	}
}

func (h *history) want(t *testing.T, what string, s Snapshot, lines ...string) {
	t.Helper()
	if got, want := h.look(s), strings.Join(lines, "\n"); got != want {
		t.Errorf("%s:\n%s\nwant\n%s", what, got, want)
	}
}

func tunnels(all ...*isthmusv1.TunnelStatus) Snapshot { return Snapshot{Tunnels: all} }

func tun(state string, times uint64) *isthmusv1.TunnelStatus {
	return &isthmusv1.TunnelStatus{Name: "a", State: state, TimesUp: times}
}

func TestTunnels(t *testing.T) {
	h := newHistory()
	h.want(t, "a new tunnel", tunnels(tun("connecting", 0)))
	failing := tun("connecting", 0)
	failing.Conditions = []*isthmusv1.Condition{{Type: "TunnelDown"}}
	failing.LastError = "no answer"
	h.want(t, "one that does not come up", tunnels(failing), "TunnelDown tunnel/a error: the tunnel is down: no answer")
	h.want(t, "the same", tunnels(failing))
	h.want(t, "up", tunnels(tun("up", 1)), "TunnelUp tunnel/a info 20s: the tunnel is up after 20s down")
	h.want(t, "unknown", tunnels(tun("unknown", 1)))
	h.want(t, "up still", tunnels(tun("up", 1)))
	h.want(t, "a flap", tunnels(tun("up", 2)), "TunnelDown tunnel/a error 30s: the tunnel was down between two looks after 30s up", "TunnelUp tunnel/a info: the tunnel is up")
	h.want(t, "flaps", tunnels(tun("up", 5)), "TunnelDown tunnel/a error 10s: the tunnel was down between two looks after 10s up", "TunnelUp tunnel/a info: the tunnel is up; it came up 3 times since the last look")
	h.want(t, "suspect", tunnels(tun("suspect", 5)), "TunnelSuspect tunnel/a error 10s: data does not pass in both directions")
	h.want(t, "dead", tunnels(tun("dead", 5)), "TunnelDown tunnel/a error 10s: the tunnel is down after 10s suspect: it is dead")
	h.want(t, "down and up", tunnels(tun("down", 6)), "TunnelUp tunnel/a info 10s: the tunnel was up between two looks, 1 times after 10s down", "TunnelDown tunnel/a error: the tunnel is down again: it is down")
	h.want(t, "up again", tunnels(tun("up", 7)), "TunnelUp tunnel/a info 10s: the tunnel is up after 10s down")

	h.restart()
	h.want(t, "unknown after a restart", tunnels(tun("unknown", 0)))
	h.want(t, "connecting for a moment", tunnels(tun("connecting", 0)))
	h.want(t, "up as before", tunnels(tun("up", 0)))
	h.want(t, "and counted", tunnels(tun("up", 1)))
	h.want(t, "down", tunnels(tun("down", 1)), "TunnelDown tunnel/a error 50s: the tunnel is down after 50s up: it is down")
	h.want(t, "no document yet", Snapshot{})
	h.want(t, "not carried out yet", Snapshot{Generation: 2, Applied: 1, Revisions: []*isthmusv1.Revision{{Generation: 2}}}, "DocumentAccepted node info: generation 2: , 0 changes")
	h.want(t, "carried out", Snapshot{Generation: 2, Applied: 2}, "TunnelRemoved tunnel/a info 30s: the tunnel is no longer in the document", "Applied node info: generation 2 is carried out")
	h.want(t, "nothing", Snapshot{Generation: 2, Applied: 2})
}

func TestSessions(t *testing.T) {
	peer := func(state string, times uint64) Snapshot {
		return Snapshot{Peers: []*isthmusv1.PeerStatus{{Name: "p", State: state, TimesUp: times, LastError: map[bool]string{true: "hold timer expired"}[state == "idle"]}}}
	}
	h := newHistory()
	h.want(t, "a new session", peer("connect", 0))
	h.want(t, "up", peer("established", 1), "SessionUp peer/p info: the session is established")
	h.want(t, "down", peer("idle", 1), "SessionDown peer/p error 10s: the session is down after 10s established: hold timer expired")
	h.want(t, "another state", peer("active", 1))
	h.want(t, "the process has ended", peer("unknown", 1))
	h.want(t, "up", peer("established", 2), "SessionUp peer/p info 30s: the session is established after 30s down")
	h.want(t, "a flap", peer("established", 3), "SessionDown peer/p error 10s: the session was down between two looks after 10s established", "SessionUp peer/p info: the session is established")
	h.want(t, "a counter that begins again", peer("established", 1))
	h.restart()
	h.want(t, "after a restart", peer("active", 0))
	h.want(t, "as before", peer("established", 1))
}

func TestConditions(t *testing.T) {
	with := func(all ...*isthmusv1.Condition) Snapshot { return Snapshot{Conditions: all} }
	down := &isthmusv1.Condition{Type: "TunnelDown", Severity: "error", Object: "tunnel a"}
	limit := &isthmusv1.Condition{Type: "PrefixLimit", Severity: "error", Object: "peer p", Message: "too many"}
	warn := &isthmusv1.Condition{Type: "StateFull", Severity: "warning", Message: "low"}
	bad := &isthmusv1.Condition{Type: "StateFull", Severity: "error", Message: "full"}
	h := newHistory()
	h.want(t, "one of a tunnel has an event of its own", with(down))
	h.want(t, "two", with(limit, warn, warn), "ConditionBegan peer/p error: PrefixLimit: too many", "ConditionBegan node warning: StateFull: low")
	h.want(t, "worse", with(limit, bad), "ConditionChanged node error 10s: StateFull: was of severity warning: full")
	h.want(t, "the end", with(limit), "ConditionEnded node info 20s: StateFull has ended after 20s")
	h.restart()
	soon := with()
	soon.Started = h.at
	h.want(t, "just started", soon)
	h.want(t, "found again", with(limit))
	h.want(t, "ended", with(), "ConditionEnded peer/p info 50s: PrefixLimit has ended after 50s")
}

func TestPools(t *testing.T) {
	pool := func(health string) Snapshot {
		return Snapshot{Pools: []*isthmusv1.PoolStatus{{Name: "main", Members: []*isthmusv1.PoolMember{{Address: "192.0.2.1", Health: health, Reason: "no answer"}}}}}
	}
	h := newHistory()
	h.want(t, "healthy", pool("healthy"))
	h.want(t, "down", pool("down"), "PoolAddressDown pool/main warning: 192.0.2.1 is down: no answer")
	h.want(t, "held down", pool("returning"))
	h.want(t, "not probed yet", pool("unknown"))
	h.want(t, "healthy", pool("healthy"), "PoolAddressUp pool/main info 30s: 192.0.2.1 is healthy after 30s down")
	h.want(t, "down", pool("down"), "PoolAddressDown pool/main warning: 192.0.2.1 is down: no answer")
	h.want(t, "removed", Snapshot{}, "PoolAddressUp pool/main info 10s: 192.0.2.1 is no longer in the pool")
}

func TestDocuments(t *testing.T) {
	revision := func(n uint64, reason, message string) *isthmusv1.Revision {
		return &isthmusv1.Revision{Generation: n, Reason: reason, Message: message, Author: "root (alice)", Changes: 2, Time: timestamppb.New(noon)}
	}
	of := func(applied uint64, all ...*isthmusv1.Revision) Snapshot {
		return Snapshot{Generation: all[0].Generation, Applied: applied, Revisions: all, Started: noon.Add(time.Second)}
	}
	h := newHistory()
	h.want(t, "documents of the time before the log", of(0, revision(7, "apply", "")))
	h.want(t, "carried out", of(7, revision(7, "apply", "")), "Applied node info: generation 7 is carried out")
	h.want(t, "two at once", of(7, revision(9, "not confirmed, back to 7", ""), revision(8, "apply", "NET-1"), revision(7, "apply", "")),
		"DocumentAccepted node info: generation 8: apply, 2 changes: NET-1", "Reverted node warning: generation 9: not confirmed, back to 7, 2 changes")
	h.restart()
	h.want(t, "carried out after a restart", of(9, revision(9, "apply", "")), "Applied node info: generation 9 is carried out")
	h.want(t, "a copy of the state directory was restored", of(0, revision(5, "apply", "")))
	h.want(t, "another document", of(0, revision(6, "apply", "")), "DocumentAccepted node info: generation 6: apply, 2 changes")

	h = newHistory()
	h.want(t, "the first document of a new node", Snapshot{Generation: 1, Started: noon.Add(-time.Second), Revisions: []*isthmusv1.Revision{revision(1, "apply", "")}},
		"DocumentAccepted node info: generation 1: apply, 2 changes")
}

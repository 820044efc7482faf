package gobgp

import (
	"context"
	"encoding/json"
	"log/slog"
	"testing"

	"github.com/osrg/gobgp/v3/pkg/log"

	"github.com/isthmus-net/isthmus/bgp/filter"
)

func newLogger() *logger {
	return &logger{
		out: newOutbox(), id: func(string) (uint32, bool) { return 1, true }, established: func(string) {},
		expired: make(map[string]bool), labels: make(map[string]context.Context),
	}
}

// fields are those of a line about peer a.
func fields(extra log.Fields) log.Fields {
	f := log.Fields{"Topic": "Peer", "Key": "169.254.0.11"}
	for k, v := range extra {
		f[k] = v
	}
	return f
}

func change(l *logger, old, next string) {
	l.Debug("state changed", fields(log.Fields{"old": "BGP_FSM_" + old, "new": "BGP_FSM_" + next}))
}

func up(l *logger) {
	change(l, "ACTIVE", "OPENSENT")
	change(l, "OPENSENT", "OPENCONFIRM")
	change(l, "OPENCONFIRM", "ESTABLISHED")
}

func down(l *logger, reason string) {
	l.Info("Peer Down", fields(log.Fields{"Reason": reason}))
	change(l, "ESTABLISHED", "IDLE")
}

// handle hands the reports that a logger has made since to a Driver, and returns how many lines for
// the daemon's log are among them.
func handle(t *testing.T, d *Driver, l *logger) (lines int) {
	t.Helper()
	for _, f := range l.out.frames {
		switch f.t {
		case frameState:
			var m stateMessage
			if err := json.Unmarshal(f.body, &m); err != nil {
				t.Fatal(err)
			}
			d.handleState(newRecorder(), m)
		case frameLog:
			lines++
		}
	}
	l.out.frames = nil
	return lines
}

// TestRestartFails has a peer that goes away as in a graceful restart, and whose next OPEN is
// refused: GoBGP drops its paths then, and logs nothing about it.
func TestRestartFails(t *testing.T) {
	d := New(Options{Log: slog.New(slog.DiscardHandler)})
	if err := d.Apply(t.Context(), config(loPeer("a", "169.254.0.11", 1))); err != nil {
		t.Fatal(err)
	}
	l := newLogger()
	step := func(what string, restarting bool, log func()) {
		t.Helper()
		log()
		handle(t, d, l)
		if got := d.Peers()[0].Restarting; got != restarting {
			t.Errorf("%s: restarting is %v", what, got)
		}
	}
	clear(d.expect) // of this process's own start
	step("the connection ends", true, func() { up(l); down(l, "graceful-restart") })
	step("the peer connects again", true, func() { change(l, "IDLE", "ACTIVE"); change(l, "ACTIVE", "OPENSENT") })
	step("its OPEN is refused", false, func() { change(l, "OPENSENT", "IDLE") })
	step("it tries again", false, func() { change(l, "IDLE", "ACTIVE") })
}

// TestLastError logs as GoBGP does, and hands the reports to a Driver that has read none of them
// when its relay ends the session.
func TestLastError(t *testing.T) {
	reason := (&filter.Notification{Code: 5, Subcode: 3, Reason: "too early or twice"}).Error()
	own := log.Fields{"Code": uint8(6), "Subcode": uint8(filter.EndedHere), "Data": []byte(reason)}
	for name, c := range map[string]struct {
		log  func(l *logger)
		want string
	}{
		"the relay ends a session": {func(l *logger) {
			up(l)
			l.Warn("received notification", fields(own))
			down(l, "notification-received code 6(cease) subcode 255(undefined)")
		}, reason},
		"the relay ends a session that is not up": {func(l *logger) {
			change(l, "ACTIVE", "OPENSENT") // GoBGP logs no NOTIFICATION then
			change(l, "OPENSENT", "IDLE")
		}, reason},
		"the next session ends differently": {func(l *logger) {
			change(l, "ACTIVE", "OPENSENT")
			change(l, "OPENSENT", "IDLE")
			up(l)
			down(l, "read-failed")
		}, "read-failed"},
		"the peer shuts down": {func(l *logger) {
			up(l)
			l.Warn("received notification", fields(log.Fields{"Code": uint8(6), "Subcode": uint8(2), "Communicated-Reason": "upgrade\n", "Data": []byte{}}))
			down(l, "notification-received code 6(cease) subcode 2(administrative shutdown)")
		}, `received NOTIFICATION 6/2: code 6(cease) subcode 2(administrative shutdown), reason "upgrade\n"`},
		"the hold timer of the peer expires": {func(l *logger) {
			up(l)
			l.Warn("received notification", fields(log.Fields{"Code": uint8(4), "Subcode": uint8(0), "Data": []byte{1, 2}}))
			down(l, "notification-received code 4(hold timer expired) subcode 0(undefined)")
		}, "received NOTIFICATION 4/0: code 4(hold timer expired) subcode 0(undefined), data 0102"},
		"a flood": {func(l *logger) {
			for range maxLines + 1 {
				l.Warn("something", fields(nil))
			}
			up(l)
			l.Warn("received notification", fields(own))
			down(l, "notification-received code 6(cease) subcode 255(undefined)")
		}, reason},
	} {
		d := New(Options{Log: slog.New(slog.DiscardHandler)})
		if err := d.Apply(t.Context(), config(loPeer("a", "169.254.0.11", 1))); err != nil {
			t.Fatal(err)
		}
		l := newLogger()
		c.log(l)
		d.note("a", reason, true)
		lines := handle(t, d, l)
		if got := d.Peers()[0].LastError; got != c.want {
			t.Errorf("%s: last error %q, want %q", name, got, c.want)
		}
		if lines > maxLines {
			t.Errorf("%s: %d lines", name, lines)
		}
	}
}

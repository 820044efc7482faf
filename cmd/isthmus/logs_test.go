package main

import (
	"context"
	"strings"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// TestFollowLogs: after a loss of the connection the command continues where it was, and each line
// is printed once.
func TestFollowLogs(t *testing.T) {
	fastWatch(t)
	for _, format := range []string{"table", "json"} {
		t.Run(format, func(t *testing.T) {
			w, p, out, errs, interrupt := follow(t, "get", "logs", "-f", "--level", "warn", "-o", format)
			log := w.server.Log.With("room", "nat")
			out.waitFor(t, "no buffer space")
			log.Info("an info line")
			log.Warn("the first one")
			out.waitFor(t, "the first one")
			p.set(true)
			errs.waitFor(t, "12:00:00 the connection to "+p.address+" is lost; connecting again\n")
			log.Error("while it was lost")
			p.set(false)
			errs.waitFor(t, "connected again\n")
			out.waitFor(t, "while it was lost")
			log.Warn("the last one")
			out.waitFor(t, "the last one")
			interrupt()
			text := out.text()
			for what, want := range map[string]int{
				"no proposal chosen": 1, "no buffer space": 1, "an info line": 0, "the first one": 1, "while it was lost": 1, "the last one": 1,
				"connected to charon": 0, "TIME ": map[string]int{"table": 1}[format], "room=nat": map[string]int{"table": 3}[format],
			} {
				if got := strings.Count(text, what); got != want {
					t.Errorf("%s is printed %d times, want %d:\n%s", what, got, want, text)
				}
			}
			if strings.Contains(errs.text(), "missing") {
				t.Error(errs.text())
			}
		})
	}
}

// TestFollowLogsOverRestart: the log of a daemon that has started again is another one. The command
// says that lines may be missing, and prints those of the new daemon from the first one on, once.
func TestFollowLogsOverRestart(t *testing.T) {
	fastWatch(t)
	w, p, out, errs, interrupt := follow(t, "get", "logs", "-f", "--limit", "1")
	out.waitFor(t, "no buffer space")
	w.server.Log.Warn("of the old daemon")
	out.waitFor(t, "of the old daemon")
	p.set(true)
	errs.waitFor(t, "is lost; connecting again\n")
	w.server.Restart()
	p.lead(w.server.Address)
	w.server.Log.Info("of the new daemon")
	p.set(false)
	errs.waitFor(t, "connected again\n")
	out.waitFor(t, "of the new daemon")
	errs.waitFor(t, "isthmus: warning: lines may be missing: the daemon has started again")
	w.server.Log.Info("the last one")
	out.waitFor(t, "the last one")
	interrupt()
	text := out.text()
	for what, want := range map[string]int{"no buffer space": 1, "of the old": 1, "of the new": 1, "the last one": 1, "TIME ": 1} {
		if got := strings.Count(text, what); got != want {
			t.Errorf("%s is printed %d times, want %d:\n%s", what, got, want, text)
		}
	}
	if n := strings.Count(errs.text(), "missing"); n != 1 {
		t.Errorf("%d warnings: %s", n, errs.text())
	}
}

// TestFollowLogsAmongOthers: a command whose former watches the node still counts tries again. One
// that is refused at first ends.
func TestFollowLogsAmongOthers(t *testing.T) {
	fastWatch(t)
	w, p, out, errs, interrupt := follow(t, "get", "logs", "-f")
	out.waitFor(t, "no buffer space")
	w.server.Log.Info("before")
	out.waitFor(t, "before")
	p.set(true)
	errs.waitFor(t, "is lost; connecting again\n")
	a := w.app(nil, &syncBuffer{}, &syncBuffer{})
	a.command() // which sets defaults
	a.contextFile = w.context
	conn, err := a.connect()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var stop context.CancelFunc
	// The server may still count the lost one.
	for open := 0; open < 4; {
		var ctx context.Context
		ctx, stop = context.WithCancel(t.Context())
		defer stop()
		stream, err := isthmusv1.NewLogServiceClient(conn).WatchLogs(ctx, &isthmusv1.WatchLogsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if head, _ := stream.Header(); head != nil {
			open++
		}
	}
	if _, text, code := w.run(t.Context(), "", "get", "logs", "-f"); code != 1 || !strings.Contains(text, "at most 4 of one client, 16 of all clients") {
		t.Errorf("exit %d, %s", code, text)
	}
	dials := p.accepted()
	p.set(false)
	for deadline := time.Now().Add(30 * time.Second); p.accepted() < dials+3; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it does not try again after it was refused: %s", errs.text())
		}
	}
	w.server.Log.Info("meanwhile")
	stop()
	errs.waitFor(t, "connected again\n")
	out.waitFor(t, "meanwhile")
	interrupt()
}

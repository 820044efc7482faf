package main

import (
	"context"
	"regexp"
	"strings"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/event"
)

// TestFollowEvents: after a loss of the connection the command continues where it was, each event
// is printed once, and missing events are said to be missing.
func TestFollowEvents(t *testing.T) {
	fastWatch(t)
	for _, format := range []string{"table", "json"} {
		t.Run(format, func(t *testing.T) {
			w, p, out, errs, interrupt := follow(t, "get", "events", "-f", "--tunnel", "aws-0", "--tunnel", "new", "-o", format)
			out.waitFor(t, "after 2m down")
			happens := func(name, state string) {
				w.server.Events.Look(event.Snapshot{Now: time.Now(), Started: time.Now(), Tunnels: []*isthmusv1.TunnelStatus{
					{Name: name, State: state, LastError: "because of " + state, Conditions: []*isthmusv1.Condition{{Type: "TunnelDown"}}},
				}})
			}
			happens("aws-0", "down")
			out.waitFor(t, "because of down")
			p.set(true)
			errs.waitFor(t, "12:00:00 the connection to "+p.address+" is lost; connecting again\n")
			happens("new", "down")
			happens("another", "down")
			p.set(false)
			errs.waitFor(t, "connected again\n")
			out.waitFor(t, "tunnel/new")
			happens("new", "suspect")
			out.waitFor(t, "because of suspect")
			interrupt()
			text := out.text()
			for what, want := range map[string]int{"TunnelUp": 2, "TunnelDown": 3, "TunnelSuspect": 1, "another": 0, "TIME ": map[string]int{"table": 1}[format]} {
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

// TestEventsAreMissing: a node that lost its events says so to a follower.
func TestEventsAreMissing(t *testing.T) {
	w := newWorld(t)
	var out, errs syncBuffer
	ctx, stop := context.WithCancel(t.Context())
	a := w.app(nil, &out, &errs)
	a.command() // which sets defaults
	a.output, a.contextFile = "table", w.context
	f := &eventFollower{a: a, filter: &isthmusv1.EventFilter{}, limit: 10, table: a.newTable(looks(a, eventColumns)...), token: "0123456789abcdef-7", printed: 7}
	done := make(chan error, 1)
	go func() { done <- f.connection(ctx) }()
	errs.waitFor(t, "isthmus: warning: events may be missing: the node has another event log than before\n")
	out.waitFor(t, "2026-03-01 09:00:00  TunnelUp")
	stop()
	<-done
}

// TestAudit: a call is one line, with its caller and its result.
func TestAudit(t *testing.T) {
	w := newWorld(t)
	for _, line := range []string{"apply -f testdata/first.yaml -m NET-1", "apply -f testdata/bad.yaml", "secret set psk-a", "client issue ann --role reader -o DIR/ann.yaml"} {
		w.run(t.Context(), "0123456789", strings.Fields(strings.ReplaceAll(line, "DIR", w.home))...)
	}
	w.run(t.Context(), "", "secret", "set", "x", "--generate", "psk", "--context", w.home+"/ann.yaml")
	get := func(line string) string {
		t.Helper()
		out, errs, code := w.run(t.Context(), "", strings.Fields(line)...)
		if code != 0 {
			t.Fatalf("%s: exit %d, %s", line, code, errs)
		}
		out = regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  `).ReplaceAllString(out, "")
		return regexp.MustCompile(`serial [0-9a-f]{32}`).ReplaceAllString(regexp.MustCompile(` {2,}`).ReplaceAllString(out, " | "), "serial S")
	}
	want := `TIME | WHO | ROLE | METHOD | OBJECT | RESULT
admin | admin | Apply | why: NET-1 | OK
admin | admin | Apply | - | InvalidArgument: document refused: 2 problems
admin | admin | SetSecret | psk-a | OK
admin | admin | IssueClient | ann as reader, serial S | OK
ann | reader | SetSecret | - | refused: /isthmus.v1.SecretService/SetSecret needs role operator, ann has role reader
`
	if got := get("get audit"); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if got := get("get audit --who ann --no-headers"); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "ann | ") {
		t.Errorf("got\n%s", got)
	}
	if got := get("get audit --limit 2 --method setsecret --no-headers"); strings.Count(got, "\n") != 2 || !strings.HasPrefix(got, "admin | ") {
		t.Errorf("got\n%s", got)
	}
	if got := get("get audit -o json"); strings.Count(got, `"event": "begin"`) != 4 || strings.Contains(got, "0123456789") {
		t.Errorf("got\n%s", got)
	}
	if _, errs, code := w.run(t.Context(), "", "get", "audit", "--context", w.home+"/ann.yaml"); code != 1 || !strings.Contains(errs, "needs the role admin") {
		t.Errorf("as a reader: exit %d, %s", code, errs)
	}
	if got := get("get events --type SecretSet --type CallFailed --no-headers"); !strings.Contains(got, "secret psk-a was set, by admin\n") || !strings.Contains(got, "CallFailed | node | Apply failed: InvalidArgument") {
		t.Errorf("got\n%s", got)
	}
}

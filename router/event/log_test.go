package event

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// clock is a clock that tests set.
type clock struct{ at time.Time }

func (c *clock) now() time.Time { return c.at }

func open(t *testing.T, name string, c *clock) *Log {
	t.Helper()
	l, err := Open(name, c.now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func every(Event) bool { return true }

func all(l *Log) []Event {
	out, _, _ := l.After(0, maxRing, every)
	return out
}

func types(events []Event) string {
	var out []string
	for _, e := range events {
		out = append(out, e.Type)
	}
	return strings.Join(out, " ")
}

// TestRestart: events survive a restart, the sequence goes on, and the state continues with what
// the log says.
func TestRestart(t *testing.T) {
	name := filepath.Join(t.TempDir(), "events.log")
	c := &clock{noon}
	l := open(t, name, c)
	id := l.ID()
	l.Start("v1")
	l.Look(Snapshot{Now: c.at, Started: c.at, Tunnels: []*isthmusv1.TunnelStatus{tun("up", 1)}})
	l.Stop()
	l.Close()
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatal(info, err)
	}

	c.at = c.at.Add(time.Hour)
	l = open(t, name, c)
	if got := types(all(l)); l.ID() != id || got != "NodeStarted TunnelUp NodeStopped" || l.Newest() != 3 {
		t.Fatalf("log %s of %s, newest %d: %s", l.ID(), id, l.Newest(), got)
	}
	l.Start("v2")
	for _, state := range []string{"unknown", "up"} {
		l.Look(Snapshot{Now: c.at, Started: c.at, Tunnels: []*isthmusv1.TunnelStatus{tun(state, 1)}})
	}
	if got := all(l); types(got) != "NodeStarted TunnelUp NodeStopped NodeStarted" || got[3].Seq != 4 || got[3].Severity != Info {
		t.Fatalf("after a restart: %+v", got)
	}
	l.Look(Snapshot{Now: c.at, Started: c.at, Tunnels: []*isthmusv1.TunnelStatus{tun("down", 1)}})
	last := all(l)[4]
	if last.Type != "TunnelDown" || last.Lasted != time.Hour {
		t.Errorf("%+v", last)
	}

	// Without a stop, numbers that a client has seen do not come again.
	l.Close()
	l = open(t, name, c)
	l.Start("v3")
	got := all(l)
	if last := got[len(got)-1]; last.Seq != 5+gap+1 || last.Severity != Warning || !strings.Contains(last.Message, "without a stop") {
		t.Errorf("%+v", last)
	}
	if _, _, whole := l.After(5, 10, every); whole {
		t.Error("events after a run without a stop are said to be whole")
	}
}

// TestDamage: a cut last line and lines that are not events are left out, and what follows is not.
func TestDamage(t *testing.T) {
	name := filepath.Join(t.TempDir(), "events.log")
	c := &clock{noon}
	l := open(t, name, c)
	l.Start("v1")
	l.Close()
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(f, "rubbish\n{}\n%s\n%s", strings.Repeat("x", 3*maxLine), `{"seq":2,"type":"Node`)
	f.Close()
	for run := range 3 {
		l = open(t, name, c)
		l.Start("again")
		got := all(l)
		if len(got) != run+2 || !slices.IsSortedFunc(got, func(a, b Event) int { return int(a.Seq) - int(b.Seq) }) {
			t.Fatalf("run %d: %+v", run, got)
		}
		if last := got[len(got)-1]; !strings.Contains(last.Message, "4 lines of the event log are damaged") {
			t.Errorf("%+v", last)
		}
		l.Close()
	}
}

// TestRotation: two bounded files have the newest events, and an identity that stays.
func TestRotation(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "events.log")
	c := &clock{noon}
	l := open(t, name, c)
	id := l.ID()
	l.limit = 64<<10 + maxLine
	l.mu.Lock()
	const n = 5000
	for i := range n {
		e := l.node(NodeStarted, "%d %s", i, strings.Repeat("x", 100))
		l.add(e)
		if i%10 == 0 {
			l.flush()
		}
	}
	l.flush()
	l.mu.Unlock()
	l.Close()
	var sum int64
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	for _, file := range files {
		info, _ := os.Stat(file)
		sum += info.Size()
	}
	if len(files) != 2 || sum > 2*l.limit {
		t.Fatalf("%q have %d bytes", files, sum)
	}
	l = open(t, name, c)
	got := all(l)
	if l.ID() != id || l.Newest() != n+gap || len(got) < 500 || got[len(got)-1].Seq != n || got[0].Seq != n-uint64(len(got))+1 {
		t.Errorf("log %s of %s, newest %d, %d events", l.ID(), id, l.Newest(), len(got))
	}
	l.Close()
	// A crash between the two steps of a rotation.
	if err := os.Rename(name, name+".1"); err != nil {
		t.Fatal(err)
	}
	if l = open(t, name, c); l.ID() != id || len(all(l)) == 0 {
		t.Errorf("log %s, %d events", l.ID(), len(all(l)))
	}
	l.Close()
	// The older file is of another log.
	if err := os.WriteFile(name+".1", []byte(`{"log":"other"}`+"\n"+`{"seq":1,"type":"NodeStarted"}`+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l = open(t, name, c); l.ID() != id || len(all(l)) != 0 {
		t.Errorf("log %s, %d events", l.ID(), len(all(l)))
	}
}

type broken struct{}

func (broken) Write(p []byte) (int, error) { return 0, errors.New("no space left on device") }

// TestNotStored: while events cannot be written they stay in memory, a condition says so, and they
// are written later.
func TestNotStored(t *testing.T) {
	name := filepath.Join(t.TempDir(), "events.log")
	c := &clock{noon}
	l := open(t, name, c)
	l.wrap = func(io.Writer) io.Writer { return broken{} }
	l.Start("v1")
	l.Call(Call{Event: "end", Method: "/x/SetSecret", Object: "psk", Result: "OK"})
	conditions := l.Conditions()
	if len(conditions) != 1 || conditions[0].Type != "EventsNotStored" || !strings.Contains(conditions[0].Message, "no space left") || len(all(l)) != 2 {
		t.Fatalf("%v, %v", conditions, all(l))
	}
	l.wrap = nil
	c.at = c.at.Add(retryPace)
	l.Look(Snapshot{Now: c.at, Started: noon})
	if len(l.Conditions()) != 0 {
		t.Error("the condition stays")
	}
	l.Close()
	if l = open(t, name, c); types(all(l)) != "NodeStarted SecretSet" {
		t.Errorf("stored: %s", types(all(l)))
	}

	// A directory in its place, and one that does not exist.
	for _, bad := range []string{t.TempDir(), filepath.Join(t.TempDir(), "none", "events.log")} {
		l, err := Open(bad, c.now)
		if err == nil || l == nil {
			t.Fatalf("%v, %v", l, err)
		}
		l.Start("v1")
		if len(l.Conditions()) != 1 || len(all(l)) != 1 {
			t.Errorf("%v, %v", l.Conditions(), all(l))
		}
	}

	// A file that is removed is made again.
	l = open(t, name, c)
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	l.Start("v2")
	l.Close()
	if l = open(t, name, c); types(all(l)) != "NodeStarted" {
		t.Errorf("after it was removed: %s", types(all(l)))
	}
}

// TestStorm: however fast the state changes, the events are bounded, those that were not recorded
// are counted, and in the end the log has the present state.
func TestStorm(t *testing.T) {
	c := &clock{noon}
	l := open(t, filepath.Join(t.TempDir(), "events.log"), c)
	const n = 1000
	state := "up"
	look := func() {
		s := Snapshot{Now: c.at, Started: noon}
		for i := range n {
			s.Tunnels = append(s.Tunnels, &isthmusv1.TunnelStatus{Name: fmt.Sprint(i), State: state, Conditions: []*isthmusv1.Condition{{Type: "TunnelDown"}}})
		}
		c.at = c.at.Add(time.Second)
		l.Look(s)
	}
	for i := range 101 {
		state = []string{"up", "down"}[i%2]
		look()
	}
	if got := l.Newest(); got > stateBurst+101*statesPerSecond || got < stateBurst {
		t.Errorf("a storm of 101000 changes has %d events", got)
	}
	for range 2 * n / statesPerSecond {
		look()
	}
	up, count, told := map[string]bool{}, 0, 0
	for _, e := range all(l) {
		if up[e.Object] = e.Type == "TunnelUp"; e.Type == "Suppressed" {
			var n int
			if _, err := fmt.Sscanf(e.Message, "%d events", &n); err != nil {
				t.Error(e.Message)
			}
			count, told = count+n, told+1
		}
	}
	delete(up, "node")
	for name, is := range up {
		if !is {
			t.Errorf("the log ends with %s down", name)
		}
	}
	if len(up) != n || count < 10_000 || count > 101_000 || told > 5 {
		t.Errorf("%d tunnels, %d events suppressed in %d events", len(up), count, told)
	}

	// Calls have an allowance of their own.
	before := l.Newest()
	for range 1000 {
		l.Call(Call{Event: "refused", Address: "192.0.2.1", Error: "no certificate"})
	}
	if got := l.Newest() - before; got > callBurst+1 {
		t.Errorf("1000 refusals have %d events", got)
	}
	state = "down"
	before = l.Newest()
	look()
	if l.Newest() == before {
		t.Error("refusals keep a change of the state from the log")
	}
}

// TestBounds: long and invalid texts are cut, and memory has a bounded number of events.
func TestBounds(t *testing.T) {
	c := &clock{noon}
	name := filepath.Join(t.TempDir(), "events.log")
	l := open(t, name, c)
	long := strings.Repeat("ä", 10_000)
	l.Call(Call{Event: "end", Method: "/x/SetSecret", Object: long, Who: long + "\xff", Result: "OK"})
	l.Look(Snapshot{Now: c.at, Started: noon, Conditions: []*isthmusv1.Condition{{Type: "StateFull", Severity: "error", Object: "tunnel " + long, Message: "\xff" + long}}})
	for _, e := range all(l) {
		if len(e.Message) > maxMessage || len(e.Object) > maxObject || len(e.Who) > maxWho || !utf8.ValidString(e.Message+e.Object+e.Who) {
			t.Errorf("%d, %d, %d bytes, %q", len(e.Message), len(e.Object), len(e.Who), e.Message)
		}
	}
	before := l.Newest()
	l.Look(Snapshot{Now: c.at, Started: noon, Conditions: []*isthmusv1.Condition{{Type: "StateFull", Severity: "error", Object: "tunnel " + long}}})
	if l.Newest() != before {
		t.Error("a condition of an object with a long name begins twice")
	}
	l.mu.Lock()
	for range 3 * maxRing {
		l.add(l.node(NodeStarted, "x"))
	}
	l.mu.Unlock()
	if n, kept := len(all(l)), cap(l.ring); n != maxRing || kept > 2*maxRing {
		t.Errorf("%d events, room for %d", n, kept)
	}
	if got, last, whole := l.After(2, 10, every); whole || len(got) != 10 || last != got[9].Seq {
		t.Errorf("after an event that is gone: %d, whole %v", len(got), whole)
	}
	if got, more := l.Before(0, 3, every); !more || got[0].Seq != l.Newest() || got[2].Seq != l.Newest()-2 {
		t.Errorf("%+v, %v", got, more)
	}
	if got, more := l.Before(l.Newest()-maxRing+3, 10, every); more || len(got) != 2 {
		t.Errorf("%+v, %v", got, more)
	}
	if got, last, whole := l.After(l.Newest(), 3, every); !whole || len(got) != 0 || last != l.Newest() {
		t.Errorf("%+v, %v", got, whole)
	}
	if _, _, whole := l.After(l.Newest()+1, 3, every); whole {
		t.Error("after an event that was not yet: whole")
	}
}

// TestCalls: entries of the audit log become events, with the caller.
func TestCalls(t *testing.T) {
	for _, c := range []struct {
		a    Call
		want string
	}{
		{Call{Event: "begin", Method: "/x/SetSecret", Object: "psk"}, ""},
		{Call{Event: "end", Method: "/x/SetSecret", Object: "psk", Result: "OK"}, "SecretSet secret/psk 0 secret psk was set"},
		{Call{Event: "end", Method: "/x/RollbackSecret", Object: "psk", Result: "OK"}, "SecretSet secret/psk 0 the former value of secret psk was restored"},
		{Call{Event: "end", Method: "/x/IssueClient", Object: "bob as reader, serial 5f", Result: "OK"}, "ClientIssued client/bob 0 a certificate was issued for bob as reader, serial 5f"},
		{Call{Event: "end", Method: "/x/RenewClient", Object: "the caller's certificate, serial 5f", Result: "OK"}, "ClientRenewed client/root (alice) 0 a certificate was renewed: the caller's certificate, serial 5f"},
		{Call{Event: "end", Method: "/x/Confirm", Object: "generation 8", Result: "OK"}, "Confirmed node 8 generation 8 was confirmed"},
		{Call{Event: "end", Method: "/x/Reboot", Result: "OK"}, "MachineChanged node 0 the machine reboots"},
		{Call{Event: "end", Method: "/x/Apply", Result: "OK"}, ""},
		{Call{Event: "end", Method: "/x/Who", Result: "OK"}, ""},
		{Call{Event: "end", Method: "/x/Apply", Result: "InvalidArgument", Error: "3 problems"}, "CallFailed node 0 Apply failed: InvalidArgument: 3 problems"},
		{Call{Event: "end", Method: "/x/Apply", Object: "why: NET-1234", Result: "Aborted", Error: "generation 7 is present"}, "CallFailed node 0 Apply (why: NET-1234) failed: Aborted: generation 7 is present"},
		{Call{Event: "end", Method: "/x/Ping", Result: "Canceled"}, ""},
		{Call{Event: "end", Method: "/x/Capture", Result: "Canceled"}, ""},
		{Call{Event: "end", Method: "/x/Apply", Result: "Canceled", Error: "gone"}, "CallFailed node 0 Apply failed: Canceled: gone"},
		{Call{Event: "refused", Method: "/x/Apply", Error: "needs role operator"}, "CallRefused node 0 Apply was refused: needs role operator"},
		{Call{Event: "refused", Address: "192.0.2.1", Error: "no certificate", Suppressed: 7}, "LoginRefused node 0 a connection from 192.0.2.1 was refused: no certificate; 7 others before it were not recorded"},
		{Call{Event: "replaced"}, ""},
	} {
		c.a.Who, c.a.Time = "root (alice)", noon
		e, ok := called(c.a)
		got := ""
		if ok {
			got = fmt.Sprintf("%s %s %d %s", e.Type, e.Object, e.Generation, e.Message)
		}
		if got != c.want || ok && e.Who != "root (alice)" {
			t.Errorf("%+v:\n%s, want\n%s", c.a, got, c.want)
		}
	}
}

// TestKinds: the list is in order, and its texts are sentences.
func TestKinds(t *testing.T) {
	if !slices.IsSortedFunc(All, func(a, b *Kind) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("the kinds are not in order of name")
	}
	for i, k := range All {
		if i > 0 && All[i-1].Name == k.Name {
			t.Errorf("%s is listed twice", k.Name)
		}
		if !slices.Contains([]string{"node", "tunnel", "peer", "pool", "secret", "client"}, k.Of) || !slices.Contains(Severities, k.Severity) || !strings.HasSuffix(k.Meaning, ".") {
			t.Errorf("%+v", *k)
		}
		if found, ok := Lookup(strings.ToLower(k.Name)); !ok || found != k {
			t.Errorf("%s cannot be looked up", k.Name)
		}
	}
	if _, ok := Lookup("NoSuchKind"); ok {
		t.Error("a kind that does not exist was found")
	}
}

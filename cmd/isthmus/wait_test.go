package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// TestWait checks that apply waits until the node has applied a document, or says what it has not.
func TestWait(t *testing.T) {
	w := newWorld(t)
	out, errs, code := w.run(t.Context(), "", "apply", "-f", "testdata/first.yaml", "--wait", "1m", "-m", "NET-1234")
	if code != exitOK || !strings.Contains(errs, "generation 1 is applied") || strings.Contains(out, "applied") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	if out, _, _ := w.run(t.Context(), "", "get", "history"); !strings.Contains(out, "NET-1234") {
		t.Errorf("the history has no reason:\n%s", out)
	}
	_, errs, code = w.run(t.Context(), "", "policy", "delete", "saas", "--wait", "1m", "-m", "NET-1235")
	if code != exitOK || !strings.Contains(errs, "generation 2 is applied") {
		t.Errorf("exit %d: %s", code, errs)
	}
	if out, _, _ := w.run(t.Context(), "", "get", "history"); !strings.Contains(out, "NET-1235") {
		t.Errorf("the history has no reason:\n%s", out)
	}
	w.server.Router.SetStuck(true)
	w.server.Router.SetConditions(&isthmusv1.Condition{Type: "NotApplied", Severity: "error", Object: "tunnel gcp-0", Message: "tunnel/gcp-0: no such interface"})
	_, errs, code = w.run(t.Context(), "", "apply", "-f", "testdata/second.yaml", "--wait", "1s")
	if code != exitFailed || !strings.Contains(errs, "generation 3 is not applied after 1s; the node goes on trying; tunnel/gcp-0: no such interface") {
		t.Errorf("exit %d: %s", code, errs)
	}
	// Neither a terminal nor --wait: it does not wait.
	if _, errs, code = w.run(t.Context(), "", "rollback", "--message", "no good"); code != exitOK || strings.Contains(errs, "applied") {
		t.Errorf("exit %d: %s", code, errs)
	}
	out, errs, code = w.run(t.Context(), "", "rollback", "--plan", "--to", "3")
	if code != exitChanges || !strings.Contains(out, "+ add tunnel gcp-0") || !strings.Contains(errs, "to generation 4") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	if _, errs, code = w.run(t.Context(), "", "apply", "-f", "testdata/second.yaml", "-m", strings.Repeat("x", 501)); code != exitFailed || !strings.Contains(errs, "at most 500 bytes") {
		t.Errorf("exit %d: %s", code, errs)
	}
}

// TestOffline checks a document without a node.
func TestOffline(t *testing.T) {
	w := newWorld(t)
	w.context = "no-such-context.yaml"
	good := "node: {name: n, asn: 64620}\nunderlay: {interface: wan, address: 192.0.2.1}\ntunnels: [{name: a, ipsec: {remoteAddress: 198.51.100.7, psk: k}}]\n"
	out, errs, code := w.run(t.Context(), good, "validate", "--offline", "-f", "-")
	if code != exitOK || out != "" || !strings.Contains(errs, "uses secrets, which were not checked: k") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
	out, errs, code = w.run(t.Context(), good+"tunnel: []\n", "validate", "--offline", "-f", "-")
	if code != exitFailed || !strings.Contains(out, "standard input:4: tunnel:") || !strings.Contains(errs, "1 problem") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
}

// TestWaitLongerThanACall checks that --wait may be longer than --timeout, and that a generation
// that the node has reverted ends the wait.
func TestWaitLongerThanACall(t *testing.T) {
	w := newWorld(t)
	w.server.Router.SetStuck(true)
	go func() {
		for w.server.Router.Asked() < 3 { // the calls of a wait
			time.Sleep(time.Millisecond)
		}
		w.server.Router.SetStuck(false)
	}()
	_, errs, code := w.run(t.Context(), "", "apply", "-f", "testdata/first.yaml", "--wait", "1m", "--timeout", "500ms")
	if code != exitOK || !strings.Contains(errs, "generation 1 is applied") {
		t.Errorf("exit %d: %s", code, errs)
	}
	w.server.Router.SetStuck(true)
	asked := w.server.Router.Asked()
	go func() {
		for w.server.Router.Asked() == asked {
			time.Sleep(time.Millisecond)
		}
		w.server.Router.Revert()
	}()
	_, errs, code = w.run(t.Context(), "", "apply", "-f", "testdata/second.yaml", "--wait", "1m")
	if code != exitFailed || !strings.Contains(errs, "waiting until generation 2 is applied: ") || !strings.Contains(errs, "not confirmed in time: generation 2") {
		t.Errorf("exit %d: %s", code, errs)
	}
}

// TestWaitOlderNode checks the words about a node that does not have the method.
func TestWaitOlderNode(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "api.sock"))
	if err != nil {
		t.Fatal(err)
	}
	older := grpc.NewServer()
	defer older.Stop()
	go func() { _ = older.Serve(l) }()
	a := &app{timeout: time.Minute}
	conn, err := a.client("unix:"+l.Addr().String(), insecure.NewCredentials())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := a.await(t.Context(), conn, 7, time.Minute); err == nil || !strings.Contains(err.Error(), "generation 7 is accepted; the node has an older version") {
		t.Error(err)
	}
}

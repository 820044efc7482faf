package main

import (
	"strings"
	"testing"

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
	w.server.Router.SetStuck(true)
	w.server.Router.SetConditions(&isthmusv1.Condition{Type: "NotApplied", Severity: "error", Object: "tunnel gcp-0", Message: "tunnel/gcp-0: no such interface"})
	_, errs, code = w.run(t.Context(), "", "apply", "-f", "testdata/second.yaml", "--wait", "1s")
	if code != exitFailed || !strings.Contains(errs, "generation 2 is not applied after 1s; the node goes on trying; tunnel/gcp-0: no such interface") {
		t.Errorf("exit %d: %s", code, errs)
	}
	// Neither a terminal nor --wait: it does not wait.
	if _, errs, code = w.run(t.Context(), "", "rollback", "--message", "no good"); code != exitOK || strings.Contains(errs, "applied") {
		t.Errorf("exit %d: %s", code, errs)
	}
	out, errs, code = w.run(t.Context(), "", "rollback", "--plan", "--to", "2")
	if code != exitChanges || !strings.Contains(out, "+ add tunnel gcp-0") || !strings.Contains(errs, "to generation 3") {
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

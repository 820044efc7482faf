package main

import (
	"strings"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// TestStatus checks that the worst is first, with its remedy, and the exit codes of --check.
func TestStatus(t *testing.T) {
	w := newWorld(t)
	condition := func(kind, object, severity string, age time.Duration) *isthmusv1.Condition {
		return &isthmusv1.Condition{Type: kind, Object: object, Severity: severity, Since: ago(age), Message: "message of " + kind + " \x1b[31m"}
	}
	w.server.Router.SetConditions(
		condition("PoolDegraded", "pool main", "warning", time.Hour),
		condition("TunnelDown", "tunnel b", "error", time.Minute),
		condition("TunnelDown", "tunnel a", "error", time.Hour),
		condition("CharonUnreachable", "", "error", time.Second),
	)
	out, _, code := w.run(t.Context(), "", "status")
	if code != exitOK {
		t.Fatalf("exit %d: %s", code, out)
	}
	at := -1
	for _, want := range []string{"node-1: 3 errors, 1 warning (v0.0.0-test, up 1h00m)", "CharonUnreachable for 1s, since 2026-03-01 11:59:59", "-> Check `systemctl status strongswan`",
		"tunnel a TunnelDown for 1h00m", "-> `isthmus describe tunnel a`", "tunnel b TunnelDown", "-> `isthmus describe tunnel b`", "warning pool main PoolDegraded", "tunnels   1/3 up", "guard     active, 3 packets", "access    the certificate of this client expires in"} {
		i := strings.Index(out, want)
		if i < at || i < 0 {
			t.Errorf("%q is missing or too early in\n%s", want, out)
		}
		at = max(at, i)
	}
	if strings.Contains(out, "\x1b") {
		t.Error("a control character is printed")
	}
	for name, tt := range map[string]struct {
		conditions []*isthmusv1.Condition
		code       int
		want       string
	}{
		"errors":   {[]*isthmusv1.Condition{condition("PoolDegraded", "pool main", "warning", 0), condition("TunnelDown", "tunnel a", "error", 0)}, exitFailed, "ERROR: 1 error: tunnel a TunnelDown: message of TunnelDown ?[31m | pool main"},
		"warnings": {[]*isthmusv1.Condition{condition("PoolDegraded", "pool main", "warning", 0)}, exitOK, "WARNING: 1 warning: pool main PoolDegraded"},
		"well":     {nil, exitOK, "OK: tunnels 1/3 up, peers 0/"},
	} {
		w.server.Router.SetConditions(tt.conditions...)
		out, stderr, code := w.run(t.Context(), "", "status", "--check")
		if code != tt.code || !strings.HasPrefix(out, tt.want) || strings.Count(out, "\n") != 1 || stderr != "" {
			t.Errorf("%s: exit %d, %q %q", name, code, out, stderr)
		}
	}
	if out, _, code := w.run(t.Context(), "", "status", "-o", "json"); code != exitOK || !strings.Contains(out, `"tunnelsUp": 1`) {
		t.Errorf("exit %d: %s", code, out)
	}
}

package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// TestSystemClean: clean runs nothing without --yes, without root, or where the daemon is not
// installed.
func TestSystemClean(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	for _, c := range []struct {
		uid  int
		args string
		code int
		say  string
	}{
		{1000, "system clean --yes", exitFailed, "needs root"},
		{0, "system clean", exitUsage, "--yes is missing"},
		{0, "system clean now", exitUsage, "is not expected"},
		{0, "system", exitUsage, "give one of"},
	} {
		var stdout, stderr bytes.Buffer
		a := &app{stdin: strings.NewReader(""), stdout: &stdout, stderr: &stderr, now: time.Now, getenv: func(string) string { return "" }, uid: c.uid}
		if code := a.run(t.Context(), strings.Fields(c.args)); code != c.code || !strings.Contains(stderr.String(), c.say) {
			t.Errorf("uid %d, %s: exit code %d, %s%s", c.uid, c.args, code, stdout.String(), stderr.String())
		}
	}
}

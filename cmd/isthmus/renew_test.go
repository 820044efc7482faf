package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/test/root"
)

// agedWorld has a context for ann, an operator, whose certificate was issued so long ago by the
// clock of both sides.
func agedWorld(t *testing.T, ago time.Duration) (w *world, file string) {
	t.Helper()
	root.Need(t, "being root on the API's socket")
	var offset atomic.Int64
	offset.Store(int64(-ago))
	now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	s := apitest.Serve(t, now, apitest.New(time.Now))
	home := t.TempDir()
	w = &world{t: t, server: s, home: home, context: filepath.Join(home, "ann.yaml")}
	file = w.context
	if _, stderr, code := w.run(t.Context(), "", "--socket", s.Socket, "client", "issue", "ann", "--role", "operator", "--lifetime", "2400h", "--endpoint", s.Address, "-o", file); code != 0 {
		t.Fatal(stderr)
	}
	offset.Store(0)
	return w, file
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func mustContext(t *testing.T, name string) *isthmusv1.ClientContext {
	t.Helper()
	c, err := readContext(name)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var renewed = regexp.MustCompile(`^isthmus: renewed \S+/ann.yaml for ann, role operator, serial ([0-9a-f]{32}), expires \S+\n$`)

// TestClientRenew: each command warns 30 days before the end; renewing replaces the context with
// one that works and that its owner alone can read, keeps what else is in it, and ends the warning.
func TestClientRenew(t *testing.T) {
	w, file := agedWorld(t, 71*24*time.Hour) // of 100 days
	before := mustContext(t, file)
	const warning = "isthmus: warning: the certificate in "
	if _, stderr, code := w.run(t.Context(), "", "get", "tunnels", "--context", file); code != 0 || !strings.HasPrefix(stderr, warning+file+" ends at ") || !strings.HasSuffix(stderr, "in 28 days; run: isthmus client renew --context "+file+"\n") {
		t.Errorf("before: exit %d, %q", code, stderr)
	}
	if _, stderr, code := w.run(t.Context(), "", "get", "tunnels"); code != 0 || !strings.HasSuffix(stderr, "in 28 days; run: isthmus client renew\n") {
		t.Errorf("the usual context: exit %d, %q", code, stderr)
	}
	link := filepath.Join(t.TempDir(), "link.yaml")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	_, stderr, code := w.run(t.Context(), "", "client", "renew", "--context", link, "--address", "localhost"+w.server.Address[strings.LastIndex(w.server.Address, ":"):])
	// after the warning of the mode
	m := renewed.FindStringSubmatch(stderr[strings.Index(stderr, "\n")+1:])
	if code != 0 || m == nil {
		t.Fatalf("renewing: exit %d, %q", code, stderr)
	}
	after := mustContext(t, file)
	info, err := os.Lstat(file)
	if err != nil || info.Mode() != 0o600 || after.Address != before.Address || after.ServerName != before.ServerName || after.Key == before.Key || after.Certificate == before.Certificate {
		t.Errorf("the context is %v of mode %v, %v", after, info.Mode(), err)
	}
	if to, err := os.Readlink(link); err != nil || to != file {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if left, _ := filepath.Glob(filepath.Join(w.home, "*")); len(left) != 1 {
		t.Errorf("next to the context: %v", left)
	}
	if _, stderr, code := w.run(t.Context(), "", "get", "tunnels"); code != 0 || stderr != "" {
		t.Errorf("afterwards: exit %d, %q", code, stderr)
	}
	if out, _, _ := w.run(t.Context(), "", "client", "list", "--socket", w.server.Socket); !regexp.MustCompile(`(?m)^ann +operator +valid +\S+ +` + m[1] + ` +[0-9a-f]{32}$`).MatchString(out) {
		t.Errorf("the list is\n%s", out)
	}
	log := readFile(t, w.server.Audit)
	if !regexp.MustCompile(`"event":"end".*"who":"ann".*RenewClient.*serial ` + m[1]).MatchString(log) {
		t.Errorf("the audit log has\n%s", log)
	}
	if _, stderr, code := w.run(t.Context(), "", "client", "renew"); code != 1 || !strings.Contains(stderr, "can be renewed from") {
		t.Errorf("at once again: exit %d, %q", code, stderr)
	}
	if _, stderr, code := w.run(t.Context(), "", "client", "renew", "--socket", w.server.Socket); code != 2 || !strings.Contains(stderr, "no certificate to renew") {
		t.Errorf("root: exit %d, %q", code, stderr)
	}
}

// TestKeepKey: the key of the context stays, and the answer may be lost.
func TestKeepKey(t *testing.T) {
	w, file := agedWorld(t, 71*24*time.Hour)
	old := readFile(t, file)
	for range 2 {
		if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, stderr, code := w.run(t.Context(), "", "client", "renew", "--keep-key"); code != 0 || !renewed.MatchString(stderr) {
			t.Fatalf("exit %d, %q", code, stderr)
		}
		if c := mustContext(t, file); !strings.Contains(old, strings.Split(c.Key, "\n")[1]) {
			t.Error("the key was changed")
		}
	}
	if n := len(w.server.Authority.Clients()); n != 3 { // with the first admin's
		t.Errorf("%d certificates", n)
	}
}

// TestRenewInterrupted: wherever a renewal is cut short, the context works, and running it again
// ends with the certificate that the node issued.
func TestRenewInterrupted(t *testing.T) {
	w, file := agedWorld(t, 71*24*time.Hour)
	works := func(when string) {
		t.Helper()
		if _, stderr, code := w.run(t.Context(), "", "get", "tunnels"); code != 0 {
			t.Errorf("%s: exit %d, %s", when, code, stderr)
		}
	}
	old := readFile(t, file)
	// Cut short while the new key was written: the rest cannot be read.
	if err := os.WriteFile(file+renewingSuffix, []byte("key: |\n  -----BEGIN PRIV"), 0o600); err != nil {
		t.Fatal(err)
	}
	works("a torn key")
	if _, err := pendingKey(file+renewingSuffix, mustContext(t, file).Certificate); err != nil {
		t.Fatal(err)
	}
	pending := readFile(t, file+renewingSuffix)
	if info, err := os.Stat(file + renewingSuffix); err != nil || info.Mode() != 0o600 {
		t.Errorf("the new key: %v, %v", info, err)
	}
	if _, stderr, code := w.run(t.Context(), "", "client", "renew"); code != 0 {
		t.Fatal(stderr)
	}
	first := mustContext(t, file)
	// Cut short after the node had answered.
	for path, text := range map[string]string{file: old, file + renewingSuffix: pending} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	works("before the context is replaced")
	if _, stderr, code := w.run(t.Context(), "", "client", "renew"); code != 0 {
		t.Fatal(stderr)
	}
	if c := mustContext(t, file); c.Key != first.Key || len(w.server.Authority.Clients()) != 3 {
		t.Errorf("another certificate was issued: %d", len(w.server.Authority.Clients()))
	}
	works("after it")
	// Cut short before the new key's own file was removed: it is of a former certificate.
	if err := os.WriteFile(file+renewingSuffix, []byte(pending), 0o600); err != nil {
		t.Fatal(err)
	}
	present := mustContext(t, file)
	if key, err := pendingKey(file+renewingSuffix, present.Certificate); err != nil || key == present.Key {
		t.Errorf("the key of a former renewal is used again: %v", err)
	}
	// Another one has renewed it with the key of before.
	if err := os.WriteFile(file, []byte(old), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr, code := w.run(t.Context(), "", "client", "renew"); code != 1 || !strings.Contains(stderr, "its key may be stolen") || readFile(t, file) != old {
		t.Errorf("renewed twice: exit %d, %q", code, stderr)
	}
}

// TestWarnings: how a context is warned of depends on what can be done.
func TestWarnings(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(w.home, "brief.yaml")
	if _, stderr, code := w.run(t.Context(), "", "client", "issue", "brief", "--role", "reader", "--lifetime", "9h", "-o", file); code != 0 {
		t.Fatal(stderr)
	}
	w.context = file
	for ahead, want := range map[time.Duration]string{
		0:             "",
		5 * time.Hour: "",
		7 * time.Hour: "in 2h0m0s; let an admin issue another one (isthmus client issue)\n",
		9 * time.Hour: ": let an admin issue another one (isthmus client issue)\n",
	} {
		var stderr bytes.Buffer
		a := w.app(nil, &bytes.Buffer{}, &stderr)
		ends := time.Now()
		a.wall = func() time.Time { return ends.Add(ahead) }
		if code := a.run(t.Context(), []string{"get", "tunnels"}); code != 0 || want == "" && stderr.Len() > 0 || !strings.HasSuffix(stderr.String(), want) {
			t.Errorf("after %v: exit %d, %q, want %q", ahead, code, stderr.String(), want)
		}
	}
}

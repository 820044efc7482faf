package auth

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestLogins: a caller over the unix socket has the name of its login user, where the kernel has
// one.
func TestLogins(t *testing.T) {
	dir := t.TempDir()
	users := func(uid string) (string, error) {
		if uid == "1000" {
			return "alice", nil
		}
		return "", errors.New("unknown user")
	}
	for text, want := range map[string]string{
		"1000":                 "root (alice)",
		"1000\n":               "root (alice)",
		"1001":                 "root (uid 1001)",
		"0":                    "root",
		"4294967295":           "root", // not set
		"99999999999":          "root",
		"-1":                   "root",
		"alice":                "root",
		"":                     "root",
		"1000 and 100000 more": "root",
	} {
		if err := os.MkdirAll(filepath.Join(dir, "7"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "7", "loginuid"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		l := &logins{proc: dir, name: users}
		if got := l.root(7); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
		if got := l.root(8) + l.root(0); got != "rootroot" {
			t.Errorf("without a process: %q", got)
		}
	}
	// The kernel's own: a test has a login user or not, but reading it succeeds where there is a
	// /proc with the file.
	if want, err := os.ReadFile("/proc/self/loginuid"); err == nil {
		got, err := (&logins{}).read(int32(os.Getpid()))
		if err != nil || got != string(want) {
			t.Errorf("of this process: %q, %v, want %q", got, err, want)
		}
	}
}

// TestObserve: the observer gets each entry after it is written, without the lock, and gets no
// refusal that is not written.
func TestObserve(t *testing.T) {
	l, err := OpenAudit(filepath.Join(t.TempDir(), "audit.log"), newClock().now)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var seen []string
	l.Observe(func(e Entry) {
		if !l.mu.TryLock() || !l.other.mu.TryLock() {
			t.Fatal("the log is locked")
		}
		l.mu.Unlock()
		l.other.mu.Unlock()
		if e.Time.IsZero() {
			t.Errorf("%v has no time", e)
		}
		seen = append(seen, fmt.Sprint(e.Event, " ", e.Method))
	})
	if err := l.Act(Entry{Method: "Apply"}, func() (uint64, error) { return 1, nil }); err != nil {
		t.Fatal(err)
	}
	for range refusalsBurst + 5 {
		if err := errors.Join(l.refuse("", Entry{}), l.refuse("reader", Entry{Method: "Apply"})); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"begin Apply", "end Apply", "refused ", "refused Apply"}; !slices.Equal(seen[:4], want) || len(seen) != 2+2*refusalsBurst {
		t.Errorf("%d entries: %q", len(seen), seen)
	}
	// Of a change that could not be written there is the end alone.
	l.file.Close()
	seen = nil
	if err := errors.Join(l.write(Entry{Event: Begin}), l.write(Entry{Event: Refused})); err == nil {
		t.Fatal("a closed file was written")
	}
	_ = l.write(Entry{Event: End, Method: "Apply"})
	if !slices.Equal(seen, []string{"end Apply"}) {
		t.Errorf("without a file: %q", seen)
	}
}

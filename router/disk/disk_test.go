//go:build unix

package disk

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// names returns what a directory has.
func names(t *testing.T, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestReplace(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	for _, tt := range []struct {
		text string
		mode fs.FileMode
	}{{"one", 0o600}, {"two", 0o644}, {"", 0o600}} {
		if err := Replace(file, []byte(tt.text), tt.mode); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(file)
		info, _ := os.Stat(file)
		if err != nil || string(data) != tt.text || info.Mode() != tt.mode {
			t.Errorf("%q of mode %v, %v, want %q of mode %v", data, info.Mode(), err, tt.text, tt.mode)
		}
	}
	if left := names(t, dir); !slices.Equal(left, []string{"file"}) {
		t.Errorf("left %v", left)
	}
	if err := Replace(filepath.Join(dir, "missing", "file"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a directory that is missing: %v", err)
	}
}

// TestFailure: where the file cannot be written or moved, what was there stays, and nothing else is
// left.
func TestFailure(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := Replace(file, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A limit of the size of files fails the write half-way, as a full disk does.
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 4096, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	failed := Replace(file, bytes.Repeat([]byte("x"), 8192), 0o600)
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(failed, unix.EFBIG) {
		t.Errorf("writing more than fits: %v", failed)
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "before" {
		t.Errorf("after a failure the file holds %q, %v", data, err)
	}

	// A directory is not replaced by a file.
	if err := os.MkdirAll(filepath.Join(dir, "taken", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Replace(filepath.Join(dir, "taken"), []byte("after"), 0o600); err == nil {
		t.Error("a directory was replaced")
	}
	if left := names(t, dir); !slices.Equal(left, []string{"file", "taken"}) {
		t.Errorf("left %v", left)
	}
}

// TestLeftover: what a killed process left is neither in the way nor followed.
func TestLeftover(t *testing.T) {
	dir := t.TempDir()
	file, other := filepath.Join(dir, "file"), filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, leave := range []func() error{
		func() error { return os.WriteFile(file+Temporary, []byte("longer than what comes"), 0o444) },
		func() error { return os.Symlink(other, file+Temporary) },
	} {
		if err := leave(); err != nil {
			t.Fatal(err)
		}
		if err := Replace(file, []byte("new"), 0o600); err != nil {
			t.Fatal(err)
		}
		data, _ := os.ReadFile(file)
		kept, _ := os.ReadFile(other)
		info, err := os.Lstat(file)
		if err != nil || string(data) != "new" || string(kept) != "other" || info.Mode() != 0o600 {
			t.Errorf("%q of mode %v, %v; the other file holds %q", data, info.Mode(), err, kept)
		}
	}
}

func TestSyncDir(t *testing.T) {
	dir := t.TempDir()
	if err := SyncDir(dir); err != nil {
		t.Error(err)
	}
	if err := SyncDir(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a directory that is missing: %v", err)
	}
}

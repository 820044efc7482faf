package store

import (
	"os"
	"path/filepath"
	"testing"
)

func TestInUse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	is := func(want bool) {
		t.Helper()
		if got, err := InUse(dir); got != want || err != nil {
			t.Errorf("in use: %v, %v; want %v", got, err, want)
		}
	}
	is(false)
	if _, err := os.Stat(dir); err == nil {
		t.Error("looking makes the directory")
	}
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	is(true)
	s.Close()
	is(false)
	if s, err = Open(dir); err != nil {
		t.Errorf("looking keeps the next one out: %v", err)
	}
	s.Close()
}

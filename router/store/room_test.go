package store

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRoom: Room returns the free space of the file system, and the error of a state directory that
// cannot be written has the remedy.
func TestRoom(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if n, readOnly, err := s.Room(); n == 0 || readOnly || err != nil {
		t.Errorf("%d, %v, %v", n, readOnly, err)
	}
	// The file is gone as far as an opening is concerned, which is all that a disk in error shows.
	if err := os.Remove(filepath.Join(dir, "lock")); err != nil {
		t.Fatal(err)
	}
	if n, readOnly, err := s.Room(); n != 0 || readOnly || err == nil || !strings.Contains(err.Error(), "start the machine again") {
		t.Errorf("%d, %v, %v", n, readOnly, err)
	}
}

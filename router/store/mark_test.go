package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/secret"
)

// TestOlderStateIsTold: a copy of the state directory that is put back is found out by what is kept
// outside of it, at each start until the state has caught up; nothing else is taken for one.
func TestOlderStateIsTold(t *testing.T) {
	for what, change := range map[string]func(*testing.T, *Store){
		"client certificates have changed since": func(t *testing.T, s *Store) {
			if err := s.SetClient(Client{Serial: "ab", Revoked: true}); err != nil {
				t.Fatal(err)
			}
		},
		"the newest document is of generation 1 and was 2": func(t *testing.T, s *Store) {
			if _, err := s.Accept(1, Revision{Text: "two"}); err != nil {
				t.Fatal(err)
			}
		},
		"secret k has been set since": func(t *testing.T, s *Store) {
			if _, err := s.SetSecret("k", []byte("two"), noon); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			state, file := filepath.Join(dir, "state"), filepath.Join(dir, "mark")
			older := func() (*Store, string) {
				t.Helper()
				s, err := Open(state)
				if err != nil {
					t.Fatal(err)
				}
				older, err := s.Remember(file)
				if err != nil {
					t.Fatal(err)
				}
				return s, older
			}
			s, got := older()
			if err := s.SetClient(Client{Serial: "ab"}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Accept(0, Revision{Text: "one"}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.SetSecret("k", []byte("one"), noon); err != nil {
				t.Fatal(err)
			}
			s.Close()
			if err := os.CopyFS(filepath.Join(dir, "copy"), os.DirFS(state)); err != nil {
				t.Fatal(err)
			}
			s, again := older()
			change(t, s)
			s.Close()
			s, third := older()
			s.Close()
			if got+again+third != "" {
				t.Errorf("in its own life: %q, %q, %q", got, again, third)
			}
			if err := os.RemoveAll(state); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(dir, "copy"), state); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				s, got := older()
				if got != what {
					t.Errorf("put back: %q", got)
				}
				s.Close()
			}
			s, _ = older()
			change(t, s)
			s.Close()
			s, got = older()
			s.Close()
			if got != "" {
				t.Errorf("when it has caught up: %q", got)
			}
			if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
			if s, err := Open(state); err != nil {
				t.Fatal(err)
			} else if _, err := s.Remember(file); err == nil {
				t.Error("a damaged file is not an error")
			} else {
				s.Close()
			}
			if _, got := older(); got != "" {
				t.Errorf("after a damaged file: %q", got)
			}
		})
	}
}

// TestFormerSecret: the value before the last one comes back, over a restart too, until it is
// dropped.
// TestAddSecret: another value is refused with both fingerprints, and the same one changes nothing.
func TestAddSecret(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	one, stored, err := s.AddSecret("k", []byte("one"), noon)
	if err != nil || !stored {
		t.Fatalf("a new one: %t, %v", stored, err)
	}
	if again, stored, err := s.AddSecret("k", []byte("one"), noon); err != nil || stored || again.Ref != one.Ref {
		t.Errorf("the same again: %v, %t, %v", again, stored, err)
	}
	_, stored, err = s.AddSecret("k", []byte("two"), noon)
	if !errors.Is(err, ErrTaken) || stored || !strings.Contains(err.Error(), one.Ref.Fingerprint) || strings.Contains(err.Error(), "two") {
		t.Errorf("another: %t, %v", stored, err)
	}
	if v, err := s.Lookup(one.Ref); err != nil || string(v) != "one" {
		t.Errorf("afterwards: %q, %v", v, err)
	}
	if _, _, err := s.AddSecret("Bad/Name", []byte("x"), noon); err == nil {
		t.Error("a bad name was accepted")
	}
}

func TestFormerSecret(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	set := func(value string) SecretInfo {
		t.Helper()
		info, err := s.SetSecret("k", []byte(value), noon)
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	back := func(want string) {
		t.Helper()
		info, err := s.RollbackSecret("k", noon)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := s.Lookup(info.Ref); err != nil || string(got) != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
	if _, err := s.RollbackSecret("k", noon); !errors.Is(err, secret.ErrNotFound) {
		t.Errorf("rolling back what is not there: %v", err)
	}
	one := set("one")
	if _, err := s.RollbackSecret("k", noon); !errors.Is(err, ErrNotFound) {
		t.Errorf("rolling back what was set once: %v", err)
	}
	if two := set("two"); two.Ref == one.Ref {
		t.Error("equal fingerprints")
	}
	if three := set("one"); three.Ref != one.Ref {
		t.Error("the same value has another fingerprint")
	}
	set("two")
	s.Close()
	if s, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	back("one")
	back("two")
	if err := s.DropFormer(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.RollbackSecret("k", noon); !errors.Is(err, ErrNotFound) {
		t.Errorf("after it was dropped: %v", err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "secrets", "k.sealed"))
	if err != nil || strings.Contains(string(data), "former") {
		t.Errorf("%s, %v", data, err)
	}
}

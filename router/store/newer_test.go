package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/secret"
)

// recorded copies the state directory that revision 36b3eab has written.
func recorded(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.CopyFS(dir, os.DirFS("testdata/36b3eab")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// records returns the names of the files of a state directory that are records.
func records(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && d.Name() != "lock" && !strings.HasPrefix(d.Name(), "audit") {
			name, _ := filepath.Rel(dir, path)
			out = append(out, name)
		}
		return err
	})
	if err != nil || len(out) < 10 {
		t.Fatalf("%v, %v", out, err)
	}
	return out
}

func contents(s *Store, t *testing.T) string {
	t.Helper()
	r, _ := s.Current()
	return fmt.Sprint(revisionText(r), len(s.History()), s.secretsText(t), s.clientsText(), s.Carry())
}

// TestUnknownFields: what a newer version has added to a file, and files and directories that it
// has made, are ignored: the node goes back with all it had.
func TestUnknownFields(t *testing.T) {
	s, err := Open(recorded(t))
	if err != nil {
		t.Fatal(err)
	}
	want := contents(s, t)
	s.Close()
	dir := recorded(t)
	added := 0
	for _, name := range records(t, dir) {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		payload, err := decodeRecord(name, data)
		if err != nil {
			t.Fatal(err)
		}
		if body, ok := bytes.CutPrefix(payload, []byte("{")); ok {
			payload = append([]byte(`{"future":{"a":[1,{"b":null}]},`), body...)
			added++
		}
		if err := os.WriteFile(filepath.Join(dir, name), encodeRecord(plain, name, payload), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if added < 9 {
		t.Fatalf("%d files have fields", added)
	}
	for name, text := range map[string]string{"future": "x", "futures/0.json": "x", "clients/0.future": "x", "secrets/x.future": "x"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700), os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := contents(s, t); got != want || len(s.Damage()) > 0 {
		t.Errorf("%v, has\n%s\nwant\n%s", s.Damage(), got, want)
	}
}

// TestNewerFormat: a file of a format that this version does not know is reported as that and not
// as damaged, by its own name and alone, and stays.
func TestNewerFormat(t *testing.T) {
	for _, name := range records(t, recorded(t)) {
		dir := recorded(t)
		file := filepath.Join(dir, name)
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		data = append(fmt.Appendf(nil, "isthmus-store %d and what a later version knows", highest(name)+1), data[len("isthmus-store 1"):]...)
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(dir)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		others := 0
		for _, d := range s.Damage() {
			if own := strings.HasPrefix(d.Error(), name) || name == keyFile; !own {
				others++
			}
			if !errors.Is(d, ErrNewer) {
				t.Errorf("%s: %v", name, d)
			}
		}
		// Two revisions are written as changes of the first.
		if want := map[bool]int{true: 2}[strings.HasSuffix(name, "1.json") && strings.HasPrefix(name, revisionDir)]; len(s.Damage()) == 0 || others != want {
			t.Errorf("%s: %v", name, s.Damage())
		}
		switch {
		case name == keyFile:
			if _, err := s.Ref("aws-0"); !errors.Is(err, ErrNewer) || errors.Is(err, ErrDamaged) {
				t.Errorf("a secret: %v", err)
			}
			if _, err := s.SetSecret("aws-0", []byte("x"), noon); !errors.Is(err, ErrNewer) {
				t.Errorf("setting one: %v", err)
			}
		case strings.HasPrefix(name, secretDir):
			if _, err := s.Lookup(secret.Ref{Name: "aws-0"}); !errors.Is(err, ErrNewer) {
				t.Errorf("the secret: %v", err)
			}
		case strings.HasPrefix(name, privateDir):
			if _, err := s.Private(strings.TrimSuffix(filepath.Base(name), sealedSuffix)); !errors.Is(err, ErrNewer) {
				t.Errorf("%s: %v", name, err)
			}
		case strings.HasSuffix(name, "3.json") && strings.HasPrefix(name, revisionDir):
			if r, _ := s.Current(); r.Generation != 2 || s.Newest() != 3 {
				t.Errorf("the present generation is %d of %d", r.Generation, s.Newest())
			}
			if _, err := s.Revision(3); !errors.Is(err, ErrNewer) {
				t.Errorf("the newest: %v", err)
			}
		}
		s.Close()
		if after, err := os.ReadFile(file); err != nil || !bytes.Equal(after, data) {
			t.Errorf("%s was changed: %v", name, err)
		}
	}
}

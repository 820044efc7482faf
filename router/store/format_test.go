package store_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/store"
	"github.com/isthmus-net/isthmus/test/golden"
)

// made was written by the version of revision 36b3eab; see testdata/make.
const made = "testdata/36b3eab"

func copyOf(t *testing.T, from string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.CopyFS(dir, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestOpensFormer: this version reads all of a state directory that an earlier one has written,
// with its authority, and writes to it.
func TestOpensFormer(t *testing.T) {
	dir := copyOf(t, made)
	now := time.Date(2026, 1, 20, 0, 0, 0, 0, time.UTC)
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if d := st.Damage(); len(d) > 0 {
		t.Fatal(d)
	}
	for generation, end := range map[uint64]string{1: "alone\n", 2: "# more\n", 3: "# more and more\n"} {
		r, err := st.Revision(generation)
		if err != nil || !strings.HasPrefix(r.Text, "tunnels: [{name: a}]\n# a document") || !strings.HasSuffix(r.Text, end) || r.Author != "ann" ||
			string(r.Ledger) != `{"tunnels":{"a":{"id":490001,"interface":"t-a"}}}` || (r.ConfirmBy.IsZero() || r.RevertTo != 2) != (generation < 3) {
			t.Errorf("generation %d: %+v, %v", generation, r, err)
		}
	}
	if c := st.Carry(); c != (store.Carry{Carried: 2, Trying: 3, Starts: 1, Back: true}) {
		t.Errorf("carried %+v", c)
	}
	for _, want := range []string{"second", "first"} {
		ref, err := st.Ref("aws-0")
		if err != nil {
			t.Fatal(err)
		}
		if v, err := st.Lookup(ref); err != nil || string(v) != want {
			t.Errorf("the secret is %q, %v; want %q", v, err, want)
		}
		if want == "second" {
			if _, err := st.RollbackSecret("aws-0", now); err != nil {
				t.Fatal(err)
			}
		}
	}
	audit, err := auth.OpenAudit(filepath.Join(dir, "audit.log"), func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	defer audit.Close()
	a, err := auth.New(auth.Options{Store: st, Bundle: filepath.Join(dir, "admin.yaml"), Notice: io.Discard, Audit: audit, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(a.Certificate(), "BEGIN CERTIFICATE"); n != 2 {
		t.Errorf("%d authorities are trusted", n)
	}
	if _, err := os.Stat(filepath.Join(dir, "admin.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a first admin once more: %v", err)
	}
	var clients []string
	for _, c := range a.Clients() {
		clients = append(clients, fmt.Sprint(c.Name, " ", c.Role, " ", c.Revoked))
	}
	slices.Sort(clients)
	if want := []string{"admin admin false", "ann reader false", "bob reader true"}; !slices.Equal(clients, want) {
		t.Errorf("clients %v, want %v", clients, want)
	}
	if err := a.Revoke(fmt.Sprintf("4%031x", 0)); err != nil {
		t.Error(err)
	}
}

// TestFormat: the format of each kind of file is that of testdata/format.txt, and has everything
// that the one of 36b3eab has, with the same types: what is added is ignored by an earlier version,
// and what goes away or changes would keep it from coming back.
func TestFormat(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if out, err := exec.Command("go", "run", "./testdata/make", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 1, 20, 0, 0, 0, 0, time.UTC)
	if err := st.SetClient(store.Client{Serial: "55", Name: "ann", Role: "reader", Issued: now, Expires: now, RenewedFrom: fmt.Sprintf("4%031x", 0), First: now, Key: "00"}); err != nil {
		t.Fatal(err)
	}
	st.Close()
	now36 := format(t, copyOf(t, made))
	present := format(t, dir)
	for _, line := range now36 {
		if !slices.Contains(present, line) {
			t.Errorf("an earlier version writes %q, and this one does not", line)
		}
	}
	if golden.Check(t, "testdata/format.txt", strings.Join(present, "\n")+"\n"); t.Failed() {
		t.Log("read docs/decisions/state-format.md before you renew it")
	}
}

// format returns one line for each field of each kind of file, in order.
func format(t *testing.T, dir string) []string {
	t.Helper()
	lines := map[string]bool{}
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(dir, path)
		if err != nil || !d.Type().IsRegular() || name == "lock" || name == "audit.log" || name == "admin.yaml" {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		header, payload, _ := bytes.Cut(data, []byte("\n"))
		words := strings.Fields(string(header))
		if len(words) != 4 {
			return fmt.Errorf("%s begins with %q", name, header)
		}
		what := name
		if sub := filepath.Dir(name); sub != "." {
			what = sub + "/*" + filepath.Ext(name)
		}
		lines[fmt.Sprintf("%s: %s %s SHA-256 length", what, words[0], words[1])] = true
		fields(lines, what+":", payload)
		if base, ok := strings.CutSuffix(name, ".sealed"); ok && strings.HasPrefix(base, "private/") {
			plain, err := st.Private(strings.TrimPrefix(base, "private/"))
			if err != nil {
				return err
			}
			fields(lines, name+", decrypted:", plain)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return slices.Sorted(maps.Keys(lines))
}

// fields records the fields of a JSON value under a path. The contents of a document's ledger
// belong to the planner.
func fields(lines map[string]bool, path string, data []byte) {
	var v any
	if json.Unmarshal(data, &v) != nil {
		lines[path+" text"] = true
		return
	}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, x := range v {
				if k == "ledger" {
					lines[path+" ledger object"] = true
					continue
				}
				walk(path+" "+k, x)
			}
		case []any:
			for _, x := range v {
				walk(path+" []", x)
			}
		case string:
			if _, err := time.Parse(time.RFC3339Nano, v); err == nil {
				lines[path+" time"] = true
			} else {
				lines[path+" string"] = true
			}
		case float64:
			lines[path+" number"] = true
		case bool:
			lines[path+" boolean"] = true
		default:
			lines[path+" null"] = true
		}
	}
	walk(path, v)
}

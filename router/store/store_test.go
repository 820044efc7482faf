package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/secret"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// model is what a store must hold.
type model struct {
	revision string
	history  int // acknowledged revisions
	secrets  string
	clients  string
}

func revisionText(r Revision) string {
	return fmt.Sprintf("%s %s confirm=%v", r.Text, r.Ledger, !r.ConfirmBy.IsZero())
}

func (s *Store) secretsText(t *testing.T) string {
	var b strings.Builder
	for _, info := range s.Secrets() {
		v, err := s.Lookup(info.Ref)
		if err != nil {
			t.Errorf("looking up %s: %v", info.Ref, err)
		}
		fmt.Fprintf(&b, "%s=%s ", info.Ref.Name, v)
	}
	return b.String()
}

func (s *Store) clientsText() string {
	var b strings.Builder
	for _, c := range s.Clients() {
		fmt.Fprintf(&b, "%s:%v ", c.Serial, c.Revoked)
	}
	return b.String()
}

// script is every kind of write, in an order in which each finds something to replace. Each step
// returns the model that holds once it was acknowledged.
var script = []func(s *Store, m model) (model, error){
	accept("one", false), setSecret("psk", "first"), setClient("0a", false), accept("two", true),
	(*Store).confirmed,
	setSecret("psk", "second"), setClient("0a", true), accept("three", true), setSecret("md5", "third"),
	func(s *Store, m model) (model, error) {
		m.secrets = "md5=third "
		return m, s.DeleteSecret("psk")
	},
	accept("four", false), setClient("0b", false),
}

// long is a script of documents that are written as changes of another one.
var long = []func(s *Store, m model) (model, error){
	accept("one"+filler, false), accept("two"+filler, true), (*Store).confirmed, accept("two"+filler+"three", false),
	func(s *Store, m model) (model, error) { return m, s.Compact(1) },
	accept("four"+filler+"three", false), setClient("0b", false),
}

var filler = strings.Repeat(" and so on, and so forth", 50)

func accept(text string, confirm bool) func(*Store, model) (model, error) {
	return func(s *Store, m model) (model, error) {
		r := Revision{Time: noon, Author: "t", Text: text, Ledger: json.RawMessage(`{"for":"` + text + `"}`)}
		if confirm {
			r.ConfirmBy, r.RevertTo = noon.Add(time.Minute), s.current.Generation
		}
		m.revision = revisionText(r)
		m.history++
		_, err := s.Accept(s.current.Generation, r)
		return m, err
	}
}

func (s *Store) confirmed(m model) (model, error) {
	m.revision = strings.Replace(m.revision, "confirm=true", "confirm=false", 1)
	return m, s.Confirm(s.current.Generation)
}

func setSecret(name, value string) func(*Store, model) (model, error) {
	return func(s *Store, m model) (model, error) {
		switch {
		case name == "psk":
			m.secrets = "psk=" + value + " "
		default:
			m.secrets = name + "=" + value + " " + m.secrets
		}
		_, err := s.SetSecret(name, []byte(value), noon)
		return m, err
	}
}

func setClient(serial string, revoked bool) func(*Store, model) (model, error) {
	return func(s *Store, m model) (model, error) {
		m.clients = strings.Replace(m.clients, serial+":false ", "", 1) + fmt.Sprintf("%s:%v ", serial, revoked)
		return m, s.SetClient(Client{Serial: serial, Revoked: revoked})
	}
}

// runScript runs until the power goes, and returns what must be there and what may be.
func runScript(t *testing.T, fs *faultFS, script []func(*Store, model) (model, error)) (was, maybe model) {
	s, err := open(fs)
	if err != nil {
		if !errors.Is(err, errPower) {
			t.Fatal(err)
		}
		return
	}
	for i, step := range script {
		if maybe, err = step(s, was); err != nil {
			if !errors.Is(err, errPower) {
				t.Fatalf("step %d: %v", i, err)
			}
			return was, maybe
		}
		was = maybe
	}
	return was, was
}

// TestPowerLoss cuts the power at every operation of the file system, and starts again from
// everything that a disk may hold then.
func TestPowerLoss(t *testing.T) {
	t.Run("whole", func(t *testing.T) { powerLoss(t, script) })
	t.Run("changes", func(t *testing.T) { powerLoss(t, long) })
	t.Run("sealed", func(t *testing.T) { powerLoss(t, sealing) })
}

func powerLoss(t *testing.T, script []func(*Store, model) (model, error)) {
	fs := newFaultFS()
	runScript(t, fs, script)
	total := fs.ops
	r := rand.New(rand.NewPCG(1, 2))
	for cut := 1; cut <= total; cut++ {
		for outcome := range numOfOutcomes + 6 {
			outcome = min(outcome, anyOfIt)
			fs := newFaultFS()
			fs.cut = cut
			was, maybe := runScript(t, fs, script)
			s, err := open(fs.restart(outcome, r))
			if err != nil {
				t.Fatalf("cut %d outcome %d: opening: %v", cut, outcome, err)
			}
			openAll(t, s)
			check := func(what, got, was, maybe string) {
				if got != was && got != maybe {
					t.Errorf("cut %d outcome %d: %s are %q, want %q or %q", cut, outcome, what, got, was, maybe)
				}
			}
			if d := s.Damage(); len(d) != 0 {
				t.Errorf("cut %d outcome %d: damage: %v", cut, outcome, d)
			}
			got := ""
			if cur, ok := s.Current(); ok {
				got = revisionText(cur)
			}
			check("document and ledger", got, was.revision, maybe.revision)
			check("secrets", s.secretsText(t), was.secrets, maybe.secrets)
			check("clients", s.clientsText(), was.clients, maybe.clients)
			if n := len(s.History()); n != was.history && n != maybe.history {
				t.Errorf("cut %d outcome %d: %d revisions, want %d or %d", cut, outcome, n, was.history, maybe.history)
			}
			if _, err := accept("after", false)(s, model{}); err != nil {
				t.Errorf("cut %d outcome %d: accepting afterwards: %v", cut, outcome, err)
			}
			if t.Failed() {
				return
			}
		}
	}
	t.Logf("%d operations cut, %d restarts", total, total*(numOfOutcomes+6))
}

// TestDamage flips bits in, and truncates, every file at many places. It must be reported, and
// everything else must be as it was.
func TestDamage(t *testing.T) {
	fs := newFaultFS()
	want, _ := runScript(t, fs, script)
	r := rand.New(rand.NewPCG(3, 4))
	for _, name := range fs.files() {
		size := len(fs.dirs[filepath.Dir(name)].now[name].now)
		places := []int{0, len(kind) + 1, len(kind) + 3, size - 1}
		for range 20 {
			places = append(places, r.IntN(size))
		}
		for i, at := range places {
			broken := fs.restart(onlySynced, nil)
			f := broken.dirs[filepath.Dir(name)].now[name]
			if i%3 == 2 {
				f.now = f.now[:at]
			} else {
				f.now[at] ^= 1 << r.IntN(8)
			}
			s, err := open(broken)
			if err != nil {
				t.Fatalf("%s broken at %d: %v", name, at, err)
			}
			d := s.Damage()
			if len(d) == 0 || !errors.Is(d[0], ErrDamaged) || !strings.Contains(errors.Join(d...).Error(), filepath.Base(name)) {
				t.Fatalf("%s broken at %d: damage is %v", name, at, d)
			}
			cur, _ := s.Current()
			switch {
			case name == revisionName(4):
				if cur.Text != "three" || string(cur.Ledger) != `{"for":"three"}` || cur.ConfirmBy.IsZero() {
					t.Errorf("present is %+v, want the one before", cur)
				}
				if gen, err := s.Accept(3, Revision{Text: "new"}); gen != 5 || err != nil {
					t.Errorf("accepted as %d, %v; the damaged 4 must keep its number", gen, err)
				}
				if _, err := s.Revision(4); !errors.Is(err, ErrDamaged) {
					t.Errorf("reading the damaged revision: %v", err)
				}
			case revisionText(cur) != want.revision:
				t.Errorf("%s broken: present is %q", name, revisionText(cur))
			}
			switch {
			case name == keyFile || filepath.Dir(name) == secretDir:
				if _, err := s.Ref("md5"); !errors.Is(err, ErrDamaged) {
					t.Errorf("%s broken: reference to a damaged secret: %v", name, err)
				}
			case s.secretsText(t) != want.secrets:
				t.Errorf("%s broken: secrets are %q", name, s.secretsText(t))
			}
			if filepath.Dir(name) == clientDir {
				if n := len(s.Clients()); n != 1 {
					t.Errorf("%s broken: %d clients", name, n)
				}
			}
		}
	}
}

// TestSwappedSecrets: a valid file under another name, and a value with another generation, are not
// accepted.
func TestSwappedSecrets(t *testing.T) {
	fs := newFaultFS()
	s, err := open(fs)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if _, err := s.SetSecret(name, []byte("value of "+name), noon); err != nil {
			t.Fatal(err)
		}
	}
	dir := fs.dirs[secretDir].now
	forged := s.secrets["b"]
	forged.Generation++
	payload, _ := json.Marshal(forged)
	dir["secrets/a.sealed"].now = dir["secrets/b.sealed"].now
	dir["secrets/b.sealed"].now = encodeRecord(plain, "secrets/b.sealed", payload)
	s, err = open(fs)
	if err != nil {
		t.Fatal(err)
	}
	if d := s.Damage(); len(d) != 2 || len(s.Secrets()) != 0 {
		t.Errorf("damage is %v, secrets are %v; want both refused", d, s.Secrets())
	}
}

// TestLostKey: when the key is gone, no new one is made over what the old one encrypted.
func TestLostKey(t *testing.T) {
	fs := newFaultFS()
	runScript(t, fs, script)
	delete(fs.dirs["."].now, keyFile)
	s, err := open(fs)
	if err != nil {
		t.Fatal(err)
	}
	if d := s.Damage(); len(d) != 1 {
		t.Errorf("damage is %v", d)
	}
	if _, err := s.SetSecret("new", []byte("x"), noon); !errors.Is(err, ErrDamaged) {
		t.Errorf("storing without a key: %v", err)
	}
	if cur, ok := s.Current(); !ok || cur.Text != "four" {
		t.Errorf("present is %+v", cur)
	}
}

// TestFailedSync: after a failed fsync of a directory nothing is written any more.
func TestFailedSync(t *testing.T) {
	fs := newFaultFS()
	s, err := open(fs)
	if err != nil {
		t.Fatal(err)
	}
	fs.cut = fs.ops + 5 // create, write, sync, rename, sync of the directory
	if _, err := s.Accept(0, Revision{Text: "x"}); !errors.Is(err, ErrFailed) {
		t.Fatalf("accepting: %v", err)
	}
	fs.cut = 0
	if _, err := s.Accept(0, Revision{Text: "y"}); !errors.Is(err, ErrFailed) {
		t.Errorf("accepting afterwards: %v", err)
	}
	if _, ok := s.Current(); ok {
		t.Error("the document whose fate is unknown is the present one")
	}
}

func TestRevisions(t *testing.T) {
	s, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range uint64(maxRevisions + 30) {
		r := Revision{Text: fmt.Sprint("document ", i+1)}
		if i >= 5 {
			r.ConfirmBy, r.RevertTo = noon, 3
		}
		if gen, err := s.Accept(i, r); err != nil || gen != i+1 {
			t.Fatalf("accepted as %d, %v", gen, err)
		}
	}
	h := s.History()
	if len(h) != maxRevisions+1 || h[0].Generation != maxRevisions+30 || h[len(h)-1].Generation != 3 {
		t.Errorf("history has %d revisions, from %d to %d; want %d and the one to go back to", len(h), h[0].Generation, h[len(h)-1].Generation, maxRevisions)
	}
	if r, err := s.Revision(3); err != nil || r.Text != "document 3" {
		t.Errorf("generation 3 is %+v, %v", r, err)
	}
	if _, err := s.Revision(4); !errors.Is(err, ErrNotFound) {
		t.Errorf("generation 4: %v", err)
	}
	if _, err := s.Accept(7, Revision{}); !errors.Is(err, ErrStale) {
		t.Errorf("accepting on an old generation: %v", err)
	}
	if err := s.Confirm(7); !errors.Is(err, ErrStale) {
		t.Errorf("confirming an old generation: %v", err)
	}
}

// TestLargeRevisions: the history is bounded in bytes too.
func TestLargeRevisions(t *testing.T) {
	s, err := open(newFaultFS())
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(10) {
		if _, err := s.Accept(i, Revision{Text: strings.Repeat(fmt.Sprint(i), 10<<20)}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.History()); n != maxRevisionBytes/(10<<20) {
		t.Errorf("%d revisions of 10 MiB are kept", n)
	}
}

func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrLocked) {
		t.Errorf("opening twice: %v", err)
	}
	value := []byte("correct horse battery staple")
	a, err := s.SetSecret("a", value, noon)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := s.SetSecret("b", value, noon); b.Ref.Fingerprint == a.Ref.Fingerprint || len(a.Ref.Fingerprint) != 16 {
		t.Errorf("fingerprints %q and %q tell that two secrets are equal", a.Ref.Fingerprint, b.Ref.Fingerprint)
	}
	if _, err := s.Lookup(secret.Ref{Name: "none"}); !errors.Is(err, secret.ErrNotFound) {
		t.Errorf("looking up a secret that is not there: %v", err)
	}
	for i := len(s.secrets); i < MaxSecrets; i++ {
		s.secrets[fmt.Sprint("many-", i)] = sealed{}
	}
	if _, err := s.SetSecret("one-more", value, noon); !errors.Is(err, ErrFull) {
		t.Errorf("one more than there may be: %v", err)
	}
	if _, err := s.SetSecret("b", value, noon); err != nil {
		t.Errorf("a new value while there are as many as there may be: %v", err)
	}
	maps.DeleteFunc(s.secrets, func(name string, _ sealed) bool { return strings.HasPrefix(name, "many-") })
	if _, err := s.SetSecret("../key", value, noon); err == nil {
		t.Error("a name with a path was accepted")
	}
	if err := s.SetPrivate("ca", value, noon); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SetSecret("a", []byte("another"), noon); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Lookup(a.Ref); err == nil || errors.Is(err, secret.ErrNotFound) {
		t.Errorf("looking up an outdated reference: %v", err)
	}
	s.Close()

	if s, err = Open(dir); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := s.secretsText(t); got != "a=another b="+string(value)+" " {
		t.Errorf("after opening again: %q", got)
	}
	if v, err := s.Private("ca"); err != nil || !bytes.Equal(v, value) {
		t.Errorf("private value: %q, %v", v, err)
	}
	err = filepath.Walk(dir, func(name string, info os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		if info.Mode().Perm()&0o077 != 0 && name != dir {
			t.Errorf("%s has mode %v", name, info.Mode())
		}
		if data, err := os.ReadFile(name); err == nil && bytes.Contains(data, value) {
			t.Errorf("%s holds the secret in the clear", name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestChanges: a long document that changes a little is written as its changes, and read back as it
// was, now and by another process.
func TestChanges(t *testing.T) {
	fs := newFaultFS()
	s, err := open(fs)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(5, 6))
	lines := strings.SplitAfter(strings.Repeat("- näme: \u00e4\u4e16\U0001f310\n", 500), "\n")
	texts := []string{strings.Join(lines, "")}
	size := func(g uint64) int { return len(fs.dirs[revisionDir].now[revisionName(g)].now) }
	small := 0
	for g := uint64(1); g <= maxRevisions+maxSplices; g++ {
		texts = append(texts, strings.Join(lines, ""))
		if _, err := s.Accept(g-1, Revision{Text: texts[g]}); err != nil {
			t.Fatal(err)
		}
		if size(g) < len(texts[g])/2 {
			small++
		}
		switch i := r.IntN(len(lines)); r.IntN(4) {
		case 0:
			lines = append(lines[:i], lines[i+1:]...)
		case 1:
			lines = append(lines[:i:i], append([]string{fmt.Sprintf("- ü%c\n", rune(0x4e00+r.IntN(2000)))}, lines[i:]...)...)
		case 2:
			lines[i] = fmt.Sprintf("- é%c\n", rune(0xe0+r.IntN(64)))
		case 3: // the same again
		}
		if g%140 == 0 {
			if err := s.Compact(1000); err != nil || size(g) >= len(texts[g]) {
				t.Fatalf("settled %d too early: %v, %d bytes", g, err, size(g))
			}
			if err := s.Compact(1); err != nil || size(g) < len(texts[g]) {
				t.Fatalf("settled %d: %v, %d bytes", g, err, size(g))
			}
		}
		if g%37 == 0 {
			if s, err = open(fs); err != nil || len(s.Damage()) > 0 {
				t.Fatalf("opening again: %v, %v", err, s.Damage())
			}
		}
	}
	if small < maxRevisions {
		t.Errorf("%d of %d revisions are written as changes", small, len(texts)-1)
	}
	for _, again := range []bool{false, true} {
		if again {
			if s, err = open(fs); err != nil || len(s.Damage()) > 0 {
				t.Fatalf("opening again: %v, %v", err, s.Damage())
			}
		}
		history := s.History()
		if n := len(history); n < maxRevisions || n > maxRevisions+2 {
			t.Errorf("%d revisions are kept", n)
		}
		for _, h := range history {
			if h, err := s.Revision(h.Generation); err != nil || h.Text != texts[h.Generation] {
				t.Errorf("generation %d: %v, or another text", h.Generation, err)
			}
		}
		if cur, _ := s.Current(); cur.Text != texts[cur.Generation] || cur.Generation != uint64(len(texts)-1) {
			t.Errorf("present is %d, or has another text", cur.Generation)
		}
	}
}

// TestLostBase: a damaged base takes with it what was written as changes of it, and says so; what
// was settled stays.
func TestLostBase(t *testing.T) {
	for _, settled := range []bool{false, true} {
		fs := newFaultFS()
		s, err := open(fs)
		if err != nil {
			t.Fatal(err)
		}
		for g := range uint64(4) {
			text := fmt.Sprint(filler, g)
			if g == 0 {
				text = "another one"
			}
			if _, err := s.Accept(g, Revision{Text: text}); err != nil {
				t.Fatal(err)
			}
		}
		if settled {
			if err := s.Compact(1); err != nil {
				t.Fatal(err)
			}
		}
		fs.dirs[revisionDir].now[revisionName(2)].now[200] ^= 1
		if s, err = open(fs); err != nil {
			t.Fatal(err)
		}
		want, damage := uint64(1), 3
		if settled {
			want, damage = 4, 2
		}
		cur, _ := s.Current()
		if d := s.Damage(); cur.Generation != want || len(d) != damage || !errors.Is(errors.Join(d...), ErrDamaged) || !strings.Contains(errors.Join(d...).Error(), "changes of generation 2") {
			t.Errorf("settled %v: present is %d, damage %v", settled, cur.Generation, d)
		}
		if g, err := s.Accept(cur.Generation, Revision{Text: "next"}); g != 5 || err != nil {
			t.Errorf("accepted as %d, %v", g, err)
		}
	}
}

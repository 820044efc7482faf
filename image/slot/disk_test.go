package slot

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

type bench struct {
	Disk
	keys    Keys
	private string // file
	dir     string
}

func newBench(t *testing.T) bench {
	t.Helper()
	dir := t.TempDir()
	b := bench{Disk: Disk{Dir: filepath.Join(dir, "disk")}, dir: dir, private: filepath.Join(dir, "key")}
	for label, size := range map[string]int64{"slot-a": 4 << 20, "slot-b": 4 << 20, "env": 2 << 20} {
		if err := os.MkdirAll(b.Dir, 0o755); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(b.Dir, label)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
	}
	public, private, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string][]byte{b.private: private, filepath.Join(dir, "key.pub"): public} {
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if b.keys, err = ReadKeys(dir); err != nil || len(b.keys) != 1 {
		t.Fatal(b.keys, err)
	}
	if err := b.Format(); err != nil {
		t.Fatal(err)
	}
	return b
}

// slot makes a slot with its signature.
func (b bench) slot(t *testing.T, size int, r Release) ([]byte, *Signature) {
	t.Helper()
	data := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(data)
	path := filepath.Join(b.dir, "slot.img")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	text, err := Sign(b.private, "", path, r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".minisig", text, 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := ParseSignature(text)
	if err != nil {
		t.Fatal(err)
	}
	return data, s
}

func (b bench) content(t *testing.T, n Name) []byte {
	t.Helper()
	return b.raw(t, n.Label())
}

func (b bench) raw(t *testing.T, label string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(b.Dir, label))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestWrite(t *testing.T) {
	b := newBench(t)
	data, s := b.slot(t, 3<<20+17, Release{Version: "1.2.3", Serial: 7})
	if err := b.Write(context.Background(), B, bytes.NewReader(data), int64(len(data)), s, b.keys); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.content(t, B)[:len(data)], data) {
		t.Error("the slot does not have the written data")
	}
	got, err := b.Signature(B)
	if err != nil || got.Release != s.Release || got.KeyID() != b.keys.IDs()[0] {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := b.Signature(A); !errors.Is(err, ErrEmpty) {
		t.Errorf("slot a: %v", err)
	}
	if e, err := b.Env(); err != nil || e != (Env{Good: A}) {
		t.Errorf("writing a slot has changed the loader's block: %+v, %v", e, err)
	}
}

// fails returns an error in the middle, like a broken connection.
type fails struct {
	r io.Reader
	n int
}

func (f *fails) Read(p []byte) (int, error) {
	if f.n <= 0 {
		return 0, errors.New("connection broke")
	}
	n, err := f.r.Read(p[:min(len(p), f.n)])
	f.n -= n
	return n, err
}

// TestWriteRefuses checks that a refused slot leaves the partition empty, with nothing of it and of
// the former slot that the loader could start.
func TestWriteRefuses(t *testing.T) {
	b := newBench(t)
	data, s := b.slot(t, 3<<20, Release{Version: "1", Serial: 1})
	changed := bytes.Clone(data)
	changed[2<<20] ^= 1
	head := bytes.Clone(data)
	head[10] ^= 1
	other := newBench(t)
	_, foreign := other.slot(t, 3<<20, Release{Version: "1", Serial: 1})
	for _, c := range []struct {
		name   string
		from   io.Reader
		size   int64
		sig    *Signature
		kind   error
		text   string
		before bool // refused before anything is written
	}{
		{name: "a changed byte", from: bytes.NewReader(changed), size: int64(len(data)), sig: s, kind: ErrSignature},
		{name: "a changed first block", from: bytes.NewReader(head), size: int64(len(data)), sig: s, kind: ErrSignature},
		{name: "cut off", from: bytes.NewReader(data[:1<<20]), size: int64(len(data)), sig: s, text: "it ended after 1048576 of 3145728 bytes"},
		{name: "cut off at the beginning", from: bytes.NewReader(data[:100]), size: int64(len(data)), sig: s, text: "ended too early"},
		{name: "broken off", from: &fails{bytes.NewReader(data), 2 << 20}, size: int64(len(data)), sig: s, text: "connection broke"},
		{name: "shorter than signed", from: bytes.NewReader(data), size: 1 << 20, sig: s, kind: ErrSignature},
		{name: "a foreign key", from: bytes.NewReader(data), size: int64(len(data)), sig: foreign, kind: ErrKey, before: true},
		{name: "too large", from: bytes.NewReader(data), size: 5 << 20, sig: s, text: "at most 4194304, and has 5242880", before: true},
		{name: "too small", from: bytes.NewReader(data), size: 10, sig: s, text: "more than 65536", before: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := b.Write(context.Background(), B, bytes.NewReader(data), int64(len(data)), s, b.keys); err != nil {
				t.Fatal(err)
			}
			err := b.Write(context.Background(), B, c.from, c.size, c.sig, b.keys)
			if err == nil || c.kind != nil && !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.text) {
				t.Fatalf("error %v", err)
			}
			if c.before {
				if !bytes.Equal(b.content(t, B)[:len(data)], data) {
					t.Error("the slot was touched")
				}
				return
			}
			if !bytes.Equal(b.content(t, B)[:4096], make([]byte, 4096)) {
				t.Error("the slot can still be started")
			}
			if _, err := b.Signature(B); !errors.Is(err, ErrEmpty) {
				t.Errorf("signature: %v", err)
			}
		})
	}
}

func TestComment(t *testing.T) {
	r := Release{Version: "0.0~git20261130T084144.d55e4bb", Serial: 1764000000}
	if got, err := ParseComment(r.Comment()); err != nil || got != r {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "timestamp:1 file:x", "isthmus-slot version= serial=1", "isthmus-slot version=1 serial=-1", "isthmus-slot version=1 serial=1 more", "isthmus-slot version=a b serial=1",
		"isthmus-slot version=1 serial=9999999999999999999999"} {
		if _, err := ParseComment(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// TestMinisign checks that Debian's minisign accepts the output of Sign, so that users can check
// it.
func TestMinisign(t *testing.T) {
	if _, err := exec.LookPath("minisign"); err != nil {
		t.Fatal("minisign is missing: run test/setup")
	}
	b := newBench(t)
	b.slot(t, 1<<20, Release{Version: "1", Serial: 1})
	img := filepath.Join(b.dir, "slot.img")
	check := func() error {
		return exec.Command("minisign", "-V", "-p", filepath.Join(b.dir, "key.pub"), "-m", img).Run()
	}
	if err := check(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("x"), 1000)
	f.Close()
	if check() == nil {
		t.Error("minisign accepts a changed slot")
	}
}

func TestRunning(t *testing.T) {
	for line, want := range map[string]Name{"": None, "root=/dev/sda1 ro": None, "ro isthmus.slot=b quiet": B, "isthmus.slot=a": A, "isthmus.slot=c": None} {
		if got := Running(line); got != want {
			t.Errorf("%q: %q", line, got)
		}
	}
}

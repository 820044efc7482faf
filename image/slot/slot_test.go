package slot

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestEnv(t *testing.T) {
	for _, e := range []Env{{Good: A}, {Good: B, Failed: A}, {Good: A, Trial: B, Tries: Tries}, {Good: B, Trial: A, Tries: 1, Failed: B}} {
		b := FormatEnv(e)
		if len(b) != EnvSize {
			t.Fatalf("%d bytes", len(b))
		}
		if i := bytes.LastIndexByte(b, '\n'); i >= envSector {
			t.Errorf("the block's text ends at byte %d, beyond its first sector", i)
		}
		got, err := ParseEnv(b)
		if err != nil || got != e {
			t.Errorf("read %+v, %v; wrote %+v", got, err, e)
		}
	}
}

// TestEnvOfTheLoader checks blocks of the loader, which removes empty variables and appends new
// ones.
func TestEnvOfTheLoader(t *testing.T) {
	block := func(text string) []byte {
		b := append([]byte(envHeader), text...)
		return append(b, bytes.Repeat([]byte("#"), EnvSize-len(b))...)
	}
	got, err := ParseEnv(block("good=b\ntries=2\nother=x\ntrial=a\n"))
	if want := (Env{Good: B, Trial: A, Tries: 2}); err != nil || got != want {
		t.Errorf("read %+v, %v; want %+v", got, err, want)
	}
	for _, bad := range [][]byte{nil, make([]byte, EnvSize), block(""), block("good=c\n"), block("good=a\ntries=9\n"), block("good=a\ntrial=x\n"), block("good=a\n")[:512]} {
		if _, err := ParseEnv(bad); !errors.Is(err, ErrEnv) {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
}

// TestSetNext checks that the loader and the helper keep each other's numbers of starts.
func TestSetNext(t *testing.T) {
	b := newBench(t)
	number := strings.Repeat("N", 26)
	if err := b.SetEnv(Env{Good: B, Trial: A, Tries: 3}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"first", number} {
		if err := b.SetNext(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.SetEnv(Env{Good: A}); err != nil {
		t.Fatal(err)
	}
	text, _, _ := strings.Cut(string(b.raw(t, EnvLabel)), "##")
	if want := envHeader + "good=a\ntrial=\ntries=0\nfailed=\nnext=" + number + "\n"; text != want {
		t.Errorf("the block is\n%swant\n%s", text, want)
	}
	if err := b.SetNext(strings.Repeat("N", envSector)); !errors.Is(err, ErrEnv) {
		t.Errorf("more than a sector: %v", err)
	}
	if e, err := b.Env(); err != nil || e != (Env{Good: A}) {
		t.Errorf("%+v, %v", e, err)
	}
}

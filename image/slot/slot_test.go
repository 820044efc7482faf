package slot

import (
	"bytes"
	"errors"
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

// The loader removes a variable that is empty, and appends one that was not there.
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

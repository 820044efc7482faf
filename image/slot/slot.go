// Package slot defines the image's two slots: their places on the disk, and the loader's block.
//
// A slot is a partition with one read-only file system that has kernel, initial RAM disk and root.
// The loader starts the slot that was marked good. A new slot is on trial: it gets three boots in
// which to be marked good, and then the loader returns to the good one.
package slot

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Name is that of a slot: "a" or "b". The zero value is none.
type Name string

// The two slots.
const (
	A    Name = "a"
	B    Name = "b"
	None Name = ""
)

// Other returns the other slot.
func (n Name) Other() Name {
	if n == A {
		return B
	}
	return A
}

// Label returns the name of the slot's partition.
func (n Name) Label() string { return "slot-" + string(n) }

// Names of the other partitions.
const (
	EnvLabel  = "env"
	DataLabel = "data"
)

// Tries is how many boots a trial gets.
const Tries = 3

// The partition "env" begins with a FAT file system of EnvArea bytes that has one file, the
// loader's environment block of EnvSize bytes. The file is made with the disk and never moves: the
// loader and we write it in place. All variable data is in its first 512 bytes, one sector, so that
// a write is atomic.
const (
	EnvArea = 1 << 20
	// EnvAt is where mkfs.vfat and mcopy put the first file. The build checks it, and the initial
	// RAM disk reads there.
	EnvAt     = 37 * envSector
	EnvSize   = 1024
	envSector = 512
	envHeader = "# GRUB Environment Block\n"
)

// Env is the loader's block, which the loader reads and writes as well; see image/grub.cfg.
type Env struct {
	// Good is the slot that was marked good last. The loader starts it unless there is a trial.
	Good Name
	// Trial is the slot that was written and has not been marked good; None: there is none.
	Trial Name
	// Tries is how many boots the trial has left, 0 to 3.
	Tries int
	// Failed is the last trial that was given up; None: none since a slot was marked good.
	Failed Name
}

// ErrEnv means that a block was not written by FormatEnv or the loader.
var ErrEnv = errors.New("environment block of the loader is damaged")

// FindEnv returns the offset of the block in an area.
func FindEnv(area []byte) (int64, error) {
	found := int64(-1)
	for at := 0; at+EnvSize <= len(area); at += envSector {
		if bytes.HasPrefix(area[at:], []byte(envHeader)) {
			if found >= 0 {
				return 0, fmt.Errorf("%w: there are two", ErrEnv)
			}
			found = int64(at)
		}
	}
	if found < 0 {
		return 0, fmt.Errorf("%w: there is none", ErrEnv)
	}
	return found, nil
}

// ParseEnv parses a block.
func ParseEnv(b []byte) (Env, error) {
	if len(b) != EnvSize || !bytes.HasPrefix(b, []byte(envHeader)) {
		return Env{}, ErrEnv
	}
	var e Env
	for line := range strings.Lines(string(b[len(envHeader):])) {
		name, value, found := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		if !found || strings.HasPrefix(line, "#") {
			continue
		}
		switch name {
		case "good":
			e.Good = Name(value)
		case "trial":
			e.Trial = Name(value)
		case "failed":
			e.Failed = Name(value)
		case "tries":
			if value == "" {
				continue
			}
			if len(value) != 1 || value[0] < '0' || value[0] > '0'+Tries {
				return Env{}, fmt.Errorf("%w: tries=%q", ErrEnv, value)
			}
			e.Tries = int(value[0] - '0')
		}
	}
	if e.Good != A && e.Good != B {
		return Env{}, fmt.Errorf("%w: good=%q", ErrEnv, e.Good)
	}
	for _, n := range []Name{e.Trial, e.Failed} {
		if n != A && n != B && n != None {
			return Env{}, fmt.Errorf("%w: %q is not a slot", ErrEnv, n)
		}
	}
	return e, nil
}

// FormatEnv makes a block.
func FormatEnv(e Env) []byte {
	b, err := change([]byte(envHeader), e.pairs()...)
	if err != nil {
		panic(err) // names of slots are short
	}
	return b
}

func (e Env) pairs() []string {
	return []string{"good", string(e.Good), "trial", string(e.Trial), "tries", strconv.Itoa(e.Tries), "failed", string(e.Failed)}
}

// change returns a block with other values, given as alternating names and values. It keeps all
// other variables, such as the numbers of starts.
func change(b []byte, pairs ...string) ([]byte, error) {
	lines := []string{envHeader}
	for line := range strings.Lines(string(b[len(envHeader):])) {
		if strings.Contains(line, "=") && !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	for i := 0; i < len(pairs); i += 2 {
		line := pairs[i] + "=" + pairs[i+1] + "\n"
		if at := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, pairs[i]+"=") }); at >= 0 {
			lines[at] = line
		} else {
			lines = append(lines, line)
		}
	}
	out := []byte(strings.Join(lines, ""))
	if len(out) > envSector {
		return nil, fmt.Errorf("%w: it has %d bytes, more than one sector", ErrEnv, len(out))
	}
	return append(out, bytes.Repeat([]byte("#"), EnvSize-len(out))...), nil
}

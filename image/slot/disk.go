package slot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Disk is the disk that the node was started from, by its partitions.
type Disk struct {
	// Dir has a file for each partition, by its label: PartitionDir.
	Dir string
}

// PartitionDir is where the image's udev links the partitions of the disk that the node was started
// from, by their labels. It has no links to copies of that disk, which have the same labels.
const PartitionDir = "/dev/isthmus"

// ErrNoSlots means that this machine was not started from a disk with slots, for example because
// isthmus comes from a Debian package.
var ErrNoSlots = errors.New("this machine has no slots")

// ErrSize means that a slot is too large or too small.
var ErrSize = errors.New("a slot cannot have this size")

func (d Disk) path(label string) string { return filepath.Join(d.Dir, label) }

// SignatureAt is the offset of a slot's signature in the partition "env", after the loader's area.
func SignatureAt(n Name) int64 {
	if n == A {
		return EnvArea
	}
	return EnvArea + 4096
}

// Env reads the loader's block.
func (d Disk) Env() (Env, error) {
	f, err := os.Open(d.path(EnvLabel))
	if errors.Is(err, os.ErrNotExist) {
		return Env{}, ErrNoSlots
	}
	if err != nil {
		return Env{}, fmt.Errorf("reading the loader's block: %w", err)
	}
	defer f.Close()
	b, _, err := block(f)
	if err != nil {
		return Env{}, fmt.Errorf("reading the loader's block: %w", err)
	}
	return ParseEnv(b)
}

// block returns the loader's block and its offset.
func block(f *os.File) ([]byte, int64, error) {
	area := make([]byte, EnvArea)
	if _, err := io.ReadFull(f, area); err != nil {
		return nil, 0, err
	}
	at, err := FindEnv(area)
	if err != nil {
		return nil, 0, err
	}
	return area[at : at+EnvSize], at, nil
}

// Format writes a block with slot a as good at the beginning of the partition, without a file
// system around it. For tests.
func (d Disk) Format() error {
	f, err := os.OpenFile(d.path(EnvLabel), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteAt(FormatEnv(Env{Good: A}), 0)
	return err
}

// SetEnv writes the loader's block, and returns when it is on the disk.
func (d Disk) SetEnv(e Env) error { return d.setPairs(e.pairs()...) }

// SetNext gives the loader the number of the next start, which no other disk has. The loader writes
// it to the disk that it was started from, by which the initial RAM disk distinguishes that disk
// from its copies.
func (d Disk) SetNext(number string) error { return d.setPairs("next", number) }

// setPairs sets values in the loader's block.
func (d Disk) setPairs(pairs ...string) error {
	f, err := os.OpenFile(d.path(EnvLabel), os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("writing the loader's block: %w", err)
	}
	defer f.Close()
	b, at, err := block(f)
	if err != nil {
		return fmt.Errorf("writing the loader's block: %w", err)
	}
	if b, err = change(b, pairs...); err != nil {
		return fmt.Errorf("writing the loader's block: %w", err)
	}
	if _, err := f.WriteAt(b, at); err != nil {
		return fmt.Errorf("writing the loader's block: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("writing the loader's block: %w", err)
	}
	return f.Close()
}

// Signature returns the signature of a slot's content, unchecked. An empty slot has none: the error
// is ErrEmpty.
func (d Disk) Signature(n Name) (*Signature, error) {
	f, err := os.Open(d.path(EnvLabel))
	if err != nil {
		return nil, fmt.Errorf("reading the signature of slot %s: %w", n, err)
	}
	defer f.Close()
	b := make([]byte, SignatureLimit)
	if _, err := f.ReadAt(b, SignatureAt(n)); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the signature of slot %s: %w", n, err)
	}
	if b = bytes.TrimRight(b, "\x00"); len(b) == 0 {
		return nil, fmt.Errorf("slot %s: %w", n, ErrEmpty)
	}
	return ParseSignature(b)
}

// ErrEmpty means that a slot has nothing that could be started.
var ErrEmpty = errors.New("slot is empty")

// SignatureBlock is the form of a signature in the partition "env".
func SignatureBlock(text []byte) []byte {
	b := make([]byte, SignatureLimit)
	copy(b, text)
	return b
}

func (d Disk) setSignature(n Name, text []byte) error {
	f, err := os.OpenFile(d.path(EnvLabel), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(SignatureBlock(text), SignatureAt(n)); err != nil {
		return err
	}
	return f.Sync()
}

// beginning is the part of a slot that is written last. Without it, the loader finds no file system
// in the slot.
const beginning = 64 << 10

// Write writes a slot of size bytes that does not run, and reads it back. From the first step to
// the last the slot is empty, so that a power loss or a refused slot leaves a slot that cannot be
// started, and never half of one.
func (d Disk) Write(ctx context.Context, n Name, from io.Reader, size int64, s *Signature, keys Keys) (err error) {
	if _, err := keys.Find(s); err != nil {
		return err
	}
	// On a block device, O_EXCL fails while the device is in use.
	f, err := os.OpenFile(d.path(n.Label()), os.O_RDWR|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("writing slot %s: it is in use", n)
	}
	if err != nil {
		return fmt.Errorf("writing slot %s: %w", n, err)
	}
	defer f.Close()
	room, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("writing slot %s: %w", n, err)
	}
	if size <= beginning || size > room {
		return fmt.Errorf("writing slot %s: %w: it must have more than %d and at most %d, and has %d", n, ErrSize, beginning, room, size)
	}
	defer func() {
		if err != nil {
			_, zeroed := f.WriteAt(make([]byte, beginning), 0)
			err = errors.Join(fmt.Errorf("writing slot %s: %w", n, err), zeroed, f.Sync())
		}
	}()
	if err := d.setSignature(n, nil); err != nil {
		return err
	}
	if _, err := f.WriteAt(make([]byte, beginning), 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	hash := NewHash(io.LimitReader(from, size))
	first := make([]byte, beginning)
	if _, err := io.ReadFull(hash, first); err != nil {
		return fmt.Errorf("receiving it: %w", short(err))
	}
	written, err := copyAt(ctx, f, beginning, hash)
	if err != nil {
		return fmt.Errorf("receiving it: %w", short(err))
	}
	if written+beginning != size {
		return fmt.Errorf("receiving it: it ended after %d of %d bytes", written+beginning, size)
	}
	if err := hash.Check(keys, s); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := readBack(f, first, size, keys, s); err != nil {
		return err
	}
	if _, err := f.WriteAt(first, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	again := make([]byte, beginning)
	forget(f)
	if _, err := f.ReadAt(again, 0); err != nil {
		return err
	}
	if !bytes.Equal(first, again) {
		return errReadBack
	}
	return d.setSignature(n, s.Text())
}

var errReadBack = errors.New("the disk does not return the data that was written: replace the disk")

// readBack checks the disk's data after the beginning, which is not on the disk yet.
func readBack(f *os.File, first []byte, size int64, keys Keys, s *Signature) error {
	forget(f)
	hash := NewHash(io.MultiReader(bytes.NewReader(first), io.NewSectionReader(f, beginning, size-beginning)))
	if _, err := io.Copy(io.Discard, hash); err != nil {
		return fmt.Errorf("reading it back: %w", err)
	}
	if err := hash.Check(keys, s); err != nil {
		return fmt.Errorf("%w (%w)", errReadBack, err)
	}
	return nil
}

// forget drops the page cache of a file, so that the kernel reads it from the disk.
func forget(f *os.File) {
	unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

func copyAt(ctx context.Context, to io.WriterAt, at int64, from io.Reader) (n int64, err error) {
	buf := make([]byte, 1<<20)
	for {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		m, err := io.ReadFull(from, buf)
		if m > 0 {
			if _, werr := to.WriteAt(buf[:m], at+n); werr != nil {
				return n, werr
			}
			n += int64(m)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

func short(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it ended too early")
	}
	return err
}

// Running returns the slot that the kernel was started from, by its command line; None on a machine
// without slots.
func Running(cmdline string) Name {
	for word := range strings.FieldsSeq(cmdline) {
		switch v, ok := strings.CutPrefix(word, "isthmus.slot="); {
		case ok && Name(v) == A:
			return A
		case ok && Name(v) == B:
			return B
		}
	}
	return None
}

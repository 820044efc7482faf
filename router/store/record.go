package store

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A record is one file: a line of text with a checksum, then the payload. The checksum covers the
// name as well, so that a file under a wrong name is as damaged as one with a flipped bit.
//
//	isthmus-store 1 <SHA-256 of "name\n" and payload, hexadecimal> <length of payload>\n
//	<payload>
//
// A later format has another number, which its checksum covers too; see
// docs/decisions/state-format.md. Format 2 is that of a secret whose key is sealed, which a version
// without seals cannot read.

const (
	kind      = "isthmus-store "
	plain     = 1
	withSeals = 2
)

// highest returns the highest format that is read under a name.
func highest(name string) uint64 {
	if path.Dir(name) == secretDir {
		return withSeals
	}
	return plain
}

func encodeRecord(format uint64, name string, payload []byte) []byte {
	return append(recordHeader(format, name, payload), payload...)
}

func recordHeader(format uint64, name string, payload []byte) []byte {
	h := sha256.New()
	if format > plain {
		fmt.Fprintf(h, "%s%d\n", kind, format)
	}
	h.Write([]byte(name + "\n"))
	h.Write(payload)
	return fmt.Appendf(nil, "%s%d %x %d\n", kind, format, h.Sum(nil), len(payload))
}

// decodeRecord returns the payload, or an error that wraps ErrNewer or ErrDamaged.
func decodeRecord(name string, data []byte) ([]byte, error) {
	i := bytes.IndexByte(data, '\n')
	if i < 0 {
		return nil, fmt.Errorf("%s: %w: no header", name, ErrDamaged)
	}
	payload := data[i+1:]
	number, rest, _ := bytes.Cut(bytes.TrimPrefix(data[:i], []byte(kind)), []byte(" "))
	flipped := false // a flipped bit cannot make a newer file: the checksum covers the number too
	for format := uint64(plain); format <= highest(name); format++ {
		header := recordHeader(format, name, payload)
		if bytes.Equal(data[:i+1], header) {
			return payload, nil
		}
		_, sum, _ := bytes.Cut(bytes.TrimPrefix(header, []byte(kind)), []byte(" "))
		flipped = flipped || bytes.Equal(bytes.TrimSuffix(sum, []byte("\n")), rest)
	}
	if v, err := strconv.ParseUint(string(number), 10, 32); err == nil && v > highest(name) && !flipped && bytes.HasPrefix(data, []byte(kind)) {
		return nil, fmt.Errorf("%s: %w: its format is %d, and this version reads up to %d", name, ErrNewer, v, highest(name))
	}
	return nil, fmt.Errorf("%s: %w: checksum differs", name, ErrDamaged)
}

const temporary = ".tmp"

// writeLocked replaces the contents of name as a whole. When it returns nil, the payload survives a
// loss of power.
func (s *Store) writeLocked(name string, payload []byte) error {
	return s.writeAsLocked(plain, name, payload)
}

func (s *Store) writeAsLocked(format uint64, name string, payload []byte) error {
	if s.failed != nil {
		return s.failed
	}
	tmp := name + temporary
	if err := s.writeTemporary(tmp, encodeRecord(format, name, payload)); err != nil {
		s.fs.remove(tmp) // The next start removes it otherwise.
		return fmt.Errorf("writing %s: %w", name, err)
	}
	// After an error from here on, the result is known only at a later start.
	err := s.fs.rename(tmp, name)
	if err == nil {
		err = s.fs.syncDir(path.Dir(name))
	}
	return s.settleLocked("writing", name, err)
}

func (s *Store) writeTemporary(tmp string, data []byte) error {
	f, err := s.fs.create(tmp)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func (s *Store) removeLocked(name string) error {
	if s.failed != nil {
		return s.failed
	}
	err := s.fs.remove(name)
	if err == nil {
		err = s.fs.syncDir(path.Dir(name))
	}
	return s.settleLocked("removing", name, err)
}

// settleLocked stops all further writes after a write with unknown outcome: the kernel reports a
// failed fsync once and then forgets it, so that a retry would only look like success.
func (s *Store) settleLocked(verb, name string, err error) error {
	if err == nil {
		return nil
	}
	s.failed = fmt.Errorf("%w: %s %s: %w", ErrFailed, verb, name, err)
	return s.failed
}

// lossOf returns why a file is lost: ErrNewer or ErrDamaged.
func lossOf(err error) error {
	if errors.Is(err, ErrNewer) {
		return ErrNewer
	}
	return ErrDamaged
}

// scanLocked passes the payload of each record of a directory to load, sorted by name, and records
// unreadable files.
func (s *Store) scanLocked(dir, suffix string, load func(name string, payload []byte) error) error {
	names, err := s.fs.readDir(dir)
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, base := range names {
		name := path.Join(dir, base)
		if strings.HasSuffix(base, temporary) {
			if err := s.fs.remove(name); err != nil && !errors.Is(err, unix.EROFS) {
				return err
			}
			continue
		}
		key, ok := strings.CutSuffix(base, suffix)
		if !ok {
			continue
		}
		data, err := s.fs.readFile(name)
		if err != nil {
			err = fmt.Errorf("%s: %w: %w", name, ErrDamaged, err)
		} else if data, err = decodeRecord(name, data); err == nil {
			err = load(key, data)
		}
		if err != nil {
			s.damage = append(s.damage, err)
			s.lost[name] = lossOf(err)
		}
	}
	return nil
}

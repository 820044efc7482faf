// Package store keeps on disk the state that must outlive the daemon: the accepted documents with
// their ledgers, secrets, issued client certificates, and a few values of the daemon's own.
//
// Each of them is one file with a checksum; a document that differs little from its predecessor is
// written as a delta from an earlier one. Files are only replaced as a whole (write a temporary
// file, fsync, rename, fsync of the directory), so that kill -9 or a loss of power at any moment
// leaves the old one or the new one. The ledger is in the same file as its document: they are
// accepted together or not at all.
//
// A damaged file is reported by Damage, left in place, and never taken for a missing one. If it is
// the newest document, the previous one is the present one.
package store

import (
	"crypto/cipher"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/disk"
)

var (
	// ErrNotFound means that the name or generation is not stored.
	ErrNotFound = errors.New("not found")
	// ErrDamaged means that a file exists and does not contain what was written.
	ErrDamaged = errors.New("damaged file")
	// ErrNewer means that a newer version has written a file in a format that this one does not
	// know.
	ErrNewer = errors.New("written by a newer version of isthmusd: start that version, or put back the state directory of before")
	// ErrSealed means that a secret is stored and its key cannot be opened on this machine, or not
	// yet.
	ErrSealed = errors.New("it is sealed, and its key is not open")
	// ErrTaken means that a secret has another value, which the caller does not want to replace.
	ErrTaken = errors.New("is not replaced")
	// ErrStale means that the write was based on a generation that is not the present one.
	ErrStale = errors.New("generation is not the present one")
	// ErrFull means that the limit of stored objects of a kind is reached.
	ErrFull = errors.New("there are too many")
	// ErrLocked means that another process has locked the directory.
	ErrLocked = errors.New("store is in use by another process")
	// ErrFailed means that the outcome of a write is unknown, as after a failed fsync, and that the
	// store accepts no further writes until it is opened again.
	ErrFailed = errors.New("store failed, restart needed")
)

// Store is an open directory. Methods may be called from several goroutines.
type Store struct {
	fs   filesystem
	dir  string
	lock *os.File

	mu        sync.Mutex
	failed    error
	damage    []error
	lost      map[string]error // why files cannot be used, ErrDamaged or ErrNewer, by name
	revisions []entry          // oldest first
	newest    uint64           // highest generation seen, damaged ones included
	current   revision         // with text and ledger; zero: none
	base      whole            // the last base text that was read
	keys      keys
	seal      seal                   // zero: none
	opened    map[string]cipher.AEAD // ciphers of the sealed keys that are open, by ID
	secrets   map[string]sealed
	private   map[string]sealed
	clients   map[string]Client
	carry     Carry

	clientChange uint64 // newest change of a client
	markFile     string // empty: none
	marked       mark   // content of the file
}

// keys are derived from the node key. Without the node key both are nil.
type keys struct {
	seal        cipher.AEAD
	fingerprint []byte
}

// Open opens the directory, creates it if it is missing, and locks it for this process. Damaged
// files do not prevent it from opening; see Damage.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening store: %w", err)
	}
	if err := disk.SyncDir(filepath.Dir(dir)); err != nil {
		return nil, fmt.Errorf("opening store: %w", err)
	}
	lock, err := dirFS(dir).lock()
	if err != nil {
		return nil, fmt.Errorf("opening store: %w", err)
	}
	s, err := open(dirFS(dir))
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("opening store %s: %w", dir, err)
	}
	s.dir, s.lock = dir, lock
	return s, nil
}

// Room returns the free bytes of the file system, 0 if it is read-only, and a very large number if
// it does not report them. A file system that has failed after a disk error is an error, although
// it may report that it can be written: ext4 on Linux 6.12 does.
func (s *Store) Room() (bytes uint64, readOnly bool, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, false, fmt.Errorf("looking for room in %s: %w", s.dir, err)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return 0, true, nil
	}
	if s.lock != nil {
		f, err := os.OpenFile(s.lock.Name(), os.O_RDWR, 0)
		if err != nil {
			return 0, errors.Is(err, unix.EROFS), fmt.Errorf("writing in %s: %w: what runs goes on, changes are refused; start the machine again, which checks the file system", s.dir, err)
		}
		f.Close()
	}
	if st.Blocks == 0 {
		return math.MaxUint64, false, nil
	}
	return st.Bavail * uint64(st.Bsize), false, nil
}

func open(fs filesystem) (*Store, error) {
	s := &Store{
		fs:      fs,
		lost:    make(map[string]error),
		opened:  make(map[string]cipher.AEAD),
		secrets: make(map[string]sealed),
		private: make(map[string]sealed),
		clients: make(map[string]Client),
	}
	for _, dir := range []string{revisionDir, secretDir, privateDir, clientDir} {
		if err := fs.mkdir(dir); err != nil {
			return nil, err
		}
	}
	if err := fs.syncDir("."); err != nil {
		return nil, err
	}
	for _, load := range []func() error{s.loadRevisions, s.loadCarry, s.loadClients, s.loadSealed, s.loadKey, s.loadSeal} {
		if err := load(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Close unlocks the directory. It writes nothing: accepted changes are already on disk.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = fmt.Errorf("%w: closed", ErrFailed)
	}
	if s.lock == nil {
		return nil
	}
	return s.lock.Close()
}

// Damage returns the files that could not be read when the store was opened, one error per file,
// each wrapping ErrDamaged or ErrNewer.
func (s *Store) Damage() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]error(nil), s.damage...)
}

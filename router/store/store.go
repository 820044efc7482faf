// Package store keeps on disk what must outlive the daemon: the accepted documents with the ledger
// that belongs to each, secrets, issued client certificates, and a few values of the daemon's own.
//
// Each of them is one file with a checksum; a document that differs little from the one before it
// is written as changes of an earlier one. A file is only ever replaced as a whole (write beside
// it, fsync, rename, fsync of the directory), so that kill -9 or a loss of power at any moment
// leaves the old one or the new one. The ledger lies in the same file as the document it was made
// for: they are accepted together or not at all.
//
// A damaged file is reported by Damage, left in place, and never taken for a missing one. When it
// is the newest document, the one before it is the present one.
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
	// ErrNotFound means that nothing is stored under the name or generation.
	ErrNotFound = errors.New("not found")
	// ErrDamaged means that a file is there and does not hold what was written.
	ErrDamaged = errors.New("damaged file")
	// ErrNewer means that a newer version has written a file in a format that this one does not
	// know.
	ErrNewer = errors.New("written by a newer version of isthmusd: start that version, or put back the state directory of before")
	// ErrSealed means that a secret is there and its key cannot be opened on this machine, or not
	// yet.
	ErrSealed = errors.New("it is sealed, and its key is not open")
	// ErrStale means that the write was based on a generation that is not the present one.
	ErrStale = errors.New("generation is not the present one")
	// ErrFull means that no more of a kind may be stored.
	ErrFull = errors.New("there are too many")
	// ErrLocked means that another process has the directory.
	ErrLocked = errors.New("store is in use by another process")
	// ErrFailed means that the outcome of a write is unknown, as after a failed fsync, and that the
	// store takes no more of them until it is opened again.
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
	base      whole            // what was last needed to read a revision
	keys      keys
	seal      seal                   // zero: none
	opened    map[string]cipher.AEAD // what encrypts with the sealed keys that are open, by ID
	secrets   map[string]sealed
	private   map[string]sealed
	clients   map[string]Client
	carry     Carry

	clientChange uint64 // newest change of a client
	markFile     string // empty: none
	marked       mark   // what it says
}

// keys are derived from the node key. Without the node key both are nil.
type keys struct {
	seal        cipher.AEAD
	fingerprint []byte
}

// Open opens the directory, makes it when it is missing, and takes it for this process alone. What
// is damaged does not keep it from opening; see Damage.
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

// Room returns how many bytes the file system still takes, none when it is read-only, and very many
// when it does not tell. A file system that has given up after an error of the disk is an error,
// although it may say that it can be written: ext4 on Linux 6.12 does.
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

// Close gives the directory back. Nothing is written: what was accepted is already on disk.
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

// Damage returns what could not be read when the store was opened, one error per file, each
// wrapping ErrDamaged or ErrNewer.
func (s *Store) Damage() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]error(nil), s.damage...)
}

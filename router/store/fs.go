package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/disk"
)

// filesystem is the part of a file system that the store needs: few methods, so that a test can cut
// the power at each. Names are relative to the store's directory.
type filesystem interface {
	mkdir(dir string) error
	readDir(dir string) ([]string, error)
	readFile(name string) ([]byte, error)
	create(name string) (file, error) // empty, readable by the owner only
	rename(from, to string) error
	remove(name string) error
	syncDir(dir string) error
}

type file interface {
	io.WriteCloser
	Sync() error
}

// dirFS is a directory of the real file system.
type dirFS string

func (d dirFS) path(name string) string { return filepath.Join(string(d), name) }

func (d dirFS) mkdir(dir string) error {
	err := os.Mkdir(d.path(dir), 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

func (d dirFS) readDir(dir string) ([]string, error) {
	entries, err := os.ReadDir(d.path(dir))
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func (d dirFS) readFile(name string) ([]byte, error) { return os.ReadFile(d.path(name)) }

func (d dirFS) create(name string) (file, error) {
	return os.OpenFile(d.path(name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
}

func (d dirFS) rename(from, to string) error { return os.Rename(d.path(from), d.path(to)) }
func (d dirFS) remove(name string) error     { return os.Remove(d.path(name)) }
func (d dirFS) syncDir(dir string) error     { return disk.SyncDir(d.path(dir)) }

// lock locks the directory for this process. The kernel releases it when the process ends, however
// it ends.
func (d dirFS) lock() (*os.File, error) {
	f, err := os.OpenFile(d.path("lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, unix.EROFS) {
		f, err = os.Open(d.path("lock"))
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrLocked, d)
		}
		return nil, err
	}
	return f, nil
}

// Package disk replaces files as a whole, so that a loss of power leaves the old one or the new
// one.
package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Temporary is the suffix of the file that Replace writes before it takes the place of the other.
const Temporary = ".new"

// Replace makes a file hold data with this mode, even if the umask is stricter: all of it, or what
// it held before. When it returns nil, the data outlives a loss of power. When the sync of the
// directory fails, the file is replaced all the same. A process that is killed may leave the
// temporary file, and the next Replace removes it: so only one caller at a time may replace a file.
func Replace(path string, data []byte, mode fs.FileMode) error {
	temporary := path + Temporary
	// The directory may be another user's: a link in this place is not followed.
	const flags, private = os.O_WRONLY | os.O_CREATE | os.O_EXCL, 0o600
	f, err := os.OpenFile(temporary, flags, private)
	if errors.Is(err, fs.ErrExist) {
		if err := os.Remove(temporary); err != nil {
			return err
		}
		f, err = os.OpenFile(temporary, flags, private)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && mode != private { // a file system without modes takes no other
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		os.Remove(temporary) // what it fails by is not why the file is not replaced
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir returns when the names of a directory outlive a loss of power.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

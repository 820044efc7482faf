package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/isthmus-net/isthmus/router/disk"
)

// AllowSSH writes the keys that may log in to a file in the format of authorized_keys, which the
// machine's SSH server reads. Without keys it removes the file, and the server does not run. It
// does not write a file that is current.
func AllowSSH(file string, keys []string) error {
	if len(keys) == 0 {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the keys for SSH: %w", err)
		}
		return nil
	}
	text := []byte(strings.Join(keys, "\n") + "\n")
	if have, err := os.ReadFile(file); err == nil && bytes.Equal(have, text) {
		return nil
	}
	err := os.MkdirAll(filepath.Dir(file), 0o755)
	if err == nil {
		err = disk.Replace(file, text, 0o644) // public keys, which the server reads as another user
	}
	if err != nil {
		return fmt.Errorf("writing the keys for SSH: %w", err)
	}
	return nil
}

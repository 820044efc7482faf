package platform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// noCloud reads a seed of cloud-init's NoCloud data source: files user-data and meta-data.
type noCloud struct{ dir string }

// HasSeed reports whether a directory has a NoCloud seed.
func HasSeed(dir string) bool {
	if dir == "" {
		return false
	}
	info, err := os.Lstat(filepath.Join(dir, "user-data"))
	return err == nil && info.Mode().IsRegular()
}

func (n *noCloud) read(name string, limit int64) ([]byte, error) {
	at := filepath.Join(n.dir, name)
	f, err := os.OpenFile(at, os.O_RDONLY|openFlags, 0)
	if err != nil {
		return nil, fmt.Errorf("reading the NoCloud seed: %w", err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("reading the NoCloud seed: %s is not a regular file", at)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("reading the NoCloud seed: %w", err)
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("reading the NoCloud seed: %w: %s is larger than %d bytes: make it smaller", ErrPermanent, at, limit)
	}
	return data, nil
}

// UserData implements Reader.
func (n *noCloud) UserData(context.Context) ([]byte, error) { return n.read("user-data", MaxUserData) }

// Facts implements Reader. A seed has only the instance's id, in a line instance-id of its
// meta-data.
func (n *noCloud) Facts(context.Context) (Facts, error) {
	f := Facts{Platform: NoCloud}
	data, err := n.read("meta-data", maxFact)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return Facts{}, err
	}
	for line := range strings.Lines(string(data)) {
		value, ok := strings.CutPrefix(line, "instance-id:")
		if !ok {
			continue
		}
		if f.Instance, err = oneLine(NoCloud, "meta-data", []byte(value)); err != nil {
			return Facts{}, err
		}
		f.Instance = strings.Trim(f.Instance, `"'`)
		break
	}
	return f, nil
}

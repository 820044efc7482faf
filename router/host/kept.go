package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/router/disk"
)

// A kernel parameter has no mark, and its former value cannot be read from the kernel after a
// change. So the value before the first change is stored in a file that lives as long as the
// parameters: until the next boot.

// maxKept bounds the file in bytes.
const maxKept = 1 << 20

// keep stores the present values of parameters before they are changed, unless they are stored
// already.
func keep(file string, changing map[string]string) error {
	if file == "" || len(changing) == 0 {
		return nil
	}
	kept, err := readKept(file)
	if err != nil {
		return err
	}
	if kept == nil {
		kept = map[string]string{}
	}
	more := false
	for path, value := range changing {
		if _, known := kept[path]; !known {
			kept[path], more = value, true
		}
	}
	if !more {
		return nil
	}
	return writeKept(file, kept)
}

// restorable returns those of the given parameters that were changed, with their former values.
func (m *Machine) restorable(of []Sysctl) (out []Sysctl, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.kept == "" {
		return nil, nil
	}
	kept, err := readKept(m.kept)
	if err != nil {
		return nil, fmt.Errorf("reading the former values of kernel parameters: %w", err)
	}
	for _, s := range of {
		if value, changed := kept[s.Path]; changed {
			out = append(out, Sysctl{Path: s.Path, Value: value, Optional: true})
		}
	}
	return out, nil
}

// forget removes restored parameters from the file.
func (m *Machine) forget(restored []Sysctl) error {
	if len(restored) == 0 {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	kept, err := readKept(m.kept)
	if err != nil {
		return err
	}
	for _, s := range restored {
		delete(kept, s.Path)
	}
	return writeKept(m.kept, kept)
}

func writeKept(file string, kept map[string]string) error {
	text, err := json.MarshalIndent(kept, "", " ")
	if err != nil {
		return err
	}
	return disk.Replace(file, text, 0o600)
}

// readKept returns the content of a file; nil: the file is missing. A damaged file is an error, and
// stays.
func readKept(file string) (map[string]string, error) {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if info.Size() > maxKept {
		return nil, fmt.Errorf("%s is larger than %d bytes", file, maxKept)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var kept map[string]string
	if err := json.Unmarshal(text, &kept); err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return kept, nil
}

// Restore sets kernel parameters to the values that a Machine with this file found, removes the
// file, and returns how many it wrote. It skips parameters of interfaces that are gone. Without the
// file it does nothing.
func Restore(file string) (written int, err error) {
	kept, err := readKept(file)
	if err != nil || kept == nil {
		return 0, err
	}
	var first, rest []Sysctl
	for _, path := range slices.Sorted(maps.Keys(kept)) {
		// The daemon, which is not root, writes the file. Only parameters of the network are
		// accepted from it.
		if !strings.HasPrefix(path, "net/") || !filepath.IsLocal(path) {
			err = errors.Join(err, fmt.Errorf("restoring kernel parameter %q: it is not below net/", path))
			continue
		}
		s := Sysctl{Path: path, Value: kept[path], Optional: true}
		if slices.ContainsFunc(Forwarding(true)[:2], func(f Sysctl) bool { return f.Path == path }) {
			first = append(first, s) // the kernel resets others to their defaults when these change
		} else {
			rest = append(rest, s)
		}
	}
	written, failed := Tune(append(first, rest...))
	if err = errors.Join(err, failed); err != nil {
		return written, err
	}
	return written, os.Remove(file)
}

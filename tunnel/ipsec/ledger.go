package ipsec

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/isthmus-net/isthmus/router/disk"
)

// ledger records across restarts of this process what was loaded into one instance of charon. It
// is a file with one line per load; the last line of a name counts. A truncated line is skipped.
// Its tunnel is then loaded once more, which does not affect its SAs in charon.
type ledger struct {
	file    *os.File
	entries map[string]loaded
}

// openLedger reads the ledger of an instance from dir, and begins a new one if the file belongs to
// another instance. Without dir or instance, the ledger is kept in memory only.
func openLedger(dir, instance string) (*ledger, error) {
	l := &ledger{entries: map[string]loaded{}}
	if dir == "" || instance == "" {
		return l, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the ledger of loaded connections: %w", err)
	}
	path := filepath.Join(dir, "charon.loaded")
	first := loaded{Name: "", Conn: instance}
	lines := 0
	if f, err := os.Open(path); err == nil {
		in := bufio.NewScanner(f)
		for ; in.Scan(); lines++ {
			var e loaded
			if json.Unmarshal(in.Bytes(), &e) != nil {
				continue
			}
			if lines == 0 && e != first {
				break
			}
			if lines > 0 {
				l.entries[e.Name] = e
			}
		}
		f.Close()
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("opening the ledger of loaded connections: %w", err)
	}
	for name, e := range l.entries {
		if e.Conn == "" {
			delete(l.entries, name)
		}
	}
	// Rewrite the whole file, so that it does not grow with each edit.
	var all bytes.Buffer
	out := json.NewEncoder(&all)
	err := out.Encode(first)
	for _, e := range l.entries {
		err = errors.Join(err, out.Encode(e))
	}
	if err == nil {
		err = disk.Replace(path, all.Bytes(), 0o600)
	}
	if err == nil {
		l.file, err = os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the ledger of loaded connections: %w", err)
	}
	return l, nil
}

// put records that a tunnel was loaded, or with an empty Conn, that it was unloaded.
func (l *ledger) put(e loaded) error {
	l.entries[e.Name] = e
	if e.Conn == "" {
		delete(l.entries, e.Name)
	}
	return l.append(e)
}

func (l *ledger) append(e loaded) error {
	if l.file == nil {
		return nil
	}
	line, err := json.Marshal(e)
	if err == nil {
		_, err = l.file.Write(append(line, '\n'))
	}
	if err != nil {
		return fmt.Errorf("writing the ledger of loaded connections: %w", err)
	}
	return nil
}

func (l *ledger) close() {
	if l.file != nil {
		l.file.Close()
	}
}

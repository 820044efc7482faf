package ipsec

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// ledger remembers across restarts of this process what was loaded into one instance of charon. It is a file of one
// line for each load, of which the last one of a name counts; a line that was cut off is passed over, and the tunnel is
// loaded once more, which charon takes without touching its SAs.
type ledger struct {
	path    string
	file    *os.File
	entries map[string]loaded
}

// openLedger reads the ledger of an instance from dir, and begins a new one when it is of another. Without dir or
// instance nothing is remembered.
func openLedger(dir, instance string) (*ledger, error) {
	l := &ledger{entries: map[string]loaded{}}
	if dir == "" || instance == "" {
		return l, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the ledger of loaded connections: %w", err)
	}
	l.path = filepath.Join(dir, "charon.loaded")
	first := loaded{Name: "", Conn: instance}
	lines := 0
	if f, err := os.Open(l.path); err == nil {
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
	// Rewritten as a whole, so that it does not grow with each edit.
	temporary := l.path + ".new"
	f, err := os.OpenFile(temporary, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the ledger of loaded connections: %w", err)
	}
	l.file = f
	err = l.append(first)
	for _, e := range l.entries {
		err = errors.Join(err, l.append(e))
	}
	if err = errors.Join(err, os.Rename(temporary, l.path)); err != nil {
		f.Close()
		return nil, fmt.Errorf("opening the ledger of loaded connections: %w", err)
	}
	return l, nil
}

// put remembers that something was loaded, or with an empty Conn, that it was unloaded.
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

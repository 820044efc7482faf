package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/isthmus-net/isthmus/router/disk"
)

// mark is the age of a state directory, in numbers that only grow.
type mark struct {
	Generation uint64            `json:"generation"` // newest document
	Clients    uint64            `json:"clients"`    // newest change of a client
	Secrets    map[string]uint64 `json:"secrets"`    // number of writes of each
}

// Remember keeps the age of the state in a file outside the state directory, and returns the parts
// of the state that are older than the file says, as text; empty: none. A restored copy of the
// directory has certificates as valid that were revoked since. An error is about the file, which
// has no other use.
func (s *Store) Remember(file string) (older string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.markFile = file
	data, err := os.ReadFile(file)
	if err == nil {
		if err = json.Unmarshal(data, &s.marked); err != nil {
			s.marked = mark{}
			err = fmt.Errorf("reading %s: %w", file, err)
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	now := s.presentLocked()
	switch {
	case now.Generation < s.marked.Generation:
		older = fmt.Sprintf("the newest document is of generation %d and was %d", now.Generation, s.marked.Generation)
	case now.Clients < s.marked.Clients:
		older = "client certificates have changed since"
	default:
		for name, n := range now.Secrets {
			if n < s.marked.Secrets[name] {
				older = fmt.Sprintf("secret %s has been set since", name)
			}
		}
	}
	return older, errors.Join(err, s.writeMarkLocked())
}

func (s *Store) presentLocked() mark {
	m := mark{Generation: s.newest, Secrets: make(map[string]uint64, len(s.secrets))}
	for _, c := range s.clients {
		m.Clients = max(m.Clients, c.Change)
	}
	m.Clients = max(m.Clients, s.clientChange)
	for name, v := range s.secrets {
		m.Secrets[name] = v.Generation
	}
	return m
}

// markLocked records a change.
func (s *Store) markLocked() {
	if s.markFile != "" {
		_ = s.writeMarkLocked() // the change itself is on disk
	}
}

// writeMarkLocked never lowers a number: an older state is reported at each start until it has
// caught up.
func (s *Store) writeMarkLocked() error {
	now := s.presentLocked()
	now.Generation, now.Clients = max(now.Generation, s.marked.Generation), max(now.Clients, s.marked.Clients)
	for name := range now.Secrets {
		now.Secrets[name] = max(now.Secrets[name], s.marked.Secrets[name])
	}
	data, err := json.Marshal(now)
	if err != nil {
		return err
	}
	if err := disk.Replace(s.markFile, data, 0o600); err != nil {
		return err
	}
	s.marked = now
	return nil
}

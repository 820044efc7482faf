package store

import (
	"encoding/json"
	"fmt"
	"slices"
)

// Carry records the progress of applying documents. Without it a document that ends the daemon
// would end it at every start.
type Carry struct {
	// Carried is the newest generation that was applied, or fully tried; 0: unknown.
	Carried uint64 `json:"carried"`
	// Trying is the generation that the last start of the daemon was to apply and that was never
	// applied, and Starts the number of starts that began with it and did not complete.
	Trying uint64 `json:"trying,omitzero"`
	Starts int    `json:"starts,omitzero"`
	// Back means that Carried was applied instead of Trying.
	Back bool `json:"back,omitzero"`
}

const carryFile = "carry"

func (s *Store) loadCarry() error {
	names, err := s.fs.readDir(".")
	if err != nil || !slices.Contains(names, carryFile) {
		return err
	}
	data, err := s.fs.readFile(carryFile)
	if err != nil {
		err = fmt.Errorf("%s: %w: %w", carryFile, ErrDamaged, err)
	} else if data, err = decodeRecord(carryFile, data); err == nil {
		if err = json.Unmarshal(data, &s.carry); err != nil {
			err = fmt.Errorf("%s: %w: %w", carryFile, ErrDamaged, err)
		}
	}
	if err != nil {
		s.damage = append(s.damage, err)
	}
	return nil
}

// Carry returns what SetCarry stored last.
func (s *Store) Carry() Carry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.carry
}

// SetCarry stores the progress. It writes nothing if the progress is the same.
func (s *Store) SetCarry(c Carry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c == s.carry {
		return nil
	}
	payload, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", carryFile, err)
	}
	if err := s.writeLocked(carryFile, payload); err != nil {
		return err
	}
	s.carry = c
	return nil
}

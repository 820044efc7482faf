package store

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
)

// Secrets are encrypted with the node key, which is on the same disk: a copy of the disk has both.
// A seal replaces it, for secrets, by a key that is on the disk only in a form that one machine can
// open. The daemon's own values stay encrypted with the node key, because the API must serve while
// the seal is closed.

const sealFile = "seal"

// SealedKey is the form of a key on disk.
type SealedKey struct {
	ID   string `json:"id"`   // of SealKeyID
	Blob []byte `json:"blob"` // input from which the machine recovers the key
}

// seal is the content of the file. New values are encrypted with the first key if it is open. Each
// further key stays until every value that it encrypts is encrypted with the first.
type seal struct {
	// the means that opens the keys; empty: values return to the node key
	With string      `json:"with"`
	Keys []SealedKey `json:"keys"`
}

// maxSealedKeys bounds the keys: the present one, and former ones while writes fail repeatedly.
const maxSealedKeys = 4

// Seal describes how secrets are sealed.
type Seal struct {
	// With is the means that opens the keys; empty: secrets are encrypted with the node key.
	With string
	// Closed are the keys that are not open.
	Closed []SealedKey
	// Secrets are the names of the secrets that cannot be read, because their key is not open.
	Secrets []string
	// Bare is the number of secrets encrypted with the node key although With is not empty.
	Bare int
}

// SealKeySize is the size of a key in bytes.
const SealKeySize = 32

// SealKeyID returns a name for a key that reveals nothing about it: 16 hexadecimal digits.
func SealKeyID(key []byte) (string, error) {
	id, err := hkdf.Expand(sha256.New, key, "isthmus store seal ID", 8)
	return hex.EncodeToString(id), err
}

// loadSeal reads the file. An unreadable file closes the values that it encrypts, and is reported.
func (s *Store) loadSeal() error {
	data, err := s.fs.readFile(sealFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		err = fmt.Errorf("%s: %w: %w", sealFile, ErrDamaged, err)
	} else if data, err = decodeRecord(sealFile, data); err == nil {
		if err = json.Unmarshal(data, &s.seal); err != nil {
			err = fmt.Errorf("%s: %w: %w", sealFile, ErrDamaged, err)
		}
	}
	if err != nil {
		s.seal = seal{}
		s.damage = append(s.damage, err)
		s.lost[sealFile] = lossOf(err)
	}
	return nil
}

// Seal returns how secrets are sealed.
func (s *Store) Seal() Seal {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Seal{With: s.seal.With}
	for _, k := range s.seal.Keys {
		if s.opened[k.ID] == nil {
			out.Closed = append(out.Closed, k)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.secrets)) {
		switch v := s.secrets[name]; {
		case v.Key != "" && s.opened[v.Key] == nil:
			out.Secrets = append(out.Secrets, name)
		case v.Key == "" && s.seal.With != "":
			out.Bare++
		}
	}
	return out
}

// presentKeyLocked returns the key for new values. While the seal is closed that is the node key,
// so that a node that cannot open it can get its secrets again.
func (s *Store) presentKeyLocked() (string, cipher.AEAD) {
	if s.seal.With != "" && len(s.seal.Keys) > 0 {
		if box := s.opened[s.seal.Keys[0].ID]; box != nil {
			return s.seal.Keys[0].ID, box
		}
	}
	return "", s.keys.seal
}

// SetSeal encrypts secrets with another key, which the machine recovers from blob, and encrypts all
// readable ones again. If with is empty, the other arguments are nil and secrets return to the node
// key. Former keys that are not open are dropped: the values that they encrypt stay, and can be
// read when OpenSeal gets the key itself.
func (s *Store) SetSeal(with string, key, blob []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys.seal == nil {
		return fmt.Errorf("sealing: no node key: %w", s.noKey())
	}
	if err := s.lost[sealFile]; errors.Is(err, ErrNewer) {
		return fmt.Errorf("sealing: %s: %w", sealFile, err)
	}
	next := seal{With: with}
	for _, k := range s.seal.Keys {
		if s.opened[k.ID] != nil {
			next.Keys = append(next.Keys, k)
		}
	}
	if len(next.Keys) >= maxSealedKeys {
		return fmt.Errorf("sealing: %w: %d former keys still encrypt secrets, since writing has failed: make room on the disk", ErrFull, len(next.Keys))
	}
	if with != "" {
		id, box, err := keyOf(key)
		if err != nil {
			return fmt.Errorf("sealing: %w", err)
		}
		next.Keys = slices.Insert(next.Keys, 0, SealedKey{id, blob})
		if err := s.writeSealLocked(next); err != nil {
			return fmt.Errorf("sealing: %w", err)
		}
		s.opened[id] = box
	} else if err := s.writeSealLocked(next); err != nil {
		return fmt.Errorf("sealing: %w", err)
	}
	if err := s.encryptAgainLocked(); err != nil {
		return fmt.Errorf("sealing: encrypting the secrets again: %w", err)
	}
	return nil
}

// RenewSeal replaces the blob of the present key. The key must be open.
func (s *Store) RenewSeal(blob []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.seal.Keys) == 0 || s.opened[s.seal.Keys[0].ID] == nil {
		return fmt.Errorf("sealing the key again: %w", ErrSealed)
	}
	next := seal{s.seal.With, slices.Clone(s.seal.Keys)}
	next.Keys[0].Blob = blob
	if err := s.writeSealLocked(next); err != nil {
		return fmt.Errorf("sealing the key again: %w", err)
	}
	return nil
}

// OpenSeal opens the values that a key encrypts, and reports whether it is the present key. An
// unknown key is ErrNotFound.
func (s *Store) OpenSeal(key []byte) (present bool, err error) {
	id, box, err := keyOf(key)
	if err != nil {
		return false, fmt.Errorf("opening the seal: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys.seal == nil {
		return false, fmt.Errorf("opening the seal: no node key: %w", s.noKey())
	}
	present = len(s.seal.Keys) > 0 && s.seal.Keys[0].ID == id
	listed := slices.ContainsFunc(s.seal.Keys, func(k SealedKey) bool { return k.ID == id })
	for name, v := range s.secrets {
		listed = listed || v.Key == id
		if v.Key != id || s.opened[id] != nil {
			continue
		}
		value, err := box.Open(nil, nil, v.Box, v.associated(secretDir))
		if err != nil {
			err = fmt.Errorf("%s: %w: cannot be decrypted with the sealed key", sealedName(secretDir, name), ErrDamaged)
			s.damage = append(s.damage, err)
			s.lost[sealedName(secretDir, name)] = ErrDamaged
			delete(s.secrets, name)
			continue
		}
		v.fingerprint = s.fingerprintLocked(name, value)
		s.secrets[name] = v
	}
	if !listed {
		return false, fmt.Errorf("opening the seal: %w: the key belongs to no secret of this node", ErrNotFound)
	}
	s.opened[id] = box
	// A full disk must not prevent secrets from being read.
	_ = s.encryptAgainLocked()
	return present, nil
}

// EncryptAgain completes the work of SetSeal and OpenSeal after failed writes.
func (s *Store) EncryptAgain() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.encryptAgainLocked()
}

func keyOf(key []byte) (id string, box cipher.AEAD, err error) {
	if len(key) != SealKeySize {
		return "", nil, fmt.Errorf("a key of %d bytes, want %d", len(key), SealKeySize)
	}
	if id, err = SealKeyID(key); err == nil {
		box, err = boxes(key)
	}
	return id, box, err
}

// encryptAgainLocked encrypts each readable value with the present key, and drops the keys that no
// value needs. After an error the next call does the rest.
func (s *Store) encryptAgainLocked() error {
	id, box := s.presentKeyLocked()
	if id != "" || s.seal.With == "" {
		for _, v := range s.secrets {
			if v.Key == id || v.Key != "" && s.opened[v.Key] == nil {
				continue
			}
			value, err := s.unsealLocked(secretDir, v)
			if err != nil {
				return err
			}
			next := v
			next.Key, next.Box = id, box.Seal(nil, nil, value, v.associated(secretDir))
			if v.Former != nil {
				before := v.before()
				if value, err = s.unsealLocked(secretDir, before); err != nil {
					return err
				}
				next.Former = &former{v.Former.Generation, v.Former.Changed, box.Seal(nil, nil, value, before.associated(secretDir))}
			}
			if err := s.putLocked(secretDir, s.secrets, next); err != nil {
				return err
			}
		}
	}
	needed := map[string]bool{id: true}
	for _, v := range s.secrets {
		needed[v.Key] = true
	}
	left := seal{s.seal.With, slices.DeleteFunc(slices.Clone(s.seal.Keys), func(k SealedKey) bool {
		return !needed[k.ID] && (s.opened[k.ID] != nil || s.seal.With == "")
	})}
	if len(left.Keys) == len(s.seal.Keys) && (left.With != "" || len(left.Keys) > 0) {
		return nil
	}
	return s.writeSealLocked(left)
}

// writeSealLocked writes the file; an empty seal has no file.
func (s *Store) writeSealLocked(next seal) error {
	if next.With == "" && len(next.Keys) == 0 {
		if _, err := s.fs.readFile(sealFile); errors.Is(err, fs.ErrNotExist) {
			s.seal = next
			return nil
		}
		if err := s.removeLocked(sealFile); err != nil {
			return err
		}
	} else {
		payload, err := json.Marshal(next)
		if err != nil {
			return err
		}
		if err := s.writeLocked(sealFile, payload); err != nil {
			return err
		}
	}
	delete(s.lost, sealFile)
	s.seal = next
	return nil
}

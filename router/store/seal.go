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

// Secrets are encrypted with the node key, which lies beside them: a copy of the disk has both. A
// seal replaces it, for them, by a key that is on the disk only in a form that one machine can
// open. The daemon's own values stay with the node key: the API must serve while the seal is
// closed.

const sealFile = "seal"

// SealedKey is a key as it lies on disk.
type SealedKey struct {
	ID   string `json:"id"`   // of SealKeyID
	Blob []byte `json:"blob"` // what the machine makes the key of
}

// seal is what the file says. New values are encrypted with the first key when it is open. Each
// further one is there until every value that it encrypts is encrypted with the first.
type seal struct {
	With string      `json:"with"` // what opens the keys; empty: values return to the node key
	Keys []SealedKey `json:"keys"`
}

// maxSealedKeys bounds how many keys are there at once: the present one, and former ones while a
// write fails again and again.
const maxSealedKeys = 4

// Seal is how secrets are sealed.
type Seal struct {
	// With is what opens the keys; empty: secrets are encrypted with the node key.
	With string
	// Closed are the keys that are not open.
	Closed []SealedKey
	// Secrets are the names of those that cannot be read, since their key is not open.
	Secrets []string
	// Bare is how many secrets are encrypted with the node key although With is something else.
	Bare int
}

// SealKeySize is the size of a key in bytes.
const SealKeySize = 32

// SealKeyID returns a name for a key that tells nothing of it: 16 hexadecimal digits.
func SealKeyID(key []byte) (string, error) {
	id, err := hkdf.Expand(sha256.New, key, "isthmus store seal ID", 8)
	return hex.EncodeToString(id), err
}

// loadSeal reads what the file says. A file that cannot be read closes what it encrypts, and is
// reported.
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

// presentKeyLocked returns what new values are encrypted with. While the seal is closed that is the
// node key: a node that cannot open it can be given its secrets again.
func (s *Store) presentKeyLocked() (string, cipher.AEAD) {
	if s.seal.With != "" && len(s.seal.Keys) > 0 {
		if box := s.opened[s.seal.Keys[0].ID]; box != nil {
			return s.seal.Keys[0].ID, box
		}
	}
	return "", s.keys.seal
}

// SetSeal has secrets encrypted with another key, which something opens of blob, and all that can
// be read now encrypted again. With an empty with the others are nil, and secrets return to the
// node key. Former keys that are not open are forgotten: what they encrypt stays, and can be read
// when OpenSeal is given the key itself.
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

// RenewSeal replaces what the present key is opened of. The key must be open.
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

// OpenSeal takes a key and has what it encrypts readable. It says whether that is the present key.
// A key that belongs to nothing here is ErrNotFound.
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
	// A disk that takes nothing keeps no secret from being read.
	_ = s.encryptAgainLocked()
	return present, nil
}

// EncryptAgain does what SetSeal and OpenSeal could not do since writing failed.
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

// encryptAgainLocked encrypts each value that can be read and does not have the present key with
// that, and forgets the keys that no value needs. After an error the rest is done by the next call.
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

// writeSealLocked makes the file say what is wanted; a seal that is nothing has no file.
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

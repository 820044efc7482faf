package store

import (
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// loadKey reads the node key, or creates it if nothing was ever encrypted. It then decrypts every
// value once, to compute its fingerprint and to find values that cannot be decrypted.
func (s *Store) loadKey() error {
	key, err := s.readKey()
	if err != nil {
		s.damage = append(s.damage, fmt.Errorf("node key: %w", err))
		s.lost[keyFile] = lossOf(err)
		return nil
	}
	if s.keys, err = deriveKeys(key); err != nil {
		return err
	}
	for dir, values := range map[string]map[string]sealed{secretDir: s.secrets, privateDir: s.private} {
		for name, v := range values {
			if v.Key != "" {
				continue // see OpenSeal
			}
			value, err := s.unsealLocked(dir, v)
			if err != nil {
				s.damage = append(s.damage, err)
				s.lost[sealedName(dir, name)] = lossOf(err)
				delete(values, name)
				continue
			}
			v.fingerprint = s.fingerprintLocked(name, value)
			values[name] = v
		}
	}
	return nil
}

// readKey returns the node key. It creates one only if the directory has neither a key nor any
// encrypted value.
func (s *Store) readKey() ([]byte, error) {
	names, err := s.fs.readDir(".")
	if err != nil {
		return nil, err
	}
	if !slices.Contains(names, keyFile) {
		used := len(s.secrets)+len(s.private) > 0 || slices.ContainsFunc(slices.Collect(maps.Keys(s.lost)), func(name string) bool {
			return strings.HasSuffix(name, sealedSuffix)
		})
		if used {
			return nil, fmt.Errorf("%w: it is gone, and what it encrypted is still there", ErrDamaged)
		}
		key := make([]byte, 32)
		rand.Read(key)
		return key, s.writeLocked(keyFile, []byte(hex.EncodeToString(key)))
	}
	data, err := s.fs.readFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	payload, err := decodeRecord(keyFile, data)
	if err != nil {
		return nil, err
	}
	key, err := hex.DecodeString(string(payload))
	if err != nil || len(key) != 32 {
		return nil, fmt.Errorf("%w: not 64 hexadecimal digits", ErrDamaged)
	}
	return key, nil
}

func deriveKeys(node []byte) (keys, error) {
	fingerprint, err := hkdf.Expand(sha256.New, node, "isthmus store fingerprint", 32)
	if err != nil {
		return keys{}, err
	}
	gcm, err := boxes(node)
	return keys{seal: gcm, fingerprint: fingerprint}, err
}

// boxes returns the cipher of a key.
func boxes(key []byte) (cipher.AEAD, error) {
	derived, err := hkdf.Expand(sha256.New, key, "isthmus store sealing", 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(derived)
	if err != nil {
		return nil, err
	}
	// A random 96-bit nonce is safe for 2^32 values under one key (NIST SP 800-38D section 8.3).
	return cipher.NewGCMWithRandomNonce(block)
}

// fingerprintLocked covers name and value, so that a reader cannot see that two names have one
// value.
func (s *Store) fingerprintLocked(name string, value []byte) string {
	h := hmac.New(sha256.New, s.keys.fingerprint)
	h.Write([]byte(name + "\x00")) // which no name has
	h.Write(value)
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// noKey returns why the node key is missing.
func (s *Store) noKey() error {
	return fmt.Errorf("%w: %s", cmp.Or(s.lost[keyFile], ErrDamaged), keyFile)
}

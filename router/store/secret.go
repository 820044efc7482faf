package store

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/secret"
)

const (
	keyFile      = "key"
	secretDir    = "secrets"
	privateDir   = "private"
	sealedSuffix = ".sealed"
)

// SecretInfo is the public information about a secret.
type SecretInfo struct {
	Ref     secret.Ref // no fingerprint while it is sealed
	Changed time.Time
	Sealed  bool // its key is not open
}

// sealed is the form of an encrypted value on disk. Name, generation and time are bound to the
// value: none of them can be exchanged without the node key.
type sealed struct {
	Name       string    `json:"name"`
	Generation uint64    `json:"generation"` // number of writes of the name
	Changed    time.Time `json:"changed"`
	Box        []byte    `json:"box"` // nonce, AES-256-GCM ciphertext and tag
	// Key is the ID of the sealed key that the boxes are encrypted with; empty: the node key.
	Key string `json:"key,omitempty"`
	// Former is the previous value, with its own generation and time, until the next document is
	// accepted; nil: none.
	Former *former `json:"former,omitempty"`

	fingerprint string
}

type former struct {
	Generation uint64    `json:"generation"`
	Changed    time.Time `json:"changed"`
	Box        []byte    `json:"box"`
}

func (v sealed) associated(dir string) []byte {
	return fmt.Appendf(nil, "%s/%s\x00%d\x00%s", dir, v.Name, v.Generation, v.Changed.UTC().Format(time.RFC3339Nano))
}

var secretName = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

// ValidSecretName reports whether a secret can have this name: lower case letters, digits and
// hyphens, 1 to 63.
func ValidSecretName(name string) bool { return secretName.MatchString(name) }

func sealedName(dir, name string) string { return dir + "/" + name + sealedSuffix }

func (s *Store) loadSealed() error {
	for dir, into := range map[string]map[string]sealed{secretDir: s.secrets, privateDir: s.private} {
		err := s.scanLocked(dir, sealedSuffix, func(name string, payload []byte) error {
			var v sealed
			if err := json.Unmarshal(payload, &v); err != nil {
				return fmt.Errorf("%s: %w: %w", name, ErrDamaged, err)
			}
			into[name] = v
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) unsealLocked(dir string, v sealed) ([]byte, error) {
	if s.keys.seal == nil {
		return nil, fmt.Errorf("%s: no node key: %w", sealedName(dir, v.Name), s.noKey())
	}
	box, key := s.keys.seal, "the node key"
	if v.Key != "" {
		if box, key = s.opened[v.Key], "the sealed key"; box == nil {
			return nil, fmt.Errorf("%s: %w", sealedName(dir, v.Name), ErrSealed)
		}
	}
	value, err := box.Open(nil, nil, v.Box, v.associated(dir))
	if err != nil {
		return nil, fmt.Errorf("%s: %w: cannot be decrypted with %s", sealedName(dir, v.Name), ErrDamaged, key)
	}
	return value, nil
}

func (s *Store) sealLocked(dir string, into map[string]sealed, name string, value []byte, now time.Time) (sealed, error) {
	if s.keys.seal == nil {
		return sealed{}, fmt.Errorf("storing %s: no node key: %w", name, s.noKey())
	}
	v := sealed{Name: name, Generation: into[name].Generation + 1, Changed: now.UTC().Round(0), fingerprint: s.fingerprintLocked(name, value)}
	box := s.keys.seal
	if dir == secretDir {
		v.Key, box = s.presentKeyLocked()
	}
	v.Box = box.Seal(nil, nil, value, v.associated(dir))
	// A value with another key cannot be read, or is about to be encrypted again.
	if old, ok := into[name]; ok && dir == secretDir && old.Key == v.Key {
		v.Former = &former{old.Generation, old.Changed, old.Box}
	}
	return v, s.putLocked(dir, into, v)
}

// putLocked writes an encrypted value.
func (s *Store) putLocked(dir string, into map[string]sealed, v sealed) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("storing %s: %w", v.Name, err)
	}
	format := uint64(plain)
	if v.Key != "" {
		format = withSeals
	}
	if err := s.writeAsLocked(format, sealedName(dir, v.Name), payload); err != nil {
		return err
	}
	delete(s.lost, sealedName(dir, v.Name))
	into[v.Name] = v
	return nil
}

// MaxSecrets bounds the secrets: a document of the largest size refers to some 40,000.
const MaxSecrets = 1 << 16

// SetSecret stores a secret, or replaces it. An invalid name is an error. A new secret beyond
// MaxSecrets is refused with ErrFull.
func (s *Store) SetSecret(name string, value []byte, now time.Time) (SecretInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.setSecretLocked(name, value, now)
}

// AddSecret stores a secret, and refuses with ErrTaken to replace another value. It
// reports whether it stored the value, which it does not when the same is stored already.
func (s *Store) AddSecret(name string, value []byte, now time.Time) (SecretInfo, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, had := s.secrets[name]; had && s.keys.seal != nil {
		switch f := s.fingerprintLocked(name, value); v.fingerprint {
		case f:
			return v.info(), false, nil
		case "":
			return SecretInfo{}, false, fmt.Errorf("secret %s %w: the stored value cannot be read and compared with the new one, fingerprint %s", name, ErrTaken, f)
		default:
			return SecretInfo{}, false, fmt.Errorf("secret %s %w: the stored value has fingerprint %s, the new one %s", name, ErrTaken, v.fingerprint, f)
		}
	}
	i, err := s.setSecretLocked(name, value, now)
	return i, err == nil, err
}

func (s *Store) setSecretLocked(name string, value []byte, now time.Time) (SecretInfo, error) {
	if !ValidSecretName(name) {
		return SecretInfo{}, fmt.Errorf("storing secret: name %q must be lower case letters, digits and hyphens, 1 to 63", name)
	}
	if _, had := s.secrets[name]; !had && len(s.secrets) >= MaxSecrets {
		return SecretInfo{}, fmt.Errorf("storing secret %q: %w: there are %d secrets; delete those that no document needs", name, ErrFull, len(s.secrets))
	}
	v, err := s.sealLocked(secretDir, s.secrets, name, value, now)
	if err != nil {
		return SecretInfo{}, err
	}
	s.markLocked()
	return v.info(), nil
}

// RollbackSecret restores the value that a secret had before it was last set; the present value
// becomes the former one. Without such a value the error wraps ErrNotFound.
func (s *Store) RollbackSecret(name string, now time.Time) (SecretInfo, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	value, err := s.formerLocked(name)
	if err != nil {
		return SecretInfo{}, err
	}
	v, err := s.sealLocked(secretDir, s.secrets, name, value, now)
	if err != nil {
		return SecretInfo{}, err
	}
	s.markLocked()
	return v.info(), nil
}

// FormerSecret returns the value that RollbackSecret would restore.
func (s *Store) FormerSecret(name string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.formerLocked(name)
}

func (s *Store) formerLocked(name string) ([]byte, error) {
	v, err := s.secretLocked(name)
	if err != nil {
		return nil, err
	}
	if v.Former == nil {
		return nil, fmt.Errorf("former value of secret %q: %w: it is kept from when the secret is set until the next document is accepted", name, ErrNotFound)
	}
	return s.unsealLocked(secretDir, v.before())
}

// DropFormer deletes the former values of secrets.
func (s *Store) DropFormer() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.secrets {
		if v.Former == nil {
			continue
		}
		v.Former = nil
		if err := s.putLocked(secretDir, s.secrets, v); err != nil {
			return err
		}
	}
	return nil
}

// before returns the former value of v, which must have one.
func (v sealed) before() sealed {
	return sealed{Name: v.Name, Generation: v.Former.Generation, Changed: v.Former.Changed, Box: v.Former.Box, Key: v.Key}
}

func (v sealed) info() SecretInfo {
	return SecretInfo{Ref: secret.Ref{Name: v.Name, Fingerprint: v.fingerprint}, Changed: v.Changed}
}

// DeleteSecret removes a secret, also a damaged one. Removing an unknown one is secret.ErrNotFound.
func (s *Store) DeleteSecret(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	file := sealedName(secretDir, name)
	if _, ok := s.secrets[name]; !ok && s.lost[file] == nil {
		return fmt.Errorf("secret %q: %w", name, secret.ErrNotFound)
	}
	if err := s.removeLocked(file); err != nil {
		return err
	}
	delete(s.secrets, name)
	delete(s.lost, file)
	return nil
}

// Secrets returns the public information about the secrets, sorted by name.
func (s *Store) Secrets() []SecretInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]SecretInfo, 0, len(s.secrets))
	for _, v := range s.secrets {
		info := v.info()
		info.Sealed = v.Key != "" && s.opened[v.Key] == nil
		out = append(out, info)
	}
	slices.SortFunc(out, func(a, b SecretInfo) int { return strings.Compare(a.Ref.Name, b.Ref.Name) })
	return out
}

// Ref returns the reference to the present value of a secret. The error wraps secret.ErrNotFound if
// there is none, ErrSealed while its key is not open, and ErrDamaged if it cannot be read.
func (s *Store) Ref(name string) (secret.Ref, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.secretLocked(name)
	return v.info().Ref, err
}

func (s *Store) secretLocked(name string) (sealed, error) {
	v, ok := s.secrets[name]
	switch {
	case s.lost[sealedName(secretDir, name)] != nil:
		return sealed{}, fmt.Errorf("secret %q: %w", name, s.lost[sealedName(secretDir, name)])
	case ok && s.keys.seal == nil:
		return sealed{}, fmt.Errorf("secret %q: %w", name, s.noKey())
	case !ok:
		return sealed{}, fmt.Errorf("secret %q: %w", name, secret.ErrNotFound)
	case v.Key != "" && s.opened[v.Key] == nil:
		return sealed{}, fmt.Errorf("secret %q: %w", name, ErrSealed)
	}
	return v, nil
}

// Lookup returns the value of a secret; it is a secret.Lookup.
func (s *Store) Lookup(ref secret.Ref) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.secretLocked(ref.Name)
	if err != nil {
		return nil, err
	}
	if v.fingerprint != ref.Fingerprint {
		return nil, fmt.Errorf("secret %q has changed: present is %s, wanted %s", ref.Name, v.fingerprint, ref.Fingerprint)
	}
	return s.unsealLocked(secretDir, v)
}

// Private returns an encrypted value of the daemon's own, or an error that wraps ErrNotFound or
// ErrDamaged.
func (s *Store) Private(name string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.private[name]
	switch {
	case s.lost[sealedName(privateDir, name)] != nil:
		return nil, fmt.Errorf("private %q: %w", name, s.lost[sealedName(privateDir, name)])
	case !ok:
		return nil, fmt.Errorf("private %q: %w", name, ErrNotFound)
	}
	return s.unsealLocked(privateDir, v)
}

// SetPrivate stores an encrypted value of the daemon's own.
func (s *Store) SetPrivate(name string, value []byte, now time.Time) error {
	if !ValidSecretName(name) {
		return fmt.Errorf("storing private value: bad name %q", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.sealLocked(privateDir, s.private, name, value, now)
	return err
}

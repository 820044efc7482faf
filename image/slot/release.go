package slot

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"aead.dev/minisign"
)

// Release is the trusted comment of a slot's signature.
type Release struct {
	Version string
	// Serial grows from release to release: the time of the commit, in seconds since 1970. A slot
	// with a lower one is installed only on request.
	Serial int64
}

// Comment returns the trusted comment.
func (r Release) Comment() string {
	return fmt.Sprintf("isthmus-slot version=%s serial=%d", r.Version, r.Serial)
}

var comment = regexp.MustCompile(`^isthmus-slot version=([0-9A-Za-z.~+_-]{1,64}) serial=([0-9]{1,18})$`)

// ParseComment parses the result of Comment.
func ParseComment(s string) (Release, error) {
	m := comment.FindStringSubmatch(s)
	if m == nil {
		return Release{}, fmt.Errorf("the signature's trusted comment is %q: it does not belong to a slot of isthmus", cut(s, 80))
	}
	serial, err := strconv.ParseInt(m[2], 10, 64)
	if err != nil {
		return Release{}, fmt.Errorf("reading the serial of the trusted comment: %w", err)
	}
	return Release{Version: m[1], Serial: serial}, nil
}

// SignatureLimit bounds the text of a signature, in bytes.
const SignatureLimit = 2048

// Signature is an unchecked signature in the format of minisign
// (https://jedisct1.github.io/minisign/).
type Signature struct {
	text []byte
	sig  minisign.Signature
	// Release is from the trusted comment. It is authentic once Check has returned nil.
	Release Release
}

// ParseSignature parses a signature file of minisign -S or Sign.
func ParseSignature(text []byte) (*Signature, error) {
	if len(text) > SignatureLimit {
		return nil, fmt.Errorf("the signature has %d bytes, more than %d", len(text), SignatureLimit)
	}
	s := &Signature{text: text}
	if err := s.sig.UnmarshalText(text); err != nil {
		return nil, fmt.Errorf("reading the signature: %w", err)
	}
	var err error
	if s.Release, err = ParseComment(s.sig.TrustedComment); err != nil {
		return nil, err
	}
	return s, nil
}

// Text returns the input of ParseSignature.
func (s *Signature) Text() []byte { return s.text }

// KeyID returns the ID of the key that made the signature, as minisign prints it.
func (s *Signature) KeyID() string { return keyID(s.sig.KeyID) }

func keyID(id uint64) string { return strings.ToUpper(strconv.FormatUint(id, 16)) }

// Keys are the keys that a node trusts for slots.
type Keys []minisign.PublicKey

// KeyDir is where a root has them: files NAME.pub, as minisign -G writes them.
const KeyDir = "/usr/share/isthmus/keys"

// ReadKeys reads the keys of a directory. An unreadable file is an error, because a node without
// its keys accepts no slot.
func ReadKeys(dir string) (Keys, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.pub"))
	if err != nil {
		return nil, err
	}
	var out Keys
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("reading the trusted keys: %w", err)
		}
		var k minisign.PublicKey
		if err := k.UnmarshalText(text); err != nil {
			return nil, fmt.Errorf("reading the trusted keys: %s: %w", f, err)
		}
		out = append(out, k)
	}
	return out, nil
}

// IDs returns the IDs of the keys.
func (k Keys) IDs() (out []string) {
	for _, key := range k {
		out = append(out, keyID(key.ID()))
	}
	return out
}

var (
	// ErrKey means that a signature was made with a key that the node does not trust.
	ErrKey = errors.New("signed with a key that this node does not trust")
	// ErrSignature means that a signature does not belong to the slot: the slot was changed, cut
	// off, or is another one.
	ErrSignature = errors.New("signature does not belong to this slot")
	// ErrOlder means that a slot is older than the one that runs.
	ErrOlder = errors.New("slot is older than the one that runs")
)

// Find returns the key of a signature.
func (k Keys) Find(s *Signature) (minisign.PublicKey, error) {
	for _, key := range k {
		if key.ID() == s.sig.KeyID {
			return key, nil
		}
	}
	return minisign.PublicKey{}, fmt.Errorf("%w: the signature is by key %s, and the node has %s", ErrKey, s.KeyID(), strings.Join(k.IDs(), ", "))
}

// Hash passes a slot's bytes through and then checks a signature over them.
type Hash struct{ *minisign.Reader }

// NewHash reads from r.
func NewHash(r io.Reader) Hash { return Hash{minisign.NewReader(r)} }

// Check returns nil if the signature matches the bytes that were read, and was made with one of the
// keys.
func (h Hash) Check(keys Keys, s *Signature) error {
	key, err := keys.Find(s)
	if err != nil {
		return err
	}
	if !h.Verify(key, s.text) {
		return ErrSignature
	}
	return nil
}

// NewKey makes a key without a password, and returns the texts of its two files in the format of
// minisign.
func NewKey() (public, private []byte, err error) {
	pub, priv, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making a signing key: %w", err)
	}
	if private, err = priv.MarshalText(); err != nil {
		return nil, nil, fmt.Errorf("making a signing key: %w", err)
	}
	if public, err = pub.MarshalText(); err != nil {
		return nil, nil, fmt.Errorf("making a signing key: %w", err)
	}
	return public, private, nil
}

// Sign signs the slot in the file path with the key in keyFile, which is from minisign -G or
// NewKey. password opens a key that has one.
func Sign(keyFile, password, path string, r Release) ([]byte, error) {
	text, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("reading the signing key: %w", err)
	}
	var key minisign.PrivateKey
	if minisign.IsEncrypted(text) {
		key, err = minisign.DecryptKey(password, text)
	} else {
		err = key.UnmarshalText(text)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the signing key %s: %w", keyFile, err)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	reader := minisign.NewReader(f)
	if _, err := io.Copy(io.Discard, reader); err != nil {
		return nil, fmt.Errorf("signing %s: %w", path, err)
	}
	return reader.SignWithComments(key, r.Comment(), "signature of a slot of isthmus"), nil
}

func cut(s string, n int) string {
	if len(s) > n {
		return s[:n] + "..."
	}
	return s
}

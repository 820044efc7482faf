package machine

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/image/slot"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/store"
)

// TPM2 is the seal whose key the machine's TPM 2.0 opens while its PCR 7 is unchanged.
const TPM2 = "tpm2"

// Sealer seals with the machine's TPM; helper.Client is one.
type Sealer interface {
	Seal(ctx context.Context, data []byte) ([]byte, error)
	Open(ctx context.Context, sealed []byte) ([]byte, error)
}

// Sealed is the store of the secrets; store.Store is one.
type Sealed interface {
	Seal() store.Seal
	SetSeal(with string, key, blob []byte) error
	RenewSeal(blob []byte) error
	OpenSeal(key []byte) (present bool, err error)
	EncryptAgain() error
}

// SealOptions configure a Seal.
type SealOptions struct {
	Store  Sealed
	Sealer Sealer
	Sys    string // /sys
	Log    *slog.Logger
}

// Seal keeps the key of the secrets in the machine's TPM on request. Its methods are safe for
// concurrent use.
type Seal struct {
	SealOptions

	doing sync.Mutex // held while the seal is opened or changed

	mu     sync.Mutex
	closed error // why the seal could not be opened
	stale  error // why the key, which is open, is not sealed for the next start
}

// NewSeal returns the seal.
func NewSeal(o SealOptions) *Seal { return &Seal{SealOptions: o} }

// SealPace is the interval of attempts to open a closed seal.
const SealPace = 30 * time.Second

// Await opens the seal at the daemon's start, and returns when that is done, has failed, or ctx is
// done. It waits for the helper, which may start at the same time.
func (s *Seal) Await(ctx context.Context) {
	for len(s.Store.Seal().Closed) > 0 {
		s.open(ctx)
		s.mu.Lock()
		err := s.closed
		s.mu.Unlock()
		if err == nil || !errors.Is(err, slot.ErrNoSlots) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Keep opens the seal when it is closed and can be opened, and encrypts secrets that are not sealed
// as they should be, until ctx is done. It calls opened after secrets have become readable.
func (s *Seal) Keep(ctx context.Context, opened func(context.Context) error) {
	pace := time.NewTicker(SealPace)
	defer pace.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
		if s.open(ctx) {
			s.Log.Info("the seal of the secrets is open")
			if err := opened(ctx); err != nil {
				s.Log.Error("applying the document with its secrets failed", "err", err)
			}
		}
		if is := s.Store.Seal(); is.Bare > 0 && len(is.Closed) == 0 {
			if err := s.Store.EncryptAgain(); err != nil {
				s.Log.Error("encrypting secrets with the sealed key failed", "err", err)
			}
		}
	}
}

// open tries the closed keys, and reports whether one has opened.
func (s *Seal) open(ctx context.Context) (opened bool) {
	s.doing.Lock()
	defer s.doing.Unlock()
	var why error
	for _, k := range s.Store.Seal().Closed {
		key, err := s.Sealer.Open(ctx, k.Blob)
		if err == nil {
			_, err = s.Store.OpenSeal(key)
		}
		opened = opened || err == nil
		if err != nil && why == nil { // the first is the present one
			why = err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if why != nil && (s.closed == nil || s.closed.Error() != why.Error()) {
		s.Log.Error("the seal of the secrets cannot be opened", "err", why)
	}
	s.closed = why
	return opened
}

// Set seals the secrets with TPM2, or removes the seal when with is empty, and returns the recovery
// string, which is not stored. While secrets cannot be read, abandon must confirm that they may
// stay so.
func (s *Seal) Set(ctx context.Context, with string, abandon bool) (recovery string, err error) {
	if with != "" && with != TPM2 {
		return "", fmt.Errorf("%w: seal %q: give %s, or none", api.ErrInvalid, with, TPM2)
	}
	s.doing.Lock()
	defer s.doing.Unlock()
	if is := s.Store.Seal(); len(is.Secrets) > 0 && !abandon {
		return "", fmt.Errorf("%w: %s cannot be read, since the seal is closed: open it with its recovery string (`isthmus system unseal`), or give --abandon and set them again",
			api.ErrPrecondition, named(is.Secrets))
	}
	var key, blob []byte
	if with == TPM2 {
		key = make([]byte, store.SealKeySize)
		rand.Read(key)
		if blob, err = s.seal(ctx, key); err != nil {
			return "", err
		}
		recovery = Recovery(key)
	}
	if err := s.Store.SetSeal(with, key, blob); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed, s.stale = nil, nil
	return recovery, nil
}

// noPCR is PCR 7 of a firmware that measures nothing: it is the same whatever was started.
var noPCR = strings.Repeat("0", 64)

func (s *Seal) seal(ctx context.Context, key []byte) ([]byte, error) {
	switch f := ReadFirmware(s.Sys); {
	case !f.TPM:
		return nil, fmt.Errorf("%w: the machine has no TPM 2.0: give it one (docs/install), restart it, and try again", api.ErrPrecondition)
	case f.PCR7 == "" || f.PCR7 == noPCR:
		return nil, fmt.Errorf("%w: the firmware has measured nothing into the TPM's PCR 7, so a seal would open whatever is started: start the machine by UEFI", api.ErrPrecondition)
	}
	blob, err := s.Sealer.Seal(ctx, key)
	if errors.Is(err, slot.ErrNoSlots) {
		return nil, fmt.Errorf("%w: the TPM is used by the system helper of the image, which this machine does not have", api.ErrPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("sealing with the TPM: %w", err)
	}
	// A blob that does not open now does not open at the next start either.
	again, err := s.Sealer.Open(ctx, blob)
	if err == nil && string(again) != string(key) {
		err = errors.New("it returned something else")
	}
	if err != nil {
		return nil, fmt.Errorf("sealing with the TPM: opening what was sealed: %w", err)
	}
	return blob, nil
}

// Unseal opens the seal with its recovery string, and seals the key for this machine in its present
// state. The error wraps api.ErrInvalid when the text is not a recovery string, or belongs to
// another seal. notSealed is why the key is not sealed for the next start; empty: it is.
func (s *Seal) Unseal(ctx context.Context, recovery string) (notSealed string, err error) {
	key, err := ParseRecovery(recovery)
	if err != nil {
		return "", fmt.Errorf("%w: %w", api.ErrInvalid, err)
	}
	s.doing.Lock()
	defer s.doing.Unlock()
	present, err := s.Store.OpenSeal(key)
	if errors.Is(err, store.ErrNotFound) {
		return "", fmt.Errorf("%w: the recovery string belongs to another seal: none of the secrets was sealed with it", api.ErrInvalid)
	}
	if err != nil {
		return "", err
	}
	if !present {
		return "", nil // the secrets that it has opened are under the present seal now
	}
	blob, err := s.seal(ctx, key)
	if err == nil {
		err = s.Store.RenewSeal(blob)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed, s.stale = nil, err
	if err != nil {
		return err.Error(), nil
	}
	return "", nil
}

// Status returns the kind of the seal, and why some secrets cannot be read; empty: all can.
func (s *Seal) Status() (with, closed string) {
	is := s.Store.Seal()
	if len(is.Secrets) == 0 && len(is.Closed) == 0 {
		return is.With, ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	why := "they were sealed before, and that seal was abandoned"
	switch {
	case s.closed != nil:
		why = s.closed.Error()
	case len(is.Closed) > 0:
		why = "the TPM has not answered yet"
	}
	return is.With, why
}

// Conditions returns the conditions of the seal.
func (s *Seal) Conditions() (out []*isthmusv1.Condition) {
	is := s.Store.Seal()
	_, closed := s.Status()
	if closed != "" {
		text := "the seal of the secrets is closed: " + closed
		if len(is.Secrets) > 0 {
			text += "; " + named(is.Secrets) + " cannot be read, and tunnels and peers that use them wait"
		}
		text += "; `isthmus system unseal` opens it with the recovery string; without that string set the secrets again with `isthmus secret set`"
		if is.With != "" {
			text += ", then `isthmus system seal " + is.With + " --abandon`"
		}
		out = append(out, condition.Sealed.Error(time.Time{}, "%s", text))
	}
	if is.Bare > 0 {
		out = append(out, condition.SecretsNotSealed.Warning(time.Time{}, "%d secrets are encrypted with the node key alone, which is on the same disk: they were set while the seal was closed, or writing them failed; they are sealed once it is open: `isthmus system unseal`, or `isthmus system seal tpm2 --abandon`", is.Bare))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stale != nil {
		out = append(out, condition.SealNotRenewed.Warning(time.Time{}, "the secrets can be read, but their key is not sealed for the next start, which will need the recovery string again: %v; then `isthmus system unseal` once more, or `isthmus system seal none`", s.stale))
	}
	return out
}

// named returns the first few names, and the number of the others.
func named(names []string) string {
	text := "secrets "
	if len(names) == 1 {
		text = "secret "
	}
	if n := len(names); n > listed {
		return text + strings.Join(names[:listed], ", ") + fmt.Sprintf(" and %d more", n-listed)
	}
	return text + strings.Join(names, ", ")
}

// A recovery string is the key itself and the first three bytes of its SHA-256, in base32 (RFC
// 4648, section 6), in groups of four.

// Recovery returns a key as a text that a person can keep.
func Recovery(key []byte) string {
	sum := sha256.Sum256(key)
	text := base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(append(key[:len(key):len(key)], sum[:3]...))
	var groups []string
	for ; len(text) > 4; text = text[4:] {
		groups = append(groups, text[:4])
	}
	return strings.Join(append(groups, text), "-")
}

// ParseRecovery returns the key of a recovery string. Case, spaces and hyphens do not matter.
func ParseRecovery(text string) ([]byte, error) {
	bare := strings.Map(func(r rune) rune {
		if r == '-' || r == ' ' || r == '\t' || r == '\r' || r == '\n' {
			return -1
		}
		return r
	}, strings.ToUpper(text))
	data, err := base32.StdEncoding.WithPadding(base32.NoPadding).DecodeString(bare)
	if err != nil || len(data) != store.SealKeySize+3 {
		return nil, errors.New("not a recovery string: it has 14 groups of four letters A to Z and digits 2 to 7")
	}
	key := data[:store.SealKeySize]
	if sum := sha256.Sum256(key); string(sum[:3]) != string(data[store.SealKeySize:]) {
		return nil, errors.New("not a recovery string: at least one letter of it is wrong")
	}
	return key, nil
}

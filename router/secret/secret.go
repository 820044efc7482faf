// Package secret names secrets without holding their values. References appear in plans, diffs and
// logs; a driver looks the value up at the last moment, when it passes it to the kernel, to charon
// or to the BGP process.
package secret

import (
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// ErrNotFound means that no secret with the name is stored.
var ErrNotFound = errors.New("no such secret")

// Ref names a secret. Two references are equal when they name the same value, so a changed value
// shows as a changed reference.
type Ref struct {
	Name        string
	Fingerprint string // keyed digest of the value; reveals nothing about it without the node's key
}

// String returns name and fingerprint; a Ref has no value to print.
func (r Ref) String() string {
	if r.Name == "" {
		return ""
	}
	return r.Name + "#" + r.Fingerprint
}

// Lookup returns the value of a secret, or an error that wraps ErrNotFound. It refuses a reference
// whose fingerprint is not the stored one, since the plan that contains it is out of date.
type Lookup func(Ref) ([]byte, error)

// Kind is the use of a secret.
type Kind string

// The kinds of secrets.
const (
	PSK          Kind = "pre-shared key"
	WireGuardKey Kind = "WireGuard key"
	Password     Kind = "BGP password"
	WebhookKey   Kind = "webhook key"
)

// placeholder matches texts that templates and examples have instead of a secret.
var placeholder = regexp.MustCompile(`(?i)^(<.*>|\$\{.*\}|\{\{.*\}\}|change[-_ ]?me|replace[-_ ]?me|placeholder|your[-_ ].*|x{3,}|\*+|\.{3,})$`)

// Check returns why a value cannot serve as a secret of the kind. The error does not contain the
// value.
func (k Kind) Check(value []byte) error {
	text := strings.TrimSpace(string(value))
	switch {
	case text == "":
		return fmt.Errorf("a %s must not be empty", k)
	case placeholder.MatchString(text):
		return fmt.Errorf("a %s must not be a placeholder: give the secret itself", k)
	case k == WireGuardKey:
		if key, err := base64.StdEncoding.DecodeString(text); err != nil || len(key) != 32 {
			return fmt.Errorf("a %s must be 32 bytes in base64, as `wg genkey` prints", k)
		}
	case k == WebhookKey && len(text) < 16:
		return fmt.Errorf("a %s must have 16 bytes or more, this one has %d: openssl rand -hex 32 prints one", k, len(text))
	case k == Password && len(value) > 80:
		return fmt.Errorf("a %s has at most 80 bytes (RFC 2385), this one %d", k, len(value))
	}
	return nil
}

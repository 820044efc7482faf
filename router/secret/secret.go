// Package secret names secrets without holding them. A reference travels through plans, diffs and logs; the value is
// looked up at the last moment by the driver that hands it to the kernel, to charon or to the BGP process.
package secret

import "errors"

// ErrNotFound means that no secret is stored under the name.
var ErrNotFound = errors.New("no such secret")

// Ref names a secret. Two references are equal when they name the same value, so a changed value shows as a changed
// reference.
type Ref struct {
	Name        string
	Fingerprint string // keyed digest of the value; tells nothing about it without the node's key
}

// String returns name and fingerprint; there is no value to print.
func (r Ref) String() string {
	if r.Name == "" {
		return ""
	}
	return r.Name + "#" + r.Fingerprint
}

// Lookup returns the value of a secret, or an error that wraps ErrNotFound. It refuses a reference whose fingerprint
// is no longer the stored one, since the plan that carries it is out of date.
type Lookup func(Ref) ([]byte, error)

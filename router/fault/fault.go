// Package fault has the errors that callers of a node distinguish, whichever room returns them.
// They become status codes in router/api.
package fault

import (
	"errors"
	"fmt"
	"io/fs"
)

var (
	// ErrNotFound means that an object of that name does not exist. It wraps fs.ErrNotExist.
	ErrNotFound = fmt.Errorf("not found%w", silent{fs.ErrNotExist})
	// ErrNoGeneration is the ErrNotFound for a generation.
	ErrNoGeneration = fmt.Errorf("%w", ErrNotFound)
	// ErrNoTunnel is the ErrNotFound for a tunnel.
	ErrNoTunnel = fmt.Errorf("%w", ErrNotFound)
	// ErrTooSoon means that the same request was carried out a moment ago.
	ErrTooSoon = errors.New("too soon")
	// ErrInvalid means that a request cannot be fulfilled, whatever the state of the node.
	ErrInvalid = errors.New("invalid request")
	// ErrPrecondition means that the present state of the node does not allow the request.
	ErrPrecondition = errors.New("not possible now")
	// ErrNoDocument is the ErrPrecondition for a node without a document, and ErrNotConfirmed that
	// for a generation that was not confirmed in time.
	ErrNoDocument   = fmt.Errorf("%w: no document can be edited: apply one first", ErrPrecondition)
	ErrNotConfirmed = fmt.Errorf("%w: not confirmed in time", ErrPrecondition)
)

// silent is an error that is wrapped without its text.
type silent struct{ error }

func (silent) Error() string   { return "" }
func (s silent) Unwrap() error { return s.error }

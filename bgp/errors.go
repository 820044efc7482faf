package bgp

import "errors"

// ErrNotFound means that no peer has that name.
var ErrNotFound = errors.New("no such peer")

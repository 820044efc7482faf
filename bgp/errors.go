package bgp

import "errors"

// ErrNotFound means that there is no peer of that name.
var ErrNotFound = errors.New("no such peer")

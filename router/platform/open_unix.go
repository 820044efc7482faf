//go:build unix

package platform

import "golang.org/x/sys/unix"

// openFlags make opening a seed's file fail for a link, and not wait for the writer of a pipe.
const openFlags = unix.O_NOFOLLOW | unix.O_NONBLOCK

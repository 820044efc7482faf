//go:build !unix

package platform

// openFlags are of Unix. isthmusd, which reads seeds, runs on Linux alone.
const openFlags = 0

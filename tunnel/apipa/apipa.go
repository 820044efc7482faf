// Package apipa allocates inside addresses from the IPv4 link-local range 169.254.0.0/16 (RFC 3927), which the clouds'
// gateways use inside tunnels.
package apipa

import (
	"errors"
	"net/netip"
)

// Range is where blocks are allocated from. It avoids what the clouds reserve: the low blocks of AWS and Oracle, the
// metadata and time services of all of them, and 169.254.21.0 to 169.254.22.255, the only addresses that Azure takes.
var Range = netip.MustParsePrefix("169.254.64.0/18")

// ErrExhausted means that every block of Range is in use.
var ErrExhausted = errors.New("no free /30 in " + Range.String())

// Blocks keeps account of which blocks of Range are in use.
type Blocks struct {
	users map[netip.Addr]int // by first address
	low   netip.Addr         // no block below is free
}

// NewBlocks returns an account in which every block is free.
func NewBlocks() *Blocks { return &Blocks{map[netip.Addr]int{}, Range.Addr()} }

// Use notes one more user of every block that p overlaps.
func (b *Blocks) Use(p netip.Prefix) {
	each(p, func(a netip.Addr) { b.users[a]++ })
}

// Release notes one user less, of a p that was given to Use.
func (b *Blocks) Release(p netip.Prefix) {
	each(p, func(a netip.Addr) {
		if b.users[a]--; b.users[a] == 0 {
			delete(b.users, a)
			if a.Less(b.low) {
				b.low = a
			}
		}
	})
}

// Free returns the lowest /30 of Range that nobody uses. It stays free until Use.
func (b *Blocks) Free() (netip.Prefix, error) {
	for ; Range.Contains(b.low); b.low = next(b.low) {
		if b.users[b.low] == 0 {
			return netip.PrefixFrom(b.low, 30), nil
		}
	}
	return netip.Prefix{}, ErrExhausted
}

// each calls f with the first address of each block of Range that p overlaps.
func each(p netip.Prefix, f func(netip.Addr)) {
	if !p.Overlaps(Range) {
		return
	}
	if p.Bits() < Range.Bits() {
		p = Range
	}
	p = p.Masked()
	last := netip.PrefixFrom(p.Addr(), min(p.Bits(), 30)).Masked()
	for a := last.Addr(); last.Contains(a); a = next(a) {
		f(a)
	}
}

func next(a netip.Addr) netip.Addr {
	return a.Next().Next().Next().Next()
}

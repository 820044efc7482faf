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

// Allocate returns the lowest /30 of Range that overlaps none of used.
func Allocate(used []netip.Prefix) (netip.Prefix, error) {
	taken := map[netip.Addr]bool{}
	for _, p := range used {
		if !p.Overlaps(Range) {
			continue
		}
		if p.Bits() <= Range.Bits() {
			return netip.Prefix{}, ErrExhausted
		}
		p = p.Masked()
		for a := block(p.Addr()); p.Contains(a) || a == block(p.Addr()); a = next(a) {
			taken[a] = true
		}
	}
	for a := Range.Addr(); Range.Contains(a); a = next(a) {
		if !taken[a] {
			return netip.PrefixFrom(a, 30), nil
		}
	}
	return netip.Prefix{}, ErrExhausted
}

func block(a netip.Addr) netip.Addr { return netip.PrefixFrom(a, 30).Masked().Addr() }

func next(a netip.Addr) netip.Addr {
	return a.Next().Next().Next().Next()
}

package reach

import (
	"net/netip"

	"github.com/isthmus-net/isthmus/nat"
)

// field is a field of a packet by which ways are distinguished.
type field int8

const (
	source field = iota
	destination
	l4proto
	port
	fieldCount

	known  field = -1 // a constant, not a field
	opaque field = -2 // any value
	unset  field = -3 // not loaded by this rule
)

// box is a set of packets: an interval for each field, as big-endian bytes.
type box struct{ first, last [fieldCount]string }

func (b *box) empty() bool {
	for f := range fieldCount {
		if b.first[f] > b.last[f] {
			return true
		}
	}
	return false
}

// meet returns the part of b in which a field is in an interval.
func (b box) meet(f field, first, last string) (box, bool) {
	b.first[f], b.last[f] = max(b.first[f], first), min(b.last[f], last)
	return b, b.first[f] <= b.last[f]
}

// without returns boxes that cover b except c, which must be within b.
func (b box) without(c box) (rest []box) {
	for f := range fieldCount {
		if b.first[f] < c.first[f] {
			low := b
			low.last[f] = step(c.first[f], -1)
			rest = append(rest, low)
		}
		if c.last[f] < b.last[f] {
			high := b
			high.first[f] = step(c.last[f], 1)
			rest = append(rest, high)
		}
		b.first[f], b.last[f] = c.first[f], c.last[f]
	}
	return rest
}

// step adds 1 or -1 to a big-endian number, which must not overflow.
func step(s string, by int) string {
	b := []byte(s)
	for i := len(b) - 1; i >= 0; i-- {
		b[i] += byte(by)
		if by > 0 && b[i] != 0 || by < 0 && b[i] != 0xff {
			break
		}
	}
	return string(b)
}

// bounds returns the first and the last address of a prefix.
func bounds(p netip.Prefix) (first, last string) {
	a := p.Masked().Addr().AsSlice()
	first = string(a)
	for bit := p.Bits(); bit < len(a)*8; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	return first, string(a)
}

func addresses(first, last string) nat.Range {
	a, _ := netip.AddrFromSlice([]byte(first))
	b, _ := netip.AddrFromSlice([]byte(last))
	return nat.Range{First: a, Last: b}
}

func (b box) common(c box) (box, bool) {
	for f := range fieldCount {
		b.first[f], b.last[f] = max(b.first[f], c.first[f]), min(b.last[f], c.last[f])
	}
	return b, !b.empty()
}

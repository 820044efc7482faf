package filter

import (
	"encoding/binary"
	"fmt"
)

// asTrans replaces a number that does not fit into two octets (RFC 6793).
const asTrans = 23456

// segment is a part of an AS_PATH: numbers of 2 or 4 octets.
type segment struct {
	kind  byte // asSet or asSequence
	width int
	b     []byte
}

const (
	asSet      = 1
	asSequence = 2
)

func (s segment) len() int { return len(s.b) / s.width }

// parsePath parses an AS_PATH or AS4_PATH, and returns why it is malformed. Confederation segments
// are malformed (RFC 5065 section 5), because this AS is in no confederation, and so is number 0
// (RFC 7607).
func parsePath(segs []segment, b []byte, width int) ([]segment, string) {
	total := 0
	for len(b) > 0 {
		if len(b) < 2 {
			return segs, "a segment is truncated"
		}
		kind, n := b[0], int(b[1])
		b = b[2:]
		switch {
		case kind != asSet && kind != asSequence:
			return segs, fmt.Sprintf("segment of type %d", kind)
		case n == 0:
			return segs, "a segment is empty"
		case n*width > len(b):
			return segs, "a segment is truncated"
		}
		for i := range n {
			if number(b[i*width:], width) == 0 {
				return segs, "AS number 0"
			}
		}
		if total += n; total > MaxASPath {
			return segs, fmt.Sprintf("it has more than %d numbers", MaxASPath)
		}
		segs = append(segs, segment{kind, width, b[:n*width]})
		b = b[n*width:]
	}
	return segs, ""
}

// count returns the length of a path, in which a set counts as one (RFC 4271 section 9.1.2.2).
func count(segs []segment) (n int) {
	for _, s := range segs {
		if s.kind == asSet {
			n++
		} else {
			n += s.len()
		}
	}
	return n
}

// appendPath appends an AS_PATH with numbers of four octets: the segments of two octets, in which
// the last numbers are replaced by the path of four (RFC 6793 section 4.2.3).
func appendPath(b []byte, segs, segs4 []segment) ([]byte, string) {
	keep, total := count(segs)-count(segs4), 0
	var v []byte
	put := func(s segment) {
		total += s.len()
		v = append(v, s.kind, byte(s.len()))
		for i := range s.len() {
			v = binary.BigEndian.AppendUint32(v, number(s.b[i*s.width:], s.width))
		}
	}
	for _, s := range segs {
		if keep <= 0 {
			break
		}
		if s.kind == asSet {
			keep--
		} else {
			s.b = s.b[:min(keep, s.len())*s.width]
			keep -= s.len()
		}
		put(s)
	}
	for _, s := range segs4 {
		put(s)
	}
	if total > MaxASPath {
		return b, fmt.Sprintf("it has more than %d numbers", MaxASPath)
	}
	return appendAttr(b, flagTransitive, attrASPath, v), ""
}

package gobgp

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// table is one of GoBGP's tables (RFC 4271 section 3.2).
type table uint8

const (
	adjIn table = iota + 1
	adjOut
	local
)

// askMessage asks for paths, in the order of prefixes. Either it asks for a table of one peer, or
// for certain prefixes: in the local table, or in the adjIn of all peers.
type askMessage struct {
	ID       uint64
	Table    table
	Peer     uint32
	Fresh    bool           // not from a table that was read for a former question
	After    netip.Prefix   // only prefixes behind this one; invalid: from the start
	Prefixes []netip.Prefix // at most maxAsked
}

// Bounds of questions and answers.
const (
	maxAsked       = 500
	answerSize     = 256 << 10 // bytes at which an answer ends
	maxCommunities = 1024
)

// pathAttributes is an entry of an answer: bgp.Attributes with a number instead of the name.
type pathAttributes struct {
	peer uint32 // 0: our own
	bgp.Attributes
}

// answer is the reply to askMessage. Its entries are in the order of prefixes; those of one prefix
// are not divided between answers.
type answer struct {
	id      uint64
	more    bool
	problem string
	size    int // bytes
	entries []bgp.Entry
}

// Flags of an answer, and of an entry.
const (
	answerMore, answerProblem = 1, 2

	hasMED, hasPreference, isStale = 1, 2, 4
)

// answerHead is what an answer begins with: the number of the question and the flags.
func answerHead(id uint64, flags byte) []byte { return append(binary.AppendUvarint(nil, id), flags) }

func appendAddr(b []byte, a netip.Addr) []byte {
	x := a.AsSlice()
	return append(append(b, byte(len(x))), x...)
}

// appendEntry appends the prefix (bits, address) and the attributes.
func appendEntry(b []byte, p netip.Prefix, a *pathAttributes) []byte {
	b = appendAddr(append(b, byte(p.Bits())), p.Addr())
	b = binary.AppendUvarint(b, uint64(a.peer))
	b = appendAddr(b, a.NextHop)
	flags := byte(0)
	for bit, set := range map[byte]bool{hasMED: a.MED != nil, hasPreference: a.LocalPreference != nil, isStale: a.Stale} {
		if set {
			flags |= bit
		}
	}
	b = append(b, flags, a.Origin)
	numbers := func(list ...uint32) {
		for _, n := range list {
			b = binary.AppendUvarint(b, uint64(n))
		}
	}
	if a.MED != nil {
		numbers(*a.MED)
	}
	if a.LocalPreference != nil {
		numbers(*a.LocalPreference)
	}
	numbers(a.ASLength, a.FirstAS, uint32(len(a.ASPath)))
	numbers(a.ASPath...)
	numbers(uint32(len(a.Communities)))
	numbers(a.Communities...)
	numbers(uint32(len(a.Large)))
	for _, l := range a.Large {
		numbers(l[:]...)
	}
	b = appendAddr(b, a.RouterID)
	return binary.BigEndian.AppendUint64(b, uint64(a.At.UnixNano()))
}

// decodeAnswer checks an answer of the child. name returns the name of a peer.
func decodeAnswer(b []byte, name func(uint32) (string, bool)) (answer, error) {
	r := reader{b: b}
	a := answer{id: r.uint64(), size: len(b)}
	flags := r.byte()
	if r.bad || flags > answerProblem {
		return a, fmt.Errorf("%w: head of an answer", errMalformed)
	}
	a.more = flags == answerMore
	if flags == answerProblem {
		a.problem = clip(string(r.b))
		return a, nil
	}
	var last netip.Prefix
	for len(r.b) > 0 {
		e, err := r.entry(name)
		if err != nil {
			return a, err
		}
		if last.IsValid() && last.Compare(e.Prefix) > 0 {
			return a, fmt.Errorf("%w: %v after %v", errMalformed, e.Prefix, last)
		}
		last = e.Prefix
		a.entries = append(a.entries, e)
	}
	if a.more && len(a.entries) == 0 {
		return a, fmt.Errorf("%w: an answer without entries that has more", errMalformed)
	}
	return a, nil
}

// entry reads one entry.
func (r *reader) entry(name func(uint32) (string, bool)) (e bgp.Entry, err error) {
	bits, address := r.byte(), r.addr()
	e.Prefix = netip.PrefixFrom(address, int(bits))
	if r.bad || !e.Prefix.IsValid() || e.Prefix != e.Prefix.Masked() || address.Is4In6() {
		return e, fmt.Errorf("%w: prefix %v/%d of an entry", errMalformed, address, bits)
	}
	id := uint32(r.uvarint(1<<32 - 1))
	e.NextHop = r.addr()
	flags := r.byte()
	e.Origin = r.byte()
	e.Stale = flags&isStale != 0
	number := func() uint32 { return uint32(r.uvarint(1<<32 - 1)) }
	list := func(most, width int) []uint32 {
		n := r.uvarint(uint64(most)) * width
		if r.bad || n > len(r.b) {
			r.bad = true
			return nil
		}
		out := make([]uint32, n)
		for i := range out {
			out[i] = number()
		}
		return out
	}
	if flags&hasMED != 0 {
		e.MED = new(number())
	}
	if flags&hasPreference != 0 {
		e.LocalPreference = new(number())
	}
	e.ASLength, e.FirstAS = number(), number()
	e.ASPath, e.Communities = list(maxASPath, 1), list(maxCommunities, 1)
	large := list(maxCommunities, 3)
	for ; len(large) > 0; large = large[3:] {
		e.Large = append(e.Large, [3]uint32(large[:3]))
	}
	e.RouterID = r.addr()
	at := r.uint64be()
	if e.At = time.Unix(0, int64(at)); id != 0 {
		var ok bool
		if e.Peer, ok = name(id); !ok {
			r.bad = true
		}
	}
	if r.bad || flags&^(hasMED|hasPreference|isStale) != 0 || e.Origin > 2 {
		return e, fmt.Errorf("%w: attributes of %v", errMalformed, e.Prefix)
	}
	return e, nil
}

func (r *reader) uint64() uint64 {
	x, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return x
}

func (r *reader) uint64be() uint64 {
	if x := r.bytes(8); x != nil {
		return binary.BigEndian.Uint64(x)
	}
	return 0
}

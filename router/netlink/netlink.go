// Package netlink reads and writes netlink messages and their attributes (RFC 3549,
// linux/netlink.h). It has no sockets, and copies nothing of what it reads.
package netlink

import (
	"bytes"
	"encoding/binary"
	"iter"
	"slices"

	"golang.org/x/sys/unix"
)

// Messages and attributes begin at multiples of four bytes. Their headers are in the byte order of
// the host.
var native = binary.NativeEndian

// flags are the bits of an attribute's type that do not belong to its number.
const flags uint16 = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER

// Message is a netlink message.
type Message struct {
	Kind, Flags      uint16
	Sequence, PortID uint32
	Body             []byte // what follows the header
}

// Next takes the first message off a datagram. Without one, or when it is not whole, ok is false,
// and no rest is returned.
func Next(b []byte) (m Message, rest []byte, ok bool) {
	if len(b) < unix.SizeofNlMsghdr {
		return m, nil, false
	}
	n := native.Uint32(b)
	if n < unix.SizeofNlMsghdr || uint64(n) > uint64(len(b)) {
		return m, nil, false
	}
	m = Message{native.Uint16(b[4:]), native.Uint16(b[6:]), native.Uint32(b[8:]), native.Uint32(b[12:]), b[unix.SizeofNlMsghdr:n]}
	return m, b[min((int(n)+3)&^3, len(b)):], true
}

// Errno returns the error that an acknowledgement (NLMSG_ERROR) or the end of a dump (NLMSG_DONE)
// has; 0 is success, or an answer without any.
func (m *Message) Errno() unix.Errno {
	if code := int32(Uint32(m.Body)); code < 0 {
		return unix.Errno(-int64(code))
	}
	return 0
}

// Answer is the progress of reading the answer to a request, which may take several datagrams.
type Answer struct {
	Sequence uint32 // of the request
	// Interrupted means that a change interrupted a dump (NLM_F_DUMP_INTR): objects that were there
	// all the time may be missing, and the request must be repeated.
	Interrupted bool
	// Ended is set by the acknowledgement or the end of a dump. End is that message, in the
	// datagram.
	Ended bool
	End   Message
}

// Read calls each with the messages of a datagram that belong to the answer, without its end. It
// skips those with another sequence number, which are the rest of an abandoned answer. ok is false
// when a message is not whole.
func (a *Answer) Read(b []byte, each func(Message)) (ok bool) {
	for len(b) > 0 && !a.Ended {
		m, rest, ok := Next(b)
		if !ok {
			return false
		}
		b = rest
		if m.Sequence != a.Sequence {
			continue
		}
		a.Interrupted = a.Interrupted || m.Flags&unix.NLM_F_DUMP_INTR != 0
		if m.Kind == unix.NLMSG_DONE || m.Kind == unix.NLMSG_ERROR {
			a.Ended, a.End = true, m
		} else {
			each(m)
		}
	}
	return true
}

// Attribute takes the first attribute off b, with its type free of flags. Without one, or when it
// is not whole, ok is false, and no rest is returned.
func Attribute(b []byte) (kind uint16, value, rest []byte, ok bool) {
	if len(b) < unix.SizeofNlAttr {
		return 0, nil, nil, false
	}
	n := int(native.Uint16(b))
	if n < unix.SizeofNlAttr || n > len(b) {
		return 0, nil, nil, false
	}
	return native.Uint16(b[2:]) &^ flags, b[unix.SizeofNlAttr:n], b[min((n+3)&^3, len(b)):], true
}

// Attributes yields the attributes of b, with their types free of flags. It stops at the first that
// is not whole.
func Attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for {
			kind, value, rest, ok := Attribute(b)
			if !ok || !yield(kind, value) {
				return
			}
			b = rest
		}
	}
}

// Uint32 reads a number in the byte order of the host; 0 when the value is too short.
func Uint32(value []byte) uint32 {
	if len(value) < 4 {
		return 0
	}
	return native.Uint32(value)
}

// Text reads a string, which ends in a zero byte.
func Text(value []byte) string { return string(bytes.TrimRight(value, "\x00")) }

// Begin appends the header of a request, and returns where it starts. End fills its length in.
func Begin(b []byte, kind, flags uint16, sequence uint32) (request []byte, start int) {
	start = len(b)
	b = native.AppendUint32(b, 0)
	b = native.AppendUint16(b, kind)
	b = native.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	b = native.AppendUint32(b, sequence)
	return native.AppendUint32(b, 0), start
}

// End ends the message at start, the last one of b.
func End(b []byte, start int) []byte {
	native.PutUint32(b[start:], uint32(len(b)-start))
	return b
}

// Request returns a request whose body has several parts.
func Request(kind, flags uint16, sequence uint32, parts ...[]byte) []byte {
	b, start := Begin(nil, kind, flags, sequence)
	return End(append(b, slices.Concat(parts...)...), start)
}

// AppendHeader appends the header of an attribute whose value has n bytes, a multiple of four, and
// is appended next.
func AppendHeader(b []byte, kind uint16, n int) []byte {
	b = native.AppendUint16(b, uint16(unix.SizeofNlAttr+n))
	return native.AppendUint16(b, kind)
}

// AppendUint32 appends an attribute that is a number in the byte order of the host.
func AppendUint32(b []byte, kind uint16, v uint32) []byte {
	return native.AppendUint32(AppendHeader(b, kind, 4), v)
}

// New returns an attribute, with what follows it up to a multiple of four bytes.
func New(kind uint16, value ...byte) []byte {
	b := append(AppendHeader(nil, kind, len(value)), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

// NewText returns an attribute that is a string with a zero byte behind it.
func NewText(kind uint16, s string) []byte { return New(kind, append([]byte(s), 0)...) }

// Nest returns an attribute that holds attributes.
func Nest(kind uint16, attributes ...[]byte) []byte {
	return New(kind|unix.NLA_F_NESTED, slices.Concat(attributes...)...)
}

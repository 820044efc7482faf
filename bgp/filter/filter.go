// Package filter is a strict BGP parser (RFC 4271) between a peer's TCP connection and a BGP
// speaker that must not be exposed to messages from strangers.
//
// Nothing from the peer is passed on as received: the package parses a message, checks every
// field, and writes what the speaker gets from the parsed values. Fields that it does not parse
// cannot pass. Errors are handled according to RFC 7606. The package does no I/O and imports
// nothing from the project.
package filter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
)

// Sizes of messages (RFC 4271 section 4.1). Extended messages (RFC 8654) are not negotiated.
const (
	HeaderLength = 19
	MaxLength    = 4096
)

// Limits of one UPDATE. A message above them is treated as a withdrawal of its prefixes.
const (
	// MaxASPath is the maximum number of AS numbers in an AS_PATH.
	MaxASPath = 512
	// MaxCommunities is the maximum number of values in each of the three community attributes.
	MaxCommunities = 512
)

// maxData is the maximum number of data bytes passed on from a peer's NOTIFICATION.
const maxData = 128

// Types of messages (RFC 4271 section 4.1, RFC 2918).
const (
	Open byte = iota + 1
	Update
	NotificationType
	Keepalive
	RouteRefresh
)

// Notification is an error that ends a session with a NOTIFICATION message.
type Notification struct {
	Code, Subcode byte
	Data          []byte
	Reason        string
}

// Error returns the reason with the code and subcode of the message.
func (n *Notification) Error() string {
	return fmt.Sprintf("%s (NOTIFICATION %d/%d)", n.Reason, n.Code, n.Subcode)
}

// Message returns the NOTIFICATION message. Data that does not fit is truncated.
func (n *Notification) Message() []byte {
	data := n.Data[:min(len(n.Data), MaxLength-HeaderLength-2)]
	return end(append(append(header(nil, NotificationType), n.Code, n.Subcode), data...), 0)
}

// Counters count the messages from one peer. They may be read at any time; a Filter adds to them.
type Counters struct {
	// Messages counts all messages, including the one that ended the session.
	Messages atomic.Uint64
	// Withdrawn counts the UPDATE messages that were treated as withdrawals (RFC 7606).
	Withdrawn atomic.Uint64
	// Resets counts the sessions that a malformed message has ended.
	Resets atomic.Uint64
	// Discarded counts the path attributes that were removed, by type.
	Discarded [256]atomic.Uint64
}

// Options describe the session of a Filter.
type Options struct {
	// IPv6 means that the session carries IPv6 unicast, otherwise IPv4 unicast. Both means that it
	// also carries the other one, if the peer offers it (RFC 4760).
	IPv6, Both bool
	// Internal means that the peer is in our own autonomous system.
	Internal bool
	// Counters must not be nil.
	Counters *Counters
}

// state is the progress of the handshake, judged by the peer's messages.
type state uint8

const (
	wantOpen state = iota
	wantKeepalive
	established
	ended // by a NOTIFICATION from the peer or to it
)

// Filter processes the messages of one connection, in order. It is not safe for concurrent use.
type Filter struct {
	o     Options
	state state
	as4   bool // both sides support AS numbers of four octets; ours always does
	id    netip.Addr
	as    uint32
	out   message // Message appends to it; kept for its capacity
	u     update
}

// New returns a Filter for a connection from which nothing has been read yet.
func New(o Options) *Filter { return &Filter{o: o} }

// Identifier returns the BGP identifier in the peer's OPEN. It is invalid before the OPEN.
func (f *Filter) Identifier() netip.Addr { return f.id }

// AS returns the number of the autonomous system in the peer's OPEN, 0 before it.
func (f *Filter) AS() uint32 { return f.as }

// Established reports whether the peer has sent its OPEN and a KEEPALIVE, and no NOTIFICATION.
func (f *Filter) Established() bool { return f.state == established }

// Length checks the first HeaderLength bytes of a message, and returns the length of the whole
// message. The error is a *Notification.
func (f *Filter) Length(h []byte) (int, error) {
	for _, b := range h[:16] {
		if b != 0xff {
			return 0, f.reset(&Notification{1, 1, nil, "the marker of a message is not all ones"})
		}
	}
	n := int(binary.BigEndian.Uint16(h[16:]))
	least, most := HeaderLength, MaxLength
	switch h[18] {
	case Open:
		least = HeaderLength + 10
	case Update:
		least = HeaderLength + 4
	case NotificationType:
		least = HeaderLength + 2
	case Keepalive:
		most = HeaderLength
	case RouteRefresh:
		least, most = HeaderLength+4, HeaderLength+4
	default:
		return 0, f.reset(&Notification{1, 3, []byte{h[18]}, fmt.Sprintf("type %d of a message is unknown", h[18])})
	}
	if n < least || n > most {
		return 0, f.reset(&Notification{1, 2, h[16:18:18], fmt.Sprintf("length %d of a message of type %d is not from %d to %d", n, h[18], least, most)})
	}
	return n, nil
}

// Message processes one whole message, whose header Length has accepted, and appends to dst what
// the speaker gets: no message, one or several. An error is a *Notification, after which the
// session has ended; dst is then unchanged.
func (f *Filter) Message(dst, m []byte) ([]byte, error) {
	f.o.Counters.Messages.Add(1)
	kind, body := m[18], m[HeaderLength:]
	if err := f.order(kind); err != nil {
		return dst, f.reset(err)
	}
	var err *Notification
	f.out = f.out[:0]
	switch kind {
	case Open:
		err = f.open(body)
	case Update:
		err = f.update(body)
	case NotificationType:
		f.notification(body)
	case Keepalive:
		if f.state == wantKeepalive {
			f.state = established
		}
		f.out.keepalive()
	case RouteRefresh:
		f.refresh(body)
	}
	if err != nil {
		return dst, f.reset(err)
	}
	return append(dst, f.out...), nil
}

// reset records the end of the session.
func (f *Filter) reset(n *Notification) error {
	f.state = ended
	f.o.Counters.Resets.Add(1)
	return n
}

// order refuses messages that must not come in this state (RFC 4271 section 8.2.2, RFC 6608).
func (f *Filter) order(kind byte) *Notification {
	ok := kind == NotificationType
	switch f.state {
	case wantOpen:
		ok = ok || kind == Open
	case wantKeepalive:
		ok = ok || kind == Keepalive
	case established:
		ok = ok || kind != Open
	case ended:
		return &Notification{6, 0, nil, "a message came after the end of the session"}
	}
	if ok {
		return nil
	}
	return &Notification{5, byte(f.state) + 1, []byte{kind}, fmt.Sprintf("a message of type %d came too early or twice", kind)}
}

// notification passes on code and subcode, and a limited part of the data: that of a shutdown is a
// text for operators (RFC 9003). A peer cannot pretend that this node ended its session.
func (f *Filter) notification(body []byte) {
	f.state = ended
	code, sub, data := body[0], body[1], body[2:]
	if code == 6 && sub == EndedHere {
		sub = 0
	}
	if code == 6 && (sub == 2 || sub == 4) {
		if len(data) == 0 || int(data[0]) != len(data)-1 || len(data) > 1+maxData {
			data = nil
		}
	} else {
		data = data[:min(len(data), maxData)]
	}
	at := f.out.begin(NotificationType)
	f.out = end(append(append(f.out, code, sub), data...), at)
}

// refresh passes on a request for a family of the session (RFC 2918). Other families and the
// subtypes of RFC 7313 are not negotiated, and are ignored; instead the speaker gets a KEEPALIVE
// for its hold timer.
func (f *Filter) refresh(body []byte) {
	if afi, safi := binary.BigEndian.Uint16(body), body[3]; !f.carries(afi, safi) || body[2] != 0 {
		f.out.keepalive()
		return
	}
	at := f.out.begin(RouteRefresh)
	f.out = end(append(f.out, body...), at)
}

const (
	afiIPv4 uint16 = 1
	afiIPv6 uint16 = 2
	unicast byte   = 1
)

// afi returns the address family that the peer must offer.
func (f *Filter) afi() uint16 {
	if f.o.IPv6 {
		return afiIPv6
	}
	return afiIPv4
}

// carries reports whether a family is one of the session.
func (f *Filter) carries(afi uint16, safi byte) bool {
	return safi == unicast && (afi == f.afi() || f.o.Both && (afi == afiIPv4 || afi == afiIPv6))
}

// EndedHere is the subcode of the NOTIFICATION that Cease returns. IANA has not assigned it, and
// Message removes it from the NOTIFICATION of a peer.
const EndedHere = 255

// Cease returns the NOTIFICATION that informs the speaker that its session was ended here, with
// the reason as data. It never leaves the node.
func Cease(reason string) []byte {
	return (&Notification{Code: 6, Subcode: EndedHere, Data: []byte(reason)}).Message()
}

// Collision is the NOTIFICATION for a connection that is closed in favour of another one (RFC 4271
// section 6.8, RFC 4486).
var Collision = &Notification{Code: 6, Subcode: 7, Reason: "another connection of the same peer is kept"}

// maxCommunication is the length in bytes of the longest Shutdown Communication (RFC 9003).
const maxCommunication = 255

// Shutdown returns the NOTIFICATION of an administrative shutdown (RFC 4486), with a text for the
// operator of the peer (RFC 9003 section 2). Longer text is truncated between characters.
func Shutdown(text string) *Notification {
	text = strings.ToValidUTF8(text, "?")
	if len(text) > maxCommunication {
		text = strings.ToValidUTF8(text[:maxCommunication], "")
	}
	n := &Notification{Code: 6, Subcode: 2, Reason: "shut down by the document"}
	if text != "" {
		n.Data = append([]byte{byte(len(text))}, text...)
	}
	return n
}

// AsNotification returns the Notification in err, or one for an internal error.
func AsNotification(err error) *Notification {
	if n, ok := errors.AsType[*Notification](err); ok {
		return n
	}
	return &Notification{Code: 6, Reason: err.Error()}
}

// message is a buffer to which one or several messages are written.
type message []byte

var marker = [16]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func header(b message, kind byte) message {
	b = append(b, marker[:]...)
	return append(b, 0, 0, kind)
}

// begin writes a header without its length, and returns its offset.
func (b *message) begin(kind byte) int {
	at := len(*b)
	*b = header(*b, kind)
	return at
}

// end sets the length of the message that begins at at.
func end(b []byte, at int) message {
	binary.BigEndian.PutUint16(b[at+16:], uint16(len(b)-at))
	return b
}

func (b *message) keepalive() { *b = end(header(*b, Keepalive), len(*b)) }

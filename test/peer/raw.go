package peer

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// BGP message types (RFC 4271 section 4.1).
const (
	BGPOpen         = 1
	BGPUpdate       = 2
	BGPNotification = 3
	BGPKeepalive    = 4
)

// RawBGP is a BGP session that follows the protocol until a test makes it violate it: it opens,
// keeps alive, and then sends any bytes of the test. IPv4 unicast and four-octet ASNs.
type RawBGP struct {
	conn net.Conn
	mu   sync.Mutex // of writing
	done chan struct{}
	err  error
}

// DialRawBGP opens a session from the node and returns when it is established. Hold
// time is 90 s.
func DialRawBGP(ctx context.Context, n *lab.Node, remote netip.AddrPort, asn uint32, id netip.Addr) (*RawBGP, error) {
	fail := func(err error) (*RawBGP, error) {
		return nil, fmt.Errorf("opening a BGP session to %s: %w", remote, err)
	}
	conn, err := n.DialContext(ctx, "tcp", remote.String())
	if err != nil {
		return fail(err)
	}
	r := &RawBGP{conn: conn, done: make(chan struct{})}
	if err := r.open(asn, id); err != nil {
		conn.Close()
		return fail(err)
	}
	go r.serve()
	return r, nil
}

func (r *RawBGP) open(asn uint32, id netip.Addr) error {
	if err := r.conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	as2 := uint16(23456) // AS_TRANS, RFC 6793
	if asn < 1<<16 {
		as2 = uint16(asn)
	}
	b := binary.BigEndian.AppendUint16([]byte{4}, as2)
	b = binary.BigEndian.AppendUint16(b, 90)
	b = append(b, id.AsSlice()...)
	caps := append([]byte{1, 4, 0, 1, 0, 1, 65, 4}, binary.BigEndian.AppendUint32(nil, asn)...)
	b = append(b, byte(len(caps)+2), 2, byte(len(caps)))
	if err := r.Send(BGPOpen, append(b, caps...)); err != nil {
		return err
	}
	for _, want := range []byte{BGPOpen, BGPKeepalive} {
		typ, body, err := r.read()
		if err != nil {
			return err
		}
		if typ != want {
			return fmt.Errorf("got message type %d % x, want type %d", typ, body, want)
		}
		if typ == BGPOpen {
			if err := r.Send(BGPKeepalive, nil); err != nil {
				return err
			}
		}
	}
	return r.conn.SetDeadline(time.Time{})
}

// serve answers with keepalives and records how the session ended.
func (r *RawBGP) serve() {
	defer close(r.done)
	alive := time.NewTicker(10 * time.Second)
	defer alive.Stop()
	go func() {
		for {
			select {
			case <-r.done:
				return
			case <-alive.C:
				_ = r.Send(BGPKeepalive, nil)
			}
		}
	}()
	for {
		typ, body, err := r.read()
		if err == nil && typ == BGPNotification && len(body) >= 2 {
			err = fmt.Errorf("notification code %d subcode %d", body[0], body[1])
		}
		if err != nil {
			r.err = err
			return
		}
	}
}

func (r *RawBGP) read() (typ byte, body []byte, err error) {
	var h [19]byte
	if _, err := io.ReadFull(r.conn, h[:]); err != nil {
		return 0, nil, err
	}
	size := int(binary.BigEndian.Uint16(h[16:]))
	if size < len(h) {
		return 0, nil, fmt.Errorf("message of %d bytes", size)
	}
	body = make([]byte, size-len(h))
	_, err = io.ReadFull(r.conn, body)
	return h[18], body, err
}

// BGPMessage returns a message with a valid header before the body.
func BGPMessage(typ byte, body []byte) []byte {
	b := bytes.Repeat([]byte{0xff}, 16)
	b = binary.BigEndian.AppendUint16(b, uint16(19+len(body)))
	return append(append(b, typ), body...)
}

// Send sends a message with a valid header before the body.
func (r *RawBGP) Send(typ byte, body []byte) error { return r.Write(BGPMessage(typ, body)) }

// Write sends bytes as they are.
func (r *RawBGP) Write(b []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := r.conn.Write(b)
	return err
}

// Announce sends one UPDATE for the prefixes, which must fit in 4096 bytes, with origin IGP, path
// as AS_PATH, at most 63 numbers, next hop, and attrs, further path attributes as they are on the
// wire.
func (r *RawBGP) Announce(path []uint32, nextHop netip.Addr, attrs []byte, prefixes ...netip.Prefix) error {
	a := []byte{0x40, 1, 1, 0, 0x40, 2, byte(2 + 4*len(path)), 2, byte(len(path))}
	for _, asn := range path {
		a = binary.BigEndian.AppendUint32(a, asn)
	}
	a = append(a, 0x40, 3, 4)
	a = append(a, nextHop.AsSlice()...)
	a = append(a, attrs...)
	b := binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(len(a)))
	b = append(b, a...)
	for _, p := range prefixes {
		b = append(b, byte(p.Bits()))
		b = append(b, p.Masked().Addr().AsSlice()[:(p.Bits()+7)/8]...)
	}
	return r.Send(BGPUpdate, b)
}

// Done is closed when the other side has ended the session; Err then says how.
func (r *RawBGP) Done() <-chan struct{} { return r.done }

// Err may be called after Done is closed.
func (r *RawBGP) Err() error { return r.err }

// Close drops the connection without a NOTIFICATION.
func (r *RawBGP) Close() {
	r.conn.Close()
	<-r.done
}

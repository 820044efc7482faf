package gobgp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// speaker is a small BGP speaker that shares no code with the driver and can misbehave. It uses a
// loopback address, opens sessions, and reopens them forever.
type speaker struct {
	t       testing.TB
	address netip.Addr
	asn     uint32

	// up is called after the handshake of each session.
	up func(*speakerSession)

	late time.Duration // sessions after the first wait this long before their OPEN

	// around opens all connections after the first, bypassing the relay; nil: they are opened as
	// usual.
	around func(context.Context) (net.Conn, error)

	mu       sync.Mutex
	sessions []*speakerSession
	routes   map[netip.Prefix][]byte // received in the last session, with the raw AS_PATH
	most     int                     // the highest number of routes
	// taken counts routes that were withdrawn, or not received again before the End-of-RIB.
	taken   int
	fresh   map[netip.Prefix]bool // received in the last session
	eors    int
	restart bool // the last OPEN had the Restart State bit
	notes   [][2]byte
}

type speakerSession struct {
	conn net.Conn
	mu   sync.Mutex
}

const (
	msgOpen = iota + 1
	msgUpdate
	msgNotification
	msgKeepalive
)

func message(kind byte, body ...byte) []byte {
	b := make([]byte, 19, 19+len(body))
	for i := range 16 {
		b[i] = 0xff
	}
	binary.BigEndian.PutUint16(b[16:], uint16(19+len(body)))
	b[18] = kind
	return append(b, body...)
}

func (k *speakerSession) send(msgs ...[]byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, m := range msgs {
		if _, err := k.conn.Write(m); err != nil {
			return err
		}
	}
	return nil
}

// attr is one path attribute of less than 256 bytes.
func attr(flags, kind byte, value ...byte) []byte {
	return append([]byte{flags, kind, byte(len(value))}, value...)
}

func asSequence(asns ...uint32) []byte {
	b := []byte{2, byte(len(asns))}
	for _, a := range asns {
		b = binary.BigEndian.AppendUint32(b, a)
	}
	return b
}

func nlri(p netip.Prefix) []byte {
	a := p.Addr().As4()
	return append([]byte{byte(p.Bits())}, a[:(p.Bits()+7)/8]...)
}

// announcement returns an UPDATE with ORIGIN, AS_PATH, NEXT_HOP, then more attributes.
func announcement(hop netip.Addr, path []uint32, more []byte, prefixes ...netip.Prefix) []byte {
	h := hop.As4()
	attrs := append(attr(0x40, 1, 0), attr(0x40, 2, asSequence(path...)...)...)
	attrs = append(attrs, attr(0x40, 3, h[:]...)...)
	attrs = append(attrs, more...)
	body := binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(len(attrs)))
	body = append(body, attrs...)
	for _, p := range prefixes {
		body = append(body, nlri(p)...)
	}
	return message(msgUpdate, body...)
}

func withdrawal(prefixes ...netip.Prefix) []byte {
	var w []byte
	for _, p := range prefixes {
		w = append(w, nlri(p)...)
	}
	body := binary.BigEndian.AppendUint16(nil, uint16(len(w)))
	return message(msgUpdate, append(append(body, w...), 0, 0)...)
}

var endOfRIB = message(msgUpdate, 0, 0, 0, 0)

// killer is the attribute that makes GoBGP v3.37.0 panic: Prefix-SID with an unknown sub-TLV in
// its SRv6 service TLV.
var killer = []byte{0xc0, 0x28, 0x09, 0x05, 0x00, 0x06, 0x00, 0x09, 0x00, 0x02, 0x00, 0x00}

// newSpeaker starts a speaker. up runs after each handshake; nil sends an End-of-RIB.
func newSpeaker(t testing.TB, address string, asn uint32, up func(*speakerSession)) *speaker {
	t.Helper()
	if up == nil {
		up = func(k *speakerSession) { k.send(endOfRIB) }
	}
	s := &speaker{t: t, address: netip.MustParseAddr(address), asn: asn, up: up, routes: map[netip.Prefix][]byte{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}, Timeout: time.Second}
		for ctx.Err() == nil {
			dial := func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "tcp4", "169.254.0.1:179") }
			s.mu.Lock()
			if s.around != nil && len(s.sessions) > 0 {
				dial = s.around
			}
			s.mu.Unlock()
			if conn, err := dial(ctx); err == nil {
				stop := context.AfterFunc(ctx, func() { conn.Close() })
				s.serve(conn)
				stop()
			}
			time.Sleep(100 * time.Millisecond)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return s
}

func (s *speaker) serve(conn net.Conn) {
	defer conn.Close()
	k := &speakerSession{conn: conn}
	if s.count() > 0 {
		time.Sleep(s.late)
	}
	id := s.address.As4()
	caps := []byte{
		1, 4, 0, 1, 0, 1, // multiprotocol, IPv4 unicast
		2, 0, // route refresh
		64, 6, 0, 120, 0, 1, 1, 0x80, // graceful restart, 120 s, IPv4 unicast, forwarding kept
		65, 4, byte(s.asn >> 24), byte(s.asn >> 16), byte(s.asn >> 8), byte(s.asn),
	}
	body := []byte{4, byte(s.asn >> 8), byte(s.asn), 0, 90}
	body = append(body, id[:]...)
	body = append(body, byte(len(caps)+2), 2, byte(len(caps)))
	if k.send(message(msgOpen, append(body, caps...)...)) != nil {
		return
	}
	up := false
	for {
		kind, body, err := readMessage(conn)
		if err != nil {
			return
		}
		switch kind {
		case msgOpen:
			s.mu.Lock()
			s.restart = restartBit(body)
			s.mu.Unlock()
			if k.send(message(msgKeepalive)) != nil {
				return
			}
		case msgKeepalive:
			if !up {
				up = true
				s.mu.Lock()
				s.sessions = append(s.sessions, k)
				s.fresh = map[netip.Prefix]bool{}
				s.mu.Unlock()
				go s.up(k)
				go func() {
					for k.send(message(msgKeepalive)) == nil {
						time.Sleep(time.Second)
					}
				}()
			}
		case msgUpdate:
			s.update(body)
		case msgNotification:
			s.mu.Lock()
			s.notes = append(s.notes, [2]byte(body))
			s.mu.Unlock()
		}
	}
}

func readMessage(conn net.Conn) (byte, []byte, error) {
	var head [19]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return 0, nil, err
	}
	n := int(binary.BigEndian.Uint16(head[16:]))
	if n < 19 || n > 4096 {
		return 0, nil, errors.New("length")
	}
	body := make([]byte, n-19)
	_, err := io.ReadFull(conn, body)
	return head[18], body, err
}

// restartBit finds the Restart State bit of the graceful restart capability in an OPEN.
func restartBit(open []byte) bool {
	p := open[10:]
	for len(p) >= 2 {
		if p[0] == 2 {
			for c := p[2 : 2+p[1]]; len(c) >= 2; c = c[2+c[1]:] {
				if c[0] == 64 {
					return c[2]&0x80 != 0
				}
			}
		}
		p = p[2+p[1]:]
	}
	return false
}

func (s *speaker) update(b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := int(binary.BigEndian.Uint16(b))
	gone := b[2 : 2+n]
	b = b[2+n:]
	m := int(binary.BigEndian.Uint16(b))
	attrs, added := b[2:2+m], b[2+m:]
	if n == 0 && m == 0 && len(added) == 0 {
		s.eors++
		for p := range s.routes {
			if !s.fresh[p] {
				s.taken++
				delete(s.routes, p)
			}
		}
	}
	each(gone, func(p netip.Prefix) {
		if _, ok := s.routes[p]; ok {
			s.taken++
		}
		delete(s.routes, p)
	})
	each(added, func(p netip.Prefix) { s.routes[p], s.fresh[p] = attrs, true })
	s.most = max(s.most, len(s.routes))
}

func each(b []byte, f func(netip.Prefix)) {
	for len(b) > 0 {
		n := int(b[0]+7) / 8
		var a [4]byte
		copy(a[:], b[1:1+n])
		f(netip.PrefixFrom(netip.AddrFrom4(a), int(b[0])))
		b = b[1+n:]
	}
}

// has reports whether the speaker has received exactly these prefixes.
func (s *speaker) has(prefixes ...string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range prefixes {
		if _, ok := s.routes[netip.MustParsePrefix(p)]; !ok {
			return false
		}
	}
	return len(s.routes) == len(prefixes)
}

// attribute returns the value of an attribute received with a prefix.
func (s *speaker) attribute(prefix string, kind byte) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := s.routes[netip.MustParsePrefix(prefix)]; len(b) > 3; {
		n, at := int(b[2]), 3
		if b[0]&0x10 != 0 {
			n, at = int(binary.BigEndian.Uint16(b[2:])), 4
		}
		if b[1] == kind {
			return b[at : at+n]
		}
		b = b[at+n:]
	}
	return nil
}

// say sends messages in the newest session.
func (s *speaker) say(msgs ...[]byte) {
	s.t.Helper()
	s.mu.Lock()
	k := s.sessions[len(s.sessions)-1]
	s.mu.Unlock()
	if err := k.send(msgs...); err != nil {
		s.t.Fatal(fmt.Errorf("speaker %v: %w", s.address, err))
	}
}

func (s *speaker) ends() (n int)  { s.mu.Lock(); defer s.mu.Unlock(); return s.eors }
func (s *speaker) count() (n int) { s.mu.Lock(); defer s.mu.Unlock(); return len(s.sessions) }

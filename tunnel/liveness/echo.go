package liveness

import (
	"crypto/rand"
	"errors"
	"net/netip"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/echo"
)

// sockets is a Pinger with a raw socket for each address family. One socket serves all tunnels, so
// that their number costs nothing, and it names the interface of each packet.
type sockets struct {
	answers
	four *socket
	six  *socket // nil: the kernel has no IPv6
}

type socket struct {
	*echo.Socket
	// drops is the kernel's counter of packets that the socket had no room for, as it was when the
	// last packet was queued, and seen its value at the last call of Lost.
	drops atomic.Uint32
	seen  uint32
}

// tokenSize is the size of the data of requests, in bytes.
const tokenSize = 8

func newPinger() (*sockets, error) {
	s := &sockets{answers: answers{peers: map[key]*peer{}}}
	four, err := echo.Open(false)
	if err != nil {
		return nil, err
	}
	six, err := echo.Open(true)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		four.Close()
		return nil, err
	}
	s.four = &socket{Socket: four}
	go four.Read(s.receive(s.four))
	if six != nil {
		s.six = &socket{Socket: six}
		go six.Read(s.receive(s.six))
	}
	return s, nil
}

// Ping implements Pinger.
func (s *sockets) Ping(iface int, from, to netip.Addr) error {
	on := s.four
	if to.Is6() {
		if on = s.six; on == nil {
			return unix.EAFNOSUPPORT
		}
	}
	var token [tokenSize]byte
	rand.Read(token[:])
	s.mu.Lock()
	k := key{iface, to}
	p := s.peers[k]
	if p == nil {
		p = &peer{}
		s.peers[k] = p
	}
	p.sequence++
	p.token, p.answered = token, false
	sequence := p.sequence
	s.mu.Unlock()
	// A queue that is full counts as a lost request.
	return on.Send(iface, from, to, sequence, token[:])
}

// Answers implements Pinger.
func (s *sockets) Answers(iface int, to netip.Addr) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.peers[key{iface, to}]; p != nil {
		return p.answers
	}
	return 0
}

// Keep implements Pinger.
func (s *sockets) Keep(interfaces map[int]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.peers {
		if !interfaces[k.iface] {
			delete(s.peers, k)
		}
	}
}

// Lost implements Pinger.
func (s *sockets) Lost() (lost bool) {
	for _, one := range []*socket{s.four, s.six} {
		if one == nil {
			continue
		}
		drops := one.drops.Load()
		lost = lost || drops != one.seen
		one.seen = drops
	}
	return lost
}

// Close implements Pinger.
func (s *sockets) Close() {
	s.four.Close()
	if s.six != nil {
		s.six.Close()
	}
}

// receive returns a function that counts a reply if it answers the newest request through its
// interface.
func (s *sockets) receive(on *socket) func(echo.Reply) {
	return func(r echo.Reply) {
		on.drops.Store(r.Dropped)
		if r.Interface == 0 {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		p := s.peers[key{r.Interface, r.From}]
		if p == nil || p.answered || r.Sequence != p.sequence || string(r.Data) != string(p.token[:]) {
			return
		}
		p.answered = true
		p.answers++
	}
}

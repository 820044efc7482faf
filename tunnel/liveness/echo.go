package liveness

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/net/bpf"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/sockfilter"
)

// sockets is a Pinger with a raw socket for each address family. One socket serves all tunnels, so
// that their number costs nothing, and it names the interface of each packet.
type sockets struct {
	answers
	id   uint16 // identifier of all requests (RFC 792)
	four *socket
	six  *socket // nil: the kernel has no IPv6
}

type socket struct {
	file *os.File
	raw  syscall.RawConn
	// drops is the kernel's counter of packets that the socket had no room for (SO_RXQ_OVFL, as it
	// was when the last packet was queued), and seen its value at the last call of Lost.
	drops atomic.Uint32
	seen  uint32
}

// Sizes and offsets of an echo message (RFC 792, RFC 4443 section 4).
const (
	echoSize  = 16 // header, and a token of 8 bytes
	replyFour = 0
	replySix  = 129
)

func newPinger() (*sockets, error) {
	var id [2]byte
	rand.Read(id[:])
	s := &sockets{id: binary.BigEndian.Uint16(id[:]), answers: answers{peers: map[key]*peer{}}}
	var err error
	if s.four, err = openSocket(false, s.id); err != nil {
		return nil, err
	}
	if s.six, err = openSocket(true, s.id); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		s.four.file.Close()
		return nil, err
	}
	go s.read(s.four)
	if s.six != nil {
		go s.read(s.six)
	}
	return s, nil
}

func openSocket(six bool, id uint16) (*socket, error) {
	family, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	if six {
		family, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("opening a raw socket: %w", err)
	}
	s := &socket{file: os.NewFile(uintptr(fd), "icmp")}
	err = errors.Join(sockfilter.Attach(fd, replies(six, id)), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1))
	if six {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1))
	} else {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1))
	}
	// without CAP_NET_ADMIN the default stays
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	var failed error
	s.raw, failed = s.file.SyscallConn()
	if err = errors.Join(err, failed); err != nil {
		s.file.Close()
		return nil, fmt.Errorf("setting a raw socket up: %w", err)
	}
	return s, nil
}

// replies passes echo replies with an identifier. A raw socket for IPv4 receives the IP header, one
// for IPv6 does not (raw(7), RFC 3542 section 3).
func replies(six bool, id uint16) (p sockfilter.Program) {
	kind := uint32(replyFour)
	if six {
		kind = replySix
		p.Add(bpf.LoadConstant{Dst: bpf.RegX, Val: 0})
	} else {
		p.Add(bpf.LoadMemShift{Off: 0})
	}
	p.Add(bpf.LoadIndirect{Off: 0, Size: 1})
	p.If(bpf.JumpNotEqual, kind, sockfilter.Drop)
	p.Add(bpf.LoadIndirect{Off: 4, Size: 2})
	p.If(bpf.JumpNotEqual, uint32(id), sockfilter.Drop)
	p.Add(sockfilter.Pass)
	return p
}

// Ping implements Pinger.
func (s *sockets) Ping(iface int, from, to netip.Addr) error {
	var random [8]byte
	rand.Read(random[:])
	s.mu.Lock()
	k := key{iface, to}
	p := s.peers[k]
	if p == nil {
		p = &peer{}
		s.peers[k] = p
	}
	p.sequence++
	p.token, p.answered = binary.BigEndian.Uint64(random[:]), false
	message := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: int(s.id), Seq: int(p.sequence), Data: random[:]}}
	s.mu.Unlock()
	if to.Is6() {
		message.Type = ipv6.ICMPTypeEchoRequest
	}
	data, err := message.Marshal(nil) // the kernel computes the checksum of ICMPv6
	if err != nil {
		return err
	}

	on, control := s.four, []byte(nil)
	var peer unix.Sockaddr
	if to.Is4() {
		control = unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(iface), Spec_dst: from.As4()})
		peer = &unix.SockaddrInet4{Addr: to.As4()}
	} else {
		if s.six == nil {
			return unix.EAFNOSUPPORT
		}
		on = s.six
		control = unix.PktInfo6(&unix.Inet6Pktinfo{Ifindex: uint32(iface), Addr: from.As16()})
		peer = &unix.SockaddrInet6{Addr: to.As16(), ZoneId: zone(to, iface)}
	}
	var sent error
	// A queue that is full counts as a lost request: the socket must not wait.
	err = on.raw.Write(func(fd uintptr) bool {
		sent = unix.Sendmsg(int(fd), data, control, peer, unix.MSG_DONTWAIT)
		return true
	})
	return errors.Join(err, sent)
}

// zone returns the scope of a link-local address (RFC 4007).
func zone(a netip.Addr, iface int) uint32 {
	if a.IsLinkLocalUnicast() {
		return uint32(iface)
	}
	return 0
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
	s.four.file.Close()
	if s.six != nil {
		s.six.file.Close()
	}
}

// read counts answers until the socket is closed.
func (s *sockets) read(from *socket) {
	buffer, control := make([]byte, 256), make([]byte, 256)
	for {
		var n, controls int
		var peer unix.Sockaddr
		var received error
		err := from.raw.Read(func(fd uintptr) bool {
			n, controls, _, peer, received = unix.Recvmsg(int(fd), buffer, control, unix.MSG_DONTWAIT)
			return received != unix.EAGAIN && received != unix.EINTR
		})
		if err != nil {
			return // closed
		}
		if received != nil {
			continue
		}
		index, drops := decodeControl(control[:controls])
		from.drops.Store(drops)
		s.receive(buffer[:n], index, peer)
	}
}

// receive counts one message if it answers the newest request through the interface with an index.
func (s *sockets) receive(message []byte, index int, peer unix.Sockaddr) {
	var from netip.Addr
	switch a := peer.(type) {
	case *unix.SockaddrInet4:
		from = netip.AddrFrom4(a.Addr)
		if len(message) < 20 || len(message) < int(message[0]&0xf)*4 {
			return
		}
		message = message[int(message[0]&0xf)*4:]
	case *unix.SockaddrInet6:
		from = netip.AddrFrom16(a.Addr)
	}
	if len(message) != echoSize || index == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[key{index, from}]
	if p == nil || p.answered || binary.BigEndian.Uint16(message[6:]) != p.sequence || binary.BigEndian.Uint64(message[8:]) != p.token {
		return
	}
	p.answered = true
	p.answers++
}

// decodeControl returns the index of the interface in the control messages of a packet, 0 without
// one, and the number of packets that were dropped before it.
func decodeControl(control []byte) (index int, drops uint32) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return 0, 0
	}
	for _, m := range messages {
		switch h := m.Header; {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(m.Data) >= 4:
			index = int(binary.NativeEndian.Uint32(m.Data)) // struct in_pktinfo
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(m.Data) >= 20:
			index = int(binary.NativeEndian.Uint32(m.Data[16:])) // struct in6_pktinfo
		case h.Level == unix.SOL_SOCKET && h.Type == unix.SO_RXQ_OVFL && len(m.Data) >= 4:
			drops = binary.NativeEndian.Uint32(m.Data)
		}
	}
	return index, drops
}

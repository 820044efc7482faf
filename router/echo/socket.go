// Package echo sends echo requests (RFC 792, RFC 4443 section 4) and matches their replies: it has
// the raw sockets, and pings with them.
package echo

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/net/bpf"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/sockfilter"
)

// Socket is a raw socket for the echo requests of one address family. The kernel passes it only
// replies with its identifier, which no other open Socket of this process has.
type Socket struct {
	id   uint16 // of all requests
	six  bool
	file *os.File
	raw  syscall.RawConn
	once sync.Once
}

// Reply is an echo reply. Data is valid until the next one is read.
type Reply struct {
	From      netip.Addr
	Interface int // index; 0: unknown
	Sequence  uint16
	Data      []byte
	// Dropped counts the packets that the socket had no room for, as it was when this one was
	// queued (SO_RXQ_OVFL).
	Dropped uint32
}

// headerSize is the size of the header of an echo message.
const headerSize = 8

// Types of echo replies.
const (
	replyFour = 0
	replySix  = 129
)

// identifiers are those of the open sockets.
var identifiers = struct {
	sync.Mutex
	used map[uint16]bool
}{used: map[uint16]bool{}}

func takeIdentifier() uint16 {
	identifiers.Lock()
	defer identifiers.Unlock()
	for {
		var random [2]byte
		rand.Read(random[:])
		if id := binary.BigEndian.Uint16(random[:]); !identifiers.used[id] {
			identifiers.used[id] = true
			return id
		}
	}
}

func returnIdentifier(id uint16) {
	identifiers.Lock()
	defer identifiers.Unlock()
	delete(identifiers.used, id)
}

// Open opens a socket for a family. It needs CAP_NET_RAW, and wraps unix.EAFNOSUPPORT if the kernel
// does not have the family.
func Open(six bool) (*Socket, error) {
	family, protocol := unix.AF_INET, unix.IPPROTO_ICMP
	if six {
		family, protocol = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, fmt.Errorf("opening a raw socket: %w", err)
	}
	s := &Socket{id: takeIdentifier(), six: six, file: os.NewFile(uintptr(fd), "icmp")}
	err = errors.Join(sockfilter.Attach(fd, replies(six, s.id)), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1))
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
		s.Close()
		return nil, fmt.Errorf("setting a raw socket up: %w", err)
	}
	return s, nil
}

// Close closes the socket. It may be called again.
func (s *Socket) Close() {
	s.once.Do(func() {
		s.file.Close()
		returnIdentifier(s.id)
	})
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

// request returns an echo request. The kernel computes the checksum of ICMPv6.
func (s *Socket) request(sequence uint16, data []byte) ([]byte, error) {
	message := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: int(s.id), Seq: int(sequence), Data: data}}
	if s.six {
		message.Type = ipv6.ICMPTypeEchoRequest
	}
	return message.Marshal(nil)
}

// Send sends an echo request through the interface with an index, from an address. The kernel
// chooses for a zero index and for an address that is not valid. Send does not wait: a queue that
// is full is an error.
func (s *Socket) Send(iface int, from, to netip.Addr, sequence uint16, data []byte) error {
	packet, err := s.request(sequence, data)
	if err != nil {
		return err
	}
	return s.send(iface, from, to, packet)
}

func (s *Socket) send(iface int, from, to netip.Addr, packet []byte) error {
	var control []byte
	var peer unix.Sockaddr
	choose := iface != 0 || from.IsValid()
	if s.six {
		peer = &unix.SockaddrInet6{Addr: to.As16(), ZoneId: zone(to, iface)}
		if choose {
			info := unix.Inet6Pktinfo{Ifindex: uint32(iface)}
			if from.IsValid() {
				info.Addr = from.As16()
			}
			control = unix.PktInfo6(&info)
		}
	} else {
		peer = &unix.SockaddrInet4{Addr: to.As4()}
		if choose {
			info := unix.Inet4Pktinfo{Ifindex: int32(iface)}
			if from.IsValid() {
				info.Spec_dst = from.As4()
			}
			control = unix.PktInfo4(&info)
		}
	}
	var sent error
	err := s.raw.Write(func(fd uintptr) bool {
		sent = unix.Sendmsg(int(fd), packet, control, peer, unix.MSG_DONTWAIT)
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

// Read calls a function with each reply until the socket is closed.
func (s *Socket) Read(handle func(Reply)) {
	buffer, control := make([]byte, 256), make([]byte, 256)
	for {
		var reply Reply
		var ok bool
		var received error
		err := s.raw.Read(func(fd uintptr) bool {
			reply, ok, received = s.receive(int(fd), buffer, control)
			return received != unix.EAGAIN && received != unix.EINTR
		})
		if err != nil {
			return // closed
		}
		if ok {
			handle(reply)
		}
	}
}

// receive reads a packet, and returns false if it is not a reply. Data beyond the buffer is cut
// off.
func (s *Socket) receive(fd int, buffer, control []byte) (r Reply, ok bool, err error) {
	n, controls, _, peer, err := unix.Recvmsg(fd, buffer, control, unix.MSG_DONTWAIT)
	if err != nil {
		return r, false, err
	}
	message := buffer[:n]
	switch a := peer.(type) {
	case *unix.SockaddrInet4:
		r.From = netip.AddrFrom4(a.Addr)
		if n < 20 || n < int(message[0]&0xf)*4 {
			return r, false, nil
		}
		message = message[int(message[0]&0xf)*4:]
	case *unix.SockaddrInet6:
		r.From = netip.AddrFrom16(a.Addr)
	}
	if len(message) < headerSize {
		return r, false, nil
	}
	r.Interface, r.Dropped = decodeControl(control[:controls])
	r.Sequence, r.Data = binary.BigEndian.Uint16(message[6:]), message[headerSize:]
	return r, true, nil
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

package proof

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"context"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/lane"
	"github.com/isthmus-net/isthmus/router/lane/stamp"
)

const (
	// maxTTL is the TTL of packets of a neighbour (RFC 5082), which STAMP requires as well (RFC
	// 8762 section 4.2.1).
	maxTTL = 255
	// network is the class of service of network control (CS6, RFC 4594 section 3.1), as the value
	// of the field.
	network = 0xc0
)

// errForeign means that a packet is not from the other node.
var errForeign = errors.New("the sender is not the other node")

// socket is the socket of a lane.
type socket struct {
	lane  lane.Lane
	index int // of the interface
	conn  *net.UDPConn
	raw   syscall.RawConn
}

// open opens the socket of a lane, whose interface has an index.
func open(l lane.Lane, index int) (*socket, error) {
	var failed error
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return errors.Join(c.Control(func(fd uintptr) { failed = set(int(fd), l) }), failed)
	}}
	conn, err := config.ListenPacket(context.Background(), "udp", netip.AddrPortFrom(l.Local, stamp.Port).String())
	if err != nil {
		return nil, fmt.Errorf("listening for STAMP packets: %w", err)
	}
	s := &socket{lane: l, index: index, conn: conn.(*net.UDPConn)}
	if s.raw, err = s.conn.SyscallConn(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("listening for STAMP packets: %w", err)
	}
	return s, nil
}

// set sets the options of a socket. Packets are not fragmented, and their size does not follow path
// MTUs that the kernel has heard of (ip(7), IP_PMTUDISC_PROBE).
func set(fd int, l lane.Lane) error {
	if err := unix.BindToDevice(fd, l.Interface); err != nil {
		return os.NewSyscallError("setsockopt SO_BINDTODEVICE", err)
	}
	options := [][3]int{
		{unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE}, {unix.IPPROTO_IP, unix.IP_TTL, maxTTL},
		{unix.IPPROTO_IP, unix.IP_TOS, network}, {unix.IPPROTO_IP, unix.IP_RECVTTL, 1},
	}
	if l.Local.Is6() {
		options = [][3]int{
			{unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE}, {unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, maxTTL},
			{unix.IPPROTO_IPV6, unix.IPV6_TCLASS, network}, {unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1},
		}
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	return nil
}

func (s *socket) close() { s.conn.Close() }

// headers returns the size of the headers of IP and UDP.
func (s *socket) headers() int {
	if s.lane.Local.Is6() {
		return 48
	}
	return 28
}

// send sends a packet to a port of the other node. It does not wait: a queue that is full is an
// error.
func (s *socket) send(b []byte, port uint16) error {
	var to unix.Sockaddr = &unix.SockaddrInet6{Addr: s.lane.Remote.As16(), Port: int(port)}
	if s.lane.Remote.Is4() {
		to = &unix.SockaddrInet4{Addr: s.lane.Remote.As4(), Port: int(port)}
	}
	var sent error
	err := s.raw.Write(func(fd uintptr) bool {
		sent = unix.Sendto(int(fd), b, unix.MSG_DONTWAIT, to)
		return true
	})
	if err = errors.Join(err, sent); err != nil {
		return fmt.Errorf("sending a STAMP packet: %w", err)
	}
	return nil
}

// receive waits for a packet. It returns the port of its sender and its TTL.
func (s *socket) receive(buffer, control []byte) (n int, port uint16, ttl uint8, err error) {
	n, controls, _, from, err := s.conn.ReadMsgUDPAddrPort(buffer, control)
	switch {
	case errors.Is(err, net.ErrClosed):
		return 0, 0, 0, err
	case err != nil:
		time.Sleep(lane.Interval) // errors of a queue or an interface pass
		return 0, 0, 0, errForeign
	case from.Addr().Unmap() != s.lane.Remote:
		return 0, 0, 0, errForeign
	}
	messages, err := unix.ParseSocketControlMessage(control[:controls])
	if err != nil {
		return 0, 0, 0, errForeign
	}
	for _, m := range messages {
		four := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_TTL
		six := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_HOPLIMIT
		if (four || six) && len(m.Data) >= 4 {
			ttl = uint8(binary.NativeEndian.Uint32(m.Data))
		}
	}
	return n, from.Port(), ttl, nil
}

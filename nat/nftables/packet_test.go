package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
	"golang.org/x/sys/unix"
)

// site is a router with an underlay and an inside. Packets are made by hand at the inside and caught on the underlay, so that
// none can be missed and every source is possible.
type site struct {
	t                       testing.TB
	inside, router, outside *netns.NS
	send4, send6            int // sockets inside that send whole packets
	out4, out6              int // the same outside
	catch, catchInside      int // sockets outside and inside that hear everything
	resets                  int // TCP resets that were heard
}

func newSite(t testing.TB) *site {
	s := &site{t: t, inside: netns.New(t), router: netns.New(t), outside: netns.New(t)}
	netns.Veth(s.router, "tun0", s.inside, "in0")
	netns.Veth(s.router, "up0", s.outside, "out0")
	s.router.Run(`sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.default.send_redirects=0 net.ipv4.conf.tun0.send_redirects=0 net.ipv4.conf.up0.send_redirects=0 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 net.ipv4.conf.tun0.rp_filter=0 net.ipv4.conf.up0.rp_filter=0
		ip addr add 192.0.2.1/32 dev up0
		ip -6 addr add 2001:db8:ff::1/128 dev up0 nodad`)
	// One address on all links and no neighbour discovery: whatever is sent arrives at once.
	for ns, links := range map[*netns.NS][]string{s.inside: {"in0"}, s.router: {"tun0", "up0"}, s.outside: {"out0"}} {
		for _, l := range links {
			ns.Run("ip link set " + l + " down\nip link set " + l + " address 02:00:00:00:00:01 arp off\nip link set " + l + " up")
		}
	}
	s.router.Run(`ip route add 10.0.0.0/8 dev tun0
		ip route add 44.0.0.0/8 dev tun0
		ip route add 172.17.0.0/16 dev tun0
		ip route add default dev up0
		ip -6 addr replace 2001:db8:ff::1/128 dev up0 nodad
		ip -6 route add 2001:db8:a::/48 dev tun0
		ip -6 route add 2001:db8:2c::/48 dev tun0
		ip -6 route add default dev up0`)
	for _, ns := range []*netns.NS{s.inside, s.outside} {
		ns.Run("sysctl -qw net.ipv4.ip_forward=0")
	}
	s.inside.Run("ip route add default dev in0\nip -6 route add default dev in0")
	s.outside.Run("ip route add default dev out0\nip -6 route add default dev out0")
	s.inside.Do(func() { s.send4, s.send6, s.catchInside = s.sockets() })
	s.outside.Do(func() { s.out4, s.out6, s.catch = s.sockets() })
	return s
}

// sockets opens two that send whole packets, and one that hears everything, in the namespace of the thread.
func (s *site) sockets() (send4, send6, catch int) {
	send4 = s.must(unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW))
	send6 = s.must(unix.Socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_RAW))
	catch = s.must(unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, int(htons(unix.ETH_P_ALL))))
	if err := unix.SetsockoptInt(catch, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		s.t.Error(err)
	}
	s.t.Cleanup(func() { unix.Close(send4); unix.Close(send6); unix.Close(catch) })
	return send4, send6, catch
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)) }

func (s *site) must(fd int, err error) int {
	if err != nil {
		s.t.Error(err)
	}
	return fd
}

// forgetFlows empties the router's connection tracking.
func (s *site) forgetFlows() {
	s.t.Helper()
	var err error
	s.router.Do(func() {
		var fd int
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER); err != nil {
			return
		}
		defer unix.Close(fd)
		const deleteAll = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE
		m := binary.NativeEndian.AppendUint32(nil, 20)
		m = binary.NativeEndian.AppendUint16(m, deleteAll)
		m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
		m = append(m, make([]byte, 12)...)
		if err = unix.Sendto(fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return
		}
		answer := make([]byte, 4096)
		if _, _, err = unix.Recvfrom(fd, answer, 0); err == nil && binary.NativeEndian.Uint32(answer[16:]) != 0 {
			err = errors.New("refused")
		}
	})
	if err != nil {
		s.t.Fatalf("flushing connection tracking: %v", err)
	}
}

// transmit sends the first packet of a flow, marked with id.
func (s *site) transmit(f nat.Flow, id uint16, flags byte) {
	s.t.Helper()
	var l4 []byte
	switch f.Protocol {
	case unix.IPPROTO_TCP:
		l4 = make([]byte, 20)
		binary.BigEndian.PutUint16(l4, 1024+id)
		binary.BigEndian.PutUint16(l4[2:], f.Port)
		binary.BigEndian.PutUint32(l4[4:], uint32(id)<<8)
		l4[12], l4[13] = 5<<4, flags
	case unix.IPPROTO_UDP:
		l4 = make([]byte, 12)
		binary.BigEndian.PutUint16(l4, 1024+id)
		binary.BigEndian.PutUint16(l4[2:], f.Port)
		binary.BigEndian.PutUint16(l4[4:], 12)
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		l4 = make([]byte, 8)
		l4[0] = 8
		if f.Protocol == unix.IPPROTO_ICMPV6 {
			l4[0] = 128
		}
		binary.BigEndian.PutUint16(l4[4:], id)
	case unix.IPPROTO_NONE: // shorter than a port number
	default:
		l4 = make([]byte, 8)
	}
	src, dst := f.Source.AsSlice(), f.Destination.AsSlice()
	if f.Protocol == unix.IPPROTO_ICMP {
		binary.BigEndian.PutUint16(l4[2:], checksum(l4))
	} else if at, ok := map[uint8]int{unix.IPPROTO_TCP: 16, unix.IPPROTO_UDP: 6, unix.IPPROTO_ICMPV6: 2}[f.Protocol]; ok {
		pseudo := slices.Concat(src, dst, []byte{0, f.Protocol, 0, byte(len(l4))}, l4)
		binary.BigEndian.PutUint16(l4[at:], checksum(pseudo))
	}
	var err error
	send4, send6 := s.send4, s.send6
	if f.Outside {
		send4, send6 = s.out4, s.out6
	}
	if f.Source.Is4() {
		h := []byte{0x45, 0, 0, byte(20 + len(l4)), byte(id >> 8), byte(id), 0, 0, 64, f.Protocol, 0, 0}
		to := &unix.SockaddrInet4{Addr: f.Destination.As4()}
		err = unix.Sendto(send4, slices.Concat(h, src, dst, l4), 0, to)
	} else {
		h := []byte{0x60, 0, byte(id >> 8), byte(id), 0, byte(len(l4)), f.Protocol, 64}
		err = unix.Sendto(send6, slices.Concat(h, src, dst, l4), 0, &unix.SockaddrInet6{Addr: f.Destination.As16()})
	}
	if err != nil {
		s.t.Fatalf("sending %+v: %v", f, err)
	}
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	sum = sum>>16 + sum&0xffff
	return ^uint16(sum>>16 + sum)
}

// caught is a packet that left by the underlay.
type caught struct {
	source, destination netip.Addr
	protocol            uint8
	packet              []byte
}

// receive returns what came out on the underlay, by id, once nothing more comes for the pause.
func (s *site) receive(pause time.Duration) map[uint16]caught {
	s.t.Helper()
	return s.hear(s.catch, pause)
}

// hear returns what came to a socket.
func (s *site) hear(socket int, pause time.Duration) map[uint16]caught {
	s.t.Helper()
	timeout := unix.NsecToTimeval(pause.Nanoseconds())
	if err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		s.t.Fatal(err)
	}
	all := map[uint16]caught{}
	b := make([]byte, 65536)
	for {
		n, from, err := unix.Recvfrom(socket, b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			return all
		}
		if err != nil {
			s.t.Fatal(err)
		}
		if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING || n < 20 {
			continue
		}
		p := slices.Clone(b[:n])
		if at := map[byte]int{4: 20, 6: 40}[p[0]>>4]; at > 0 && len(p) >= at+20 && p[map[int]int{20: 9, 40: 6}[at]] == unix.IPPROTO_TCP && p[at+13]&rst != 0 {
			s.resets++
		}
		switch {
		case p[0]>>4 == 4:
			src, _ := netip.AddrFromSlice(p[12:16])
			dst, _ := netip.AddrFromSlice(p[16:20])
			all[binary.BigEndian.Uint16(p[4:])] = caught{src, dst, p[9], p}
		case p[0]>>4 == 6 && n >= 40:
			src, _ := netip.AddrFromSlice(p[8:24])
			dst, _ := netip.AddrFromSlice(p[24:40])
			if dst.IsMulticast() { // neighbour discovery of the kernel itself
				continue
			}
			all[binary.BigEndian.Uint16(p[2:])] = caught{src, dst, p[6], p}
		}
	}
}

func (c caught) String() string {
	return fmt.Sprintf("%v > %v protocol %d", c.source, c.destination, c.protocol)
}

var errTimeout = errors.New("no answer")

// try sends from a socket inside, to whatever answers, and returns the error that it gets, or errTimeout.
func (s *site) try(network, from, to string, port int, wait time.Duration) error {
	s.t.Helper()
	var c net.Conn
	var err error
	s.inside.Do(func() {
		d := net.Dialer{Timeout: wait}
		if network == "tcp" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from), Port: port}
		} else {
			d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(from), Port: port}
		}
		c, err = d.Dial(network, to)
	})
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(wait))
		if _, err = c.Write([]byte("x")); err == nil {
			_, err = c.Read(make([]byte, 1))
		}
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return errTimeout
	}
	if no, ok := errors.AsType[unix.Errno](err); ok {
		return no
	}
	return err
}

// port returns the source port, or the identifier of a query.
func (c caught) port() (port uint16, has bool) {
	l4 := c.packet[20:]
	if c.source.Is6() {
		l4 = c.packet[40:]
	}
	switch c.protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		return binary.BigEndian.Uint16(l4), true
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return binary.BigEndian.Uint16(l4[4:]), true
	}
	return 0, false
}

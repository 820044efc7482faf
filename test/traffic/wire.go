package traffic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// Flags of TCP.
const (
	syn = 0x02
	rst = 0x04
	ack = 0x10
)

// Tap sends hand-made packets in a network namespace, so that every source is possible, and
// captures everything there, so that none can be missed.
type Tap struct {
	Send4        int // raw socket for whole packets of IPv4
	send6, catch int
}

// OpenTap opens a Tap in the network namespace of the calling thread.
func OpenTap() (*Tap, error) {
	t := &Tap{-1, -1, -1}
	var err error
	if t.Send4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err == nil {
		if t.send6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err == nil {
			t.catch, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		}
	}
	if err == nil {
		err = unix.SetsockoptInt(t.catch, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	}
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("opening raw sockets: %w", err)
	}
	return t, nil
}

// Close closes the tap.
func (t *Tap) Close() {
	for _, fd := range []int{t.Send4, t.send6, t.catch} {
		unix.Close(fd)
	}
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)) }

// Send sends the first packet of a flow, marked with id.
func (t *Tap) Send(f nat.Flow, id uint16, flags byte) error {
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
		binary.BigEndian.PutUint16(l4[2:], Checksum(l4))
	} else if at, ok := map[uint8]int{unix.IPPROTO_TCP: 16, unix.IPPROTO_UDP: 6, unix.IPPROTO_ICMPV6: 2}[f.Protocol]; ok {
		pseudo := slices.Concat(src, dst, []byte{0, f.Protocol, 0, byte(len(l4))}, l4)
		binary.BigEndian.PutUint16(l4[at:], Checksum(pseudo))
	}
	return t.SendPacket(f.Source, f.Destination, f.Protocol, id, 64, l4)
}

// SendPacket sends a packet, marked with id: the identification of IPv4, the flow label of IPv6.
func (t *Tap) SendPacket(source, destination netip.Addr, protocol uint8, id uint16, hops byte, l4 []byte) error {
	src, dst := source.AsSlice(), destination.AsSlice()
	var err error
	if source.Is4() {
		h := []byte{0x45, 0, 0, byte(20 + len(l4)), byte(id >> 8), byte(id), 0, 0, hops, protocol, 0, 0}
		to := &unix.SockaddrInet4{Addr: destination.As4()}
		err = unix.Sendto(t.Send4, slices.Concat(h, src, dst, l4), 0, to)
	} else {
		h := []byte{0x60, 0, byte(id >> 8), byte(id), 0, byte(len(l4)), protocol, hops}
		err = unix.Sendto(t.send6, slices.Concat(h, src, dst, l4), 0, &unix.SockaddrInet6{Addr: destination.As16()})
	}
	if err != nil {
		return fmt.Errorf("sending protocol %d from %v to %v: %w", protocol, source, destination, err)
	}
	return nil
}

// Checksum is the Internet checksum (RFC 1071).
func Checksum(b []byte) uint16 {
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

// Packet is a captured packet.
type Packet struct {
	Source, Destination netip.Addr
	Protocol            uint8
	Bytes               []byte // from the network header on
}

// String describes the packet.
func (p Packet) String() string {
	return fmt.Sprintf("%v > %v protocol %d", p.Source, p.Destination, p.Protocol)
}

// l4 returns the bytes after the network header.
func (p Packet) l4() []byte {
	if p.Source.Is6() {
		return p.Bytes[40:]
	}
	return p.Bytes[20:]
}

// Port returns the source port, or the identifier of a query.
func (p Packet) Port() (port uint16, has bool) {
	switch p.Protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		return binary.BigEndian.Uint16(p.l4()), true
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return binary.BigEndian.Uint16(p.l4()[4:]), true
	}
	return 0, false
}

// answers reports whether the packet is an error or a reply of ICMP. Its sender chooses the id,
// which therefore means nothing.
func (p Packet) answers() bool {
	switch p.Protocol {
	case unix.IPPROTO_ICMP:
		return p.l4()[0] != 8
	case unix.IPPROTO_ICMPV6:
		return p.l4()[0] != 128
	}
	return false
}

// Sounds are the packets that a Tap captured.
type Sounds struct {
	Packets map[uint16]Packet // by id, but for answers
	Answers []Packet          // errors and replies of ICMP
	Resets  int               // packets of TCP with this flag
	All     []Packet
}

// Receive returns the captured packets once none has arrived for the pause.
func (t *Tap) Receive(pause time.Duration) (heard Sounds, err error) {
	timeout := unix.NsecToTimeval(pause.Nanoseconds())
	if err := unix.SetsockoptTimeval(t.catch, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return heard, err
	}
	heard.Packets = map[uint16]Packet{}
	keep := func(id uint16, p Packet) {
		heard.All = append(heard.All, p)
		if p.answers() {
			heard.Answers = append(heard.Answers, p)
		} else {
			heard.Packets[id] = p
		}
	}
	b := make([]byte, 65536)
	for {
		n, from, err := unix.Recvfrom(t.catch, b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			return heard, nil
		}
		if err != nil {
			return heard, err
		}
		if from.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING || n < 20 {
			continue
		}
		p := slices.Clone(b[:n])
		if at := map[byte]int{4: 20, 6: 40}[p[0]>>4]; at > 0 && len(p) >= at+20 && p[map[int]int{20: 9, 40: 6}[at]] == unix.IPPROTO_TCP && p[at+13]&rst != 0 {
			heard.Resets++
		}
		switch {
		case p[0]>>4 == 4:
			src, _ := netip.AddrFromSlice(p[12:16])
			dst, _ := netip.AddrFromSlice(p[16:20])
			keep(binary.BigEndian.Uint16(p[4:]), Packet{src, dst, p[9], p})
		case p[0]>>4 == 6 && n >= 40:
			src, _ := netip.AddrFromSlice(p[8:24])
			dst, _ := netip.AddrFromSlice(p[24:40])
			if dst.IsMulticast() { // neighbour discovery of the kernel itself
				continue
			}
			keep(binary.BigEndian.Uint16(p[2:]), Packet{src, dst, p[6], p})
		}
	}
}

// Site is a router with a Tap on each of its networks. Servers is on that of servers and proxies;
// it may be Inside.
type Site struct{ Inside, Outside, Servers *Tap }

// Heard are the packets that left a router, by network.
type Heard struct{ Outside, Servers, Inside Sounds }

// Send sends the first packets of flows, by id, and returns the packets that leave the router.
func (s Site) Send(flows map[uint16]nat.Flow) (h Heard, err error) {
	for id, f := range flows {
		flags, from := byte(syn), s.Inside
		if f.Late {
			flags = ack
		}
		if f.Outside {
			from = s.Outside
		}
		if err := from.Send(f, id, flags); err != nil {
			return h, err
		}
	}
	hear := func(t *Tap, pause time.Duration) Sounds {
		sounds, failed := t.Receive(pause)
		err = errors.Join(err, failed)
		return sounds
	}
	h.Outside = hear(s.Outside, 100*time.Millisecond)
	h.Servers = hear(s.Servers, 10*time.Millisecond)
	if s.Inside != s.Servers {
		h.Inside = hear(s.Inside, 10*time.Millisecond)
	}
	return h, err
}

// Fate is the expected result of a flow.
type Fate struct {
	Sources []netip.Addr   // that it may go on with; none: it ends at the router
	To      netip.AddrPort // the server or proxy that it goes to, if it does
	Ports   nat.PortRange  // that it may leave with; zero: every one
	Reset   bool           // its source receives a TCP reset
	Why     string
}

// Wrong describes the flows, by id, whose results differ from their fates. own are the router's
// addresses, with which it may send errors.
func (h Heard) Wrong(flows map[uint16]nat.Flow, own []netip.Addr, fate func(nat.Flow) Fate) (wrong []string) {
	resets := 0
	for id, f := range flows {
		want := fate(f)
		if want.Reset {
			resets++
		}
		out, passed := h.Outside.Packets[id]
		if want.To.IsValid() {
			if passed {
				wrong = append(wrong, fmt.Sprintf("%+v: left as %v, want %s", f, out, want.Why))
			}
			out, passed = h.Servers.Packets[id]
			passed = passed && netip.AddrPortFrom(out.Destination, binary.BigEndian.Uint16(out.l4()[2:])) == want.To
		}
		if passed != (len(want.Sources) > 0) || passed && !slices.Contains(want.Sources, out.Source) {
			wrong = append(wrong, fmt.Sprintf("%+v: %v %v, want %s", f, passed, out, want.Why))
		} else if passed && want.Ports != (nat.PortRange{}) {
			if port, has := out.Port(); has && (port < want.Ports.First || port > want.Ports.Last) {
				wrong = append(wrong, fmt.Sprintf("%+v leaves with port %d, want one of %v", f, port, want.Ports))
			}
		}
	}
	if n := h.Outside.Resets + h.Servers.Resets + h.Inside.Resets; n != resets {
		wrong = append(wrong, fmt.Sprintf("%d resets, want %d", n, resets))
	}
	stray := slices.Clone(h.Outside.Answers)
	for id, out := range h.Outside.Packets {
		if _, sent := flows[id]; !sent {
			stray = append(stray, out)
		}
	}
	for _, out := range stray {
		if !slices.Contains(own, out.Source) {
			wrong = append(wrong, fmt.Sprintf("not sent by any flow: %v %x", out, out.Bytes))
		}
	}
	return wrong
}

// Forget empties the connection tracking of the network namespace of the calling thread.
func Forget() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("flushing connection tracking: %w", err)
	}
	defer unix.Close(fd)
	const deleteAll = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE
	m := binary.NativeEndian.AppendUint32(nil, 20)
	m = binary.NativeEndian.AppendUint16(m, deleteAll)
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m = append(m, make([]byte, 12)...)
	answer := make([]byte, 4096)
	if err = unix.Sendto(fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err == nil {
		_, _, err = unix.Recvfrom(fd, answer, 0)
	}
	if code := int32(binary.NativeEndian.Uint32(answer[16:])); err == nil && code != 0 {
		err = unix.Errno(-code)
	}
	if err != nil {
		return fmt.Errorf("flushing connection tracking: %w", err)
	}
	return nil
}

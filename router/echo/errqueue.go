package echo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// problem is an error that the kernel queued for a socket (ip(7), IP_RECVERR).
type problem struct {
	unix.SockExtendedErr
	from netip.Addr // of the sender of an ICMP error; not valid: unknown
}

// queued takes an error from the queue of the socket, with the beginning of the ICMP message that
// it quotes. It returns false if the queue is empty.
func (p *pinger) queued(fd int) (e problem, quote []byte, ok bool) {
	n, controls, _, _, err := unix.Recvmsg(fd, p.quote, p.extra, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if err != nil {
		return e, nil, false
	}
	messages, err := unix.ParseSocketControlMessage(p.extra[:controls])
	if err != nil {
		return e, nil, true
	}
	for _, m := range messages {
		four := m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_RECVERR
		six := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
		if (four || six) && len(m.Data) >= int(unsafe.Sizeof(e.SockExtendedErr)) {
			e = decodeProblem(m.Data)
		}
	}
	return e, p.quote[:n], true
}

// decodeProblem decodes struct sock_extended_err, and the socket address behind it.
func decodeProblem(b []byte) problem {
	e := problem{SockExtendedErr: unix.SockExtendedErr{
		Errno: binary.NativeEndian.Uint32(b), Origin: b[4], Type: b[5], Code: b[6], Info: binary.NativeEndian.Uint32(b[8:]), Data: binary.NativeEndian.Uint32(b[12:]),
	}}
	switch b = b[16:]; {
	case len(b) >= 8 && binary.NativeEndian.Uint16(b) == unix.AF_INET:
		e.from = netip.AddrFrom4([4]byte(b[4:8]))
	case len(b) >= 24 && binary.NativeEndian.Uint16(b) == unix.AF_INET6:
		e.from = netip.AddrFrom16([16]byte(b[8:24]))
	}
	return e
}

// tooBigHere reports whether this node found a packet too big, which it may after it took the
// packet (xfrm_local_error).
func (e problem) tooBigHere() bool {
	return e.Origin == unix.SO_EE_ORIGIN_LOCAL && e.Errno == uint32(unix.EMSGSIZE)
}

// tooBig reports whether a packet is too big for its path.
func (e problem) tooBig() bool {
	return e.tooBigHere() || e.Origin == unix.SO_EE_ORIGIN_ICMP && e.Type == 3 && e.Code == 4 || e.Origin == unix.SO_EE_ORIGIN_ICMP6 && e.Type == 2
}

// ends reports whether an error ends a request. Only one request is under way at a time, so that an
// error of this node is about it.
func (e problem) ends(quote, packet []byte) bool {
	return e.tooBigHere() || e.reason() != nil && quotes(quote, packet)
}

// quotes reports whether an ICMP error quotes a request. The kernel, or a translation on the way,
// may have changed the checksum.
func quotes(quote, packet []byte) bool {
	return len(quote) >= headerSize && quote[0] == packet[0] && quote[1] == packet[1] && string(quote[4:]) == string(packet[4:len(quote)])
}

// reason describes an error; nil: it does not end a request.
func (e problem) reason() error {
	if e.tooBig() {
		return tooBig(e.Info)
	}
	six := e.Origin == unix.SO_EE_ORIGIN_ICMP6
	if !six && e.Origin != unix.SO_EE_ORIGIN_ICMP {
		return nil
	}
	switch {
	case !six && e.Type == 3:
		return e.unreachable(unreachableFour)
	case six && e.Type == 1:
		return e.unreachable(unreachableSix)
	case !six && e.Type == 11, six && e.Type == 3:
		return errors.New("hop limit exceeded, as in a loop of routes")
	}
	return nil
}

func (e problem) unreachable(texts map[uint8]string) error {
	text, ok := texts[e.Code]
	if !ok {
		text = fmt.Sprintf("code %d", e.Code)
	}
	return fmt.Errorf("destination unreachable: %s", text)
}

// Codes of destination unreachable (RFC 792, RFC 1812 section 5.2.7.1, RFC 4443 section 3.1).
var (
	unreachableFour = map[uint8]string{
		0: "no route to the network", 1: "the host does not answer", 2: "protocol unreachable", 3: "port unreachable", 9: "network prohibited", 10: "host prohibited",
		13: "prohibited by a filter",
	}
	unreachableSix = map[uint8]string{
		0: "no route", 1: "prohibited by a filter", 3: "the host does not answer", 4: "port unreachable", 5: "the source is prohibited", 6: "the route rejects it",
	}
)

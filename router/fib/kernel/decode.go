package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
)

// message is a netlink message: its header and what follows.
type message struct {
	kind, flags uint16
	seq, pid    uint32
	body        []byte
}

var errTruncated = errors.New("a netlink message is truncated")

// messages cuts a datagram into messages.
func messages(b []byte) ([]message, error) {
	var ms []message
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return nil, errTruncated
		}
		n := native.Uint32(b)
		if n < unix.SizeofNlMsghdr || uint64(n) > uint64(len(b)) {
			return nil, errTruncated
		}
		ms = append(ms, message{native.Uint16(b[4:]), native.Uint16(b[6:]), native.Uint32(b[8:]), native.Uint32(b[12:]), b[unix.SizeofNlMsghdr:n]})
		b = b[min(int(n+3)&^3, len(b)):]
	}
	return ms, nil
}

// attrs yields the attributes in b, without flags in their type. It stops at the first that is not whole.
func attrs(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			n := int(native.Uint16(b))
			if n < unix.SizeofRtAttr || n > len(b) || !yield(native.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:n]) {
				return
			}
			b = b[min((n+3)&^3, len(b)):]
		}
	}
}

func u32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return native.Uint32(b)
}

// decodeError returns what an acknowledgement (NLMSG_ERROR) or the end of a dump (NLMSG_DONE) says: nil, or an errno with the kernel's explanation.
func decodeError(m message) error {
	if len(m.body) < 4 {
		if m.kind == unix.NLMSG_DONE {
			return nil
		}
		return errTruncated
	}
	code := int32(native.Uint32(m.body))
	if code >= 0 {
		return nil
	}
	errno := unix.Errno(-code)
	rest := m.body[4:]
	if m.kind == unix.NLMSG_ERROR {
		if len(rest) < unix.SizeofNlMsghdr || m.flags&unix.NLM_F_ACK_TLVS == 0 {
			return errno
		}
		skip := unix.SizeofNlMsghdr
		if m.flags&unix.NLM_F_CAPPED == 0 {
			skip = int(u32(rest)+3) &^ 3
		}
		rest = rest[min(skip, len(rest)):]
	}
	for kind, value := range attrs(rest) {
		if kind == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w (%s)", errno, bytes.TrimRight(value, "\x00"))
		}
	}
	return errno
}

// decodeLink reads an RTM_NEWLINK.
func decodeLink(m message) (fib.Link, error) {
	if m.kind != unix.RTM_NEWLINK || len(m.body) < unix.SizeofIfInfomsg {
		return fib.Link{}, errTruncated
	}
	const up = unix.IFF_UP | unix.IFF_LOWER_UP
	l := fib.Link{Index: native.Uint32(m.body[4:]), Up: native.Uint32(m.body[8:])&up == up}
	for kind, value := range attrs(m.body[unix.SizeofIfInfomsg:]) {
		if kind == unix.IFLA_IFNAME {
			l.Name = string(bytes.TrimRight(value, "\x00"))
		}
	}
	return l, nil
}

// decodeNextHop adds what an RTM_NEWNEXTHOP says to a state.
func decodeNextHop(m message, s *fib.State) error {
	if m.kind != unix.RTM_NEWNEXTHOP || len(m.body) < sizeofNhmsg {
		return errTruncated
	}
	o := fib.Object{IPv6: m.body[0] == unix.AF_INET6}
	var members []uint32
	for kind, value := range attrs(m.body[sizeofNhmsg:]) {
		switch kind {
		case nhaID:
			o.ID = u32(value)
		case nhaGroup:
			members = []uint32{}
			for ; len(value) >= 8; value = value[8:] {
				members = append(members, native.Uint32(value))
			}
		case nhaBlackhole:
			o.Blackhole = true
		case nhaOIF:
			o.Link = u32(value)
		case nhaGateway:
			o.Gateway, _ = netip.AddrFromSlice(value)
		}
	}
	switch {
	case m.body[2] != fib.Protocol:
		s.Taken = append(s.Taken, o.ID)
	case members != nil:
		slices.Sort(members)
		s.Groups = append(s.Groups, fib.Group{ID: o.ID, Members: members})
	default:
		if o.Blackhole {
			o.Link = 0 // the kernel says loopback
		}
		s.NextHops = append(s.NextHops, o)
	}
	return nil
}

// decodeRoute reads an RTM_NEWROUTE; ok is false for a route that is not ours.
func decodeRoute(m message) (r fib.Installed, ok bool, err error) {
	if m.kind != unix.RTM_NEWROUTE || len(m.body) < unix.SizeofRtMsg {
		return r, false, errTruncated
	}
	h := m.body
	if h[4] != unix.RT_TABLE_MAIN || h[5] != fib.Protocol || h[3] != 0 || native.Uint32(h[8:])&unix.RTM_F_CLONED != 0 {
		return r, false, nil
	}
	addr := netip.IPv4Unspecified()
	if h[0] == unix.AF_INET6 {
		addr = netip.IPv6Unspecified()
	}
	var metric uint32
	for kind, value := range attrs(h[unix.SizeofRtMsg:]) {
		switch kind {
		case unix.RTA_DST:
			if a, whole := netip.AddrFromSlice(value); whole {
				addr = a
			}
		case unix.RTA_PRIORITY:
			metric = u32(value)
		case rtaNHID:
			r.NextHop = u32(value)
		}
	}
	r.Prefix = netip.PrefixFrom(addr, int(h[1]))
	r.Blackhole = h[7] == unix.RTN_BLACKHOLE
	return r, metric == fib.Metric && r.Prefix.IsValid(), nil
}

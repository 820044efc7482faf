package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/netlink"
)

var errTruncated = errors.New("a netlink message is truncated")

// messages splits a datagram into messages.
func messages(b []byte) ([]netlink.Message, error) {
	var ms []netlink.Message
	for len(b) > 0 {
		m, rest, ok := netlink.Next(b)
		if !ok {
			return nil, errTruncated
		}
		ms, b = append(ms, m), rest
	}
	return ms, nil
}

// decodeError returns the result in an acknowledgement (NLMSG_ERROR) or at the end of a dump
// (NLMSG_DONE): nil, or an errno with the kernel's explanation.
func decodeError(m netlink.Message) error {
	if len(m.Body) < 4 {
		if m.Kind == unix.NLMSG_DONE {
			return nil
		}
		return errTruncated
	}
	errno := m.Errno()
	if errno == 0 {
		return nil
	}
	rest := m.Body[4:]
	if m.Kind == unix.NLMSG_ERROR {
		if len(rest) < unix.SizeofNlMsghdr || m.Flags&unix.NLM_F_ACK_TLVS == 0 {
			return errno
		}
		skip := unix.SizeofNlMsghdr
		if m.Flags&unix.NLM_F_CAPPED == 0 {
			skip = int(netlink.Uint32(rest)+3) &^ 3
		}
		rest = rest[min(skip, len(rest)):]
	}
	for kind, value := range netlink.Attributes(rest) {
		if kind == unix.NLMSGERR_ATTR_MSG {
			return fmt.Errorf("%w (%s)", errno, netlink.Text(value))
		}
	}
	return errno
}

// decodeLink reads an RTM_NEWLINK.
func decodeLink(m netlink.Message) (fib.Link, error) {
	if m.Kind != unix.RTM_NEWLINK || len(m.Body) < unix.SizeofIfInfomsg {
		return fib.Link{}, errTruncated
	}
	const up = unix.IFF_UP | unix.IFF_LOWER_UP
	l := fib.Link{Index: native.Uint32(m.Body[4:]), Up: native.Uint32(m.Body[8:])&up == up}
	for kind, value := range netlink.Attributes(m.Body[unix.SizeofIfInfomsg:]) {
		if kind == unix.IFLA_IFNAME {
			l.Name = netlink.Text(value)
		}
	}
	return l, nil
}

// decodeNextHop adds the object of an RTM_NEWNEXTHOP to a state.
func decodeNextHop(m netlink.Message, s *fib.State) error {
	if m.Kind != unix.RTM_NEWNEXTHOP || len(m.Body) < unix.SizeofNhmsg {
		return errTruncated
	}
	o := fib.Object{IPv6: m.Body[0] == unix.AF_INET6}
	var members []uint32
	var buckets uint16
	for kind, value := range netlink.Attributes(m.Body[unix.SizeofNhmsg:]) {
		switch kind {
		case unix.NHA_ID:
			o.ID = netlink.Uint32(value)
		case unix.NHA_GROUP:
			members = []uint32{}
			for ; len(value) >= 8; value = value[8:] {
				members = append(members, native.Uint32(value))
			}
		case nhaResGroup:
			for kind, value := range netlink.Attributes(value) {
				if kind == nhaResGroupBuckets && len(value) >= 2 {
					buckets = native.Uint16(value)
				}
			}
		case unix.NHA_BLACKHOLE:
			o.Blackhole = true
		case unix.NHA_OIF:
			o.Link = netlink.Uint32(value)
		case unix.NHA_GATEWAY:
			o.Gateway, _ = netip.AddrFromSlice(value)
		}
	}
	switch {
	case m.Body[2] != fib.Protocol:
		s.Taken = append(s.Taken, o.ID)
	case members != nil:
		slices.Sort(members)
		s.Groups = append(s.Groups, fib.Group{ID: o.ID, Members: members, Buckets: buckets})
	default:
		if o.Blackhole {
			o.Link = 0 // the kernel reports the loopback interface
		}
		s.NextHops = append(s.NextHops, o)
	}
	return nil
}

// decodeBucket reads the group of a bucket and the member that has it (RTM_NEWNEXTHOPBUCKET).
func decodeBucket(m netlink.Message) (group, member uint32, err error) {
	if m.Kind != rtmNewNextHopBucket || len(m.Body) < unix.SizeofNhmsg {
		return 0, 0, errTruncated
	}
	for kind, value := range netlink.Attributes(m.Body[unix.SizeofNhmsg:]) {
		switch kind {
		case unix.NHA_ID:
			group = netlink.Uint32(value)
		case nhaResBucket:
			for kind, value := range netlink.Attributes(value) {
				if kind == nhaResBucketNHID {
					member = netlink.Uint32(value)
				}
			}
		}
	}
	return group, member, nil
}

// decodeRoute reads an RTM_NEWROUTE; ok is false for a route that is not ours.
func decodeRoute(m netlink.Message) (r fib.Installed, ok bool, err error) {
	if m.Kind != unix.RTM_NEWROUTE || len(m.Body) < unix.SizeofRtMsg {
		return r, false, errTruncated
	}
	h := m.Body
	if h[5] != fib.Protocol || h[3] != 0 || native.Uint32(h[8:])&unix.RTM_F_CLONED != 0 {
		return r, false, nil
	}
	addr := netip.IPv4Unspecified()
	if h[0] == unix.AF_INET6 {
		addr = netip.IPv6Unspecified()
	}
	metric, table := uint32(0), uint32(h[4])
	for kind, value := range netlink.Attributes(h[unix.SizeofRtMsg:]) {
		switch kind {
		case unix.RTA_DST:
			if a, whole := netip.AddrFromSlice(value); whole {
				addr = a
			}
		case unix.RTA_TABLE:
			table = netlink.Uint32(value)
		case unix.RTA_PRIORITY:
			metric = netlink.Uint32(value)
		case rtaNHID:
			r.NextHop = netlink.Uint32(value)
		}
	}
	r.Key = fib.Key{Domain: fib.DomainOf(table), Prefix: netip.PrefixFrom(addr, int(h[1]))}
	r.Blackhole = h[7] == unix.RTN_BLACKHOLE
	return r, metric == fib.Metric && r.Key.Prefix.IsValid(), nil
}

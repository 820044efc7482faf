package kernel

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/netlink"
)

const (
	// rtaNHID is RTA_NH_ID of linux/rtnetlink.h.
	rtaNHID = 30
	// Of linux/nexthop.h, which golang.org/x/sys/unix does not have: the type of a resilient group,
	// and its attributes.
	nexthopGroupTypeRes        = 1
	nhaResGroup                = 12
	nhaResGroupBuckets         = 1
	nhaResGroupIdleTimer       = 2
	nhaResGroupUnbalancedTimer = 3
	// Of linux/rtnetlink.h and linux/nexthop.h: messages about the buckets of resilient groups.
	rtmNewNextHopBucket = 116
	rtmGetNextHopBucket = 118
	nhaResBucket        = 13
	nhaResBucketNHID    = 3
)

var native = binary.NativeEndian

func attrAddr(b []byte, kind uint16, a netip.Addr) []byte {
	if a.Is4() {
		v := a.As4()
		return append(netlink.AppendHeader(b, kind, 4), v[:]...)
	}
	v := a.As16()
	return append(netlink.AppendHeader(b, kind, 16), v[:]...)
}

func family(ipv6 bool) byte {
	if ipv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// compile appends the netlink message of a change.
func compile(b []byte, op fib.Op, seq uint32, flags uint16) ([]byte, error) {
	var start int
	switch op.Kind {
	case fib.SetNextHop:
		o := op.Object
		b, start = netlink.Begin(b, unix.RTM_NEWNEXTHOP, flags|unix.NLM_F_CREATE|unix.NLM_F_REPLACE, seq)
		var nhFlags uint32
		if o.Gateway.IsValid() {
			// The gateway is reachable on a point-to-point link even if no inside address covers
			// it.
			nhFlags = unix.RTNH_F_ONLINK
		}
		b = append(b, family(o.IPv6), unix.RT_SCOPE_UNIVERSE, fib.Protocol, 0)
		b = native.AppendUint32(b, nhFlags)
		b = netlink.AppendUint32(b, unix.NHA_ID, op.ID)
		if o.Blackhole {
			b = netlink.AppendHeader(b, unix.NHA_BLACKHOLE, 0)
		} else {
			b = netlink.AppendUint32(b, unix.NHA_OIF, o.Link)
			if o.Gateway.IsValid() {
				b = attrAddr(b, unix.NHA_GATEWAY, o.Gateway)
			}
		}
	case fib.SetGroup:
		b, start = netlink.Begin(b, unix.RTM_NEWNEXTHOP, flags|unix.NLM_F_CREATE|unix.NLM_F_REPLACE, seq)
		b = append(b, unix.AF_UNSPEC, unix.RT_SCOPE_UNIVERSE, fib.Protocol, 0, 0, 0, 0, 0)
		b = netlink.AppendUint32(b, unix.NHA_ID, op.ID)
		b = netlink.AppendHeader(b, unix.NHA_GROUP, 8*len(op.Members))
		for _, id := range op.Members {
			b = native.AppendUint32(b, id)
			b = append(b, 0, 0, 0, 0) // weight minus one, reserved
		}
		if op.Buckets > 0 {
			b = resilient(b, op.Buckets)
		}
	case fib.DeleteGroup, fib.DeleteNextHop:
		b, start = netlink.Begin(b, unix.RTM_DELNEXTHOP, flags, seq)
		b = append(b, unix.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0)
		b = netlink.AppendUint32(b, unix.NHA_ID, op.ID)
	case fib.AddRoute, fib.ReplaceRoute, fib.DeleteRoute:
		kind, more := uint16(unix.RTM_NEWROUTE), uint16(unix.NLM_F_CREATE|unix.NLM_F_EXCL)
		switch op.Kind {
		case fib.ReplaceRoute:
			more = unix.NLM_F_REPLACE
		case fib.DeleteRoute:
			kind, more = unix.RTM_DELROUTE, 0
		}
		b, start = netlink.Begin(b, kind, flags|more, seq)
		routeType, scope := byte(unix.RTN_UNICAST), byte(unix.RT_SCOPE_UNIVERSE)
		switch {
		case op.Kind == fib.DeleteRoute:
			routeType, scope = unix.RTN_UNSPEC, unix.RT_SCOPE_NOWHERE // any type and scope
		case op.ID == 0:
			routeType = unix.RTN_BLACKHOLE
		}
		prefix, table := op.Key.Prefix, op.Key.Domain.Table()
		b = append(b, family(prefix.Addr().Is6()), byte(prefix.Bits()), 0, 0,
			unix.RT_TABLE_UNSPEC, fib.Protocol, scope, routeType, 0, 0, 0, 0)
		b = netlink.AppendUint32(b, unix.RTA_TABLE, table) // rtm_table has 8 bits
		b = attrAddr(b, unix.RTA_DST, prefix.Addr())
		b = netlink.AppendUint32(b, unix.RTA_PRIORITY, fib.Metric)
		if op.ID != 0 {
			b = netlink.AppendUint32(b, rtaNHID, op.ID)
		}
	default:
		return b, fmt.Errorf("unknown kind of change %d", op.Kind)
	}
	return netlink.End(b, start), nil
}

// idleTimer is how long a bucket must have had no packet before another member takes it, in
// hundredths of a second. A shorter pause may be one of a flow in progress, whose packets would
// arrive in another order.
const idleTimer = 100

// resilient appends the type of a resilient group. Without an unbalanced timer, a bucket in use
// never moves while its member is there.
func resilient(b []byte, buckets uint16) []byte {
	b = netlink.AppendHeader(b, unix.NHA_GROUP_TYPE, 2)
	b = append(native.AppendUint16(b, nexthopGroupTypeRes), 0, 0)
	b = netlink.AppendHeader(b, nhaResGroup|unix.NLA_F_NESTED, 8+8+8)
	b = netlink.AppendHeader(b, nhaResGroupBuckets, 2)
	b = append(native.AppendUint16(b, buckets), 0, 0)
	b = netlink.AppendUint32(b, nhaResGroupIdleTimer, idleTimer)
	return netlink.AppendUint32(b, nhaResGroupUnbalancedTimer, 0)
}

// describe returns what a change does, for errors.
func describe(op fib.Op) string {
	switch op.Kind {
	case fib.SetNextHop:
		return fmt.Sprintf("setting nexthop object %d on interface %d", op.ID, op.Object.Link)
	case fib.SetGroup:
		return fmt.Sprintf("setting nexthop group %d to %d", op.ID, op.Members)
	case fib.AddRoute:
		return fmt.Sprintf("adding route %v", op.Key)
	case fib.ReplaceRoute:
		return fmt.Sprintf("replacing route %v", op.Key)
	case fib.DeleteRoute:
		return fmt.Sprintf("deleting route %v", op.Key)
	case fib.DeleteGroup:
		return fmt.Sprintf("deleting nexthop group %d", op.ID)
	default:
		return fmt.Sprintf("deleting nexthop object %d", op.ID)
	}
}

// linkDump and nextHopDump request all objects of a kind.
func linkDump(seq uint32) []byte {
	b, start := netlink.Begin(nil, unix.RTM_GETLINK, unix.NLM_F_DUMP, seq)
	return netlink.End(append(b, make([]byte, unix.SizeofIfInfomsg)...), start)
}

func nextHopDump(seq uint32) []byte {
	b, start := netlink.Begin(nil, unix.RTM_GETNEXTHOP, unix.NLM_F_DUMP, seq)
	return netlink.End(append(b, make([]byte, unix.SizeofNhmsg)...), start)
}

func bucketDump(seq uint32) []byte {
	b, start := netlink.Begin(nil, rtmGetNextHopBucket, unix.NLM_F_DUMP, seq)
	return netlink.End(append(b, make([]byte, unix.SizeofNhmsg)...), start)
}

// routeDump requests the routes with our protocol of every table, because a table that is no longer
// wanted may still have some. The kernel filters by protocol (NETLINK_GET_STRICT_CHK), so that the
// routes of others cost no messages.
func routeDump(seq uint32, family byte) []byte {
	b, start := netlink.Begin(nil, unix.RTM_GETROUTE, unix.NLM_F_DUMP, seq)
	b = append(b, family, 0, 0, 0, unix.RT_TABLE_UNSPEC, fib.Protocol, 0, 0, 0, 0, 0, 0)
	return netlink.End(b, start)
}

package conntrack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/netlink"
)

// Attributes of ctnetlink, from the kernel's uapi/linux/netfilter/nfnetlink_conntrack.h.
const (
	attrOriginal        = 1
	attrReply           = 2
	attrStatus          = 3
	attrProtocolInfo    = 4
	attrTimeout         = 7
	attrMark            = 8
	attrCounterOriginal = 9
	attrCounterReply    = 10
	attrID              = 12
	attrZone            = 18
	attrTimestamp       = 20

	tupleIP, tupleProtocol        = 1, 2
	ip4Source, ip4Destination     = 1, 2
	ip6Source, ip6Destination     = 3, 4
	protocolNumber                = 1
	sourcePort, destinationPort   = 2, 3
	icmpID, icmpType, icmpCode    = 4, 5, 6
	icmp6ID, icmp6Type, icmp6Code = 7, 8, 9
	infoTCP, tcpState             = 1, 1
	// packets and bytes of a counter, start and stop of a timestamp
	pairFirst, pairSecond         = 1, 2
	globalEntries, globalLimit    = 1, 2
	statInsertFailed              = 9
	statDrop, statEarlyDrop       = 10, 11
	messageNew, messageGet        = 0, 1
	messageDelete                 = 2
	messageStatsCPU, messageStats = 4, 5
	headerSize                    = unix.SizeofNlMsghdr + 4 // including struct nfgenmsg
	subsystem                     = unix.NFNL_SUBSYS_CTNETLINK << 8
)

// errDamaged means that a message is truncated or damaged otherwise.
var errDamaged = errors.New("damaged netlink message")

// number decodes an unsigned number in network byte order. The kernel sends one, two, four or
// eight bytes; for any other length it returns 0.
func number(b []byte) uint64 {
	switch len(b) {
	case 1:
		return uint64(b[0])
	case 2:
		return uint64(binary.BigEndian.Uint16(b))
	case 4:
		return uint64(binary.BigEndian.Uint32(b))
	case 8:
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// decode decodes the attributes of a flow, after the headers. It keeps no reference to b, and sets
// all fields of f.
func decode(b []byte, f *Flow) error {
	*f = Flow{}
	ok := true
	for whole := true; len(b) > 0; ok = ok && whole {
		var kind uint16
		var data []byte
		kind, data, b, whole = netlink.Attribute(b)
		switch kind {
		case attrOriginal:
			whole = decodeTuple(data, &f.Original, &f.Protocol)
		case attrReply:
			whole = decodeTuple(data, &f.Reply, &f.Protocol)
		case attrStatus:
			f.Status = Status(number(data))
		case attrProtocolInfo:
			whole = decodeTCP(data, &f.TCPState)
		case attrTimeout:
			f.Timeout = time.Duration(uint32(number(data))) * time.Second
		case attrMark:
			f.Mark = uint32(number(data))
		case attrCounterOriginal:
			whole = decodePair(data, &f.Sent.Packets, &f.Sent.Bytes)
		case attrCounterReply:
			whole = decodePair(data, &f.Received.Packets, &f.Received.Bytes)
		case attrID:
			f.ID = uint32(number(data))
		case attrZone:
			f.Zone = uint16(number(data))
		case attrTimestamp:
			var start, stop uint64
			whole = decodePair(data, &start, &stop)
			if start != 0 {
				f.Start = time.Unix(0, int64(start))
			}
			if stop != 0 {
				f.End = time.Unix(0, int64(stop))
			}
		}
	}
	if !ok || !f.Original.Source.IsValid() || !f.Reply.Source.IsValid() {
		return errDamaged
	}
	return nil
}

// appendDeletion appends the request to delete exactly the flow in a message.
func appendDeletion(b []byte, m netlink.Message) []byte {
	b, start := netlink.Begin(b, subsystem|messageDelete, unix.NLM_F_ACK, 0)
	b = append(b, m.Body[0], unix.NFNETLINK_V0, 0, 0)
	for rest := m.Body[4:]; len(rest) > 0; {
		kind, _, after, _ := netlink.Attribute(rest)
		if kind == attrOriginal || kind == attrZone || kind == attrID {
			b = append(b, rest[:len(rest)-len(after)]...)
		}
		rest = after
	}
	return netlink.End(b, start)
}

// decodeTuple reports whether the tuple is complete and has two addresses.
func decodeTuple(b []byte, t *Tuple, protocol *uint8) bool {
	var source, destination netip.Addr
	var from, to uint16
	for len(b) > 0 {
		kind, inner, rest, ok := netlink.Attribute(b)
		if b = rest; !ok {
			return false
		}
		for len(inner) > 0 && (kind == tupleIP || kind == tupleProtocol) {
			inside, data, rest, ok := netlink.Attribute(inner)
			if inner = rest; !ok {
				return false
			}
			if kind == tupleIP {
				switch inside {
				case ip4Source, ip6Source:
					source, _ = netip.AddrFromSlice(data)
				case ip4Destination, ip6Destination:
					destination, _ = netip.AddrFromSlice(data)
				}
				continue
			}
			switch v := uint16(number(data)); inside {
			case protocolNumber:
				*protocol = uint8(v)
			case sourcePort, icmpID, icmp6ID:
				from = v
			case destinationPort:
				to = v
			case icmpType, icmp6Type:
				to |= v << 8
			case icmpCode, icmp6Code:
				to |= v & 0xff
			}
		}
	}
	t.Source, t.Destination = netip.AddrPortFrom(source, from), netip.AddrPortFrom(destination, to)
	return source.IsValid() && destination.IsValid()
}

// decodeTCP decodes the state from the attributes of the protocol, and reports whether they are
// complete.
func decodeTCP(b []byte, state *uint8) bool {
	for len(b) > 0 {
		kind, inner, rest, ok := netlink.Attribute(b)
		if b = rest; !ok {
			return false
		}
		for len(inner) > 0 && kind == infoTCP {
			kind, data, rest, ok := netlink.Attribute(inner)
			if inner = rest; !ok {
				return false
			}
			if kind == tcpState {
				*state = uint8(number(data))
			}
		}
	}
	return true
}

// decodePair decodes the attributes 1 and 2 of a counter or a timestamp, and reports whether they
// are complete.
func decodePair(b []byte, first, second *uint64) bool {
	for len(b) > 0 {
		kind, data, rest, ok := netlink.Attribute(b)
		if b = rest; !ok {
			return false
		}
		switch kind {
		case pairFirst:
			*first = number(data)
		case pairSecond:
			*second = number(data)
		}
	}
	return true
}

// body returns the attributes of a ctnetlink message, which follow a struct nfgenmsg.
func body(m netlink.Message) ([]byte, error) {
	if len(m.Body) < 4 {
		return nil, errDamaged
	}
	return m.Body[4:], nil
}

// failure returns the error in an NLMSG_ERROR or NLMSG_DONE.
func failure(m netlink.Message) error {
	if errno := m.Errno(); errno != 0 {
		return errno
	}
	return nil
}

// Stats are the statistics of the table.
type Stats struct {
	// Entries is the number of flows in the table, Limit its maximum
	// (net.netfilter.nf_conntrack_max, which all network namespaces of a machine share).
	Entries, Limit uint32
	// InsertFailed counts new flows that found no free tuple, or lost a race for it. Dropped
	// counts packets of new flows that found the table full. EvictedEarly counts flows that were
	// evicted to make room. All count since the namespace was created.
	InsertFailed, Dropped, EvictedEarly uint64
}

// correct subtracts the failed insertions from the dropped packets, because the kernel counts each
// failed insertion in both.
func (s *Stats) correct() { s.Dropped -= min(s.Dropped, s.InsertFailed) }

// decodeStats adds the values of a message to s.
func decodeStats(m netlink.Message, s *Stats) error {
	b, err := body(m)
	if err != nil {
		return err
	}
	for len(b) > 0 {
		kind, data, rest, ok := netlink.Attribute(b)
		if b = rest; !ok {
			return errDamaged
		}
		switch v := number(data); {
		case m.Kind == subsystem|messageStats && kind == globalEntries:
			s.Entries = uint32(v)
		case m.Kind == subsystem|messageStats && kind == globalLimit:
			s.Limit = uint32(v)
		case m.Kind == subsystem|messageStatsCPU && kind == statInsertFailed:
			s.InsertFailed += v
		case m.Kind == subsystem|messageStatsCPU && kind == statDrop:
			s.Dropped += v
		case m.Kind == subsystem|messageStatsCPU && kind == statEarlyDrop:
			s.EvictedEarly += v
		}
	}
	return nil
}

package conntrack

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
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

	tupleIP, tupleProtocol               = 1, 2
	ip4Source, ip4Destination            = 1, 2
	ip6Source, ip6Destination            = 3, 4
	protocolNumber                       = 1
	sourcePort, destinationPort          = 2, 3
	icmpID, icmpType, icmpCode           = 4, 5, 6
	icmp6ID, icmp6Type, icmp6Code        = 7, 8, 9
	infoTCP, tcpState                    = 1, 1
	counterPackets, counterBytes         = 1, 2
	timestampStart, timestampStop        = 1, 2
	globalEntries, globalLimit           = 1, 2
	statInsertFailed                     = 9
	statDrop, statEarlyDrop              = 10, 11
	messageNew, messageGet               = 0, 1
	messageDelete                        = 2
	messageStatsCPU, messageStats        = 4, 5
	headerSize                           = unix.SizeofNlMsghdr + 4 // and struct nfgenmsg
	subsystem                            = unix.NFNL_SUBSYS_CTNETLINK << 8
	nested                        uint16 = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
)

// errTruncated means that a message is not as long as it says, or is damaged otherwise.
var errTruncated = errors.New("a damaged netlink message")

// attributes walks over the attributes in b.
type attributes struct {
	b    []byte
	kind uint16
	data []byte
	bad  bool // what is left is no attribute
}

func (a *attributes) next() bool {
	if len(a.b) < unix.SizeofNlAttr {
		a.bad = a.bad || len(a.b) > 0
		return false
	}
	n := int(binary.NativeEndian.Uint16(a.b))
	if n < unix.SizeofNlAttr || n > len(a.b) {
		a.bad = true
		return false
	}
	a.kind = binary.NativeEndian.Uint16(a.b[2:]) &^ nested
	a.data = a.b[unix.SizeofNlAttr:n]
	a.b = a.b[min((n+3)&^3, len(a.b)):]
	return true
}

// number reads an unsigned number in network byte order, of whatever length up to eight bytes.
func number(b []byte) (v uint64) {
	if len(b) > 8 {
		b = b[:8]
	}
	for _, c := range b {
		v = v<<8 | uint64(c)
	}
	return v
}

// decode reads the attributes of a flow, behind the headers. It keeps nothing of b, and sets all of f.
func decode(b []byte, f *Flow) error {
	*f = Flow{}
	a := attributes{b: b}
	ok := true
	for a.next() {
		switch a.kind {
		case attrOriginal:
			ok = decodeTuple(a.data, &f.Original, &f.Protocol) && ok
		case attrReply:
			ok = decodeTuple(a.data, &f.Reply, &f.Protocol) && ok
		case attrStatus:
			f.Status = Status(number(a.data))
		case attrProtocolInfo:
			for info := (attributes{b: a.data}); info.next(); {
				if info.kind != infoTCP {
					continue
				}
				for tcp := (attributes{b: info.data}); tcp.next(); {
					if tcp.kind == tcpState {
						f.TCPState = uint8(number(tcp.data))
					}
				}
			}
		case attrTimeout:
			f.Timeout = time.Duration(uint32(number(a.data))) * time.Second
		case attrMark:
			f.Mark = uint32(number(a.data))
		case attrCounterOriginal:
			decodeCounter(a.data, &f.Sent)
		case attrCounterReply:
			decodeCounter(a.data, &f.Received)
		case attrID:
			f.ID = uint32(number(a.data))
		case attrZone:
			f.Zone = uint16(number(a.data))
		case attrTimestamp:
			for t := (attributes{b: a.data}); t.next(); {
				switch t.kind {
				case timestampStart:
					f.Start = time.Unix(0, int64(number(t.data)))
				case timestampStop:
					f.End = time.Unix(0, int64(number(t.data)))
				}
			}
		}
	}
	if a.bad || !ok || !f.Original.Source.IsValid() || !f.Reply.Source.IsValid() {
		return errTruncated
	}
	return nil
}

// appendDeletion appends the request to delete the flow that a message tells of, and no other one.
func appendDeletion(b []byte, m message) []byte {
	at := len(b)
	b = append(b, make([]byte, headerSize)...)
	a := attributes{b: m.payload[4:]}
	for before := a.b; a.next(); before = a.b {
		if a.kind == attrOriginal || a.kind == attrZone || a.kind == attrID {
			b = append(b, before[:len(before)-len(a.b)]...)
		}
	}
	h := b[at:]
	binary.NativeEndian.PutUint32(h, uint32(len(h)))
	binary.NativeEndian.PutUint16(h[4:], subsystem|messageDelete)
	binary.NativeEndian.PutUint16(h[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	h[unix.SizeofNlMsghdr], h[unix.SizeofNlMsghdr+1] = m.payload[0], unix.NFNETLINK_V0
	return b
}

// decodeTuple says whether the tuple has two addresses.
func decodeTuple(b []byte, t *Tuple, protocol *uint8) bool {
	var source, destination netip.Addr
	var from, to uint16
	for a := (attributes{b: b}); a.next(); {
		switch a.kind {
		case tupleIP:
			for ip := (attributes{b: a.data}); ip.next(); {
				switch ip.kind {
				case ip4Source, ip6Source:
					source, _ = netip.AddrFromSlice(ip.data)
				case ip4Destination, ip6Destination:
					destination, _ = netip.AddrFromSlice(ip.data)
				}
			}
		case tupleProtocol:
			for p := (attributes{b: a.data}); p.next(); {
				switch v := number(p.data); p.kind {
				case protocolNumber:
					*protocol = uint8(v)
				case sourcePort, icmpID, icmp6ID:
					from = uint16(v)
				case destinationPort:
					to = uint16(v)
				case icmpType, icmp6Type:
					to |= uint16(v&0xff) << 8
				case icmpCode, icmp6Code:
					to |= uint16(v & 0xff)
				}
			}
		}
	}
	t.Source, t.Destination = netip.AddrPortFrom(source, from), netip.AddrPortFrom(destination, to)
	return source.IsValid() && destination.IsValid()
}

func decodeCounter(b []byte, c *Counter) {
	for a := (attributes{b: b}); a.next(); {
		switch a.kind {
		case counterPackets:
			c.Packets = number(a.data)
		case counterBytes:
			c.Bytes = number(a.data)
		}
	}
}

// message is one netlink message.
type message struct {
	kind, flags uint16
	sequence    uint32
	payload     []byte
}

// split takes the first message off a datagram.
func split(b []byte) (m message, rest []byte, err error) {
	if len(b) < unix.SizeofNlMsghdr {
		return m, nil, errTruncated
	}
	n := int(binary.NativeEndian.Uint32(b))
	if n < unix.SizeofNlMsghdr || n > len(b) {
		return m, nil, errTruncated
	}
	m = message{binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), binary.NativeEndian.Uint32(b[8:]), b[unix.SizeofNlMsghdr:n]}
	return m, b[min((n+3)&^3, len(b)):], nil
}

// body returns the attributes of a message of ctnetlink, which are behind a struct nfgenmsg.
func (m message) body() ([]byte, error) {
	if len(m.payload) < 4 {
		return nil, errTruncated
	}
	return m.payload[4:], nil
}

// err returns what an NLMSG_ERROR or NLMSG_DONE says.
func (m message) err() error {
	if len(m.payload) < 4 {
		return nil
	}
	if code := int32(binary.NativeEndian.Uint32(m.payload)); code < 0 {
		return unix.Errno(-code)
	}
	return nil
}

// Stats are the table's figures.
type Stats struct {
	// Entries are the flows in the table, Limit is how many it holds at most (net.netfilter.nf_conntrack_max, which all
	// network namespaces of a machine share).
	Entries, Limit uint32
	// InsertFailed counts new flows that found no free tuple, or lost a race for it; Dropped packets of new flows that found no room in
	// the table; EvictedEarly flows that were given up to make room. All since the namespace was made.
	InsertFailed, Dropped, EvictedEarly uint64
}

// decodeStats adds what a message says to s.
func decodeStats(m message, s *Stats) error {
	b, err := m.body()
	if err != nil {
		return err
	}
	a := attributes{b: b}
	for a.next() {
		switch v := number(a.data); {
		case m.kind == subsystem|messageStats && a.kind == globalEntries:
			s.Entries = uint32(v)
		case m.kind == subsystem|messageStats && a.kind == globalLimit:
			s.Limit = uint32(v)
		case m.kind == subsystem|messageStatsCPU && a.kind == statInsertFailed:
			s.InsertFailed += v
		case m.kind == subsystem|messageStatsCPU && a.kind == statDrop:
			s.Dropped += v
		case m.kind == subsystem|messageStatsCPU && a.kind == statEarlyDrop:
			s.EvictedEarly += v
		}
	}
	if a.bad {
		return errTruncated
	}
	return nil
}

// Package stamp encodes and decodes the test packets of STAMP (RFC 8762) in unauthenticated mode,
// with the TLVs of RFC 8972 that isthmus needs. Nodes send them inside encrypted tunnels, which
// authenticate the sender.
package stamp

import (
	"encoding/binary"
	"errors"
	"time"
)

const (
	// Port is the UDP port of Session-Reflectors (RFC 8762 section 4.1).
	Port = 862
	// Size is the size of a packet without TLVs, in bytes (RFC 8762 sections 4.2.1 and 4.3.1).
	Size = 44

	// tlvHeader is the size of the flags, the type and the length of a TLV (RFC 8972 section 4).
	tlvHeader = 4
	// maxTLVs bounds the TLVs of a packet.
	maxTLVs = 16
	// unrecognized is a flag that a sender sets. A reflector that knows the type of the TLV clears
	// it (RFC 8972 section 4).
	unrecognized = 0x80
	// errorEstimate says that the clock is not synchronized, and has the smallest error that is
	// possible (RFC 4656 section 4.1.2): only differences on one clock are used.
	errorEstimate = 1
)

// Types of TLVs (RFC 8972 section 5.1): reportType is one for private use.
const (
	paddingType = 1
	reportType  = 240
)

// The errors of Parse.
var (
	errShort  = errors.New("the packet is shorter than 44 bytes")
	errTLV    = errors.New("a TLV is longer than the packet")
	errTLVs   = errors.New("the packet has more than 16 TLVs")
	errReport = errors.New("the report has an unknown form")
)

// Stamp is what each packet begins with.
type Stamp struct {
	Sequence uint32
	Time     uint64 // of sending, in NTP format
	Error    uint16 // error estimate
	Session  uint16 // SSID (RFC 8972 section 3)
}

// Packet is a packet of a Session-Sender or of a Session-Reflector.
type Packet struct {
	Stamp
	// Received, Sender and TTL are set by a reflector: the time when it received the packet of the
	// sender, the begin of that packet, and its TTL.
	Received uint64
	Sender   Stamp
	TTL      uint8
	// Report is that of an isthmus node. Nil: the packet has none.
	Report *Report
	// Reply says that a reflector recognized the report. A packet without a report does not say who
	// sent it.
	Reply bool
}

// AppendRequest appends the packet of a sender, with padding up to a size in bytes.
func AppendRequest(b []byte, p *Packet, size int) []byte {
	begin := len(b)
	b = appendStamp(b, p.Stamp)
	b = append(b, make([]byte, Size-16)...)
	b = appendReport(b, p.Report, unrecognized)
	if left := size - (len(b) - begin) - tlvHeader; left >= 0 {
		b = append(b, unrecognized, paddingType)
		b = binary.BigEndian.AppendUint16(b, uint16(left))
		b = append(b, make([]byte, left)...)
	}
	return b
}

// AppendReply appends the packet of a reflector. It has the size of the sender's (RFC 8762 section
// 4.3), which the caller gives as zero if the path back may be narrower.
func AppendReply(b []byte, p *Packet, size int) []byte {
	begin := len(b)
	b = appendStamp(b, p.Stamp)
	b = binary.BigEndian.AppendUint64(b, p.Received)
	b = binary.BigEndian.AppendUint32(b, p.Sender.Sequence)
	b = binary.BigEndian.AppendUint64(b, p.Sender.Time)
	b = binary.BigEndian.AppendUint16(b, p.Sender.Error)
	b = append(b, 0, 0, p.TTL, 0, 0, 0)
	b = appendReport(b, p.Report, 0)
	return append(b, make([]byte, max(0, size-(len(b)-begin)))...)
}

func appendStamp(b []byte, s Stamp) []byte {
	b = binary.BigEndian.AppendUint32(b, s.Sequence)
	b = binary.BigEndian.AppendUint64(b, s.Time)
	b = binary.BigEndian.AppendUint16(b, errorEstimate)
	return binary.BigEndian.AppendUint16(b, s.Session)
}

// Parse decodes a packet.
func Parse(b []byte) (p Packet, err error) {
	if len(b) < Size {
		return p, errShort
	}
	p.Stamp = Stamp{binary.BigEndian.Uint32(b), binary.BigEndian.Uint64(b[4:]), binary.BigEndian.Uint16(b[12:]), binary.BigEndian.Uint16(b[14:])}
	p.Received = binary.BigEndian.Uint64(b[16:])
	p.Sender = Stamp{Sequence: binary.BigEndian.Uint32(b[24:]), Time: binary.BigEndian.Uint64(b[28:]), Error: binary.BigEndian.Uint16(b[36:])}
	p.TTL = b[40]
	b = b[Size:]
	for n := 0; len(b) >= tlvHeader; n++ {
		flags, kind, size := b[0], b[1], int(binary.BigEndian.Uint16(b[2:]))
		switch {
		case kind == 0:
			return p, nil // padding without a TLV, as senders without RFC 8972 add it
		case n == maxTLVs:
			return p, errTLVs
		case size > len(b)-tlvHeader:
			return p, errTLV
		}
		value := b[tlvHeader : tlvHeader+size]
		b = b[tlvHeader+size:]
		if kind != reportType || p.Report != nil {
			continue
		}
		if p.Report, err = parseReport(value); err != nil {
			return p, err
		}
		p.Reply = flags&unrecognized == 0
	}
	return p, nil
}

// epoch is the difference of the epochs of NTP and Unix, in seconds (RFC 5905 appendix A.4).
const epoch = 2_208_988_800

// Time returns a time in NTP format (RFC 5905 section 6). It ends at the end of the era, in 2036,
// and begins again, so that differences stay right.
func Time(t time.Time) uint64 {
	seconds, nanos := uint64(t.Unix()+epoch), uint64(t.Nanosecond())
	return seconds<<32 | nanos<<32/uint64(time.Second)
}

// Between returns the time from one time to another one.
func Between(from, to uint64) time.Duration {
	d := int64(to - from)
	return time.Duration(d>>32)*time.Second + time.Duration((d&(1<<32-1))*int64(time.Second)>>32)
}

package filter

import (
	"encoding/binary"
	"fmt"
)

// Types of path attributes that are parsed. All other optional ones are removed.
const (
	attrOrigin          = 1
	attrASPath          = 2
	attrNextHop         = 3
	attrMED             = 4
	attrLocalPref       = 5
	attrAtomicAggregate = 6
	attrAggregator      = 7
	attrCommunities     = 8  // RFC 1997
	attrMPReach         = 14 // RFC 4760
	attrMPUnreach       = 15
	attrExtCommunities  = 16 // RFC 4360
	attrAS4Path         = 17 // RFC 6793
	attrAS4Aggregator   = 18
	attrLargeCommunity  = 32 // RFC 8092
)

const (
	flagOptional   = 0x80
	flagTransitive = 0x40
	flagPartial    = 0x20
	flagExtended   = 0x10
)

// flags holds the Optional and Transitive bits that each attribute must have.
var flags = map[byte]byte{
	attrOrigin: flagTransitive, attrASPath: flagTransitive, attrNextHop: flagTransitive,
	attrMED: flagOptional, attrLocalPref: flagTransitive, attrAtomicAggregate: flagTransitive,
	attrAggregator: flagOptional | flagTransitive, attrCommunities: flagOptional | flagTransitive,
	attrMPReach: flagOptional, attrMPUnreach: flagOptional,
	attrExtCommunities: flagOptional | flagTransitive, attrAS4Path: flagOptional | flagTransitive,
	attrAS4Aggregator: flagOptional | flagTransitive, attrLargeCommunity: flagOptional | flagTransitive,
}

// known is flags as an array; 0 stands for an attribute that is not parsed.
var known = func() (a [256]byte) {
	for t, f := range flags {
		a[t] = f
	}
	return a
}()

// asTrans replaces a number that does not fit into two octets (RFC 6793).
const asTrans = 23456

// update is one UPDATE message during processing. Its slices keep their capacity from message to
// message, or point into the message.
type update struct {
	withdrawn []byte // withdrawn prefixes of the session's family
	nlri      []byte // prefixes that use NEXT_HOP
	reach     []byte // prefixes in MP_REACH_NLRI
	hop       []byte // NEXT_HOP: 4 bytes
	reachHop  []byte // in MP_REACH_NLRI: 4 or 16 bytes

	reachable bool // the message has reachable prefixes, maybe of other families
	end       bool // MP_UNREACH_NLRI of the session's family without a prefix
	count     int  // attributes

	seen                               [256]bool
	origin, path, as4path              []byte
	med, pref                          []byte
	atomic                             bool
	aggregator, as4aggregator          []byte
	communities, extCommunities, large []byte
	partial                            [256]bool
	// bad is why the message is treated as a withdrawal; empty: it is not.
	bad                 string
	segments, segments4 []segment
	// ext are extended communities, front and back the attributes before and after NEXT_HOP, and
	// all the prefixes to withdraw.
	ext, front, back, all []byte
}

// Note returns why the last UPDATE message was treated as a withdrawal, or an empty text if it was
// not.
func (f *Filter) Note() string { return f.u.bad }

func (u *update) reset() {
	*u = update{
		withdrawn: u.withdrawn[:0], nlri: u.nlri[:0], reach: u.reach[:0],
		segments: u.segments[:0], segments4: u.segments4[:0], ext: u.ext[:0], front: u.front[:0], back: u.back[:0], all: u.all[:0],
	}
}

// worse records an error for which the message is treated as a withdrawal.
func (u *update) worse(format string, args ...any) {
	if u.bad == "" {
		u.bad = fmt.Sprintf(format, args...)
	}
}

func (f *Filter) discard(kind byte) { f.o.Counters.Discarded[kind].Add(1) }

// update checks an UPDATE message, and writes what the speaker gets instead.
func (f *Filter) update(body []byte) *Notification {
	u := &f.u
	u.reset()
	malformed := func(why string) *Notification { return &Notification{3, 1, nil, "an UPDATE has " + why} }
	n := int(binary.BigEndian.Uint16(body))
	if n > len(body)-4 {
		return malformed("withdrawn routes beyond its end")
	}
	withdrawn, rest := body[2:2+n], body[2+n:]
	n = int(binary.BigEndian.Uint16(rest))
	if n > len(rest)-2 {
		return malformed("attributes beyond its end")
	}
	attrs, nlri := rest[2:2+n], rest[2+n:]
	var ok, ok2 bool
	u.withdrawn, ok = appendPrefixes(u.withdrawn, withdrawn, 32)
	u.nlri, ok2 = appendPrefixes(u.nlri, nlri, 32)
	if !ok || !ok2 {
		return &Notification{3, 10, nil, "an UPDATE has a malformed IPv4 prefix"}
	}
	u.reachable = len(nlri) > 0
	if f.o.IPv6 {
		u.withdrawn, u.nlri = u.withdrawn[:0], u.nlri[:0]
	}
	if err := f.attributes(attrs); err != nil {
		return err
	}
	if u.bad != "" && !u.reachable {
		// The unreadable attribute may be the one with the prefixes (RFC 7606 section 5.2).
		return malformed("no reachable prefix, and a malformed attribute: " + u.bad)
	}
	if len(u.nlri)+len(u.reach) > 0 && u.bad == "" {
		f.mandatory()
	}
	if len(u.nlri)+len(u.reach) > 0 && u.bad == "" {
		f.compose()
	}
	if u.bad != "" {
		f.o.Counters.Withdrawn.Add(1)
	}
	f.write(len(body) == 4)
	return nil
}

// attributes parses the path attributes.
func (f *Filter) attributes(b []byte) *Notification {
	u := &f.u
	for len(b) > 0 {
		u.count++
		head := 3
		if len(b) > 0 && b[0]&flagExtended != 0 {
			head = 4
		}
		if len(b) < head {
			u.worse("the last attribute is truncated")
			return nil
		}
		flag, kind, size := b[0], b[1], int(b[2])
		if head == 4 {
			size = int(binary.BigEndian.Uint16(b[2:]))
		}
		b = b[head:]
		if size > len(b) {
			if kind == attrMPReach || kind == attrMPUnreach {
				return &Notification{3, 1, nil, fmt.Sprintf("attribute %d is longer than all attributes", kind)}
			}
			u.worse("attribute %d is longer than all attributes", kind)
			return nil
		}
		v := b[:size]
		b = b[size:]
		want := known[kind]
		switch {
		case want == 0 && flag&flagOptional == 0:
			return &Notification{3, 2, []byte{flag, kind}, fmt.Sprintf("attribute %d is unknown and not optional", kind)}
		case want == 0:
			f.discard(kind)
			continue
		case u.seen[kind] && (kind == attrMPReach || kind == attrMPUnreach):
			return &Notification{3, 1, nil, fmt.Sprintf("attribute %d comes twice", kind)}
		case u.seen[kind]:
			f.discard(kind) // the first one counts
			continue
		case flag&(flagOptional|flagTransitive) != want:
			u.worse("flags %#x of attribute %d", flag, kind)
		}
		u.seen[kind], u.partial[kind] = true, flag&flagPartial != 0
		if err := f.attribute(kind, v); err != nil {
			return err
		}
	}
	return nil
}

// attribute checks the value of one attribute (RFC 7606 section 7).
func (f *Filter) attribute(kind byte, v []byte) *Notification {
	u := &f.u
	width := 2
	if f.as4 {
		width = 4
	}
	length := func(n int) bool {
		if len(v) != n {
			u.worse("length %d of attribute %d", len(v), kind)
		}
		return len(v) == n
	}
	switch kind {
	case attrOrigin:
		if length(1) && v[0] > 2 {
			u.worse("ORIGIN %d", v[0])
		}
		u.origin = v
	case attrASPath:
		var why string
		if u.segments, why = parsePath(u.segments, v, width); why != "" {
			u.worse("AS_PATH: %s", why)
		}
		u.path = v
	case attrNextHop:
		if length(4) && !host4(v) {
			u.worse("NEXT_HOP %d.%d.%d.%d", v[0], v[1], v[2], v[3])
		}
		u.hop = v
	case attrMED:
		length(4)
		u.med = v
	case attrLocalPref:
		if !f.o.Internal {
			f.discard(kind)
			return nil
		}
		length(4)
		u.pref = v
	case attrAtomicAggregate:
		if len(v) != 0 {
			f.discard(kind)
			return nil
		}
		u.atomic = true
	case attrAggregator:
		if len(v) != width+4 || number(v, width) == 0 {
			f.discard(kind)
			return nil
		}
		u.aggregator = v
	case attrCommunities:
		u.communities = f.communities(kind, v, 4)
	case attrExtCommunities:
		u.extCommunities = f.extended(f.communities(kind, v, 8))
	case attrLargeCommunity:
		u.large = f.communities(kind, v, 12)
	case attrAS4Path:
		var why string
		if !f.as4 {
			u.segments4, why = parsePath(u.segments4, v, 4)
		}
		if f.as4 || why != "" || len(v) == 0 {
			f.discard(kind)
			u.segments4 = u.segments4[:0]
			return nil
		}
		u.as4path = v
	case attrAS4Aggregator:
		if f.as4 || len(v) != 8 || number(v, 4) == 0 {
			f.discard(kind)
			return nil
		}
		u.as4aggregator = v
	case attrMPReach:
		return f.mpReach(v)
	case attrMPUnreach:
		return f.mpUnreach(v)
	}
	return nil
}

// communities checks an attribute that consists of values of one size.
func (f *Filter) communities(kind byte, v []byte, size int) []byte {
	switch n := len(v) / size; {
	case n == 0 || len(v)%size != 0:
		f.u.worse("length %d of attribute %d", len(v), kind)
	case n > MaxCommunities:
		f.u.worse("%d communities in attribute %d, at most %d are accepted", n, kind, MaxCommunities)
	}
	return v
}

// extended returns the extended communities that a transit router of IP unicast passes on: those
// of AS numbers and IPv4 addresses, such as route targets, and opaque ones. Those of other
// services are removed.
func (f *Filter) extended(v []byte) []byte {
	u := &f.u
	n := len(v)
	for ; len(v) >= 8; v = v[8:] {
		if v[0]&^0x40 <= 3 { // apart from the transitive bit
			u.ext = append(u.ext, v[:8]...)
		}
	}
	if len(u.ext) < n && u.bad == "" {
		f.discard(attrExtCommunities)
	}
	if len(u.ext) == 0 {
		return nil
	}
	return u.ext
}

// mpReach parses MP_REACH_NLRI (RFC 4760 section 3). That of another family is removed.
func (f *Filter) mpReach(v []byte) *Notification {
	u := &f.u
	malformed := func(why string) *Notification { return &Notification{3, 9, nil, "MP_REACH_NLRI " + why} }
	if len(v) < 5 || len(v) < 5+int(v[3]) {
		return malformed("is truncated")
	}
	u.reachable = true
	if binary.BigEndian.Uint16(v) != f.afi() || v[2] != unicast {
		f.discard(attrMPReach)
		return nil
	}
	hop, prefixes := v[4:4+int(v[3])], v[5+int(v[3]):]
	bits := 32
	if f.o.IPv6 {
		bits = 128
		switch len(hop) {
		case 16:
		case 32: // a link-local address comes second (RFC 2545 section 3)
			if host6(hop[:16]) {
				hop = hop[:16]
			} else {
				hop = hop[16:]
			}
		default:
			return malformed(fmt.Sprintf("has a next hop of %d bytes", len(hop)))
		}
		if !host6(hop) {
			u.worse("MP_REACH_NLRI with a next hop that is not a valid host address")
		}
	} else if len(hop) != 4 {
		return malformed(fmt.Sprintf("has a next hop of %d bytes", len(hop)))
	} else if !host4(hop) {
		u.worse("MP_REACH_NLRI with next hop %d.%d.%d.%d", hop[0], hop[1], hop[2], hop[3])
	}
	var ok bool
	if u.reach, ok = appendPrefixes(u.reach, prefixes, bits); !ok {
		return malformed("has a malformed prefix")
	}
	u.reachHop = hop
	return nil
}

// mpUnreach parses MP_UNREACH_NLRI (RFC 4760 section 4). That of another family is removed.
func (f *Filter) mpUnreach(v []byte) *Notification {
	u := &f.u
	if len(v) < 3 {
		return &Notification{3, 9, nil, "MP_UNREACH_NLRI is truncated"}
	}
	if binary.BigEndian.Uint16(v) != f.afi() || v[2] != unicast {
		f.discard(attrMPUnreach)
		return nil
	}
	bits := 32
	if f.o.IPv6 {
		bits = 128
	}
	var ok bool
	if u.withdrawn, ok = appendPrefixes(u.withdrawn, v[3:], bits); !ok {
		return &Notification{3, 9, nil, "MP_UNREACH_NLRI has a malformed prefix"}
	}
	u.end = len(v) == 3
	return nil
}

// mandatory checks for the attributes that must come with prefixes (RFC 7606 section 3).
func (f *Filter) mandatory() {
	u := &f.u
	for kind := byte(attrOrigin); kind <= attrNextHop; kind++ {
		if !u.seen[kind] && (kind != attrNextHop || len(u.nlri) > 0) {
			u.worse("attribute %d is missing", kind)
		}
	}
}

// compose writes the attributes. From here on AS numbers have four octets, which the speaker
// supports. The attributes AS4_PATH and AS4_AGGREGATOR of old speakers are merged (RFC 6793
// section 4.2.3).
func (f *Filter) compose() {
	u := &f.u
	u.front = appendAttr(u.front, flagTransitive, attrOrigin, u.origin)
	if f.as4 {
		u.front = appendAttr(u.front, flagTransitive, attrASPath, u.path)
	} else {
		// If AGGREGATOR is not AS_TRANS, an old speaker has aggregated after the last speaker that
		// supports four octets.
		old := u.aggregator != nil && u.as4aggregator != nil && number(u.aggregator, 2) != asTrans
		if u.as4aggregator != nil && (old || u.aggregator == nil) {
			f.discard(attrAS4Aggregator)
			u.as4aggregator = nil
		}
		if u.as4path != nil && (old || count(u.segments) < count(u.segments4)) {
			f.discard(attrAS4Path)
			u.segments4 = u.segments4[:0]
		}
		var why string
		if u.front, why = appendPath(u.front, u.segments, u.segments4); why != "" {
			u.worse("AS_PATH: %s", why)
			return
		}
	}
	b := u.back
	if u.med != nil {
		b = appendAttr(b, flagOptional, attrMED, u.med)
	}
	if u.pref != nil {
		b = appendAttr(b, flagTransitive, attrLocalPref, u.pref)
	}
	if u.atomic {
		b = appendAttr(b, flagTransitive, attrAtomicAggregate, nil)
	}
	if a := u.aggregator; a != nil {
		var v [8]byte
		if u.as4aggregator != nil {
			copy(v[:], u.as4aggregator)
		} else if f.as4 {
			copy(v[:], a)
		} else {
			copy(v[2:], a)
		}
		b = appendAttr(b, f.passOn(attrAggregator), attrAggregator, v[:])
	}
	for _, c := range []struct {
		kind  byte
		value []byte
	}{{attrCommunities, u.communities}, {attrExtCommunities, u.extCommunities}, {attrLargeCommunity, u.large}} {
		if c.value != nil {
			b = appendAttr(b, f.passOn(c.kind), c.kind, c.value)
		}
	}
	u.back = b
	// Expanding two octets to four may leave no room for a prefix.
	if len(u.front)+len(u.back) > MaxLength-HeaderLength-64 {
		u.worse("%d bytes of attributes leave no room for a prefix", len(u.front)+len(u.back))
	}
}

// passOn returns the flags of an optional transitive attribute, with the Partial bit if it was
// received with it.
func (f *Filter) passOn(kind byte) byte {
	if f.u.partial[kind] {
		return flagOptional | flagTransitive | flagPartial
	}
	return flagOptional | flagTransitive
}

// write writes the messages: first the withdrawals, then the announcements. If nothing remains, it
// writes a KEEPALIVE, since an UPDATE without prefixes would be an End-of-RIB (RFC 4724 section
// 2).
func (f *Filter) write(empty bool) {
	u := &f.u
	withdrawn := u.withdrawn
	if u.bad != "" {
		u.all = append(append(append(u.all, withdrawn...), u.nlri...), u.reach...)
		withdrawn, u.nlri, u.reach = u.all, u.nlri[:0], u.reach[:0]
	}
	end := u.end && u.count == 1
	attrs := len(u.front) + len(u.back)
	if f.o.IPv6 {
		split(withdrawn, 4+7, f.unreach6)
		split(u.reach, 4+attrs+25, f.reach6)
		if end {
			f.unreach6(nil)
		}
	} else {
		split(withdrawn, 4, f.unreach4)
		split(u.nlri, 4+attrs+7, func(ps []byte) { f.reach4(u.hop, ps) })
		split(u.reach, 4+attrs+7, func(ps []byte) { f.reach4(u.reachHop, ps) })
		if end || empty {
			f.unreach4(nil)
		}
	}
	if len(f.out) == 0 {
		f.out.keepalive()
	}
}

// split passes prefixes to emit, in groups that fit into a message with extra bytes after its
// header.
func split(ps []byte, extra int, emit func([]byte)) {
	for len(ps) > 0 {
		n := 0
		for n < len(ps) {
			next := n + 1 + (int(ps[n])+7)/8
			if next > MaxLength-HeaderLength-extra {
				break
			}
			n = next
		}
		emit(ps[:n])
		ps = ps[n:]
	}
}

func (f *Filter) unreach4(ps []byte) {
	at := f.out.begin(Update)
	b := binary.BigEndian.AppendUint16(f.out, uint16(len(ps)))
	f.out = end(append(append(b, ps...), 0, 0), at)
}

func (f *Filter) reach4(hop, ps []byte) {
	u := &f.u
	at := f.out.begin(Update)
	b := binary.BigEndian.AppendUint16(append(f.out, 0, 0), uint16(len(u.front)+7+len(u.back)))
	b = appendAttr(append(b, u.front...), flagTransitive, attrNextHop, hop)
	f.out = end(append(append(b, u.back...), ps...), at)
}

func (f *Filter) unreach6(ps []byte) {
	at := f.out.begin(Update)
	b := binary.BigEndian.AppendUint16(append(f.out, 0, 0), uint16(7+len(ps)))
	b = append(b, flagOptional|flagExtended, attrMPUnreach)
	b = binary.BigEndian.AppendUint16(b, uint16(3+len(ps)))
	f.out = end(append(append(b, 0, byte(afiIPv6), unicast), ps...), at)
}

func (f *Filter) reach6(ps []byte) {
	u := &f.u
	at := f.out.begin(Update)
	b := binary.BigEndian.AppendUint16(append(f.out, 0, 0), uint16(len(u.front)+len(u.back)+25+len(ps)))
	b = append(append(b, u.front...), u.back...)
	b = append(b, flagOptional|flagExtended, attrMPReach)
	b = binary.BigEndian.AppendUint16(b, uint16(21+len(ps)))
	b = append(b, 0, byte(afiIPv6), unicast, 16)
	b = append(append(b, u.reachHop...), 0)
	f.out = end(append(b, ps...), at)
}

// appendAttr appends one attribute.
func appendAttr(b []byte, flag, kind byte, v []byte) []byte {
	if len(v) > 255 {
		b = binary.BigEndian.AppendUint16(append(b, flag|flagExtended, kind), uint16(len(v)))
	} else {
		b = append(b, flag, kind, byte(len(v)))
	}
	return append(b, v...)
}

// appendPrefixes checks prefixes of at most this many bits, and appends them with the bits beyond
// their length cleared.
func appendPrefixes(dst, b []byte, bits int) ([]byte, bool) {
	for len(b) > 0 {
		n := 1 + (int(b[0])+7)/8
		if int(b[0]) > bits || n > len(b) {
			return dst, false
		}
		dst = append(dst, b[:n]...)
		if rest := b[0] % 8; rest != 0 {
			dst[len(dst)-1] &= 0xff << (8 - rest)
		}
		b = b[n:]
	}
	return dst, true
}

// host4 reports whether an IPv4 address can be that of a host other than this one (RFC 4271
// section 6.3).
func host4(a []byte) bool { return a[0] != 0 && a[0] != 127 && a[0] < 224 }

// host6 reports the same for an IPv6 address.
func host6(a []byte) bool {
	const low = "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	switch {
	case a[0] == 0xff: // multicast
		return false
	// ::, ::1, embedded IPv4
	case string(a[:10]) == low && (a[10] == 0 && a[11] == 0 || a[10] == 0xff && a[11] == 0xff):
		return false
	}
	return true
}

// number decodes an AS number of 2 or 4 octets.
func number(b []byte, width int) uint32 {
	if width == 2 {
		return uint32(binary.BigEndian.Uint16(b))
	}
	return binary.BigEndian.Uint32(b)
}

// segment is a part of an AS_PATH: numbers of 2 or 4 octets.
type segment struct {
	kind  byte // asSet or asSequence
	width int
	b     []byte
}

const (
	asSet      = 1
	asSequence = 2
)

func (s segment) len() int { return len(s.b) / s.width }

// parsePath parses an AS_PATH or AS4_PATH, and returns why it is malformed. Confederation segments
// are malformed (RFC 5065 section 5), because this AS is in no confederation, and so is number 0
// (RFC 7607).
func parsePath(segs []segment, b []byte, width int) ([]segment, string) {
	total := 0
	for len(b) > 0 {
		if len(b) < 2 {
			return segs, "a segment is truncated"
		}
		kind, n := b[0], int(b[1])
		b = b[2:]
		switch {
		case kind != asSet && kind != asSequence:
			return segs, fmt.Sprintf("segment of type %d", kind)
		case n == 0:
			return segs, "a segment is empty"
		case n*width > len(b):
			return segs, "a segment is truncated"
		}
		for i := range n {
			if number(b[i*width:], width) == 0 {
				return segs, "AS number 0"
			}
		}
		if total += n; total > MaxASPath {
			return segs, fmt.Sprintf("it has more than %d numbers", MaxASPath)
		}
		segs = append(segs, segment{kind, width, b[:n*width]})
		b = b[n*width:]
	}
	return segs, ""
}

// count returns the length of a path, in which a set counts as one (RFC 4271 section 9.1.2.2).
func count(segs []segment) (n int) {
	for _, s := range segs {
		if s.kind == asSet {
			n++
		} else {
			n += s.len()
		}
	}
	return n
}

// appendPath appends an AS_PATH with numbers of four octets: the segments of two octets, in which
// the last numbers are replaced by the path of four (RFC 6793 section 4.2.3).
func appendPath(b []byte, segs, segs4 []segment) ([]byte, string) {
	keep, total := count(segs)-count(segs4), 0
	var v []byte
	put := func(s segment) {
		total += s.len()
		v = append(v, s.kind, byte(s.len()))
		for i := range s.len() {
			v = binary.BigEndian.AppendUint32(v, number(s.b[i*s.width:], s.width))
		}
	}
	for _, s := range segs {
		if keep <= 0 {
			break
		}
		if s.kind == asSet {
			keep--
		} else {
			s.b = s.b[:min(keep, s.len())*s.width]
			keep -= s.len()
		}
		put(s)
	}
	for _, s := range segs4 {
		put(s)
	}
	if total > MaxASPath {
		return b, fmt.Sprintf("it has more than %d numbers", MaxASPath)
	}
	return appendAttr(b, flagTransitive, attrASPath, v), ""
}

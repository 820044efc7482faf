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

// update is one UPDATE message during processing. Its slices keep their capacity from message to
// message, or point into the message.
type update struct {
	withdrawn4, withdrawn6 []byte // withdrawn prefixes of the session's families

	nlri     []byte // prefixes that use NEXT_HOP
	reach    []byte // prefixes in MP_REACH_NLRI: of IPv6 if reach6 is set
	reach6   bool
	hop      []byte // NEXT_HOP: 4 bytes
	reachHop []byte // in MP_REACH_NLRI: 4 or 16 bytes

	reachable bool // the message has reachable prefixes, maybe of other families
	end       bool // MP_UNREACH_NLRI of a family of the session without a prefix
	end6      bool // it is of IPv6
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
	// ext are extended communities, front and back the attributes before and after NEXT_HOP.
	ext, front, back []byte
}

// Note returns why the last UPDATE message was treated as a withdrawal, or an empty text if it was
// not.
func (f *Filter) Note() string { return f.u.bad }

func (u *update) reset() {
	*u = update{
		withdrawn4: u.withdrawn4[:0], withdrawn6: u.withdrawn6[:0], nlri: u.nlri[:0], reach: u.reach[:0],
		segments: u.segments[:0], segments4: u.segments4[:0], ext: u.ext[:0], front: u.front[:0], back: u.back[:0],
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
	u.withdrawn4, ok = appendPrefixes(u.withdrawn4, withdrawn, 32)
	u.nlri, ok2 = appendPrefixes(u.nlri, nlri, 32)
	if !ok || !ok2 {
		return &Notification{3, 10, nil, "an UPDATE has a malformed IPv4 prefix"}
	}
	u.reachable = len(nlri) > 0
	if !f.carries(afiIPv4, unicast) {
		u.withdrawn4, u.nlri = u.withdrawn4[:0], u.nlri[:0]
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
	afi := binary.BigEndian.Uint16(v)
	if !f.carries(afi, v[2]) {
		f.discard(attrMPReach)
		return nil
	}
	hop, prefixes := v[4:4+int(v[3])], v[5+int(v[3]):]
	bits := 32
	if u.reach6 = afi == afiIPv6; u.reach6 {
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
	afi := binary.BigEndian.Uint16(v)
	if !f.carries(afi, v[2]) {
		f.discard(attrMPUnreach)
		return nil
	}
	list, bits := &u.withdrawn4, 32
	if afi == afiIPv6 {
		list, bits = &u.withdrawn6, 128
	}
	var ok bool
	if *list, ok = appendPrefixes(*list, v[3:], bits); !ok {
		return &Notification{3, 9, nil, "MP_UNREACH_NLRI has a malformed prefix"}
	}
	u.end, u.end6 = len(v) == 3, afi == afiIPv6
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

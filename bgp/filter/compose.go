package filter

import "encoding/binary"

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
	if u.bad != "" {
		u.withdrawn4 = append(u.withdrawn4, u.nlri...)
		if u.reach6 {
			u.withdrawn6 = append(u.withdrawn6, u.reach...)
		} else {
			u.withdrawn4 = append(u.withdrawn4, u.reach...)
		}
		u.nlri, u.reach = u.nlri[:0], u.reach[:0]
	}
	attrs := len(u.front) + len(u.back)
	split(u.withdrawn4, 4, f.unreach4)
	split(u.withdrawn6, 4+7, f.unreach6)
	split(u.nlri, 4+attrs+7, func(ps []byte) { f.reach4(u.hop, ps) })
	if u.reach6 {
		split(u.reach, 4+attrs+25, f.reach6)
	} else {
		split(u.reach, 4+attrs+7, func(ps []byte) { f.reach4(u.reachHop, ps) })
	}
	end := u.end && u.count == 1
	if end && u.end6 {
		f.unreach6(nil)
	}
	if end && !u.end6 || empty && f.carries(afiIPv4, unicast) {
		f.unreach4(nil)
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

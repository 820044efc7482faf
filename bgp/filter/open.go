package filter

import (
	"encoding/binary"
	"fmt"
	"net/netip"
)

// Codes of the capabilities (RFC 5492) that are negotiated. All others are removed from an OPEN,
// the peer's and ours, so that neither side relies on them.
const (
	capMultiprotocol   = 1  // RFC 4760
	capRouteRefresh    = 2  // RFC 2918
	capGracefulRestart = 64 // RFC 4724
	capFourOctetAS     = 65 // RFC 6793
)

// capabilities are those in an OPEN that are negotiated.
type capabilities struct {
	families     [2]bool // multiprotocol: IPv4 unicast, IPv6 unicast
	multi        bool    // any multiprotocol capability
	refresh      bool
	as4          uint32
	hasAS4       bool
	restart      uint16 // flags and time
	hasRestart   bool
	restarted    [2]bool // families of graceful restart
	restartFlags [2]byte
}

// open checks an OPEN message, and writes one with only the negotiated capabilities.
func (f *Filter) open(body []byte) *Notification {
	c, err := parseOpen(body)
	if err != nil {
		return err
	}
	// Without any multiprotocol capability, the session is for IPv4 unicast.
	if ours := f.afi(); c.multi && !c.families[ours-1] || !c.multi && ours != afiIPv4 {
		return &Notification{2, 7, []byte{capMultiprotocol, 4, 0, byte(ours), 0, unicast},
			fmt.Sprintf("the peer does not offer IPv%d unicast", map[uint16]int{afiIPv4: 4, afiIPv6: 6}[ours])}
	}
	f.as4, f.state = c.hasAS4, wantKeepalive
	f.id, _ = netip.AddrFromSlice(body[5:9])
	if f.as = uint32(binary.BigEndian.Uint16(body[1:])); c.hasAS4 {
		f.as = c.as4
	}
	f.out = c.appendOpen(f.out, body[:9])
	return nil
}

// OwnOpen returns an OPEN message of our own speaker with only the negotiated capabilities, and
// its BGP identifier.
func OwnOpen(m []byte) ([]byte, netip.Addr, error) {
	if len(m) < HeaderLength+10 || m[18] != Open {
		return nil, netip.Addr{}, fmt.Errorf("reading our own OPEN: it is too short, or of type %d", m[min(18, len(m)-1)])
	}
	c, err := parseOpen(m[HeaderLength:])
	if err != nil {
		return nil, netip.Addr{}, fmt.Errorf("reading our own OPEN: %w", err)
	}
	id, _ := netip.AddrFromSlice(m[HeaderLength+5 : HeaderLength+9])
	return c.appendOpen(nil, m[HeaderLength:HeaderLength+9]), id, nil
}

// parseOpen parses the body of an OPEN message of at least 10 bytes.
func parseOpen(body []byte) (c capabilities, err *Notification) {
	switch hold := binary.BigEndian.Uint16(body[3:]); {
	case body[0] != 4:
		return c, &Notification{2, 1, []byte{0, 4}, fmt.Sprintf("version %d of an OPEN is not 4", body[0])}
	case binary.BigEndian.Uint16(body[1:]) == 0:
		return c, &Notification{2, 2, nil, "AS number 0 in an OPEN (RFC 7607)"}
	case hold == 1 || hold == 2:
		return c, &Notification{2, 6, nil, fmt.Sprintf("hold time of %d s in an OPEN", hold)}
	case binary.BigEndian.Uint32(body[5:]) == 0:
		return c, &Notification{2, 3, nil, "BGP identifier 0 in an OPEN (RFC 6286)"}
	}
	malformed := func(why string) *Notification { return &Notification{2, 0, nil, "the parameters of an OPEN " + why} }
	n, rest, wide := int(body[9]), body[10:], false
	if n > 0 && len(rest) > 0 && rest[0] == 255 { // RFC 9072
		if len(rest) < 3 {
			return c, malformed("are truncated")
		}
		n, rest, wide = int(binary.BigEndian.Uint16(rest[1:])), rest[3:], true
	}
	if n != len(rest) {
		return c, malformed(fmt.Sprintf("have %d bytes instead of %d", len(rest), n))
	}
	for len(rest) > 0 {
		head := 2
		if wide {
			head = 3
		}
		if len(rest) < head {
			return c, malformed("are truncated")
		}
		kind, size := rest[0], int(rest[1])
		if wide {
			size = int(binary.BigEndian.Uint16(rest[1:]))
		}
		rest = rest[head:]
		if size > len(rest) {
			return c, malformed("are truncated")
		}
		if kind != 2 {
			return c, &Notification{2, 4, nil, fmt.Sprintf("parameter %d of an OPEN is unknown", kind)}
		}
		if !c.parse(rest[:size]) {
			return c, malformed("have a truncated capability")
		}
		rest = rest[size:]
	}
	if c.hasAS4 && c.as4 == 0 {
		return c, &Notification{2, 2, nil, "AS number 0 in a capability (RFC 7607)"}
	}
	return c, nil
}

// parse parses the capabilities in one parameter. A malformed one counts as not offered.
func (c *capabilities) parse(b []byte) bool {
	for len(b) > 0 {
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			return false
		}
		code, v := b[0], b[2:2+int(b[1])]
		b = b[2+len(v):]
		switch {
		case code == capMultiprotocol:
			c.multi = true
			if i := family(v, 3); len(v) == 4 && i >= 0 {
				c.families[i] = true
			}
		case code == capRouteRefresh && len(v) == 0:
			c.refresh = true
		case code == capFourOctetAS && len(v) == 4:
			c.as4, c.hasAS4 = binary.BigEndian.Uint32(v), true
		case code == capGracefulRestart && len(v) >= 2 && len(v)%4 == 2:
			// The last one counts (RFC 4724 section 3). Of the flags, only Restart State is used.
			c.restart, c.hasRestart = binary.BigEndian.Uint16(v)&0x8fff, true
			c.restarted, c.restartFlags = [2]bool{}, [2]byte{}
			for v = v[2:]; len(v) > 0; v = v[4:] {
				if i := family(v, 2); i >= 0 {
					c.restarted[i], c.restartFlags[i] = true, v[3]&0x80
				}
			}
		}
	}
	return true
}

// family returns 0 for IPv4 unicast, 1 for IPv6 unicast and -1 for all others. safi is the offset
// of the SAFI.
func family(v []byte, safi int) int {
	if len(v) <= safi || v[safi] != unicast || v[0] != 0 || v[1] < 1 || v[1] > 2 {
		return -1
	}
	return int(v[1]) - 1
}

// appendOpen appends an OPEN message with a fixed part and these capabilities, in a single
// parameter.
func (c *capabilities) appendOpen(b message, fixed []byte) message {
	at := b.begin(Open)
	b = append(append(b, fixed...), 0)
	params := len(b)
	b = append(b, 2, 0)
	for i, ok := range c.families {
		if ok {
			b = append(b, capMultiprotocol, 4, 0, byte(i+1), 0, unicast)
		}
	}
	if c.refresh {
		b = append(b, capRouteRefresh, 0)
	}
	if c.hasRestart {
		size := len(b) + 1
		b = append(b, capGracefulRestart, 2)
		b = binary.BigEndian.AppendUint16(b, c.restart)
		for i, ok := range c.restarted {
			if ok {
				b = append(b, 0, byte(i+1), unicast, c.restartFlags[i])
				b[size] += 4
			}
		}
	}
	if c.hasAS4 {
		b = append(b, capFourOctetAS, 4)
		b = binary.BigEndian.AppendUint32(b, c.as4)
	}
	if size := len(b) - params - 2; size == 0 {
		b = b[:params]
	} else {
		b[params+1] = byte(size)
	}
	b[params-1] = byte(len(b) - params)
	return end(b, at)
}

// ReplaceNextHop replaces the next hop from by to in the MP_REACH_NLRI attributes of whole
// messages of our own speaker.
func ReplaceNextHop(b []byte, from, to [16]byte) {
	for len(b) >= HeaderLength {
		m := b[:min(len(b), max(HeaderLength, int(binary.BigEndian.Uint16(b[16:]))))]
		b = b[len(m):]
		if m[18] != Update || len(m) < HeaderLength+4 {
			continue
		}
		rest := m[HeaderLength:]
		rest = rest[min(len(rest), 2+int(binary.BigEndian.Uint16(rest))):]
		if len(rest) < 2 {
			continue
		}
		attrs := rest[2:min(len(rest), 2+int(binary.BigEndian.Uint16(rest)))]
		for len(attrs) >= 4 {
			head, size := 3, int(attrs[2])
			if attrs[0]&flagExtended != 0 {
				head, size = 4, int(binary.BigEndian.Uint16(attrs[2:]))
			}
			if len(attrs) < head+size {
				break
			}
			if v := attrs[head : head+size]; attrs[1] == attrMPReach && len(v) >= 20 && v[3] == 16 && [16]byte(v[4:20]) == from {
				copy(v[4:20], to[:])
			}
			attrs = attrs[head+size:]
		}
	}
}

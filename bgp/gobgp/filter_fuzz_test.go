package gobgp

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"os"
	"strings"
	"testing"

	"github.com/osrg/gobgp/v3/pkg/apiutil"
	packet "github.com/osrg/gobgp/v3/pkg/packet/bgp"

	"github.com/isthmus-net/isthmus/bgp/filter"
)

// Bits of the first byte of FuzzFilter's input.
const (
	fuzzIPv6     = 1 << iota // an IPv6 session
	fuzzInternal             // an internal peer
	fuzzOld                  // the peer supports only AS numbers of two octets
	fuzzBoth                 // a session of both families
	fuzzKinds    = iota
)

// panics returns the bodies of the UPDATE messages in testdata that make GoBGP v3.37.0 panic.
func panics(t testing.TB) (bodies [][]byte) {
	t.Helper()
	text, err := os.ReadFile("testdata/panics.txt")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimRight(line, "\n"); strings.HasPrefix(line, "  ") {
			b, err := hex.DecodeString(strings.TrimSpace(line))
			if err != nil {
				t.Fatal(err)
			}
			bodies = append(bodies, b)
		}
	}
	if len(bodies) != 19 {
		t.Fatalf("%d bodies", len(bodies))
	}
	return bodies
}

// fuzzInput returns a session for FuzzFilter: its kind, then type, length and body of each message
// after the handshake.
func fuzzInput(kind byte, messages ...[]byte) []byte {
	b := []byte{kind}
	for _, m := range messages {
		b = append(b, m[18])
		b = binary.BigEndian.AppendUint16(b, uint16(len(m)-19))
		b = append(b, m[19:]...)
	}
	return b
}

// fuzzOpen returns an OPEN with the capabilities of the session.
func fuzzOpen(kind byte) []byte {
	caps := []byte{1, 4, 0, 1, 0, 1, 2, 0, 64, 6, 0, 120, 0, 1, 1, 0x80}
	if kind&fuzzBoth != 0 {
		caps = append(caps, 1, 4, 0, byte(2-kind&fuzzIPv6), 0, 1)
	}
	if kind&fuzzIPv6 != 0 {
		caps[3], caps[13] = 2, 2
	}
	if kind&fuzzOld == 0 {
		caps = append(caps, 65, 4, 0, 0, 0xfd, 0xe9)
	}
	body := []byte{4, 0xfd, 0xe9, 0, 90, 169, 254, 0, 11, byte(len(caps) + 2), 2, byte(len(caps))}
	return message(msgOpen, append(body, caps...)...)
}

// TestPanics checks that each of the bodies makes GoBGP panic, on parsing it or on passing it on,
// and that the filter's output does not.
func TestPanics(t *testing.T) {
	panicked := 0
	for _, b := range panics(t) {
		if crashes(message(msgUpdate, b...)) {
			panicked++
		}
		for kind := range byte(1 << fuzzKinds) {
			feed(t, fuzzInput(kind, message(msgUpdate, b...)))
		}
	}
	if panicked != 19 {
		t.Errorf("GoBGP panics on %d of the bodies", panicked)
	}
	if !crashes(announcement(addr("169.254.0.11"), []uint32{65001}, killer, prefix("10.0.0.0/8"))) {
		t.Error("GoBGP does not panic on CVE-2026-7734")
	}
}

// crashes reports whether GoBGP panics when it processes a message.
func crashes(m []byte) (yes bool) {
	defer func() { yes = recover() != nil }()
	work(m)
	return false
}

// work does what GoBGP does with a message, as far as that can be called from outside: it parses
// and validates the message, and encodes its path for the API.
func work(m []byte) (*packet.BGPMessage, error) {
	parsed, err := packet.ParseBGPMessage(m)
	if err != nil {
		return nil, err
	}
	if err := packet.ValidateBGPMessage(parsed); err != nil {
		return nil, err
	}
	u, ok := parsed.Body.(*packet.BGPUpdate)
	if !ok {
		return parsed, nil
	}
	families := map[packet.RouteFamily]packet.BGPAddPathMode{packet.RF_IPv4_UC: 0, packet.RF_IPv6_UC: 0}
	if _, err := packet.ValidateUpdateMsg(u, families, true, false, false); err != nil {
		return nil, err
	}
	if _, err := apiutil.MarshalPathAttributes(u.PathAttributes); err != nil {
		return nil, err
	}
	for _, n := range u.NLRI {
		if _, err := apiutil.MarshalNLRI(n); err != nil {
			return nil, err
		}
		_ = n.String()
	}
	for _, a := range u.PathAttributes {
		_ = a.String()
		if _, err := a.Serialize(); err != nil {
			return nil, err
		}
	}
	return parsed, nil
}

// feed passes a session through the filter, and the result to GoBGP.
func feed(t *testing.T, b []byte) {
	if len(b) == 0 {
		return
	}
	kind, b := b[0], b[1:]
	f := filter.New(filter.Options{IPv6: kind&fuzzIPv6 != 0, Both: kind&fuzzBoth != 0, Internal: kind&fuzzInternal != 0, Counters: &filter.Counters{}})
	pass := func(m []byte) bool {
		n, err := f.Length(m[:19])
		if err != nil || n != len(m) {
			return false
		}
		out, err := f.Message(nil, bytes.Clone(m))
		if err != nil {
			return false
		}
		if len(out) == 0 {
			t.Fatalf("the filter returned nothing for %x", m)
		}
		for len(out) > 0 {
			n := int(binary.BigEndian.Uint16(out[16:]))
			if n < 19 || n > 4096 || n > len(out) {
				t.Fatalf("length %d in %x", n, out)
			}
			one := out[:n]
			out = out[n:]
			got, err := work(one)
			if err != nil {
				t.Fatalf("GoBGP rejects %x, made of %x: %v", one, m, err)
			}
			looked(t, kind, got)
		}
		return true
	}
	if kind >= 1<<fuzzKinds {
		// The message that follows replaces the OPEN.
	} else if !pass(fuzzOpen(kind)) || !pass(message(msgKeepalive)) {
		t.Fatal("the handshake does not pass")
	}
	for len(b) >= 3 {
		n := min(int(binary.BigEndian.Uint16(b[1:])), len(b)-3, 4096-19)
		if !pass(message(b[0], b[3:3+n]...)) {
			return
		}
		b = b[3+n:]
	}
}

// looked checks that the filter has removed everything that it must remove. Then GoBGP has nothing
// to merge: its UpdatePathAttrs4ByteAs, which panics, returns at once without an AS4_PATH.
func looked(t *testing.T, kind byte, m *packet.BGPMessage) {
	u, ok := m.Body.(*packet.BGPUpdate)
	if !ok {
		return
	}
	seen := map[packet.BGPAttrType]bool{}
	for _, a := range u.PathAttributes {
		if seen[a.GetType()] {
			t.Fatalf("attribute %v twice", a.GetType())
		}
		seen[a.GetType()] = true
		switch x := a.(type) {
		case *packet.PathAttributeAsPath:
			for _, s := range x.Value {
				if _, ok := s.(*packet.As4PathParam); !ok {
					t.Fatalf("AS_PATH of two octets: %v", x)
				}
			}
		case *packet.PathAttributeAggregator:
			if x.Length != 8 {
				t.Fatalf("AGGREGATOR of two octets: %v", x)
			}
		case *packet.PathAttributeLocalPref:
			if kind&fuzzInternal == 0 {
				t.Fatal("LOCAL_PREF of an external peer")
			}
		case *packet.PathAttributeMpReachNLRI:
			if kind&(fuzzIPv6|fuzzBoth) == 0 || len(x.Value) == 0 || x.LinkLocalNexthop != nil {
				t.Fatalf("MP_REACH_NLRI %v", x)
			}
		case *packet.PathAttributeMpUnreachNLRI:
			if kind&(fuzzIPv6|fuzzBoth) == 0 {
				t.Fatalf("MP_UNREACH_NLRI %v", x)
			}
		case *packet.PathAttributeOrigin, *packet.PathAttributeNextHop, *packet.PathAttributeMultiExitDisc,
			*packet.PathAttributeAtomicAggregate, *packet.PathAttributeCommunities,
			*packet.PathAttributeExtendedCommunities, *packet.PathAttributeLargeCommunities:
		default:
			t.Fatalf("attribute %v", a.GetType())
		}
	}
	if kind&(fuzzIPv6|fuzzBoth) == fuzzIPv6 && len(u.NLRI)+len(u.WithdrawnRoutes) > 0 {
		t.Fatal("IPv4 prefixes in an IPv6 session")
	}
}

// FuzzFilter checks that GoBGP accepts the filter's output without a panic or an error.
func FuzzFilter(f *testing.F) {
	for _, b := range panics(f) {
		for kind := range byte(1 << fuzzKinds) {
			f.Add(fuzzInput(kind, message(msgUpdate, b...)))
		}
	}
	good := announcement(addr("169.254.0.11"), []uint32{65001}, attr(0xc0, 8, 0xfd, 0xe9, 0, 1), prefix("10.1.0.0/16"), prefix("10.2.0.0/24"))
	more := append(attr(0x80, 4, 0, 0, 0, 9), attr(0x40, 6)...)
	more = append(more, attr(0xc0, 7, 0, 0, 0xfd, 0xe9, 10, 0, 0, 1)...)
	more = append(more, attr(0xc0, 16, 0, 2, 0xfd, 0xe9, 0, 0, 0, 1, 3, 0x0b, 0, 0, 0, 0, 0, 0, 6, 0, 1, 2, 3, 4, 5, 6)...)
	more = append(more, attr(0xc0, 32, 0, 0, 0xfd, 0xe9, 0, 0, 0, 1, 0, 0, 0, 2)...)
	rich := announcement(addr("169.254.0.11"), []uint32{65001, 4200000000}, more, prefix("10.1.0.0/16"))
	v6 := attr(0x40, 1, 0)
	v6 = append(v6, attr(0x40, 2, asSequence(65001)...)...)
	v6 = append(v6, attr(0x80, 14, append(append([]byte{0, 2, 1, 16}, addr("fd00::1").AsSlice()...), 0, 32, 0x20, 1, 0x0d, 0xb8)...)...)
	v6 = append(v6, attr(0x80, 15, 0, 2, 1, 48, 0x20, 1, 0x0d, 0xb8, 0, 1)...)
	six := message(msgUpdate, append(binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(len(v6))), v6...)...)
	old := attr(0x40, 1, 0)
	old = append(old, attr(0x40, 2, 2, 2, 0xfd, 0xe9, 0x5b, 0xa0)...)
	old = append(old, attr(0x40, 3, 169, 254, 0, 11)...)
	old = append(old, attr(0xc0, 17, asSequence(4200000000)...)...)
	old = append(old, attr(0xc0, 7, 0x5b, 0xa0, 10, 0, 0, 1)...)
	old = append(old, attr(0xc0, 18, 0xfa, 0x56, 0xea, 0, 10, 0, 0, 1)...)
	two := message(msgUpdate, append(append(binary.BigEndian.AppendUint16([]byte{0, 0}, uint16(len(old))), old...), 16, 10, 1)...)
	for kind := range byte(8) {
		f.Add(fuzzInput(kind, good, endOfRIB, withdrawal(prefix("10.1.0.0/16")), rich))
		f.Add(fuzzInput(kind, six, message(msgKeepalive), message(5, 0, 1, 0, 1)))
		f.Add(fuzzInput(kind, two))
		f.Add(fuzzInput(kind, message(msgNotification, 6, 2, 3, 'b', 'y', 'e')))
		f.Add(fuzzInput(kind|8, fuzzOpen(kind), message(msgKeepalive), good))
	}
	f.Fuzz(feed)
}

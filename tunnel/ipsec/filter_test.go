package ipsec

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/sockfilter/sockfiltertest"
)

// TestEarlyFilter applies the catcher's filter to packets, and to truncated versions of those that
// pass.
func TestEarlyFilter(t *testing.T) {
	const port = 4500
	four, four2, stranger := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("192.0.2.3")
	six, six2 := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8:0:1::1")
	// Each of these differs from the peer's IPv6 address in one word.
	strangers6 := []netip.Addr{netip.MustParseAddr("2001:db9::1"), netip.MustParseAddr("2001:db8:1::1"), netip.MustParseAddr("2001:db8::1:0:0:1"), netip.MustParseAddr("2001:db8::2")}
	esp := func(sequence uint32) []byte { return binary.BigEndian.AppendUint32([]byte{0, 0, 0x10, 0}, sequence) }
	udp := func(port uint16, payload []byte) []byte {
		b := binary.BigEndian.AppendUint16([]byte{0x12, 0x34}, port)
		b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
		return append(append(b, 0, 0), payload...)
	}
	ip := func(from netip.Addr, protocol byte, payload []byte) []byte {
		if from.Is6() {
			b := append([]byte{0x60, 0, 0, 0, 0, byte(len(payload)), protocol, 64}, from.AsSlice()...)
			return append(append(b, make([]byte, 16)...), payload...)
		}
		b := append([]byte{0x45, 0, 0, byte(20 + len(payload)), 0, 0, 0x40, 0, 64, protocol, 0, 0}, from.AsSlice()...)
		return append(append(b, make([]byte, 4)...), payload...)
	}
	with := func(b []byte, at int, value ...byte) []byte { copy(b[at:], value); return b }
	options := func(b []byte) []byte { // two words of options in the header
		return append(append(with(b[:20:20], 0, 0x47), make([]byte, 8)...), b[20:]...)
	}
	for _, tt := range []struct {
		name    string
		packet  []byte
		sources []netip.Addr
		pass    bool
	}{
		{"ESP", ip(four, unix.IPPROTO_ESP, esp(1)), []netip.Addr{four, four2}, true},
		{"ESP from the second source", ip(four2, unix.IPPROTO_ESP, esp(1)), []netip.Addr{four, four2}, true},
		{"ESP with the last early number", ip(four, unix.IPPROTO_ESP, esp(earlyNumbers)), []netip.Addr{four}, true},
		{"ESP behind options", options(ip(four, unix.IPPROTO_ESP, esp(1))), []netip.Addr{four}, true},
		{"ESP in UDP", ip(four, unix.IPPROTO_UDP, udp(port, esp(1))), []netip.Addr{four}, true},
		{"ESP in UDP behind options", options(ip(four, unix.IPPROTO_UDP, udp(port, esp(1)))), []netip.Addr{four}, true},
		{"a later packet", ip(four, unix.IPPROTO_ESP, esp(earlyNumbers+1)), []netip.Addr{four}, false},
		{"a later packet in UDP", ip(four, unix.IPPROTO_UDP, udp(port, esp(earlyNumbers+1))), []netip.Addr{four}, false},
		{"another port", ip(four, unix.IPPROTO_UDP, udp(500, esp(1))), []netip.Addr{four}, false},
		{"another protocol", ip(four, unix.IPPROTO_TCP, udp(port, esp(1))), []netip.Addr{four}, false},
		{"a first fragment", with(ip(four, unix.IPPROTO_ESP, esp(1)), 6, 0x20), []netip.Addr{four}, false},
		{"a later fragment", with(ip(four, unix.IPPROTO_ESP, esp(1)), 6, 0, 1), []netip.Addr{four}, false},
		{"from a stranger", ip(stranger, unix.IPPROTO_ESP, esp(1)), []netip.Addr{four, four2}, false},
		{"without sources", ip(four, unix.IPPROTO_ESP, esp(1)), nil, false},
		{"with too many sources", ip(stranger, unix.IPPROTO_ESP, esp(1)), make([]netip.Addr, mostSources+1), true},
		{"with too many sources, a later packet", ip(stranger, unix.IPPROTO_ESP, esp(earlyNumbers+1)), make([]netip.Addr, mostSources+1), false},
		{"IPv6, ESP", ip(six, unix.IPPROTO_ESP, esp(1)), []netip.Addr{six, six2}, true},
		{"IPv6, ESP from the second source", ip(six2, unix.IPPROTO_ESP, esp(1)), []netip.Addr{six, six2}, true},
		{"IPv6, ESP in UDP", ip(six, unix.IPPROTO_UDP, udp(port, esp(1))), []netip.Addr{six}, true},
		{"IPv6, a later packet", ip(six, unix.IPPROTO_ESP, esp(earlyNumbers+1)), []netip.Addr{six}, false},
		{"IPv6, a fragment", ip(six, unix.IPPROTO_FRAGMENT, esp(1)), []netip.Addr{six}, false},
		{"IPv6, a stranger, word 1", ip(strangers6[0], unix.IPPROTO_ESP, esp(1)), []netip.Addr{six, six2}, false},
		{"IPv6, a stranger, word 2", ip(strangers6[1], unix.IPPROTO_ESP, esp(1)), []netip.Addr{six, six2}, false},
		{"IPv6, a stranger, word 3", ip(strangers6[2], unix.IPPROTO_ESP, esp(1)), []netip.Addr{six, six2}, false},
		{"IPv6, a stranger, word 4", ip(strangers6[3], unix.IPPROTO_ESP, esp(1)), []netip.Addr{six, six2}, false},
		{"IPv6, with too many sources", ip(strangers6[0], unix.IPPROTO_ESP, esp(1)), make([]netip.Addr, mostSources6+1), true},
	} {
		f := earlyFilter(tt.packet[0]>>4 == 6, tt.sources)
		passes := func(b []byte, kind, ifindex uint32) bool {
			t.Helper()
			return sockfiltertest.Passes(t, f, b, map[bpf.Extension]uint32{bpf.ExtType: kind, bpf.ExtInterfaceIndex: ifindex})
		}
		if got := passes(tt.packet, unix.PACKET_HOST, 2); got != tt.pass {
			t.Errorf("%s: passes: %v", tt.name, got)
		}
		if passes(tt.packet, unix.PACKET_OTHERHOST, 2) || passes(tt.packet, unix.PACKET_OUTGOING, 2) {
			t.Errorf("%s: passes though not for this host", tt.name)
		}
		if passes(tt.packet, unix.PACKET_HOST, 1) {
			t.Errorf("%s: passes from the loopback interface", tt.name)
		}
		for n := range tt.packet { // the sequence number is the last field that the filter reads
			if passes(tt.packet[:n], unix.PACKET_HOST, 2) {
				t.Errorf("%s: %d of %d bytes pass", tt.name, n, len(tt.packet))
			}
		}
	}
}

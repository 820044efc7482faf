package packets

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/sockfilter/sockfiltertest"
)

// header describes a packet.
type header struct {
	from, to string
	protocol uint8
	ports    [2]uint16 // source and destination
	offset   uint16    // of a fragment, in units of 8 bytes, with flags
	options  int       // words of options
}

// bytes returns the packet, and its EtherType.
func (h header) bytes() ([]byte, uint32) {
	from, to := netip.MustParseAddr(h.from), netip.MustParseAddr(h.to)
	var b []byte
	kind := uint32(unix.ETH_P_IPV6)
	if from.Is4() {
		kind = unix.ETH_P_IP
		b = make([]byte, 20, 60)
		b[0] = 0x45 + byte(h.options)
		binary.BigEndian.PutUint16(b[6:], h.offset)
		b[9] = h.protocol
		copy(b[12:], from.AsSlice())
		copy(b[16:], to.AsSlice())
		for range h.options {
			b = append(b, 1, 1, 1, 1)
		}
	} else {
		b = make([]byte, 40, 60)
		b[0], b[6] = 0x60, h.protocol
		copy(b[8:], from.AsSlice())
		copy(b[24:], to.AsSlice())
	}
	b = binary.BigEndian.AppendUint16(b, h.ports[0])
	return binary.BigEndian.AppendUint16(b, h.ports[1]), kind
}

func TestFilter(t *testing.T) {
	const tcp, udp, icmp, icmp6, esp = unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6, unix.IPPROTO_ESP
	four := header{from: "10.1.2.3", to: "192.0.2.9", protocol: tcp, ports: [2]uint16{40000, 443}}
	six := header{from: "2001:db8:1:2:3:4:5:6", to: "2001:db8:9::9", protocol: udp, ports: [2]uint16{53, 40001}}
	change := func(h header, f func(*header)) header { f(&h); return h }
	host := func(a string) Filter { return Filter{Host: netip.MustParseAddr(a)} }
	for _, k := range []struct {
		name   string
		filter Filter
		packet header
		want   bool
	}{
		{"everything", Filter{}, four, true},
		{"everything, IPv6", Filter{}, six, true},
		{"the source", host("10.1.2.3"), four, true},
		{"the destination", host("192.0.2.9"), four, true},
		{"another address", host("10.1.2.4"), four, false},
		{"an address of IPv6", host("2001:db8::1"), four, false},
		{"the source, IPv6", host("2001:db8:1:2:3:4:5:6"), six, true},
		{"the destination, IPv6", host("2001:db8:9::9"), six, true},
		{"an address of IPv4", host("10.1.2.3"), six, false},
		{"another first word", host("2001:db9:1:2:3:4:5:6"), six, false},
		{"another second word", host("2001:db8:1:3:3:4:5:6"), six, false},
		{"another third word", host("2001:db8:1:2:3:5:5:6"), six, false},
		{"another last word", host("2001:db8:1:2:3:4:5:7"), six, false},
		{"half of each address", host("2001:db8:1:2:0:0:0:9"), six, false},
		{"the destination begins as the source", host("2001:db8:1:2:9::9"), change(six, func(h *header) { h.to = "2001:db8:1:2:9::9" }), true},
		{"a protocol", Filter{Protocols: []uint8{tcp}}, four, true},
		{"another protocol", Filter{Protocols: []uint8{udp}}, four, false},
		{"the first of two", Filter{Protocols: []uint8{icmp, icmp6}}, change(four, func(h *header) { h.protocol = icmp }), true},
		{"the last of two", Filter{Protocols: []uint8{icmp, icmp6}}, change(six, func(h *header) { h.protocol = icmp6 }), true},
		{"neither of two", Filter{Protocols: []uint8{icmp, icmp6}}, four, false},
		{"protocol 0", Filter{Protocols: []uint8{0}}, four, false},
		{"the destination port", Filter{Port: 443}, four, true},
		{"the source port", Filter{Port: 40000}, four, true},
		{"another port", Filter{Port: 444}, four, false},
		{"the source port, IPv6", Filter{Port: 53}, six, true},
		{"the destination port, IPv6", Filter{Port: 40001}, six, true},
		{"another port, IPv6", Filter{Port: 54}, six, false},
		{"a port behind options", Filter{Port: 443}, change(four, func(h *header) { h.options = 10 }), true},
		{"the options are no port", Filter{Port: 0x0101}, change(four, func(h *header) { h.options = 10 }), false},
		{"a port of another protocol", Filter{Port: 443}, change(four, func(h *header) { h.protocol = esp }), false},
		{"a port of another protocol, IPv6", Filter{Port: 53}, change(six, func(h *header) { h.protocol = icmp6 }), false},
		{"a port and the protocol", Filter{Port: 443, Protocols: []uint8{tcp}}, four, true},
		{"a port and another protocol", Filter{Port: 443, Protocols: []uint8{udp}}, four, false},
		{"the first fragment", Filter{Port: 443}, change(four, func(h *header) { h.offset = 0x2000 }), true},
		{"not to be fragmented", Filter{Port: 443}, change(four, func(h *header) { h.offset = 0x4000 }), true},
		{"the second fragment", Filter{Port: 443}, change(four, func(h *header) { h.offset = 1 }), false},
		{"all of them", Filter{netip.MustParseAddr("10.1.2.3"), []uint8{tcp}, 443}, four, true},
		{"all but the host", Filter{netip.MustParseAddr("10.1.2.4"), []uint8{tcp}, 443}, four, false},
		{"all but the port", Filter{netip.MustParseAddr("2001:db8:9::9"), []uint8{udp}, 54}, six, false},
	} {
		b, kind := k.packet.bytes()
		for _, of := range []uint32{kind, unix.ETH_P_ARP} {
			got := sockfiltertest.Passes(t, k.filter.program(), b, map[bpf.Extension]uint32{bpf.ExtProto: of})
			if got != (k.want && of == kind) {
				t.Errorf("%s, EtherType %#x: %v", k.name, of, got)
			}
		}
	}
}

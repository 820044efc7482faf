package nat

import (
	"slices"
	"strconv"
	"testing"
)

func TestProtocols(t *testing.T) {
	names := map[uint8]string{1: "icmp", 4: "ipip", 6: "tcp", 17: "udp", 41: "ipv6", 47: "gre", 50: "esp", 51: "ah", 58: "icmpv6", 132: "sctp"}
	told := []uint8{6, 17, 1, 58, 132, 33, 136}
	for p := range 256 {
		number := uint8(p)
		want := names[number]
		if want == "" {
			want = strconv.Itoa(p)
		}
		if got := ProtocolName(number); got != want {
			t.Errorf("%d is called %q, want %q", p, got, want)
		}
		if got := Portless(number); got == slices.Contains(told, number) {
			t.Errorf("%d is portless: %v", p, got)
		}
		if got := Connectionless(number); got == slices.Contains([]uint8{6, 33, 132}, number) {
			t.Errorf("%d is connectionless: %v", p, got)
		}
	}
	// The order is that of the comparisons in the kernel's rules.
	if got := NotPortless(); !slices.Equal(got, told) {
		t.Errorf("not portless: %v, want %v", got, told)
	}
}

func TestPolicyProtocol(t *testing.T) {
	for _, tt := range []struct {
		name         string
		ipv4, ipv6   uint8
		known, ports bool
	}{
		{"", 0, 0, true, false},
		{"tcp", 6, 6, true, true},
		{"udp", 17, 17, true, true},
		{"icmp", 1, 58, true, false},
		{"icmpv6", 0, 0, false, false},
		{"sctp", 0, 0, false, false},
		{"6", 0, 0, false, false},
		{"TCP", 0, 0, false, false},
	} {
		four, known := PolicyProtocol(tt.name, false)
		six, known6 := PolicyProtocol(tt.name, true)
		if four != tt.ipv4 || six != tt.ipv6 || known != tt.known || known6 != tt.known || TakesPorts(tt.name) != tt.ports {
			t.Errorf("%q: %d, %d with IPv6, known %v and %v, ports %v, want %+v", tt.name, four, six, known, known6, TakesPorts(tt.name), tt)
		}
	}
}

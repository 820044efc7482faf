package link

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/link/linktest"
)

// TestSurroundings checks that Surroundings returns addresses, routes, rules and filters of others
// and leaves ours out, and that Around reports each change of theirs.
func TestSurroundings(t *testing.T) {
	l := open(t)
	run := func(command string) {
		words := strings.Fields(command)
		linktest.Run(t, words[0], words[1:]...)
	}
	for _, command := range []string{
		"ip link add ist-w type veth peer name ist-v", "ip link set ist-w up", "ip link set ist-v up",
		"ip addr add 192.0.2.100/24 dev ist-w", "ip route add default via 192.0.2.1 metric 100", "ip route add 198.51.100.0/24 nexthop via 192.0.2.2 nexthop via 192.0.2.3",
		"ip route add 10.9.0.0/16 via 192.0.2.4 table 77", "ip rule add from 10.0.0.0/8 lookup 77 priority 100", "ip route add 203.0.113.0/24 via 192.0.2.9 proto 73 metric 2048",
	} {
		run(command)
	}
	if err := setPool(l, "ist-w", []netip.Addr{netip.MustParseAddr("192.0.2.10")}); err != nil {
		t.Fatal(err)
	}
	// Other tests leave interfaces behind.
	read := func() (s fib.Surroundings) {
		t.Helper()
		s, err := l.Surroundings()
		if err != nil {
			t.Fatal(err)
		}
		s.Addresses = slices.DeleteFunc(s.Addresses, func(a fib.Assigned) bool { return a.Interface != "ist-w" })
		s.Routes = slices.DeleteFunc(s.Routes, func(r fib.Foreign) bool { return r.Interface != "ist-w" })
		return s
	}
	s := read()
	if own := fmt.Sprint(s.Own(nil)); own != "[192.0.2.100]" {
		t.Errorf("own addresses %s", own)
	}
	if own := s.Own([]string{"ist-w"}); len(own) != 0 {
		t.Errorf("own addresses %v of an attachment", own)
	}
	if g := fmt.Sprint(s.Gateways("ist-w")); g != "[192.0.2.1 192.0.2.2 192.0.2.3 192.0.2.4]" {
		t.Errorf("gateways %s", g)
	}
	if bits := s.Best(netip.MustParseAddr("198.51.100.7")); bits != 24 {
		t.Errorf("the route to 198.51.100.7 has length %d", bits)
	}
	if slices.ContainsFunc(s.Routes, func(r fib.Foreign) bool { return r.Prefix == pfx("203.0.113.0/24") }) {
		t.Error("a route of ours is among those of others")
	}
	if d := s.Doubts("ist-w", pfx("198.51.100.0/24")); len(d) != 1 || !strings.Contains(d[0], "routing rule 100") {
		t.Errorf("doubts %q", d)
	}
	linktest.Run(t, "ip", "rule", "del", "priority", "100")
	linktest.Run(t, "ip", "route", "add", "198.51.100.128/25", "via", "192.0.2.1")
	s = read()
	if d := s.Doubts("ist-w", pfx("198.51.100.0/24")); len(d) != 0 {
		t.Errorf("doubts %q", d)
	}
	if d := s.Doubts("other", pfx("198.51.100.0/24")); len(d) != 2 {
		t.Errorf("doubts %q, want those of the route and of a part of it", d)
	}
	if d := s.Doubts("ist-w", pfx("2001:db8::/32")); len(d) != 1 || !strings.Contains(d[0], "no route") {
		t.Errorf("doubts %q", d)
	}

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	heard, ended := make(chan struct{}, 1), make(chan error)
	go func() {
		ended <- l.Around(ctx, func() {
			select {
			case heard <- struct{}{}:
			default:
			}
		})
	}()
	for _, change := range [][2]string{
		{"ip addr add 192.0.2.77/24 dev ist-w", "ip addr del 192.0.2.77/24 dev ist-w"},
		{"ip route add 198.18.0.0/15 via 192.0.2.1", "ip route del 198.18.0.0/15"},
		{"ip rule add lookup 78 priority 200", "ip rule del priority 200"},
		{"ip link set ist-w mtu 1400", "ip link set ist-w mtu 1500"},
	} {
		for tries := 0; ; tries++ { // changes before the socket is there are not reported
			run(change[0])
			run(change[1])
			select {
			case <-heard:
			case <-time.After(time.Second):
				if tries < 60 {
					continue
				}
				t.Fatalf("%s is not reported", change[0])
			}
			break
		}
		for quiet := false; !quiet; { // further notifications of the same change
			select {
			case <-heard:
			case <-time.After(200 * time.Millisecond):
				quiet = true
			}
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestForeignThroughCanary checks that a route, or one of its next hops, through the canary's
// interface is left out. Ring: pure.
func TestForeignThroughCanary(t *testing.T) {
	const near, other = 7, 3 // indices
	route := func(attrs ...*nl.RtAttr) []byte {
		b := (&nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET, Dst_len: 24, Table: fib.TableMain, Protocol: unix.RTPROT_STATIC, Type: unix.RTN_UNICAST}}).Serialize()
		for _, a := range attrs {
			b = append(b, a.Serialize()...)
		}
		return b
	}
	index := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	hop := func(n uint32, via byte) []byte {
		gateway := nl.NewRtAttr(unix.RTA_GATEWAY, []byte{192, 0, 2, via}).Serialize()
		b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofRtNexthop+len(gateway)))
		return slices.Concat(b, []byte{0, 0}, index(n), gateway)
	}
	to := nl.NewRtAttr(unix.RTA_DST, []byte{198, 51, 100, 0})
	for _, tt := range []struct {
		name string
		m    []byte
		want string
	}{
		{"one next hop", route(to, nl.NewRtAttr(unix.RTA_OIF, index(other))), "[{254 198.51.100.0/24 up0 invalid IP 0}]"},
		{"the canary", route(to, nl.NewRtAttr(unix.RTA_OIF, index(near))), "[]"},
		{"two next hops", route(to, nl.NewRtAttr(unix.RTA_MULTIPATH, slices.Concat(hop(other, 1), hop(other, 2)))), "[{254 198.51.100.0/24 up0 192.0.2.1 0} {254 198.51.100.0/24 up0 192.0.2.2 0}]"},
		{"the canary and another", route(to, nl.NewRtAttr(unix.RTA_MULTIPATH, slices.Concat(hop(near, 1), hop(other, 2)))), "[{254 198.51.100.0/24 up0 192.0.2.2 0}]"},
	} {
		if got := fmt.Sprint(foreign(tt.m, map[int]string{other: "up0"}, near)); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

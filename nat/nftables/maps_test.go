package nftables

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
)

// Ring: namespace.

// TestTwoSpokesWithOnePrefix lets two spokes with the same addresses talk to each other and to the
// Internet, at the same time and from the same ports.
func TestTwoSpokesWithOnePrefix(t *testing.T) {
	s := newSite(t)
	a, b := s.inside, netns.New(t)
	netns.Veth(s.router, "tun1", b, "in0")
	s.router.Run("ip link set tun1 down\nip link set tun1 address 02:00:00:00:00:01 arp off\nip link set tun1 up\nip route del 10.0.0.0/8\nip route add 100.64.0.0/16 dev tun0\nip route add 100.65.0.0/16 dev tun1")
	b.Run("ip link set in0 down\nip link set in0 address 02:00:00:00:00:01 arp off\nip link set in0 up\nip route add default dev in0")
	for _, ns := range []*netns.NS{a, b} {
		ns.Run("ip addr add 10.0.0.1/32 dev in0")
	}
	s.outside.Run("ip addr add 198.51.100.1/32 dev out0")
	d := newDriver(t, s.router)
	c := nat.Config{Underlay: "up0", Attachments: inside("tun0", "tun1"), Own: []netip.Addr{addr("192.0.2.1")}, Pools: []nat.Pool{pool("p", "192.0.2.11"), pool("q", "192.0.2.12")},
		Maps: []nat.Map{
			{Interfaces: []string{"tun0"}, Inside: netip.MustParsePrefix("10.0.0.0/16"), Mapped: netip.MustParsePrefix("100.64.0.0/16")},
			{Interfaces: []string{"tun1"}, Inside: netip.MustParsePrefix("10.0.0.0/16"), Mapped: netip.MustParsePrefix("100.65.0.0/16")},
		},
		Policies: []nat.Policy{
			{Name: "a", Action: nat.SNAT, Sources: pfx("100.64.0.0/16"), Pool: "p"},
			{Name: "b", Action: nat.SNAT, Sources: pfx("100.65.0.0/16"), Pool: "q"},
		}}
	apply(t, d, c)

	exchange := func(what string, port int, from, at *netns.NS, listenAt, to, seen string) {
		t.Helper()
		var l net.Listener
		var client net.Conn
		var err error
		at.Do(func() { l, err = net.Listen("tcp", listenAt) })
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		dialer := net.Dialer{Timeout: waitTime(true), LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: port}}
		from.Do(func() { client, err = dialer.Dial("tcp", to) })
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		t.Cleanup(func() { client.Close() }) // so that all are open at the same time
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		if got := netip.MustParseAddrPort(server.RemoteAddr().String()).Addr(); got != addr(seen) {
			t.Errorf("%s: the server sees %v, want %s", what, got, seen)
		}
		for _, ends := range [][2]net.Conn{{client, server}, {server, client}} {
			ends[1].SetDeadline(time.Now().Add(waitTime(true)))
			ends[0].Write(make([]byte, 5000))
			if _, err := io.ReadFull(ends[1], make([]byte, 5000)); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	exchange("from a to b", 5555, a, b, "10.0.0.1:80", "100.65.0.1:80", "100.64.0.1")
	exchange("from b to a", 5555, b, a, "10.0.0.1:80", "100.64.0.1:80", "100.65.0.1")
	exchange("from a to the Internet", 5556, a, s.outside, "198.51.100.1:443", "198.51.100.1:443", "192.0.2.11")
	exchange("from b to the Internet", 5556, b, s.outside, "198.51.100.1:443", "198.51.100.1:443", "192.0.2.12")

	t.Log("ICMP errors reach the socket of their flow")
	udp := func(from *netns.NS, to string, first []byte) (err error) {
		from.Do(func() {
			var conn net.Conn
			if conn, err = net.Dial("udp", to); err != nil {
				return
			}
			defer conn.Close()
			raw, _ := conn.(*net.UDPConn).SyscallConn()
			raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
			})
			if err == nil {
				_, err = conn.Write(first)
			}
			conn.SetDeadline(time.Now().Add(waitTime(true)))
			if err == nil {
				_, err = conn.Read(make([]byte, 10))
			}
		})
		return err
	}
	if err := udp(a, "100.65.0.1:4321", []byte("x")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("from the other spoke: %v", err)
	}
	if err := udp(a, "198.51.100.1:4321", []byte("x")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("from the Internet: %v", err)
	}
	s.router.Run("ip link set tun1 mtu 1300")
	if err := udp(a, "100.65.0.1:4322", make([]byte, 1400)); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("too long for the other tunnel: %v", err)
	}

	t.Log("no inside address has left")
	for id, out := range s.receive(50 * time.Millisecond) {
		if !slices.Contains([]string{"192.0.2.11", "192.0.2.12"}, out.Source.String()) {
			t.Errorf("%d: %v", id, out)
		}
	}
	t.Log("nor has connection tracking")
	if flows := s.router.Run("cat /proc/net/nf_conntrack"); strings.Contains(flows, "=10.0.0.1 ") {
		t.Errorf("an unmapped address has a flow:\n%s", flows)
	}
}

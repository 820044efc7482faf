package nftables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
)

// Ring: namespace.

// addClients sets up addresses and routes inside and outside for real clients and servers.
func (s *site) addClients() {
	s.inside.Run("ip addr add 10.0.0.1/32 dev in0\nip -6 addr add 2001:db8:a::1/128 dev in0 nodad")
	s.outside.Run(`ip addr add 198.51.100.1/32 dev out0
		ip -6 addr add 2001:db8:b::1/128 dev out0 nodad
		ip route add 192.0.2.0/24 dev out0
		ip -6 route add 2001:db8:ff::/64 dev out0`)
}

// TestRejectIsSeen checks that a rejected client gets an error at once instead of a timeout.
func TestRejectIsSeen(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	c.Policies = append(c.Policies, nat.Policy{Name: "no", Action: nat.Reject, Sources: pfx("0.0.0.0/0", "::/0"), Destinations: pfx("198.51.100.0/24", "2001:db8:b::/48")})
	apply(t, d, c)
	s.addClients()
	for _, k := range []struct {
		network, to string
		want        error
	}{
		{"tcp", "198.51.100.1:443", syscall.ECONNREFUSED},
		{"udp", "198.51.100.1:443", syscall.EHOSTUNREACH}, // ICMP 3/13
		{"tcp", "[2001:db8:b::1]:443", syscall.ECONNREFUSED},
		{"udp", "[2001:db8:b::1]:443", syscall.EACCES}, // ICMPv6 1/1
	} {
		var err error
		s.inside.Do(func() {
			var conn net.Conn
			if conn, err = net.DialTimeout(k.network, k.to, waitTime(true)); err != nil {
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(waitTime(true)))
			if _, err = conn.Write([]byte("x")); err == nil {
				_, err = conn.Read(make([]byte, 1))
			}
		})
		if !errors.Is(err, k.want) {
			t.Errorf("%s to %s: %v, want %v", k.network, k.to, err, k.want)
		}
	}
	s.silent()
	if n := guardCount(t, d); n > 0 {
		t.Errorf("the guard counts %d of what was rejected", n)
	}
}

// TestPlainPassesOnlyBetweenItsPrefixes sends packets whose sources are not translated.
func TestPlainPassesOnlyBetweenItsPrefixes(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	c.Policies = append(c.Policies, nat.Policy{Name: "plain", Action: nat.NoNAT, Sources: pfx("44.0.0.0/16"), Destinations: pfx("198.51.100.0/24"), Protocol: "tcp"})
	apply(t, d, c)
	for id, k := range []struct {
		what, source, destination string
		protocol, flags           byte
		passes                    bool
	}{
		{"a flow of the policy", "44.0.0.1", "198.51.100.1", unix.IPPROTO_TCP, syn, true},
		{"another protocol", "44.0.0.1", "198.51.100.1", unix.IPPROTO_UDP, 0, false},
		{"another source", "44.1.0.1", "198.51.100.1", unix.IPPROTO_TCP, syn, false},
		{"another destination", "44.0.0.1", "198.51.101.1", unix.IPPROTO_TCP, syn, false},
		{"no flow", "44.0.0.2", "198.51.100.1", unix.IPPROTO_TCP, rst, false},
	} {
		f := nat.Flow{Source: addr(k.source), Destination: addr(k.destination), Protocol: k.protocol, Port: 443}
		s.transmit(f, uint16(id+1), k.flags)
		got, passed := s.receive(50 * time.Millisecond)[uint16(id+1)]
		if passed != k.passes || passed && got.Source != f.Source {
			t.Errorf("%s: passed: %v %v, want %v", k.what, passed, got, k.passes)
		}
	}
	t.Log("without the policy the flow ends")
	c.Policies = c.Policies[:1]
	apply(t, d, c)
	s.transmit(nat.Flow{Source: addr("44.0.0.1"), Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_TCP, Port: 443}, 1, ack)
	s.silent()

	t.Log("inside addresses toward the Internet are refused")
	c.Policies = append(c.Policies, nat.Policy{Name: "leak", Action: nat.NoNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.100.0/24")})
	if err := d.Apply(t.Context(), c); err == nil {
		t.Error("10.0.0.0/8 may leave as it is")
	}
}

// TestLateConnections checks what happens to a TCP connection whose beginning this node has not
// seen, and that dropped packets are sampled once Sample listens.
func TestLateConnections(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	c.Policies[0].Pickup = false
	apply(t, d, c)
	f := nat.Flow{Source: addr("10.0.0.1"), Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_TCP, Port: 443, Late: true}

	ctx, stop := context.WithCancel(t.Context())
	samples, done := make(chan nat.Flow, 100), make(chan error, 1)
	go func() { done <- d.Sample(ctx, func(_ nat.Reason, f nat.Flow) { samples <- f }) }()
	send := func(flags byte, want bool) {
		t.Helper()
		s.forgetFlows()
		s.transmit(f, 1, flags)
		if got, passed := s.receive(50 * time.Millisecond)[1]; passed != want || passed && got.Source != addr("192.0.2.11") {
			t.Errorf("flags %#x: passed: %v %v, want %v", flags, passed, got, want)
		}
	}
	for deadline := time.Now().Add(waitTime(true)); len(samples) == 0 && time.Now().Before(deadline); {
		send(ack, false)
	}
	send(syn|ack, false)
	send(syn, true)
	if len(samples) == 0 {
		t.Fatal("no sample")
	}
	if got := <-samples; got != f {
		t.Errorf("sampled %+v, want %+v", got, f)
	}
	if why, want := c.Explain(f), "policy tcp decides such flows, but this one did not begin here, and the policy has no pickup"; why != want {
		t.Errorf("explained as %q", why)
	}
	if err := newDriver(t, s.router).Sample(ctx, nil); !errors.Is(err, unix.EPERM) {
		t.Errorf("a second listener: %v", err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}

	t.Log("with pickup")
	c.Policies = []nat.Policy{c.Policies[0], {Name: "not-these", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.100.128/25"), Protocol: "tcp", Pool: "p"}}
	c.Policies[0].Pickup = true
	apply(t, d, c)
	send(ack, true)
	f.Destination = addr("198.51.100.129") // a more specific policy without pickup
	send(ack, false)
	send(syn, true)
}

// TestUnknownFlowsGetNoAnswer sends packets from outside that belong to no flow.
func TestUnknownFlowsGetNoAnswer(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	apply(t, d, c)
	s.router.Run("ip addr add 192.0.2.11/32 dev up0\nip -6 addr add 2001:db8:ff::11/128 dev up0 nodad")
	s.addClients()
	for _, k := range []struct {
		network, to string
		answered    bool
	}{
		{"tcp", "192.0.2.11:4321", false},
		{"udp", "192.0.2.11:4321", false},
		{"tcp", "[2001:db8:ff::11]:4321", false},
		{"udp", "[2001:db8:ff::11]:4321", false},
		{"tcp", "192.0.2.1:4321", true}, // the node's own address
		{"udp", "192.0.2.1:4321", true},
		{"tcp", "[2001:db8:ff::1]:4321", true},
	} {
		var err error
		s.outside.Do(func() {
			var conn net.Conn
			if conn, err = net.DialTimeout(k.network, k.to, waitTime(k.answered)); err != nil {
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(waitTime(k.answered)))
			if _, err = conn.Write([]byte("x")); err == nil {
				_, err = conn.Read(make([]byte, 1))
			}
		})
		if got := errors.Is(err, syscall.ECONNREFUSED); got != k.answered {
			t.Errorf("%s to %s: %v, want an answer: %v", k.network, k.to, err, k.answered)
		}
	}
}

// TestTimeouts reads the timeouts of flows from connection tracking, before and after the whole
// table is replaced.
func TestTimeouts(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	c.Policies[0].Timeouts = nat.Timeouts{TCPEstablished: 2 * time.Hour}
	c.Policies = append(c.Policies,
		nat.Policy{Name: "udp", Action: nat.SNAT, Sources: pfx("0.0.0.0/0", "::/0"), Protocol: "udp", Pool: "p", Timeouts: nat.Timeouts{UDP: 200 * time.Second, UDPStream: 1000 * time.Second}},
		nat.Policy{Name: "plain", Action: nat.NoNAT, Sources: pfx("44.0.0.0/16"), Destinations: pfx("198.51.100.0/24"), Protocol: "udp", Timeouts: nat.Timeouts{UDP: 77 * time.Second}},
		nat.Policy{Name: "standard", Action: nat.SNAT, Sources: pfx("0.0.0.0/0"), Destinations: pfx("198.51.100.99/32"), Protocol: "udp", Pool: "p"})
	apply(t, d, c)
	left := func(port uint16) int {
		t.Helper()
		for line := range strings.Lines(s.router.Run("cat /proc/net/nf_conntrack")) {
			if strings.Contains(line, fmt.Sprintf(" dport=%d ", port)) {
				n, err := strconv.Atoi(strings.Fields(line)[4])
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
		t.Fatalf("no flow to port %d", port)
		return 0
	}
	check := func(what string, port uint16, want int) {
		t.Helper()
		if got := left(port); got > want || got < want-5 {
			t.Errorf("%s: %d seconds, want %d", what, got, want)
		}
	}
	udp := func(source, destination string, port uint16) {
		s.transmit(nat.Flow{Source: addr(source), Destination: addr(destination), Protocol: unix.IPPROTO_UDP, Port: port}, 1, 0)
	}
	udp("10.0.0.1", "198.51.100.1", 1001)
	check("UDP", 1001, 200)
	udp("2001:db8:a::1", "2001:db8:b::1", 1002)
	check("UDP of IPv6", 1002, 200)
	udp("44.0.0.1", "198.51.100.1", 1003)
	check("UDP untranslated", 1003, 77)
	udp("10.0.0.1", "198.51.100.99", 1004)
	check("UDP of a policy without", 1004, 30)

	s.addClients()
	client, _ := connect(t, s, listen(t, s, "198.51.100.1:443"))
	check("TCP", 443, 7200)
	c.Pools = append(c.Pools, pool("q", "192.0.2.12", "192.0.2.13"))
	c.Policies[3].Timeouts.UDP = 50 * time.Second
	apply(t, d, c)
	udp("10.0.0.1", "198.51.100.1", 1001)
	check("UDP after all was replaced", 1001, 200)
	if _, err := client.Write(bytes.Repeat([]byte("x"), 100)); err != nil {
		t.Fatal(err)
	}
	check("TCP after all was replaced", 443, 7200)
	udp("10.0.0.1", "198.51.100.99", 1005)
	check("UDP with an added timeout", 1005, 50)

	t.Log("timeouts that exist are not written again")
	other := newDriver(t, s.router)
	apply(t, other, c)
	if other.Writes() != 0 {
		t.Errorf("%d transactions", other.Writes())
	}
	t.Log("unused timeouts are removed")
	c.Policies = c.Policies[:1]
	apply(t, d, c)
	if list := s.router.Run("nft list table inet isthmus"); strings.Count(list, "ct timeout tcp") != 1 || strings.Contains(list, "ct timeout udp") {
		t.Errorf("after all but one were removed:\n%s", list)
	}
}

// TestSourcePortIsKept checks that a source port changes only when it is already taken at the
// address.
func TestSourcePortIsKept(t *testing.T) {
	s := newSite(t)
	apply(t, newDriver(t, s.router), guardConfig())
	port := func(source string) uint16 {
		s.transmit(nat.Flow{Source: addr(source), Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_TCP, Port: 443}, 7, syn)
		got, ok := s.receive(50 * time.Millisecond)[7]
		if !ok {
			t.Fatal("the SYN did not pass")
		}
		return uint16(got.Bytes[20])<<8 | uint16(got.Bytes[21])
	}
	if got := port("10.0.0.1"); got != 1024+7 {
		t.Errorf("a free port became %d", got)
	}
	if got := port("10.0.0.2"); got == 1024+7 {
		t.Error("two flows have one address and port")
	}
}

// TestPortForward forwards a port of a pool's address to a server inside, and connects to it from
// outside and from the server's own spoke.
func TestPortForward(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	c.Pools[0].Addresses[0].Public = addr("203.0.113.11")
	c.Policies = append(c.Policies, nat.Policy{Name: "web", Action: nat.DNAT, Sources: pfx("198.51.100.0/24", "10.0.0.0/8"), Protocol: "tcp",
		Ports: []nat.PortRange{{First: 443, Last: 443}}, Pool: "p", To: netip.MustParseAddrPort("10.0.0.1:8443")})
	apply(t, d, c)
	s.router.Run("ip addr add 192.0.2.11/32 dev up0")
	s.addClients()
	s.outside.Run("ip addr add 203.0.113.99/32 dev out0")
	var server net.Listener
	var err error
	s.inside.Do(func() { server, err = net.Listen("tcp", "10.0.0.1:8443") })
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	ask := func(from *netns.NS, source, to, seen string) {
		t.Helper()
		dialer := net.Dialer{Timeout: waitTime(seen != ""), LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		var client net.Conn
		from.Do(func() { client, err = dialer.Dial("tcp", to) })
		if seen == "" {
			if e, ok := errors.AsType[net.Error](err); err == nil || !ok || !e.Timeout() {
				t.Errorf("from %s to %s: %v, want silence", source, to, err)
			}
			return
		}
		if err != nil {
			t.Errorf("from %s to %s: %v", source, to, err)
			return
		}
		defer client.Close()
		conn, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if got := netip.MustParseAddrPort(conn.RemoteAddr().String()).Addr(); got != addr(seen) {
			t.Errorf("from %s to %s: the server sees %v, want %s", source, to, got, seen)
		}
		conn.Write([]byte("hello"))
		client.SetDeadline(time.Now().Add(waitTime(true)))
		if b := make([]byte, 5); err == nil {
			if _, err = io.ReadFull(client, b); err != nil {
				t.Errorf("from %s to %s: %v", source, to, err)
			}
		}
	}
	ask(s.outside, "198.51.100.1", "192.0.2.11:443", "198.51.100.1")
	ask(s.outside, "203.0.113.99", "192.0.2.11:443", "") // not among the allowed sources
	ask(s.outside, "198.51.100.1", "192.0.2.11:444", "")
	ask(s.inside, "10.0.0.1", "192.0.2.11:443", "192.0.2.11")
	ask(s.inside, "10.0.0.1", "203.0.113.11:443", "203.0.113.11")

	t.Log("a late packet does not reach the server, which would reset the connection")
	s.transmit(nat.Flow{Source: addr("198.51.100.1"), Destination: addr("192.0.2.11"), Protocol: unix.IPPROTO_TCP, Port: 443, Outside: true}, 99, ack)
	if got := s.arrivals(s.in, 50*time.Millisecond); got[99].Bytes != nil {
		t.Errorf("it reached %v", got[99])
	}
	for id, out := range s.receive(50 * time.Millisecond) {
		if !slices.Contains([]netip.Addr{addr("192.0.2.1"), addr("192.0.2.11")}, out.Source) {
			t.Errorf("%d left: %v", id, out)
		}
	}
}

// TestRedirectToProxy redirects flows to a port on the Internet to a proxy on the node, which
// reads their original destination.
func TestRedirectToProxy(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	c.Policies = append(c.Policies, nat.Policy{Name: "web", Action: nat.Redirect, Sources: pfx("10.0.0.0/8"), Protocol: "tcp",
		Ports: []nat.PortRange{{First: 80, Last: 80}}, To: netip.MustParseAddrPort("192.0.2.1:3128")})
	apply(t, d, c)
	s.addClients()
	s.outside.Run("ip addr add 172.17.0.1/32 dev out0")
	internet := listen(t, s, "198.51.100.1:80")
	var proxy net.Listener
	var err error
	s.router.Do(func() { proxy, err = net.Listen("tcp", "192.0.2.1:3128") })
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	dial := func(to string) (net.Conn, error) {
		var conn net.Conn
		var err error
		s.inside.Do(func() { conn, err = net.DialTimeout("tcp", to, waitTime(true)) })
		return conn, err
	}
	client, err := dial("198.51.100.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	conn, err := proxy.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if from := netip.MustParseAddrPort(conn.RemoteAddr().String()).Addr(); from != addr("10.0.0.1") {
		t.Errorf("the proxy sees %v", from)
	}
	if meant := originalDestination(t, conn); meant != netip.MustParseAddrPort("198.51.100.1:80") {
		t.Errorf("the proxy reads the original destination %v", meant)
	}

	t.Log("another port is not redirected, and its flows are translated")
	other, server := connect(t, s, listen(t, s, "198.51.100.1:443"))
	if got := netip.MustParseAddrPort(server.RemoteAddr().String()).Addr(); got != addr("192.0.2.11") {
		t.Errorf("the server sees %v", got)
	}
	other.Close()

	t.Log("from spoke to spoke nothing is redirected")
	s.inside.Run("ip addr add 172.17.0.1/32 dev in0")
	if conn, err := dial("172.17.0.1:80"); err == nil {
		t.Error("an answer from", conn.RemoteAddr())
	}

	t.Log("a proxy that is down: blocked")
	c.Policies = slices.Clone(c.Policies)
	c.Policies[1].Down = true
	apply(t, d, c)
	if _, err := dial("198.51.100.1:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v, want a refusal", err)
	}
	t.Log("bypassed")
	c.Policies = slices.Clone(c.Policies)
	c.Policies[1].Bypass = true
	apply(t, d, c)
	_, server = connect(t, s, internet)
	if got := netip.MustParseAddrPort(server.RemoteAddr().String()).Addr(); got != addr("192.0.2.11") {
		t.Errorf("the server sees %v", got)
	}
	t.Log("the flow to the proxy is still there")
	client.Write([]byte("x"))
	conn.SetDeadline(time.Now().Add(waitTime(true)))
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// originalDestination returns the SO_ORIGINAL_DST of an IPv4 connection.
func originalDestination(t *testing.T, c net.Conn) netip.AddrPort {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var m *unix.IPv6Mreq // 20 bytes; a sockaddr_in takes 16 of them
	raw.Control(func(fd uintptr) { m, err = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST) })
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Multiaddr[4:8])), uint16(m.Multiaddr[2])<<8|uint16(m.Multiaddr[3]))
}

package nftables

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
	"github.com/isthmus-net/isthmus/test/traffic"
)

const (
	fin, syn, rst, ack = 0x01, 0x02, 0x04, 0x10
)

func guardConfig() nat.Config {
	c := nat.Config{Underlay: "up0", Attachments: inside("tun0"), Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")}, Pools: []nat.Pool{pool("p", "192.0.2.11", "2001:db8:ff::11")}}
	c.Policies = []nat.Policy{{Name: "tcp", Action: nat.SNAT, Sources: pfx("10.0.0.0/8", "2001:db8:a::/48"), Protocol: "tcp", Pool: "p", Pickup: true}}
	return c
}

// TestNothingLeavesWithAnInsideSource sends packets that do not begin a flow.
func TestNothingLeavesWithAnInsideSource(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	apply(t, d, c)
	allowed := []netip.Addr{addr("192.0.2.1"), addr("192.0.2.11"), addr("2001:db8:ff::1"), addr("2001:db8:ff::11")}
	id := uint16(0)
	send := func(what string, f nat.Flow, flags byte, passes bool) {
		t.Helper()
		id++
		s.transmit(f, id, flags)
		got, passed := s.receive(50 * time.Millisecond)[id]
		if passed && !slices.Contains(allowed, got.Source) {
			t.Errorf("%s: left as %v", what, got)
		}
		if passed != passes {
			t.Errorf("%s: passed: %v, want %v", what, passed, passes)
		}
	}
	flows := []nat.Flow{
		{Source: addr("10.0.0.1"), Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_TCP, Port: 443},
		{Source: addr("2001:db8:a::1"), Destination: addr("2001:db8:b::1"), Protocol: unix.IPPROTO_TCP, Port: 443},
	}
	before := guardCount(t, d)
	dropped := uint64(0)
	for _, f := range flows {
		send("SYN", f, syn, true)
		send("RST without a flow", f, rst, false)
		send("FIN without a flow", f, fin, false)
		send("SYN and FIN", f, syn|fin, false)
		send("no flag at all", f, 0, false)
		udp := f
		udp.Protocol = unix.IPPROTO_UDP
		send("no policy", udp, 0, false)
		strange := f
		strange.Protocol = 253
		send("unknown protocol", strange, 0, false)
		dropped += 6
		spoofed := f
		spoofed.Source = allowed[1]
		if f.Source.Is6() {
			spoofed.Source = allowed[3]
		}
		send("our own address from the inside", spoofed, syn, false)
		dropped++

		// A flow that is established when the table appears, or when connection tracking loses it.
		s.forgetFlows()
		send("ACK in the middle of a flow", f, ack, true)
		s.forgetFlows()
		send("RST after a flush", f, rst, false)
		dropped++
	}
	if got := guardCount(t, d) - before; got != dropped {
		t.Errorf("the guard counts %d, want %d", got, dropped)
	}

	t.Log("a flow that began without rules does not keep its source once there are rules")
	s.router.Run("nft delete table inet isthmus\nnft add table inet x\nnft add chain inet x y { type filter hook forward priority 0 ; }\nnft add rule inet x y ct state new counter")
	f := flows[0]
	id++
	s.transmit(f, id, syn)
	if got, passed := s.receive(50 * time.Millisecond)[id]; !passed || got.Source != f.Source {
		t.Errorf("without rules: %v %v: the test shows nothing", passed, got)
	}
	apply(t, d, c)
	send("after the table is back", f, ack, true)
}

func guardCount(t *testing.T, d *Driver) uint64 {
	t.Helper()
	state, err := d.Observe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return state.Guard.Packets
}

// TestReplacingLeavesNoGap replaces the whole table repeatedly under traffic that it must drop.
func TestReplacingLeavesNoGap(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	a := guardConfig()
	b := guardConfig()
	b.Pools = append(b.Pools, pool("q", "192.0.2.12", "192.0.2.13"))
	apply(t, d, a)
	stop, done := make(chan struct{}), make(chan uint16)
	go func() {
		for id := uint16(1); ; id++ {
			select {
			case <-stop:
				done <- id
				return
			default:
			}
			s.transmit(nat.Flow{Source: addr("10.0.0.1"), Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_UDP, Port: 53}, id, 0)
			time.Sleep(100 * time.Microsecond)
		}
	}()
	for range 30 {
		apply(t, d, b)
		apply(t, d, a)
	}
	close(stop)
	sent := <-done
	s.silent()
	if d.Writes() != 61 {
		t.Errorf("%d transactions, want 61", d.Writes())
	}
	if n := guardCount(t, d); n != uint64(sent)-1 {
		t.Errorf("the guard counts %d of %d", n, sent-1)
	}
}

// TestConnections makes real TCP connections. It checks the source, the MSS that each side sees,
// the packets that the node itself sends, and that a connection survives every change of the
// rules.
func TestConnections(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	c.Clamps = []nat.Clamp{{Interface: "tun0", IPv4: 1200, IPv6: 1100}}
	apply(t, d, c)
	s.inside.Run("ip addr add 10.0.0.1/32 dev in0\nip -6 addr add 2001:db8:a::1/128 dev in0 nodad")
	s.outside.Run(`ip addr add 198.51.100.1/32 dev out0
		ip -6 addr add 2001:db8:b::1/128 dev out0 nodad
		ip route add 192.0.2.0/24 dev out0
		ip -6 route add 2001:db8:ff::/64 dev out0`)

	for _, k := range []struct {
		server, source string
		mss            int
	}{{"198.51.100.1", "192.0.2.11", 1200}, {"2001:db8:b::1", "2001:db8:ff::11", 1100}} {
		listener := listen(t, s, net.JoinHostPort(k.server, "443"))
		client, server := connect(t, s, listener)
		if got := netip.MustParseAddrPort(server.RemoteAddr().String()).Addr(); got != addr(k.source) {
			t.Errorf("the server sees %v, want %s", got, k.source)
		}
		// The MSS option that a side receives limits the segments that it sends.
		for name, conn := range map[string]net.Conn{"client": client, "server": server} {
			if got := sendMSS(t, conn); got > k.mss || got < k.mss-12 {
				t.Errorf("%s: the %s sends segments of %d, want %d", k.server, name, got, k.mss)
			}
		}
		echo := func(when string) {
			t.Helper()
			deadline := time.Now().Add(waitTime(true))
			client.SetDeadline(deadline)
			server.SetDeadline(deadline)
			b := make([]byte, 4)
			_, err := client.Write([]byte("ping"))
			if err == nil {
				_, err = io.ReadFull(server, b)
			}
			if err == nil {
				_, err = server.Write(b)
			}
			if err == nil {
				_, err = io.ReadFull(client, b)
			}
			if err != nil || string(b) != "ping" {
				t.Errorf("%s: %q, %v", when, b, err)
			}
		}
		echo("at first")
		changed := c
		changed.Pools = append(slices.Clone(c.Pools), pool("q", "192.0.2.12"))
		changed.Policies = []nat.Policy{{Name: "tcp", Action: nat.SNAT, Sources: pfx("10.0.0.0/8", "2001:db8:a::/48"), Protocol: "tcp", Pool: "q"}}
		apply(t, d, changed)
		echo("after another pool was chosen")
		apply(t, d, c)
		echo("after it was chosen back")

		// The node's own traffic keeps the node's address.
		var err error
		var own net.Conn
		s.router.Do(func() { own, err = net.DialTimeout("tcp", listener.Addr().String(), 5*time.Second) })
		if err != nil {
			t.Fatal(err)
		}
		defer own.Close()
		if got := netip.MustParseAddrPort(own.LocalAddr().String()).Addr(); !slices.Contains(c.Own, got) {
			t.Errorf("the node sends as %v", got)
		}
		peer, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer peer.Close()
		if peer.RemoteAddr().String() != own.LocalAddr().String() {
			t.Errorf("the node's own connection is translated to %v", peer.RemoteAddr())
		}
	}

	t.Log("a clamp never raises the MSS")
	c.Clamps[0].IPv4 = 9000
	apply(t, d, c)
	client, server := connect(t, s, listen(t, s, "198.51.100.1:80"))
	if a, b := sendMSS(t, client), sendMSS(t, server); a > 1460 || b > 1460 {
		t.Errorf("segments of %d and %d", a, b)
	}

	t.Log("from tunnel to tunnel nothing is translated or dropped")
	s.router.Run("ip link add tun1 type veth peer name far1 netns " + s.outside.Path + "\nip link set tun1 address 02:00:00:00:00:01 arp off\nip link set tun1 up\nip route add 172.16.0.0/16 dev tun1")
	s.outside.Run("ip link set far1 address 02:00:00:00:00:01 arp off\nip link set far1 up\nip addr add 172.16.0.1/32 dev far1\nip route add 10.0.0.0/8 dev far1")
	c.Attachments = inside("tun0", "tun1")
	apply(t, d, c)
	_, server = connect(t, s, listen(t, s, "172.16.0.1:443"))
	if got := server.RemoteAddr().String(); !strings.HasPrefix(got, "10.0.0.1:") {
		t.Errorf("the other spoke sees %s", got)
	}
}

func listen(t *testing.T, s *site, at string) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	s.outside.Do(func() { l, err = net.Listen("tcp", at) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// waitTime is how long a test waits for an answer. A busy machine needs time for one that comes; an
// answer that must not come would come at once.
func waitTime(answered bool) time.Duration {
	if answered {
		return 30 * time.Second
	}
	return 400 * time.Millisecond
}

func connect(t *testing.T, s *site, l net.Listener) (client, server net.Conn) {
	t.Helper()
	var err error
	s.inside.Do(func() { client, err = net.DialTimeout("tcp", l.Addr().String(), waitTime(true)) })
	if err != nil {
		t.Fatalf("%v\n%s", err, s.router.Run("nft list table inet isthmus"))
	}
	t.Cleanup(func() { client.Close() })
	l.(*net.TCPListener).SetDeadline(time.Now().Add(waitTime(true)))
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return client, server
}

// sendMSS returns the largest segment that a connection sends, in bytes.
func sendMSS(t *testing.T, c net.Conn) int {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var mss int
	raw.Control(func(fd uintptr) { mss, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) })
	if err != nil {
		t.Fatal(err)
	}
	return mss
}

// TestICMPErrors checks that an error about a translated flow, from a router inside, leaves with
// the flow's address.
func TestICMPErrors(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	apply(t, d, guardConfig())
	f := nat.Flow{Source: addr("10.0.0.1"), Destination: addr("198.51.100.1"), Protocol: unix.IPPROTO_TCP, Port: 443}
	s.transmit(f, 1, syn)
	out, ok := s.receive(50 * time.Millisecond)[1]
	if !ok {
		t.Fatal("the SYN did not pass")
	}
	// The error quotes the server's answer as it arrived inside.
	quoted := make([]byte, 28)
	copy(quoted, []byte{0x45, 0, 0, 40, 0, 0, 0, 0, 63, unix.IPPROTO_TCP})
	copy(quoted[12:], f.Destination.AsSlice())
	copy(quoted[16:], f.Source.AsSlice())
	binary.BigEndian.PutUint16(quoted[20:], f.Port)
	binary.BigEndian.PutUint16(quoted[22:], 1024+1)
	binary.BigEndian.PutUint16(quoted[10:], traffic.Checksum(quoted[:20]))
	message := append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, quoted...) // port unreachable
	binary.BigEndian.PutUint16(message[2:], traffic.Checksum(message))
	header := []byte{0x45, 0, 0, byte(20 + len(message)), 0, 77, 0, 0, 64, unix.IPPROTO_ICMP, 0, 0, 10, 9, 9, 9}
	packet := slices.Concat(header, f.Destination.AsSlice(), message)
	if err := unix.Sendto(s.in.Send4, packet, 0, &unix.SockaddrInet4{Addr: f.Destination.As4()}); err != nil {
		t.Fatal(err)
	}
	arrived, err := s.out.Receive(50 * time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if len(arrived.Answers) != 1 || arrived.Answers[0].Source != out.Source {
		t.Fatalf("errors %v, want one from %v", arrived.Answers, out.Source)
	}
	inner := arrived.Answers[0].Bytes[28:]
	if to, _ := netip.AddrFromSlice(inner[16:20]); to != out.Source {
		t.Errorf("the error quotes a packet to %v: % x", to, inner)
	}
}

// TestDoors connects to ports of the node from an attachment and from the underlay. BGP is
// accepted only from the address of a peer on its own interface. The API answers the configured
// sources and the node itself.
func TestDoors(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	c.Sessions = []nat.Session{{Interface: "tun0", Address: addr("10.0.0.1")}, {Interface: "tun0", Address: addr("2001:db8:a::1")}}
	c.API.Port = 7443
	apply(t, d, c)
	s.inside.Run("ip addr add 10.0.0.1/32 dev in0\nip -6 addr add 2001:db8:a::1/128 dev in0 nodad")
	s.outside.Run(`ip addr add 198.51.100.1/32 dev out0
		ip -6 addr add 2001:db8:b::1/128 dev out0 nodad
		ip route add 192.0.2.0/24 dev out0
		ip -6 route add 2001:db8:ff::/64 dev out0`)
	for _, port := range []string{"179", "180", "7443"} {
		s.router.Do(func() {
			l, err := net.Listen("tcp", ":"+port)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { l.Close() })
		})
	}
	dial := func(from *netns.NS, to string, answered bool) {
		t.Helper()
		from.Do(func() {
			c, err := net.DialTimeout("tcp", to, waitTime(answered))
			if err == nil {
				c.Close()
			}
			if e, _ := errors.AsType[net.Error](err); (err == nil) != answered || err != nil && !e.Timeout() {
				t.Errorf("to %s: %v, want an answer: %v", to, err, answered)
			}
		})
	}
	for _, a := range []string{"192.0.2.1", "[2001:db8:ff::1]"} {
		dial(s.inside, a+":179", true)
		dial(s.outside, a+":179", false)
		dial(s.outside, a+":180", true)
		dial(s.outside, a+":7443", false)
		dial(s.inside, a+":7443", false)
	}
	c.API.From = pfx("10.0.0.0/30", "2001:db8:b::/64")
	apply(t, d, c)
	dial(s.inside, "192.0.2.1:7443", true)
	dial(s.outside, "192.0.2.1:7443", false)
	dial(s.inside, "[2001:db8:ff::1]:7443", false)
	dial(s.outside, "[2001:db8:ff::1]:7443", true)
	dial(s.router, "127.0.0.1:7443", true)

	c.Sessions = []nat.Session{{Interface: "tun0", Address: addr("10.0.0.2")}, {Interface: "tun1", Address: addr("10.0.0.1")}}
	apply(t, d, c)
	dial(s.inside, "192.0.2.1:179", false)
	dial(s.router, "127.0.0.1:179", true)
}

// TestDNSDoors connects to port 53 of addresses of the node. The port is open only at addresses
// with doors, only to the interfaces and sources that these name, and to the node itself. Other
// addresses and ports are not affected.
func TestDNSDoors(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := guardConfig()
	s.inside.Run("ip addr add 10.0.0.1/32 dev in0\nip -6 addr add 2001:db8:a::1/128 dev in0 nodad")
	s.outside.Run(`ip addr add 198.51.100.1/32 dev out0
		ip addr add 198.51.100.9/32 dev out0
		ip -6 addr add 2001:db8:b::1/128 dev out0 nodad
		ip route add 192.0.2.0/24 dev out0 src 198.51.100.1
		ip -6 route add 2001:db8:ff::/64 dev out0`)
	s.router.Run("ip addr add 198.18.0.10/32 dev lo\nip route add 198.51.100.0/24 dev up0")
	s.outside.Run("ip route add 198.18.0.10/32 dev out0 src 198.51.100.1")
	s.inside.Run("ip route add 198.18.0.10/32 dev in0 src 10.0.0.1")
	s.router.Do(func() {
		for _, port := range []string{"53", "54"} {
			l, err := net.Listen("tcp", ":"+port)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { l.Close() })
			// so that answers have it as their source
			for _, a := range []string{"192.0.2.1", "2001:db8:ff::1", "198.18.0.10", "127.0.0.1"} {
				p, err := net.ListenPacket("udp", net.JoinHostPort(a, port))
				if err != nil {
					t.Error(err)
					return
				}
				t.Cleanup(func() { p.Close() })
				go func() {
					for buffer := make([]byte, 100); ; {
						_, from, err := p.ReadFrom(buffer)
						if err != nil {
							return
						}
						_, _ = p.WriteTo([]byte("pong"), from)
					}
				}()
			}
		}
	})
	ask := func(from *netns.NS, source, to string, answered bool) {
		t.Helper()
		from.Do(func() {
			for _, network := range []string{"tcp", "udp"} {
				dialer := net.Dialer{Timeout: waitTime(answered)}
				if source != "" && network == "tcp" {
					dialer.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
				} else if source != "" {
					dialer.LocalAddr = &net.UDPAddr{IP: net.ParseIP(source)}
				}
				conn, err := dialer.Dial(network, to)
				if err == nil {
					if network == "udp" {
						_ = conn.SetDeadline(time.Now().Add(waitTime(answered)))
						_, _ = conn.Write([]byte("ping"))
						_, err = conn.Read(make([]byte, 10))
					}
					conn.Close()
				}
				if e, _ := errors.AsType[net.Error](err); (err == nil) != answered || err != nil && !e.Timeout() {
					t.Errorf("over %s from %q to %s: %v, want an answer: %v", network, source, to, err, answered)
				}
			}
		})
	}
	apply(t, d, c)
	ask(s.outside, "", "192.0.2.1:53", true) // the rules do not cover it, because it has no doors

	c.DNS = []nat.Door{{Interface: "tun0", Address: addr("192.0.2.1")}, {Interface: "tun0", Address: addr("2001:db8:ff::1")}, {Interface: "up0", Address: addr("192.0.2.1"), From: pfx("198.51.100.9/32")}, {Interface: "tun9", Address: addr("198.18.0.10")}}
	apply(t, d, c)
	for _, a := range []string{"192.0.2.1", "[2001:db8:ff::1]"} {
		ask(s.inside, "", a+":53", true)
		ask(s.outside, "", a+":53", false)
		ask(s.outside, "", a+":54", true)
	}
	ask(s.outside, "198.51.100.9", "192.0.2.1:53", true)
	ask(s.outside, "198.51.100.9", "198.18.0.10:53", false)
	ask(s.inside, "", "198.18.0.10:53", false)
	ask(s.inside, "", "198.18.0.10:54", true)
	ask(s.router, "", "192.0.2.1:53", true)
	ask(s.router, "", "127.0.0.1:53", true)
	if diff, err := d.Differences(context.Background(), withLinks(t, d, c)); err != nil || len(diff) > 0 {
		t.Errorf("differences %v, %v", diff, err)
	}
	c.DNS = c.DNS[:3]
	apply(t, d, c)
	ask(s.inside, "", "198.18.0.10:53", true) // which no longer has a door
	ask(s.outside, "", "192.0.2.1:53", false)
	c.DNS = nil
	apply(t, d, c)
	ask(s.outside, "", "192.0.2.1:53", true)
}

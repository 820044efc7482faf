package echo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/netns"
)

// bench is a node, a router and a host behind it. The link to the host has an MTU of 1400, and a
// third network has two more interfaces of the node and the router.
type bench struct {
	t                  *testing.T
	node, router, host *netns.NS
}

func newBench(t *testing.T) *bench {
	b := &bench{t, netns.New(t), netns.New(t), netns.New(t)}
	for _, n := range []*netns.NS{b.node, b.router, b.host} {
		n.Run("sysctl -qw net.ipv6.conf.default.accept_dad=0")
	}
	netns.Veth(b.node, "t-a", b.router, "a0")
	netns.Veth(b.node, "t-b", b.router, "b0")
	netns.Veth(b.router, "h0", b.host, "h1")
	b.node.Run(`ip addr add 10.1.0.1/24 dev t-a
		ip addr add 10.2.0.1/24 dev t-b
		ip route add 10.9.0.0/24 via 10.1.0.2
		ip -6 addr add fd01::1/64 dev t-a nodad
		ip -6 addr add fd02::1/64 dev t-b nodad
		ip -6 route add fd09::/64 via fd01::2`)
	b.router.Run(`ip addr add 10.1.0.2/24 dev a0
		ip addr add 10.2.0.2/24 dev b0
		ip addr add 10.9.0.1/24 dev h0
		ip link set h0 mtu 1400
		ip -6 addr add fd01::2/64 dev a0 nodad
		ip -6 addr add fd02::2/64 dev b0 nodad
		ip -6 addr add fd09::1/64 dev h0 nodad
		sysctl -qw net.ipv4.ip_forward=1
		sysctl -qw net.ipv6.conf.all.forwarding=1
		sysctl -qw net.ipv4.icmp_ratelimit=0
		ip route add unreachable 10.8.0.0/24
		ip route add prohibit 10.7.0.0/24
		ip -6 route add unreachable fd08::/64`)
	b.host.Run(`ip link set h1 mtu 1400
		ip addr add 10.9.0.2/24 dev h1
		ip route add default via 10.9.0.1
		ip -6 addr add fd09::2/64 dev h1 nodad
		ip -6 route add default via fd09::1`)
	b.node.Run(`ip route add 10.8.0.0/24 via 10.1.0.2
		ip route add 10.7.0.0/24 via 10.1.0.2
		ip -6 route add fd08::/64 via fd01::2`)
	// The link-local addresses, which neighbour discovery needs, are tentative at first.
	for _, to := range []string{"10.9.0.2", "10.2.0.2", "fd09::2", "fd02::2", "fd01::2"} {
		for end := time.Now().Add(time.Minute); ; {
			all, err := b.ping(t.Context(), Request{To: addr(to), Count: 1, Size: 56})
			if err == nil && all[0].Err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %v, %v", to, all, err)
			}
		}
	}
	return b
}

// ping pings from the node, and returns the results. The sockets are opened on the thread of its
// namespace, to which the caller gives the time of the ping.
func (b *bench) ping(ctx context.Context, q Request) (all []Result, err error) {
	b.t.Helper()
	b.node.Do(func() {
		err = Ping(ctx, q, func(r Result) error {
			all = append(all, r)
			return nil
		})
	})
	return all, err
}

func addr(text string) netip.Addr {
	if text == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(text)
}

// TestPing pings over links and routers of its own. Ring: namespace.
func TestPing(t *testing.T) {
	b := newBench(t)
	for _, k := range []struct {
		name, to, from, iface string
		size                  int
		df                    bool
		want                  string // "": an answer
		by                    string // the sender of the error
	}{
		{name: "the kernel chooses", to: "10.9.0.2", size: 56},
		{name: "IPv6, the kernel chooses", to: "fd09::2", size: 56},
		{name: "the smallest", to: "10.9.0.2", size: TokenSize},
		{name: "an interface", to: "10.2.0.2", from: "10.2.0.1", iface: "t-b", size: 56},
		{name: "an interface, IPv6", to: "fd02::2", from: "fd02::1", iface: "t-b", size: 56},
		{name: "an interface that is not of the route", to: "10.9.0.2", from: "10.2.0.1", iface: "t-b", size: 56, want: "no answer within 1s"},
		{name: "an interface that is not of the route, IPv6", to: "fd09::2", from: "fd02::1", iface: "t-b", size: 56, want: "destination unreachable: this node has no route to it"},
		{name: "in fragments", to: "10.9.0.2", size: 8972},
		{name: "in fragments, IPv6", to: "fd09::2", size: 8972},
		{name: "the largest that fits", to: "10.9.0.2", size: 1400 - 28, df: true},
		{name: "too big for a router", to: "10.9.0.2", size: 1400 - 28 + 1, df: true, want: "packet too big: the path MTU is 1400", by: "10.1.0.2"},
		{name: "the same from the cache of this node", to: "10.9.0.2", size: 1400 - 28 + 1, df: true, want: "packet too big: the path MTU is 1400"},
		{name: "the largest that fits, IPv6", to: "fd09::2", size: 1400 - 48, df: true},
		{name: "too big for this node", to: "10.1.0.2", size: 1473, df: true, want: "packet too big: the path MTU is 1500"},
		{name: "too big for this node, IPv6", to: "fd01::2", size: 1453, df: true, want: "packet too big: the path MTU is 1500"},
		{name: "unreachable", to: "10.8.0.2", size: 56, want: "destination unreachable: the host does not answer", by: "10.1.0.2"},
		{name: "prohibited", to: "10.7.0.2", size: 56, want: "destination unreachable: prohibited by a filter", by: "10.1.0.2"},
		{name: "unreachable, IPv6", to: "fd08::2", size: 56, want: "destination unreachable: no route", by: "fd01::2"},
		{name: "no route", to: "10.200.0.2", size: 56, want: "destination unreachable: this node has no route to it"},
		{name: "no route, IPv6", to: "fd77::2", size: 56, want: "destination unreachable: this node has no route to it"},
		{name: "a source that is missing", to: "10.9.0.2", from: "10.66.0.1", iface: "t-a", size: 56, want: "destination unreachable: this node has no route to it from 10.66.0.1"},
		{name: "a source that is missing, IPv6", to: "fd09::2", from: "fd66::1", iface: "t-a", size: 56, want: "this node does not have the source address fd66::1"},
		{name: "broadcast", to: "10.1.0.255", size: 56, want: "it is a broadcast address"},
	} {
		t.Run(k.name, func(t *testing.T) {
			all, err := b.ping(t.Context(), Request{To: addr(k.to), From: addr(k.from), Interface: k.iface, Count: 1, Interval: time.Millisecond, Size: k.size, DontFragment: k.df})
			if err != nil || len(all) != 1 {
				t.Fatalf("%v, %v", all, err)
			}
			r := all[0]
			if k.want == "" {
				if r.Err != nil || r.From != addr(k.to) || r.RoundTrip <= 0 || r.RoundTrip > Wait || r.Sequence != 1 {
					t.Errorf("%+v", r)
				}
				return
			}
			if r.Err == nil || !strings.HasPrefix(r.Err.Error(), k.want) || r.RoundTrip != 0 || r.From != addr(k.by) {
				t.Errorf("%+v, want %q by %q", r, k.want, k.by)
			}
		})
	}
	// The first IPv6 packet that is too big may find the path MTU in the cache, where a fragmented
	// one has left it.
	b.node.Run("ip -6 route flush cache")
	all, err := b.ping(t.Context(), Request{To: addr("fd09::2"), Count: 3, Interval: time.Millisecond, Size: 1400 - 48 + 1, DontFragment: true})
	if err != nil || len(all) != 3 {
		t.Fatalf("%v, %v", all, err)
	}
	for i, r := range all {
		if r.Sequence != i+1 || r.Err == nil || r.Err.Error() != "packet too big: the path MTU is 1400" {
			t.Errorf("%+v", r)
		}
	}
	var near []netip.Addr
	for _, word := range strings.Fields(b.router.Run("ip -6 -o addr show dev b0 scope link")) {
		if p, err := netip.ParsePrefix(word); err == nil {
			near = append(near, p.Addr())
		}
	}
	all, err = b.ping(t.Context(), Request{To: near[0], From: addr("fd02::1"), Interface: "t-b", Count: 1, Size: 56})
	if err != nil || all[0].Err != nil || all[0].From != near[0] {
		t.Errorf("a link-local address by an interface: %v, %v", all, err)
	}
	if _, err := b.ping(t.Context(), Request{To: addr("10.9.0.2"), Interface: "none", Count: 1, Size: 56}); !errors.Is(err, ErrNoInterface) {
		t.Errorf("an interface that is missing: %v", err)
	}
}

// TestSequence checks that the results come one after the other, with the interval between them,
// and that a failed one does not spoil those after it.
func TestSequence(t *testing.T) {
	b := newBench(t)
	n := 0
	var all []Result
	var err error
	begun := time.Now()
	b.node.Do(func() {
		err = Ping(t.Context(), Request{To: addr("10.9.0.2"), Count: 3, Interval: 300 * time.Millisecond, Size: 56}, func(r Result) error {
			all = append(all, r)
			n++
			if n == 1 {
				_, err := b.host.Try("ip addr del 10.9.0.2/24 dev h1")
				return err
			}
			_, _ = b.host.Try("ip addr add 10.9.0.2/24 dev h1")
			_, err := b.host.Try("ip route replace default via 10.9.0.1")
			return err
		})
	})
	if err != nil || len(all) != 3 || all[0].Err != nil || all[1].Err == nil || all[2].Err != nil {
		t.Fatalf("%+v, %v", all, err)
	}
	if took := time.Since(begun); took < Wait+300*time.Millisecond {
		t.Errorf("it took %v", took)
	}
}

// TestForged has the router, in the place of a silent host, send replies of its own.
func TestForged(t *testing.T) {
	b := newBench(t)
	b.host.Run("sysctl -qw net.ipv4.icmp_echo_ignore_all=1\nsysctl -qw net.ipv6.icmp.echo_ignore_all=1")
	for _, k := range []struct {
		name string
		six  bool
		// change makes a reply of the right one.
		change func(reply []byte)
		from   string // source of the reply; "": that of the host
		by     string // interface of the router
		ping   string // interface of the ping
		data   bool   // the reply is right
	}{
		{name: "right", data: true},
		{name: "right, IPv6", six: true, data: true},
		{name: "another token", change: func(b []byte) { b[len(b)-1] ^= 1 }},
		{name: "another token, IPv6", six: true, change: func(b []byte) { b[len(b)-1] ^= 1 }},
		{name: "another sequence", change: func(b []byte) { b[7] ^= 1 }},
		{name: "another identifier", change: func(b []byte) { b[5] ^= 1 }},
		{name: "another source", from: "10.9.0.1"},
		{name: "another source, IPv6", six: true, from: "fd09::1"},
		{name: "another interface", by: "b0", ping: "t-a"},
		{name: "the right interface", by: "a0", ping: "t-a", data: true},
	} {
		t.Run(k.name, func(t *testing.T) {
			to, own := "10.9.0.2", "10.1.0.1"
			if k.six {
				to, own = "fd09::2", "fd01::1"
			}
			stop := b.forge(t, k.six, addr(to), addr(own), k.from, k.by, k.change)
			all, err := b.ping(t.Context(), Request{To: addr(to), From: addr(own), Interface: k.ping, Count: 1, Interval: time.Millisecond, Size: 56})
			if sent := stop(); sent == 0 {
				t.Error("no reply was forged")
			}
			if err != nil || len(all) != 1 || (all[0].Err == nil) != k.data {
				t.Errorf("%+v, %v", all, err)
			}
		})
	}
}

// forge has the router answer echo requests to an address that it forwards. The returned function
// ends that, and returns how many replies were sent.
func (b *bench) forge(t *testing.T, six bool, to, own netip.Addr, from, by string, change func([]byte)) func() int {
	t.Helper()
	source := to
	if from != "" {
		source = addr(from)
	}
	family, protocol := unix.AF_INET, uint16(unix.ETH_P_IP)
	if six {
		family, protocol = unix.AF_INET6, uint16(unix.ETH_P_IPV6)
	}
	var in, out int
	var err error
	b.router.Do(func() {
		if in, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(protocol<<8|protocol>>8)); err != nil {
			return
		}
		if out, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return
		}
		if by != "" {
			err = unix.BindToDevice(out, by)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	// A receive that ends now and then lets the reader see that it is over.
	if err := unix.SetsockoptTimeval(in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 10_000}); err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	var wg sync.WaitGroup
	sent := 0
	wg.Go(func() {
		buffer := make([]byte, 2000)
		for {
			select {
			case <-over:
				return
			default:
			}
			n, _, err := unix.Recvfrom(in, buffer, 0)
			if err != nil {
				continue
			}
			if packet := forged(buffer[:n], six, to, own, source, change); packet != nil {
				var peer unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(own.AsSlice()[:4])}
				if six {
					peer = &unix.SockaddrInet6{Addr: own.As16()}
				}
				if err := unix.Sendto(out, packet, 0, peer); err != nil {
					t.Errorf("sending a forged reply: %v", err)
					return
				}
				sent++
			}
		}
	})
	return func() int {
		close(over)
		wg.Wait()
		unix.Close(in)
		unix.Close(out)
		return sent
	}
}

// forged returns the reply to a request, with its IP header; nil: the packet is not one.
func forged(b []byte, six bool, to, own, source netip.Addr, change func([]byte)) []byte {
	if change == nil {
		change = func([]byte) {}
	}
	if six {
		if len(b) < 48 || b[6] != unix.IPPROTO_ICMPV6 || netip.AddrFrom16([16]byte(b[24:40])) != to || b[40] != 128 {
			return nil
		}
		body := append([]byte(nil), b[40:]...)
		change(body)
		m := icmp.Message{Type: ipv6.ICMPTypeEchoReply, Body: &icmp.Echo{ID: int(binary.BigEndian.Uint16(body[4:])), Seq: int(binary.BigEndian.Uint16(body[6:])), Data: body[8:]}}
		message, err := m.Marshal(icmp.IPv6PseudoHeader(source.AsSlice(), own.AsSlice()))
		if err != nil {
			return nil
		}
		head := append([]byte{0x60, 0, 0, 0, byte(len(message) >> 8), byte(len(message)), unix.IPPROTO_ICMPV6, 64}, source.AsSlice()...)
		return append(append(head, own.AsSlice()...), message...)
	}
	if len(b) < 28 || b[9] != unix.IPPROTO_ICMP || netip.AddrFrom4([4]byte(b[16:20])) != to || b[20] != 8 {
		return nil
	}
	body := append([]byte(nil), b[20:]...)
	change(body)
	m := icmp.Message{Type: ipv4.ICMPTypeEchoReply, Body: &icmp.Echo{ID: int(binary.BigEndian.Uint16(body[4:])), Seq: int(binary.BigEndian.Uint16(body[6:])), Data: body[8:]}}
	message, err := m.Marshal(nil)
	if err != nil {
		return nil
	}
	// The kernel computes the checksum of the header (raw(7)).
	head := append([]byte{0x45, 0, byte((20 + len(message)) >> 8), byte(20 + len(message)), 0, 0, 0, 0, 64, unix.IPPROTO_ICMP, 0, 0}, source.AsSlice()...)
	return append(append(head, own.AsSlice()...), message...)
}

// TestGone checks that a ping ends with its context, and closes its socket.
func TestGone(t *testing.T) {
	b := newBench(t)
	b.host.Run("sysctl -qw net.ipv4.icmp_echo_ignore_all=1")
	for name, interval := range map[string]time.Duration{"while it waits for an answer": time.Millisecond, "between two requests": time.Hour} {
		ctx, cancel := context.WithCancel(t.Context())
		before := sockets(t)
		to := "10.1.0.2"
		if interval < time.Hour {
			to = "10.9.0.2"
		}
		time.AfterFunc(100*time.Millisecond, cancel)
		begun := time.Now()
		_, err := b.ping(ctx, Request{To: addr(to), Count: 100, Interval: interval, Size: 56})
		if !errors.Is(err, context.Canceled) || time.Since(begun) > Wait {
			t.Errorf("%s: %v after %v", name, err, time.Since(begun))
		}
		if n := sockets(t); n != before {
			t.Errorf("%s: %d sockets are open, %d before", name, n, before)
		}
	}
	stop := errors.New("stop")
	b.node.Do(func() {
		if err := Ping(t.Context(), Request{To: addr("10.1.0.2"), Count: 2, Size: 56}, func(Result) error { return stop }); err != stop {
			t.Errorf("an error of the function: %v", err)
		}
	})
	if n := len(identifiers.used); n != 0 {
		t.Errorf("%d identifiers are in use", n)
	}
}

// sockets counts the open sockets of this process.
func sockets(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

// TestIdentifiers checks that no two open sockets have the same identifier.
func TestIdentifiers(t *testing.T) {
	seen := map[uint16]bool{}
	for range 60_000 {
		id := takeIdentifier()
		if seen[id] {
			t.Fatalf("identifier %d is in use", id)
		}
		seen[id] = true
	}
	for id := range seen {
		returnIdentifier(id)
	}
	if len(identifiers.used) != 0 {
		t.Errorf("%d identifiers are in use", len(identifiers.used))
	}
}

// TestQuotes checks which ICMP errors are about a request.
func TestQuotes(t *testing.T) {
	packet := append([]byte{8, 0, 1, 2, 3, 4, 5, 6}, "12345678901234567890"...)
	for quote, want := range map[string]bool{
		string(packet[:8]): true, string(packet[:16]): true, "\x08\x00xx\x03\x04\x05\x06": true,
		string(packet[:7]): false, "": false, "\x08\x00\x01\x02\x03\x04\x05\x07": false, "\x08\x00\x01\x02\x03\x05\x05\x06": false,
		"\x08\x00\x01\x02\x03\x04\x05\x0612345679": false, "\x00\x00\x01\x02\x03\x04\x05\x06": false,
	} {
		if got := quotes([]byte(quote), packet); got != want {
			t.Errorf("%q: %v", quote, got)
		}
	}
	for _, e := range []problem{
		{SockExtendedErr: unix.SockExtendedErr{Origin: unix.SO_EE_ORIGIN_ICMP, Type: 4}},
		{SockExtendedErr: unix.SockExtendedErr{Origin: unix.SO_EE_ORIGIN_LOCAL, Errno: uint32(unix.EHOSTUNREACH)}},
		{SockExtendedErr: unix.SockExtendedErr{Origin: unix.SO_EE_ORIGIN_NONE}},
	} {
		if e.ends(packet, packet) {
			t.Errorf("%+v ends a request", e)
		}
	}
	for want, e := range map[string]unix.SockExtendedErr{
		"hop limit exceeded, as in a loop of routes": {Origin: unix.SO_EE_ORIGIN_ICMP, Type: 11},
		"destination unreachable: code 99":           {Origin: unix.SO_EE_ORIGIN_ICMP6, Type: 1, Code: 99},
		"packet too big: the path MTU is unknown":    {Origin: unix.SO_EE_ORIGIN_ICMP, Type: 3, Code: 4},
		"packet too big: the path MTU is 1280":       {Origin: unix.SO_EE_ORIGIN_ICMP6, Type: 2, Info: 1280},
	} {
		if got := fmt.Sprint((problem{SockExtendedErr: e}).reason()); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

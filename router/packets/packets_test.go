package packets

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/netns"
)

// pair is two namespaces with a link between them that carries large packets.
type pair struct {
	t          *testing.T
	near, away *netns.NS
	// Sockets of UDP, each connected to the other one.
	out, in *net.UDPConn
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{t: t, near: netns.New(t), away: netns.New(t)}
	for _, n := range []*netns.NS{p.near, p.away} {
		n.Run("sysctl -qw net.ipv6.conf.default.disable_ipv6=1")
	}
	netns.Veth(p.near, "t-a", p.away, "a0")
	p.near.Run("ip link set t-a mtu 65535\nip addr add 10.1.0.1/24 dev t-a")
	p.away.Run("ip link set a0 mtu 65535\nip addr add 10.1.0.2/24 dev a0")
	near, away := &net.UDPAddr{IP: net.IPv4(10, 1, 0, 1), Port: 7001}, &net.UDPAddr{IP: net.IPv4(10, 1, 0, 2), Port: 7002}
	p.out, p.in = p.dial(p.near, near, away), p.dial(p.away, away, near)
	// From now on the kernels know the neighbours.
	if _, err := p.near.Try("ping -c 1 -W 10 10.1.0.2"); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pair) dial(n *netns.NS, from, to *net.UDPAddr) (c *net.UDPConn) {
	p.t.Helper()
	var err error
	n.Do(func() { c, err = net.DialUDP("udp4", from, to) })
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	return c
}

func (p *pair) send(c *net.UDPConn, data []byte) {
	p.t.Helper()
	// Nothing reads the sockets, and a full one is not an error of the sender.
	if _, err := c.Write(data); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
		p.t.Errorf("sending: %v", err)
	}
}

// capture captures at the near end, and returns copies of all packets. begun runs when the capture
// has begun.
func (p *pair) capture(ctx context.Context, q Request, begun func() error) (all []Packet, end End, err error) {
	p.near.Do(func() {
		first := true
		end, err = Capture(ctx, q, func(some []Packet, lost int) error {
			if first {
				first = false
				return begun()
			}
			if lost != 0 {
				p.t.Errorf("%d packets were lost", lost)
			}
			for _, s := range some {
				s.Data = append([]byte(nil), s.Data...)
				all = append(all, s)
			}
			return nil
		})
	})
	return all, end, err
}

// TestCapture checks packets of both directions, their lengths and times.
func TestCapture(t *testing.T) {
	p := newPair(t)
	q := Request{Interface: "t-a", Filter: Filter{Protocols: []uint8{unix.IPPROTO_UDP}}, Count: 150, Duration: time.Minute, Size: 100}
	before := time.Now()
	all, end, err := p.capture(t.Context(), q, func() error {
		for i := range 100 {
			p.send(p.out, []byte(strings.Repeat(string(rune('a'+i%26)), 8+i)))
			p.send(p.in, []byte(strings.Repeat(string(rune('A'+i%26)), 8+i)))
		}
		return nil
	})
	if err != nil || end != Counted || len(all) != 150 {
		t.Fatalf("%d packets, %q, %v", len(all), end, err)
	}
	// On a loaded machine the kernel may handle those that arrive later than those that leave.
	type kind struct {
		leaving bool
		length  int
	}
	seen := map[kind]bool{}
	for i, a := range all {
		n := a.Length - 28 - 8
		if n < 0 || n >= 100 || seen[kind{a.Leaving, n}] {
			t.Errorf("packet %d: %d bytes, leaving %v", i, a.Length, a.Leaving)
			continue
		}
		seen[kind{a.Leaving, n}] = true
		text, from, to := strings.Repeat(string(rune('a'+n%26)), 8+n), "10.1.0.1", "10.1.0.2"
		if !a.Leaving {
			text, from, to = strings.ToUpper(text), to, from
		}
		if len(a.Data) != min(100, a.Length) || a.Data[0] != 0x45 ||
			netip.AddrFrom4([4]byte(a.Data[12:])).String() != from || netip.AddrFrom4([4]byte(a.Data[16:])).String() != to || !strings.HasPrefix(text, string(a.Data[28:])) {
			t.Errorf("packet %d: leaving %v, %d bytes: %q", i, a.Leaving, a.Length, a.Data)
		}
		if a.Time.Before(before) || a.Time.After(time.Now()) {
			t.Errorf("packet %d has the time %v", i, a.Time)
		}
	}

	// A filter of the socket counts only what it passes.
	q = Request{Interface: "t-a", Filter: Filter{Host: netip.MustParseAddr("10.1.0.2"), Port: 7003}, Count: 1, Duration: time.Minute, Size: 65535}
	other := p.dial(p.near, &net.UDPAddr{IP: net.IPv4(10, 1, 0, 1), Port: 7003}, &net.UDPAddr{IP: net.IPv4(10, 1, 0, 2), Port: 7002})
	all, end, err = p.capture(t.Context(), q, func() error {
		p.send(p.out, []byte("one"))
		p.send(other, make([]byte, 60_000))
		return nil
	})
	if err != nil || end != Counted || len(all) != 1 || all[0].Length != 60_028 || len(all[0].Data) != 60_028 {
		t.Errorf("%d packets, %q, %v", len(all), end, err)
	}
}

// TestEnds checks how a capture ends, apart from the number of packets.
func TestEnds(t *testing.T) {
	p := newPair(t)
	nothing := func() error { return nil }
	q := Request{Interface: "t-a", Count: 10_000, Duration: time.Minute, Size: 65535}

	short := q
	short.Duration = 500 * time.Millisecond
	begun := time.Now()
	all, end, err := p.capture(t.Context(), short, func() error { p.send(p.out, []byte("one")); return nil })
	if err != nil || end != TimeOver || len(all) != 1 || time.Since(begun) < short.Duration {
		t.Errorf("the time is over: %d packets, %q, %v after %v", len(all), end, err, time.Since(begun))
	}

	ctx, cancel := context.WithCancel(t.Context())
	if _, end, err := p.capture(ctx, q, func() error { cancel(); return nil }); end != "" || !errors.Is(err, context.Canceled) {
		t.Errorf("the caller has gone before the first packet: %q, %v", end, err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	begun = time.Now()
	if _, end, err := p.capture(ctx, q, nothing); end != "" || !errors.Is(err, context.Canceled) || time.Since(begun) > q.Duration/2 {
		t.Errorf("the caller has gone: %q, %v after %v", end, err, time.Since(begun))
	}

	stop := errors.New("stop")
	if _, _, err := p.capture(t.Context(), q, func() error { return stop }); err != stop {
		t.Errorf("an error of the function: %v", err)
	}
	p.near.Do(func() {
		_, err = Capture(t.Context(), q, func(some []Packet, _ int) error {
			if len(some) == 0 {
				p.send(p.out, []byte("one"))
				return nil
			}
			return stop
		})
	})
	if err != stop {
		t.Errorf("an error of the function with packets: %v", err)
	}

	missing := q
	missing.Interface = "t-c"
	if _, _, err := p.capture(t.Context(), missing, nothing); !errors.Is(err, ErrNoInterface) {
		t.Errorf("an interface that is missing: %v", err)
	}
	down := func() error { _, err := p.away.Try("ip link set a0 down"); return err }
	// The near end stays up without carrier.
	if all, end, err := p.capture(t.Context(), short, down); err != nil || end != TimeOver || len(all) != 0 {
		t.Errorf("without carrier: %d packets, %q, %v", len(all), end, err)
	}
	remove := func() error { _, err := p.away.Try("ip link del a0"); return err }
	if _, _, err := p.capture(t.Context(), q, remove); !errors.Is(err, ErrDown) {
		t.Errorf("an interface that is removed: %v", err)
	}
	p.near.Run("ip link add t-a type veth peer name t-b")
	if _, _, err := p.capture(t.Context(), q, nothing); !errors.Is(err, ErrDown) {
		t.Errorf("an interface that is down: %v", err)
	}
	if n := packetSockets(t); n != 0 {
		t.Errorf("%d packet sockets are open", n)
	}
}

// packetSockets counts the packet sockets of this process.
func packetSockets(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && domain == unix.AF_PACKET {
			n++
		}
	}
	return n
}

// TestBounds checks that a capture ends after MaxBytes, and that packets which are lost meanwhile
// are counted.
func TestBounds(t *testing.T) {
	p := newPair(t)
	data := make([]byte, 60_000)
	q := Request{Interface: "t-a", Count: 10_000, Duration: time.Minute, Size: 65535}
	got, some, missing, calls := 0, 0, 0, 0
	var end End
	var err error
	p.near.Do(func() {
		end, err = Capture(t.Context(), q, func(all []Packet, lost int) error {
			calls++
			room := 0
			for _, a := range all {
				room += len(a.Data)
			}
			if room > batchBytes+q.Size || len(all) > batchPackets {
				t.Errorf("%d packets with %d bytes at once", len(all), room)
			}
			if lost < missing {
				t.Errorf("%d packets are lost after %d were", lost, missing)
			}
			got, some, missing = got+room, some+len(all), lost
			// The queue has room for some of these.
			sent := 200
			if calls > 2 {
				sent = 10
			}
			for range sent {
				p.send(p.out, data)
			}
			return nil
		})
	})
	if err != nil || end != Full || got < MaxBytes || got > MaxBytes+q.Size {
		t.Errorf("%d bytes, %q, %v", got, end, err)
	}
	if missing == 0 {
		t.Errorf("no packet is missing, of %d", some)
	}
}

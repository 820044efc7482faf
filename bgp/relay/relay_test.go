package relay

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/bgp/filter"
	"github.com/isthmus-net/isthmus/test/root"
)

// TestMain runs the tests in their own network namespace, which disappears with the process. Ring:
// namespace; needs root.
func TestMain(m *testing.M) {
	const inside = "ISTHMUS_TEST_NETNS"
	if os.Geteuid() != 0 || os.Getenv("ISTHMUS_UNIT") != "" {
		os.Exit(m.Run())
	}
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM)
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	for _, c := range []string{"link set lo up", "route replace local 169.254.0.0/24 dev lo"} {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "ip %s: %v: %s", c, err, out)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func ip(t *testing.T, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

const limit = 60 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func message(kind byte, body ...byte) []byte {
	b := bytes.Repeat([]byte{0xff}, 16)
	b = binary.BigEndian.AppendUint16(b, uint16(19+len(body)))
	return append(append(b, kind), body...)
}

// open returns an OPEN whose BGP identifier ends with this byte.
func open(id byte) []byte {
	return message(filter.Open, 4, 0xfd, 0xe9, 0, 90, 169, 254, 0, id, 14, 2, 12, 1, 4, 0, 1, 0, 1, 65, 4, 0, 0, 0xfd, 0xe9)
}

var (
	keepalive = message(filter.Keepalive)
	local     = netip.MustParseAddr("169.254.0.1")
	theirs    = netip.MustParseAddr("169.254.0.11")
)

// bench is a relay with a speaker made of pipes.
type bench struct {
	*Relay
	t      *testing.T
	inner  chan net.Conn // connections that the relay has opened to the speaker
	mu     sync.Mutex
	failed []string
	ended  []string
}

func start(t *testing.T, o Options) *bench {
	root.Need(t, "network namespaces")
	b := &bench{t: t, inner: make(chan net.Conn, 100)}
	o.Identifier = netip.MustParseAddr("169.254.0.1")
	o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	o.Inner = func(ctx context.Context, from, to netip.Addr) (net.Conn, error) {
		a, z := net.Pipe()
		go func() { z.Write(open(1)); b.inner <- z }()
		return a, nil
	}
	o.Failed = func(name string, err error) { b.mu.Lock(); b.failed = append(b.failed, err.Error()); b.mu.Unlock() }
	o.Ended = func(name, reason string) { b.mu.Lock(); b.ended = append(b.ended, reason); b.mu.Unlock() }
	if o.Port == 0 {
		o.Port = 179
	}
	b.Relay = New(o)
	t.Cleanup(b.Close)
	return b
}

func peer() Peer {
	return Peer{Name: "a", Address: theirs, Local: local, Inner: theirs, InnerLocal: local, Interface: "lo", TTL: 1, Passive: true, Counters: new(filter.Counters)}
}

// call opens a connection as the peer.
func call(from netip.Addr, wait time.Duration) (net.Conn, error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: wait}
	return d.Dial("tcp4", "169.254.0.1:179")
}

// mustCall tries until the listener exists.
func (b *bench) mustCall() (conn net.Conn) {
	b.t.Helper()
	eventually(b.t, "a connection", func() (ok bool) {
		var err error
		conn, err = call(theirs, limit)
		return err == nil
	})
	b.t.Cleanup(func() { conn.Close() })
	return conn
}

// next returns the next connection to the speaker.
func (b *bench) next() net.Conn {
	b.t.Helper()
	select {
	case c := <-b.inner:
		b.t.Cleanup(func() { c.Close() })
		return c
	case <-time.After(limit):
		b.t.Fatal("the speaker got no connection")
		return nil
	}
}

// expect reads one message.
func expect(t *testing.T, c net.Conn, want []byte) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(limit))
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got  %x, %v\nwant %x", got[:n], err, want)
	}
}

// over checks that a connection ends.
func over(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(limit))
	rest, err := io.ReadAll(c)
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() || len(rest) > 0 {
		t.Errorf("not over: %x, %v", rest, err)
	}
}

// up sets up a session, and returns both ends.
func (b *bench) up(id byte) (peer, speaker net.Conn) {
	b.t.Helper()
	peer = b.mustCall()
	peer.Write(open(id))
	speaker = b.next()
	expect(b.t, speaker, open(id))
	expect(b.t, peer, open(1))
	peer.Write(keepalive)
	expect(b.t, speaker, keepalive)
	return peer, speaker
}

func TestSession(t *testing.T) {
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	p, s := b.up(11)
	if len(b.Passed()) != 1 {
		t.Errorf("passed %v", b.Passed())
	}
	// Messages in pieces, and several in one.
	p.Write(keepalive[:7])
	p.Write(append(keepalive[7:], keepalive...))
	expect(t, s, append(keepalive, keepalive...))
	m := append(message(filter.Update, 0, 0, 0, 0), message(filter.NotificationType, 6, 2)...)
	go s.Write(m)
	expect(t, p, m)
	s.Close()
	over(t, p)
	// The next session needs a speaker that waits for it.
	p = b.mustCall()
	p.Write(open(11))
	select {
	case <-b.inner:
		t.Error("a session although the speaker is not ready")
	case <-time.After(300 * time.Millisecond):
	}
	b.Ready("a")
	expect(t, b.next(), open(11))
}

// TestMalformed checks that the peer and the speaker each get their NOTIFICATION, and that earlier
// messages are not lost.
func TestMalformed(t *testing.T) {
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	p, s := b.up(11)
	p.Write(append(keepalive, message(9)...))
	expect(t, s, keepalive)
	reason := "type 9 of a message is unknown (NOTIFICATION 1/3)"
	expect(t, s, filter.Cease(reason))
	s.Close() // at once, as GoBGP does
	expect(t, p, message(filter.NotificationType, 1, 3, 9))
	over(t, p)
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.ended) != 1 || b.ended[0] != reason {
		t.Errorf("ended %q", b.ended)
	}
}

// TestMalformedOpen checks that a malformed OPEN never reaches the speaker.
func TestMalformedOpen(t *testing.T) {
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	p := b.mustCall()
	m := open(11)
	m[19] = 3
	p.Write(m)
	expect(t, p, message(filter.NotificationType, 2, 1, 0, 4))
	over(t, p)
	if len(b.inner) > 0 {
		t.Error("the speaker got a connection")
	}
}

// TestWaits checks that a peer which sends its OPEN only after ours gets ours.
func TestWaits(t *testing.T) {
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	p := b.mustCall()
	expect(t, p, open(1))
	p.Write(open(11))
	expect(t, b.next(), open(11))
}

// TestStrangers checks that connections from other addresses, or on other interfaces, are closed.
func TestStrangers(t *testing.T) {
	ip(t, "link add ist-other type veth peer name ist-other2")
	t.Cleanup(func() { exec.Command("ip", "link", "del", "ist-other").Run() })
	ip(t, "link set ist-other up")
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	b.mustCall().Close()
	before := runtime.NumGoroutine()
	for range 500 {
		c, err := call(netip.MustParseAddr("169.254.0.12"), limit)
		if err != nil {
			continue // already reset
		}
		over(t, c)
		c.Close()
	}
	if n := runtime.NumGoroutine(); n > before+20 {
		t.Errorf("%d goroutines, before %d", n, before)
	}
	if len(b.inner) > 0 {
		t.Error("the speaker got a connection")
	}
	other := peer()
	other.Interface = "ist-other"
	b.Apply([]Peer{other}, nil)
	eventually(t, "the listener is gone from lo", func() bool {
		c, err := call(theirs, limit)
		if err == nil {
			c.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED)
	})
}

// TestFlood checks that no more than two connections of a peer are kept, however many it opens.
func TestFlood(t *testing.T) {
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	p, s := b.up(11)
	before := runtime.NumGoroutine()
	var last net.Conn
	for range 300 {
		next := b.mustCall() // sends nothing
		if last != nil {
			over(t, last) // closed at once, without a message
		}
		last = next
	}
	eventually(t, "two are left", func() bool { return runtime.NumGoroutine() <= before+20 })
	p.Write(keepalive)
	expect(t, s, keepalive)
}

// TestKeyRemoved checks that the listener accepts connections without a key after the password was
// removed.
func TestKeyRemoved(t *testing.T) {
	b := start(t, Options{})
	with, without := peer(), peer()
	with.Key, without.Counters = []byte("secret"), with.Counters
	b.Apply([]Peer{without}, nil)
	b.mustCall()
	for range 2 {
		b.Apply([]Peer{with}, nil)
		if c, err := call(theirs, time.Second); err == nil {
			c.Close()
			t.Fatal("a connection without the key")
		}
		b.Apply([]Peer{without}, nil)
		b.mustCall()
	}
	// With the key on both sides.
	b.Apply([]Peer{with}, nil)
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(theirs, 0)), Timeout: limit,
		Control: control(func(fd int) error { return md5(fd, local, []byte("secret")) })}
	d.SetMultipathTCP(false)
	c, err := d.Dial("tcp4", "169.254.0.1:179")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// far is a peer that listens on a port other than the relay's.
func far(t *testing.T) (*net.TCPListener, int) {
	root.Need(t, "network namespaces")
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(theirs, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, l.Addr().(*net.TCPAddr).Port
}

func TestDial(t *testing.T) {
	l, port := far(t)
	l.Close()
	b := start(t, Options{RemotePort: port})
	p := peer()
	p.Passive = false
	b.Apply([]Peer{p}, nil)
	b.Ready("a")
	eventually(t, "the reason", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.failed) > 0 && strings.Contains(b.failed[0], "connection refused")
	})
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(theirs, uint16(port))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	l.SetDeadline(time.Now().Add(limit))
	c, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); from != local {
		t.Errorf("from %v", from)
	}
	c.Write(open(11))
	expect(t, b.next(), open(11))
}

// TestCollision makes both sides connect (RFC 4271 section 6.8). The connection that the side with
// the higher identifier has opened stays, unless the other is already a session.
func TestCollision(t *testing.T) {
	for name, c := range map[string]struct {
		id byte // of the peer; ours is 1
		up bool // the first connection is a session
		in bool // the first one was opened by the peer
	}{
		"theirs wins": {id: 11}, "ours wins": {id: 0, in: true}, "a session stays": {id: 11, up: true},
	} {
		t.Run(name, func(t *testing.T) {
			l, port := far(t)
			b := start(t, Options{RemotePort: port})
			p := peer()
			p.Passive = false
			id := c.id
			if id == 0 {
				id = 11
				b.o.Identifier = netip.MustParseAddr("200.0.0.1")
			}
			if c.in {
				p.Passive = true
			}
			b.Apply([]Peer{p}, nil)
			b.Ready("a")
			var first net.Conn
			var s *session
			if c.in {
				first = b.mustCall()
			} else {
				l.SetDeadline(time.Now().Add(limit))
				x, err := l.AcceptTCP()
				if err != nil {
					t.Fatal(err)
				}
				first = x
			}
			defer first.Close()
			first.Write(open(id))
			speaker := b.next()
			expect(t, first, open(1))
			expect(t, speaker, open(id))
			if c.up {
				first.Write(keepalive)
				expect(t, speaker, keepalive)
			}
			b.mu.Lock()
			s = b.sessions["a"]
			b.mu.Unlock()
			var second net.Conn
			if c.in {
				conn, err := dialPeer(s.ctx, &s.p, port)
				if err != nil {
					t.Fatal(err)
				}
				go newLeg(s, conn, true).run()
				l.SetDeadline(time.Now().Add(limit))
				if second, err = l.AcceptTCP(); err != nil {
					t.Fatal(err)
				}
			} else {
				second = b.mustCall()
			}
			defer second.Close()
			second.Write(open(id))
			lost := first
			if c.up {
				lost = second
			}
			expect(t, lost, message(filter.NotificationType, 6, 7))
			over(t, lost)
			if c.up {
				first.Write(keepalive)
				expect(t, speaker, keepalive)
				return
			}
			over(t, speaker)
			b.Ready("a")
			expect(t, b.next(), open(id))
			expect(t, second, open(1))
		})
	}
}

// TestCollisionAtOnce opens a second connection, which wins, at the moment in which the peer's
// first one becomes a session. If the speaker sees the session come up, the session stays.
func TestCollisionAtOnce(t *testing.T) {
	stayed := 0
	const times = 800
	for i := range times {
		l, port := far(t)
		b := start(t, Options{RemotePort: port})
		b.o.Identifier = netip.MustParseAddr("200.0.0.1")
		b.Apply([]Peer{peer()}, nil)
		b.Ready("a")
		first := b.mustCall()
		first.Write(open(11))
		speaker := b.next()
		expect(t, first, open(1))
		expect(t, speaker, open(11))
		b.mu.Lock()
		s := b.sessions["a"]
		b.mu.Unlock()
		conn, err := dialPeer(s.ctx, &s.p, port)
		if err != nil {
			t.Fatal(err)
		}
		go newLeg(s, conn, true).run()
		l.SetDeadline(time.Now().Add(limit))
		second, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		go second.Write(open(11))
		time.Sleep(time.Duration(i%80) * time.Microsecond) // moves the one past the other
		first.Write(keepalive)
		got := make([]byte, len(keepalive))
		speaker.SetReadDeadline(time.Now().Add(limit))
		if _, err := io.ReadFull(speaker, got); err == nil {
			stayed++
			expect(t, second, message(filter.NotificationType, 6, 7))
			first.Write(keepalive)
			expect(t, speaker, keepalive)
		} else {
			expect(t, first, message(filter.NotificationType, 6, 7))
		}
		first.Close()
		second.Close()
		b.Close()
		l.Close()
	}
	t.Logf("the first connection stayed %d of %d times", stayed, times)
}

// TestDrain checks that the speaker's last message to a removed peer is passed on.
func TestDrain(t *testing.T) {
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	p, s := b.up(11)
	b.Apply(nil, nil)
	bye := message(filter.NotificationType, 6, 3)
	go func() { s.Write(bye); s.Close() }()
	expect(t, p, bye)
	over(t, p)
	if _, err := call(theirs, limit); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("calling the former listener: %v", err)
	}
}

// TestClose checks that nothing is sent on Close, which leaves the sessions to graceful restart.
// TestShut checks that the peer of a removed session has received the NOTIFICATION of an
// administrative shutdown when Apply returns, with its text, and gets no session afterwards.
func TestShut(t *testing.T) {
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	peer, speaker := b.up(11)
	b.Apply(nil, map[string]*filter.Notification{"a": filter.Shutdown("until 6 pm")})
	want := message(filter.NotificationType, append([]byte{6, 2, 10}, "until 6 pm"...)...)
	peer.SetReadDeadline(time.Now().Add(limit))
	got := make([]byte, len(want))
	if n, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("got %x, %v, want %x", got[:n], err, want)
	}
	over(t, peer)
	over(t, speaker)
	eventually(t, "no listener is left for the peer", func() bool {
		c, err := call(theirs, time.Second)
		if err == nil {
			defer c.Close()
			c.SetReadDeadline(time.Now().Add(limit))
			_, err = c.Read(make([]byte, 1))
		}
		return err != nil
	})
}

func TestClose(t *testing.T) {
	b := start(t, Options{})
	b.Apply([]Peer{peer()}, nil)
	b.Ready("a")
	p, s := b.up(11)
	waiting := b.mustCall()
	b.Close()
	over(t, p)
	over(t, waiting)
	over(t, s)
}

// TestRebind replaces a tunnel's interface by another one with the same name.
func TestRebind(t *testing.T) {
	b := start(t, Options{})
	p := peer()
	p.Interface, p.Local, p.Address = "ist-a", netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2")
	p.Inner, p.InnerLocal = p.Address, p.Local
	b.Apply([]Peer{p}, nil) // before the interface exists
	listening := func() (index int) {
		b.Relay.mu.Lock()
		defer b.Relay.mu.Unlock()
		for _, l := range b.listeners {
			if l.l != nil {
				index = l.index
			}
		}
		return index
	}
	if listening() != 0 {
		t.Error("listening without an interface")
	}
	last := 0
	for range 2 {
		ip(t, "link add ist-a type veth peer name ist-b")
		ip(t, "link set ist-a up")
		eventually(t, "a new listener", func() bool { i := listening(); return i != 0 && i != last })
		last = listening()
		ip(t, "link del ist-a")
		eventually(t, "none", func() bool { return listening() == 0 })
	}
	// Removed and created again between two checks.
	ip(t, "link add ist-a type veth peer name ist-b")
	eventually(t, "a new listener", func() bool { i := listening(); return i != 0 && i != last })
	last = listening()
	b.Relay.mu.Lock()
	ip(t, "link del ist-a")
	ip(t, "link add ist-a type veth peer name ist-b")
	b.Relay.mu.Unlock()
	t.Cleanup(func() { exec.Command("ip", "link", "del", "ist-a").Run() })
	eventually(t, "a listener on the new interface", func() bool { i := listening(); return i != 0 && i != last })
}

// TestHop checks that the next hop of a peer with other addresses inside is replaced.
func TestHop(t *testing.T) {
	update := func(a netip.Addr) []byte {
		attrs := append([]byte{0x40, 1, 1, 0, 0x80, 14, 26, 0, 2, 1, 16}, a.AsSlice()...)
		attrs = append(attrs, 0, 32, 0x20, 1, 0x0d, 0xb8)
		return message(filter.Update, append([]byte{0, 0, 0, byte(len(attrs))}, attrs...)...)
	}
	inside, outside := netip.MustParseAddr("100::1"), netip.MustParseAddr("fe80::1")
	b := append(append([]byte{}, keepalive...), update(inside)...)
	b = append(b, update(netip.MustParseAddr("100::3"))...)
	filter.ReplaceNextHop(b, inside.As16(), outside.As16())
	want := append(append(append([]byte{}, keepalive...), update(outside)...), update(netip.MustParseAddr("100::3"))...)
	if !bytes.Equal(b, want) {
		t.Errorf("got  %x\nwant %x", b, want)
	}
	for n := range b { // truncated anywhere
		filter.ReplaceNextHop(b[:n], outside.As16(), inside.As16())
	}
}

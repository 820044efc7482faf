package ipsec

import (
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/link/linktest"
)

// Ring: namespace. ESP comes from another namespace, bare and in UDP; the kernel's states are
// fakes.

// states holds fake states of the kernel, by SPI.
type states struct {
	mu    sync.Mutex
	of    map[uint32]link.Inbound
	asked map[uint32]int
}

func (s *states) state(_ netip.Addr, spi uint32) (link.Inbound, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[spi]++
	in, ok := s.of[spi]
	if !ok {
		return in, link.ErrNoSA
	}
	return in, nil
}

func (s *states) set(spi uint32, in link.Inbound) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[spi] = in
}

func (s *states) times(spi uint32) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked[spi]
}

// elsewhere runs f in a named network namespace. Sockets created in f stay in it.
func elsewhere(t *testing.T, ns string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		file, err := os.Open("/run/netns/" + ns)
		if err == nil {
			err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNET)
			file.Close()
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// espPacket returns the content of an IPv4 or UDP packet.
func espPacket(spi, sequence uint32) []byte {
	b := binary.BigEndian.AppendUint32(nil, spi)
	return append(binary.BigEndian.AppendUint32(b, sequence), "encrypted"...)
}

// took returns a state with keys that has accepted sequence numbers below 33.
func took(sequences ...uint32) link.Inbound {
	in := link.Inbound{Keyed: true, Window: 32, Taken: []uint32{0}}
	for _, s := range sequences {
		in.Top = max(in.Top, s)
		in.Taken[0] |= 1 << (s - 1)
	}
	return in
}

func TestCatcher(t *testing.T) {
	t.Run("IPv4", func(t *testing.T) { catches(t, false, "192.0.2.1", "192.0.2.2") })
	t.Run("IPv6", func(t *testing.T) { catches(t, true, "2001:db8::1", "2001:db8::2") })
}

// catches checks a catcher between two addresses.
func catches(t *testing.T, six bool, here, there string) {
	version, length, most := "4", "/24", mostSources
	if six {
		version, length, most = "6", "/64", mostSources6
	}
	linktest.Namespace(t, "ist-catch")
	linktest.Run(t, "ip", "link", "add", "ist-c", "type", "veth", "peer", "ist-c", "netns", "ist-catch")
	t.Cleanup(func() { linktest.Run(t, "ip", "link", "del", "ist-c") })
	linktest.Run(t, "ip", "-"+version, "addr", "add", here+length, "dev", "ist-c", "nodad")
	linktest.Run(t, "ip", "link", "set", "ist-c", "up")
	linktest.Run(t, "ip", "-n", "ist-catch", "-"+version, "addr", "add", there+length, "dev", "ist-c", "nodad")
	linktest.Run(t, "ip", "-n", "ist-catch", "link", "set", "ist-c", "up")

	type arrival struct {
		sort     string
		from     string
		spi, seq uint32
	}
	arrivals := make(chan arrival, 100)
	listen := func(sort string, conn net.PacketConn) {
		t.Cleanup(func() { conn.Close() })
		go func() {
			buf := make([]byte, 1<<16)
			for {
				n, from, err := conn.ReadFrom(buf)
				if err != nil {
					return
				}
				if n >= 8 {
					host := from.String()
					if h, _, err := net.SplitHostPort(host); err == nil {
						host = h
					}
					arrivals <- arrival{sort, host, binary.BigEndian.Uint32(buf), binary.BigEndian.Uint32(buf[4:])}
				}
			}
		}()
	}
	in, err := net.ListenPacket("udp"+version, net.JoinHostPort(here, "4500"))
	if err != nil {
		t.Fatal(err)
	}
	listen("udp", in)
	if in, err = net.ListenPacket("ip"+version+":50", here); err != nil {
		t.Fatal(err)
	}
	listen("esp", in)
	out := map[string]net.Conn{}
	elsewhere(t, "ist-catch", func() (err error) {
		if out["udp"], err = net.Dial("udp"+version, net.JoinHostPort(here, "4500")); err == nil {
			out["esp"], err = net.Dial("ip"+version+":50", here)
		}
		return err
	})
	defer out["udp"].Close()
	defer out["esp"].Close()

	s := &states{of: map[uint32]link.Inbound{}, asked: map[uint32]int{}}
	c, err := newCatcher(slog.New(slog.NewTextHandler(testLog{t}, nil)), six, s.state)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	from := func(sources ...string) {
		t.Helper()
		var a []netip.Addr
		for _, x := range sources {
			a = append(a, netip.MustParseAddr(x))
		}
		if err := c.from(a); err != nil {
			t.Fatal(err)
		}
	}
	arrives := func(sort string, spi, seq uint32) {
		t.Helper()
		select {
		case got := <-arrivals:
			if want := (arrival{sort, there, spi, seq}); got != want {
				t.Errorf("%+v arrived, want %+v", got, want)
			}
		case <-time.After(time.Minute):
			t.Errorf("%s %08x number %d did not arrive", sort, spi, seq)
		}
	}
	send := func(sort string, spi, seq uint32) {
		t.Helper()
		if _, err := out[sort].Write(espPacket(spi, seq)); err != nil {
			t.Fatal(err)
		}
		arrives(sort, spi, seq)
	}
	asked := func(spi uint32, n int) {
		t.Helper()
		until(t, 10*time.Second, "the kernel is asked", func() bool { return s.times(spi) >= n })
	}
	last := uint32(0xc0000000)
	another := func() uint32 { last++; return last }
	// flushed returns when all packets sent before have been processed, and checks that nothing
	// else has arrived.
	flushed := func(sort string) {
		t.Helper()
		spi := another()
		send(sort, spi, 1)
		asked(spi, 1)
		if n := s.times(spi); n != 1 {
			t.Errorf("the kernel was asked %d times for an SPI that it does not have", n)
		}
	}

	send("udp", 0xa0000001, 1)
	from("192.0.2.2", "2001:db8::2")
	for _, sort := range []string{"udp", "esp"} {
		flushed(sort)
		spi := another()
		send(sort, spi, earlyNumbers+1)
		flushed(sort)
		if s.times(spi) != 0 {
			t.Errorf("%s: a packet beyond the first numbers was processed", sort)
		}

		// The packets come before the SA has keys.
		spi = another()
		s.set(spi, link.Inbound{})
		send(sort, spi, 2)
		send(sort, spi, 1)
		send(sort, spi, 3)
		send(sort, spi, 2)
		asked(spi, 3)
		flushed(sort)
		s.set(spi, took(3))
		arrives(sort, spi, 1)
		arrives(sort, spi, 2)
		// From then on the kernel accepts them.
		flushed(sort)
		former := s.times(spi)
		send(sort, spi, 4)
		flushed(sort)
		if n := s.times(spi); n != former {
			t.Errorf("%s: the kernel was asked for an SA that it is known to have", sort)
		}

		// The packets are read when the SA already has keys; the kernel has accepted one of them.
		spi = another()
		s.set(spi, took(2))
		send(sort, spi, 2)
		asked(spi, 2)
		spi = another()
		s.set(spi, took(2))
		send(sort, spi, 1)
		arrives(sort, spi, 1)
		flushed(sort)

		// The negotiation fails.
		spi = another()
		s.set(spi, link.Inbound{})
		send(sort, spi, 1)
		asked(spi, 3)
		s.mu.Lock()
		delete(s.of, spi)
		n := s.asked[spi]
		s.mu.Unlock()
		asked(spi, n+1)
		flushed(sort)
		if got := s.times(spi); got != n+1 {
			t.Errorf("%s: the kernel was asked %d more times for an SPI that it does not have", sort, got-n)
		}
	}
	if s.times(0xa0000001) != 0 {
		t.Error("packets are caught before their sources are set")
	}
	send("udp", 0, 1) // IKE, recognized by the Non-ESP Marker
	flushed("udp")
	if s.times(0) != 0 {
		t.Error("IKE was processed")
	}

	// As many peers as a filter may have.
	other := func(i int) string {
		if six {
			return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 14: byte(1 + i>>8), 15: byte(i)}).String()
		}
		return netip.AddrFrom4([4]byte{192, 0, byte(3 + i>>8), byte(i)}).String()
	}
	var many []string
	for i := range most {
		many = append(many, other(i))
	}
	if six { // each word of the address counts
		copy(many[most-3:], []string{"2001:db9::2", "2001:db8:1::2", "2001:db8::1:0:2"})
	}
	from(many...)
	unlisted := another()
	send("esp", unlisted, 1)
	many[most/2] = there
	from(many...)
	flushed("esp")
	if s.times(unlisted) != 0 {
		t.Error("a packet from an address that is not on the list was processed")
	}
	from(append(many, other(most))...)
	flushed("esp")
	many[most/2] = other(most / 2)
	from(append(many, other(most))...) // too many
	flushed("esp")
}

// ipPacket returns an ESP packet with its IPv4 header.
func ipPacket(spi, sequence uint32, size int) []byte {
	p := make([]byte, 20, size)
	p[0], p[9] = 0x45, unix.IPPROTO_ESP
	copy(p[16:], []byte{192, 0, 2, 1})
	p = append(p, espPacket(spi, sequence)...)
	return append(p, make([]byte, max(0, size-len(p)))...)
}

func TestCatcherBounds(t *testing.T) {
	var log strings.Builder
	s := &states{of: map[uint32]link.Inbound{1: {}, 2: {}, 3: {}}, asked: map[uint32]int{}}
	c := &catcher{log: slog.New(slog.NewTextHandler(&log, nil)), state: s.state, seen: map[saID]bool{}, held: map[saID]*held{}}
	now := time.Now()
	has := func(spi uint32) int {
		h := c.held[saID{netip.MustParseAddr("192.0.2.1"), spi}]
		if h == nil {
			return 0
		}
		return len(h.packets)
	}
	for i := range uint32(caughtPackets + 10) {
		c.take(ipPacket(1, i+1, 100), now)
	}
	if c.count != caughtPackets || has(1) != caughtPackets {
		t.Errorf("%d packets kept, want at most %d", c.count, caughtPackets)
	}
	for range 2 { // in the second round none is new
		for i := range uint32(10) {
			c.take(ipPacket(2, i+1, 100), now)
		}
	}
	if c.count != caughtPackets || has(2) != 10 || has(1) != caughtPackets-10 {
		t.Errorf("next to %d packets of one SA, %d of another were kept, want 10", has(1), has(2))
	}
	if n := strings.Count(log.String(), "too many"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
	for i := range uint32(1000) {
		c.take(ipPacket(3, i+1, 60_000), now)
	}
	if c.size > caughtBytes || has(3) < 10 || has(3) == 1000 {
		t.Errorf("%d bytes kept, want at most %d; %d large packets", c.size, caughtBytes, has(3))
	}
	size, count := 0, 0
	for _, h := range c.held {
		for _, p := range h.packets {
			size, count = size+len(p.packet), count+1
		}
	}
	if size != c.size || count != c.count {
		t.Errorf("counted %d packets with %d bytes, have %d with %d", c.count, c.size, count, size)
	}
	c.ask(now.Add(caughtFor))
	if c.count != count {
		t.Errorf("%d of %d packets kept for their time", c.count, count)
	}
	c.ask(now.Add(caughtFor + 1))
	if c.count != 0 || c.size != 0 || len(c.held) != 0 || c.full {
		t.Errorf("%d packets kept too long", c.count)
	}
	for i := range uint32(3 * mostSeen) {
		s.set(i+10, took(1))
		c.take(ipPacket(i+10, 1, 100), now)
	}
	if len(c.seen) > mostSeen || len(c.fresh) > mostSeen {
		t.Errorf("%d and %d SAs stored, want at most %d", len(c.seen), len(c.fresh), mostSeen)
	}

	var b budget
	n := 0
	for ; b.left(now) && n <= readsAtOnce; n++ {
		b.n++
	}
	if n != readsAtOnce || b.left(now.Add(readsPer-1)) || !b.left(now.Add(readsPer)) {
		t.Errorf("%d reads at once, want %d", n, readsAtOnce)
	}
}

package ipsec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/sockfilter"
)

const (
	// earlyNumbers is the highest sequence number that is caught; steady traffic is beyond it.
	earlyNumbers  = 4096
	caughtPackets = 4096            // upper limit of packets kept
	caughtBytes   = 8 << 20         // upper limit of bytes kept
	caughtFor     = 3 * time.Second // after which a packet is useless
	readsAtOnce   = 1024            // packets that are read in each readsPer
	readsPer      = 50 * time.Millisecond
	// askEvery is the minimum time between requests to the kernel about kept packets.
	askEvery = 2 * time.Millisecond
	// askWithin is the maximum of this time, when an answer takes long, as on a busy machine.
	askWithin = 20 * time.Millisecond
	// underWay is how long the kernel may still be processing a packet that it accepts.
	underWay = 5 * time.Millisecond
	// mostSources is limited by the length of a filter, which net.core.optmem_max limits to at
	// least 20 KiB.
	mostSources  = 512
	mostSources6 = 128 // likewise; an address is four words of a filter
	mostSeen     = 4096
)

// catcher keeps ESP packets that arrive before their SA is installed.
//
// A responder sends on a new SA as soon as it has created it, before its answer has given us the
// keys. The kernel drops packets that arrive in that time. Therefore catcher copies such packets
// from the wire (packet(7)), and once the SA is installed, passes them to the kernel again through
// the loopback interface. This is always active: the sequence numbers of an SA begin with 1, and a
// filter in the kernel passes only the first numbers from the peers. A catcher is for one family
// of outside addresses.
//
// Only the kernel decides what happens to a packet: it has a state that reserves the SPI before a
// peer can receive it, then one with keys, and its replay window tells which packets it has
// accepted. Packets with another SPI are dropped at once.
type catcher struct {
	log   *slog.Logger
	six   bool // IPv6
	state func(dst netip.Addr, spi uint32) (link.Inbound, error)

	in      *os.File // packet socket
	raw     syscall.RawConn
	sources []netip.Addr // those of the filter
	closing atomic.Bool
	ended   chan struct{}

	// Only run uses the fields below.
	out int // raw socket
	// seen holds the SAs with keys. It is true when all packets that came before the keys have
	// been read.
	seen  map[saID]bool
	fresh []saID         // those in seen that are false
	held  map[saID]*held // without empty ones
	count int            // packets in held
	size  int            // bytes in held
	full  bool           // already logged since held was last empty
}

// saID identifies the SA that a packet claims to belong to.
type saID struct {
	dst netip.Addr
	spi uint32
}

// held contains the packets of one SA.
type held struct {
	early bool // the packets came before the SA had keys
	// packets are by sequence number, because a packet comes twice if the interface is in a
	// bridge.
	packets map[uint32]caught
}

type caught struct {
	at     time.Time
	packet []byte
}

// newCatcher starts a catcher for IPv4 or IPv6, without sources yet. state returns the states of
// SAs.
func newCatcher(log *slog.Logger, six bool, state func(netip.Addr, uint32) (link.Inbound, error)) (*catcher, error) {
	protocol, family := uint16(unix.ETH_P_IP), unix.AF_INET
	if six {
		protocol, family = unix.ETH_P_IPV6, unix.AF_INET6
	}
	c := &catcher{log: log, six: six, state: state, ended: make(chan struct{}), seen: map[saID]bool{}, held: map[saID]*held{}}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("catching early packets: %w", err)
	}
	c.in = os.NewFile(uintptr(fd), "packet")
	// without CAP_NET_ADMIN the default stays
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, caughtBytes)
	c.raw, err = c.in.SyscallConn()
	if err == nil {
		err = c.attach(earlyFilter(six, nil))
	}
	if err == nil { // bound last, so that nothing arrives unfiltered
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, protocol))})
	}
	if err == nil {
		c.out, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	}
	if err != nil {
		c.in.Close()
		return nil, fmt.Errorf("catching early packets: %w", err)
	}
	go c.run()
	return c, nil
}

// from sets the addresses from which packets are caught, without those of the other family. If
// there are more than mostSources or mostSources6, packets from all addresses are caught.
func (c *catcher) from(sources []netip.Addr) error {
	sources = slices.DeleteFunc(slices.Clone(sources), func(a netip.Addr) bool { return a.Is4() == c.six || !a.IsValid() })
	slices.SortFunc(sources, netip.Addr.Compare)
	sources = slices.Compact(sources)
	if slices.Equal(sources, c.sources) {
		return nil
	}
	if err := c.attach(earlyFilter(c.six, sources)); err != nil {
		return fmt.Errorf("catching early packets: %w", err)
	}
	c.sources = sources
	return nil
}

func (c *catcher) attach(filter sockfilter.Program) error {
	var err error
	failed := c.raw.Control(func(fd uintptr) { err = sockfilter.Attach(int(fd), filter) })
	return errors.Join(failed, err)
}

// close stops the catcher, and waits until it has stopped.
func (c *catcher) close() {
	c.closing.Store(true)
	c.in.Close()
	<-c.ended
}

func (c *catcher) run() {
	defer close(c.ended)
	defer unix.Close(c.out)
	buf := make([]byte, 1<<16)
	var reads budget
	var next time.Time // when to ask the kernel again
	for {
		now := time.Now()
		if len(c.held) > 0 && !now.Before(next) {
			c.ask(now)
			took := time.Since(now)
			// Save CPU time for other work, but a packet that is late is useless.
			next = now.Add(took + min(max(askEvery, 20*took), askWithin))
		}
		if !reads.left(now) {
			time.Sleep(askEvery)
			continue
		}
		var wake time.Time // zero: only a packet wakes it
		if len(c.held) > 0 {
			// a deadline in the past would prevent reading
			wake = time.Now().Add(max(time.Until(next), askEvery/2))
		}
		_ = c.in.SetReadDeadline(wake)
		n, err := c.read(buf)
		switch {
		case c.closing.Load():
			return
		// an interface went down
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ENETDOWN):
		case err != nil:
			c.log.Warn("some packets may be lost while SAs are replaced", "error", err)
			return
		default:
			reads.n++
			c.take(buf[:n], time.Now())
		}
	}
}

// budget limits reads, so that a flood does not consume the CPU. Unread packets wait in the
// socket's buffer, as far as it has room.
type budget struct {
	n     int
	since time.Time
}

// left reports whether another read is allowed now.
func (b *budget) left(now time.Time) bool {
	if now.Sub(b.since) >= readsPer {
		b.n, b.since = 0, now
	}
	return b.n < readsAtOnce
}

// read waits for a packet.
func (c *catcher) read(buf []byte) (n int, err error) {
	waited := c.raw.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), buf)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if !errors.Is(err, unix.EAGAIN) {
			return true
		}
		// All packets from before these SAs have been read. The kernel accepts those that arrive
		// from now on.
		for _, id := range c.fresh {
			c.seen[id] = true
		}
		c.fresh = nil
		return false
	})
	if waited != nil {
		return 0, waited
	}
	return n, err
}

// take keeps a packet unless the kernel certainly accepts it, or has no SA for it.
func (c *catcher) take(packet []byte, now time.Time) {
	id, sequence, ok := parseESP(packet)
	if !ok || c.seen[id] {
		return
	}
	h := c.held[id]
	if h == nil {
		state, err := c.state(id.dst, id.spi)
		if errors.Is(err, link.ErrNoSA) {
			return
		}
		if err == nil && state.Keyed {
			c.keyed(id)
		}
		h = &held{early: err == nil && !state.Keyed, packets: map[uint32]caught{}}
	}
	if _, twice := h.packets[sequence]; twice {
		return
	}
	for c.count >= caughtPackets || c.size+len(packet) > caughtBytes {
		if !c.full {
			c.full = true
			c.log.Warn("packets that arrived before their SA are lost, because there are too many", "packets", c.count, "bytes", c.size)
		}
		// The SA with the most packets loses one, so that no peer displaces the packets of
		// another.
		most, n := id, len(h.packets)+1
		for other, o := range c.held {
			if len(o.packets) > n {
				most, n = other, len(o.packets)
			}
		}
		if most == id {
			return
		}
		for sequence := range c.held[most].packets {
			c.drop(most, sequence)
			break
		}
	}
	c.held[id] = h
	packet = slices.Clone(packet)
	sum(packet)
	h.packets[sequence] = caught{now, packet}
	c.count, c.size = c.count+1, c.size+len(packet)
}

// keyed records that the kernel has the keys of an SA. Packets that wait in the socket may have
// arrived before.
func (c *catcher) keyed(id saID) {
	if _, is := c.seen[id]; is {
		return
	}
	if len(c.seen) >= mostSeen { // SAs in use are recorded again
		clear(c.seen)
		c.fresh = nil
	}
	c.seen[id] = false
	c.fresh = append(c.fresh, id)
}

// ask passes the packets of SAs that now have keys to the kernel, and drops those that are
// useless.
func (c *catcher) ask(now time.Time) {
	for id, h := range c.held {
		state, err := c.state(id.dst, id.spi)
		h.early = h.early || err == nil && !state.Keyed
		if err == nil && state.Keyed {
			c.keyed(id)
		}
		n := 0
		for _, sequence := range slices.Sorted(maps.Keys(h.packets)) {
			p := h.packets[sequence]
			switch {
			case errors.Is(err, link.ErrNoSA), now.Sub(p.at) > caughtFor:
			case !state.Keyed, !h.early && now.Sub(p.at) < underWay:
				continue
			case !state.Took(sequence) && unix.Sendto(c.out, p.packet, 0, to(id.dst)) == nil:
				n++
			}
			c.drop(id, sequence)
		}
		if n > 0 {
			c.log.Info("delivered packets that arrived before their SA", "packets", n, "spi", fmt.Sprintf("%08x", id.spi))
		}
	}
}

// drop removes a packet.
func (c *catcher) drop(id saID, sequence uint32) {
	h := c.held[id]
	c.count, c.size = c.count-1, c.size-len(h.packets[sequence].packet)
	if delete(h.packets, sequence); len(h.packets) == 0 {
		delete(c.held, id)
	}
	c.full = c.full && c.count > 0
}

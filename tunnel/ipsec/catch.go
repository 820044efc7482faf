package ipsec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	caughtPackets = 4096            // the most that are kept
	caughtFor     = 3 * time.Second // after which a packet is of no use any more
)

// catcher keeps ESP packets that arrive before their SA does.
//
// A responder sends on a new SA as soon as it has made it, before its answer has told us the keys. When nothing was up
// before, nobody notices. When traffic is flowing on SAs that a former charon left in the kernel, the packets of that
// moment are lost: the kernel drops what it has no state for. So they are copied from the wire (packet(7)), and once the
// SA is there, given to the kernel again through the loopback interface. A packet that the kernel had taken already is
// dropped by its replay window. IPv4 outside addresses only.
type catcher struct {
	in  *os.File // packet socket
	out int      // raw socket

	mu     sync.Mutex
	known  map[uint32]bool // SPIs that the kernel takes already
	caught []caught
	closed bool
}

type caught struct {
	spi    uint32
	at     time.Time
	packet []byte
}

// newCatcher begins to catch packets with other SPIs than the known ones.
func newCatcher(known map[uint32]bool) (*catcher, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("catching early packets: %w", err)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) // without the right to, the default is kept
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(espFilter)), Filter: &espFilter[0]})
	if err == nil { // bound last, so that nothing arrives unfiltered
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_IP))})
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("catching early packets: %w", err)
	}
	out, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("catching early packets: %w", err)
	}
	c := &catcher{in: os.NewFile(uintptr(fd), "packet"), out: out, known: known}
	go c.run()
	return c, nil
}

// espFilter passes unfragmented IPv4 packets to this host that are ESP, or UDP to port 4500 (RFC 3948).
var espFilter = []unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0xfffff004}, // SKF_AD_OFF + SKF_AD_PKTTYPE
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.PACKET_HOST, Jf: 9},
	{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 6},
	{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 0x3fff, Jt: 7}, // more fragments, or an offset
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 9},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_ESP, Jt: 4},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.IPPROTO_UDP, Jf: 4},
	{Code: unix.BPF_LDX | unix.BPF_B | unix.BPF_MSH, K: 0},
	{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_IND, K: 2},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 4500, Jf: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0xffff},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0},
}

func (c *catcher) run() {
	buf := make([]byte, 1<<16)
	for {
		n, err := c.in.Read(buf)
		if errors.Is(err, unix.ENETDOWN) {
			continue // some interface went down
		}
		if err != nil {
			return
		}
		if spi, ok := parseSPI(buf[:n]); ok {
			c.keep(spi, buf[:n], time.Now())
		}
	}
}

func (c *catcher) keep(spi uint32, packet []byte, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known[spi] {
		return
	}
	old := 0
	for old < len(c.caught) && (now.Sub(c.caught[old].at) > caughtFor || len(c.caught)-old >= caughtPackets) {
		old++
	}
	packet = append([]byte(nil), packet...)
	if at := int(packet[0]&0xf) * 4; len(packet) >= at+8 && packet[9] == unix.IPPROTO_UDP {
		// None (RFC 3948, section 2.1). One that was left to the sender's network card is not there yet on a veth.
		packet[at+6], packet[at+7] = 0, 0
	}
	c.caught = append(c.caught[old:], caught{spi, now, packet})
}

// release gives the kernel the packets of an SA that it has now, and returns how many.
func (c *catcher) release(spi uint32) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.known[spi] {
		return 0
	}
	c.known[spi] = true
	rest := c.caught[:0]
	for _, p := range c.caught {
		if p.spi != spi {
			rest = append(rest, p)
		} else if unix.Sendto(c.out, p.packet, 0, &unix.SockaddrInet4{Addr: [4]byte(p.packet[16:20])}) == nil {
			n++
		}
	}
	c.caught = rest
	return n
}

func (c *catcher) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.in.Close()
	unix.Close(c.out)
}

// parseSPI returns the SPI of an IPv4 packet with ESP in it, bare or in UDP. SPI 0 marks IKE (RFC 3948, section 2.2).
func parseSPI(p []byte) (uint32, bool) {
	if len(p) < 20 || p[0]>>4 != 4 {
		return 0, false
	}
	at := int(p[0]&0xf) * 4
	if at < 20 {
		return 0, false
	}
	switch p[9] {
	case unix.IPPROTO_ESP:
	case unix.IPPROTO_UDP:
		at += 8
	default:
		return 0, false
	}
	if len(p) < at+8 {
		return 0, false
	}
	spi := binary.BigEndian.Uint32(p[at:])
	return spi, spi != 0
}

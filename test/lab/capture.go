package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"
)

// Capture counts IP packets by source address where they pass. The kernel filters
// and counts, so the number is exact under any load.
type Capture struct {
	mu    sync.Mutex
	fd    int
	count uint64
	first []string
}

// Capture starts to count packets, in either direction, whose source is in
// one of the prefixes. With iface "" all interfaces of the node count, and a packet that
// passes several of them counts several times. ARP is not IP and never counts.
func (n *Node) Capture(iface string, sources ...netip.Prefix) (*Capture, error) {
	fail := func(err error) (*Capture, error) { return nil, fmt.Errorf("capturing in %s: %w", n.Name, err) }
	if len(sources) == 0 {
		return fail(errors.New("no prefix given"))
	}
	var c Capture
	err := n.Do(func() (err error) {
		// Protocol 0 receives nothing until bind, when the filter is in place.
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		filter := sourceFilter(sources)
		ifreq := 0
		if iface != "" {
			req, err := unix.NewIfreq(iface)
			if err != nil {
				return err
			}
			if err := unix.IoctlIfreq(c.fd, unix.SIOCGIFINDEX, req); err != nil {
				return fmt.Errorf("looking for interface %s: %w", iface, err)
			}
			ifreq = int(req.Uint32())
		}
		if err := unix.SetsockoptSockFprog(c.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
			return fmt.Errorf("attaching the filter: %w", err)
		}
		all := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.ETH_P_ALL))
		return unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifreq})
	})
	if err != nil {
		if c.fd > 0 {
			unix.Close(c.fd)
		}
		return fail(err)
	}
	return &c, nil
}

// Count is the number of packets so far, and how the first ten of them looked.
func (c *Capture) Count() (n uint64, first []string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd >= 0 {
		// packet(7): reading resets both; tp_packets includes those that the socket's
		// buffer had no room for.
		st, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
		if err != nil {
			return 0, nil, fmt.Errorf("reading the capture's count: %w", err)
		}
		c.count += uint64(st.Packets)
		b := make([]byte, 256)
		for {
			k, _, err := unix.Recvfrom(c.fd, b, 0)
			if err != nil {
				break
			}
			if len(c.first) < 10 {
				c.first = append(c.first, describe(b[:k]))
			}
		}
	}
	return c.count, c.first, nil
}

// Stop ends the capture and returns the final Count.
func (c *Capture) Stop() (n uint64, first []string, err error) {
	n, first, err = c.Count()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd >= 0 {
		unix.Close(c.fd)
		c.fd = -1
	}
	return n, first, err
}

func describe(b []byte) string {
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		return fmt.Sprintf("%s > %s protocol %d", netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9])
	case len(b) >= 40 && b[0]>>4 == 6:
		return fmt.Sprintf("%s > %s next header %d", netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), b[6])
	}
	return fmt.Sprintf("% x", b)
}

// sourceFilter is a classic BPF program that accepts IP packets from the prefixes. Each
// prefix is a block that accepts or falls through to the next, so no jump is long.
func sourceFilter(prefixes []netip.Prefix) []unix.SockFilter {
	const (
		load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		and  = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret  = unix.BPF_RET | unix.BPF_K
		skb  = 1<<32 - 0x1000 // SKF_AD_OFF; +0 is SKF_AD_PROTOCOL
	)
	var prog []unix.SockFilter
	for _, p := range prefixes {
		p = p.Masked()
		protocol, offset, addr := uint32(unix.ETH_P_IP), uint32(12), p.Addr().AsSlice()
		if p.Addr().Is6() {
			protocol, offset = unix.ETH_P_IPV6, 8
		}
		words := (p.Bits() + 31) / 32
		left := uint8(3 * words) // instructions from here to the block's accept
		prog = append(prog, unix.SockFilter{Code: load, K: skb}, unix.SockFilter{Code: jeq, Jf: left + 1, K: protocol})
		for i := range words {
			mask := ^uint32(0)
			if rest := p.Bits() - 32*i; rest < 32 {
				mask <<= 32 - rest
			}
			left -= 3
			prog = append(prog,
				unix.SockFilter{Code: load, K: offset + uint32(4*i)},
				unix.SockFilter{Code: and, K: mask},
				unix.SockFilter{Code: jeq, Jf: left + 1, K: binary.BigEndian.Uint32(addr[4*i:])})
		}
		prog = append(prog, unix.SockFilter{Code: ret, K: 256})
	}
	return append(prog, unix.SockFilter{Code: ret, K: 0})
}

package ipsec

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/sockfilter"
)

// earlyFilter passes unfragmented packets of a family to this host that are ESP with one of the
// first sequence numbers, bare or in UDP to port 4500 (RFC 3948), from one of the sources.
func earlyFilter(six bool, sources []netip.Addr) (p sockfilter.Program) {
	const loop = 1 // the loopback interface, through which packets are passed to the kernel again
	p.Add(bpf.LoadExtension{Num: bpf.ExtType})
	p.If(bpf.JumpNotEqual, unix.PACKET_HOST, sockfilter.Drop)
	p.Add(bpf.LoadExtension{Num: bpf.ExtInterfaceIndex})
	p.If(bpf.JumpEqual, loop, sockfilter.Drop)
	// Load the length of the IP header into register X.
	protocol, source, words, most := uint32(9), uint32(12), 1, mostSources
	if six {
		protocol, source, words, most = 6, 8, 4, mostSources6
		// In a fragment, another header follows the first one.
		p.Add(bpf.LoadConstant{Dst: bpf.RegX, Val: 40})
	} else {
		p.Add(bpf.LoadAbsolute{Off: 6, Size: 2})
		p.If(bpf.JumpBitsSet, 0x3fff, sockfilter.Drop) // more fragments, or an offset
		p.Add(bpf.LoadMemShift{Off: 0})
	}
	var inUDP sockfilter.Program
	inUDP.If(bpf.JumpNotEqual, unix.IPPROTO_UDP, sockfilter.Drop)
	inUDP.Add(bpf.LoadIndirect{Off: 2, Size: 2})
	inUDP.If(bpf.JumpNotEqual, 4500, sockfilter.Drop)
	inUDP.Add(bpf.LoadIndirect{Off: 12, Size: 4})
	p.Add(bpf.LoadAbsolute{Off: protocol, Size: 1})
	p.IfElse(bpf.JumpEqual, unix.IPPROTO_ESP, sockfilter.Program{bpf.LoadIndirect{Off: 4, Size: 4}}, inUDP)
	p.If(bpf.JumpGreaterThan, earlyNumbers, sockfilter.Drop)
	if len(sources) > most {
		p.Add(sockfilter.Pass)
		return p
	}
	for i := range words {
		p.Add(bpf.LoadAbsolute{Off: source + 4*uint32(i), Size: 4}, bpf.StoreScratch{Src: bpf.RegA, N: i})
	}
	for _, a := range sources {
		// From the last word to the first: each test contains the tests of the words after it.
		same := sockfilter.Program{sockfilter.Pass}
		for i := words - 1; i >= 0; i-- {
			var word sockfilter.Program
			if words > 1 {
				word.Add(bpf.LoadScratch{Dst: bpf.RegA, N: i})
			}
			word.If(bpf.JumpEqual, binary.BigEndian.Uint32(a.AsSlice()[4*i:]), same...)
			same = word
		}
		p.Add(same...)
	}
	p.Add(sockfilter.Drop)
	return p
}

func to(a netip.Addr) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Addr: a.As16()}
}

// parseESP returns the SA and the sequence number of an ESP packet, bare or in UDP. SPI 0 marks
// IKE (RFC 3948, section 2.2).
func parseESP(p []byte) (id saID, sequence uint32, ok bool) {
	at, protocol, ok := header(p)
	if ok && protocol == unix.IPPROTO_UDP {
		at += 8
	}
	if !ok || protocol != unix.IPPROTO_UDP && protocol != unix.IPPROTO_ESP || len(p) < at+8 {
		return id, 0, false
	}
	dst := p[16:20]
	if p[0]>>4 == 6 {
		dst = p[24:40]
	}
	id.dst, _ = netip.AddrFromSlice(dst)
	id.spi = binary.BigEndian.Uint32(p[at:])
	return id, binary.BigEndian.Uint32(p[at+4:]), id.spi != 0
}

// header returns the length of the IP header of a packet and the protocol of its payload.
func header(p []byte) (size int, protocol byte, ok bool) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		size = int(p[0]&0xf) * 4
		return size, p[9], size >= 20
	case len(p) >= 40 && p[0]>>4 == 6:
		return 40, p[6], true
	}
	return 0, 0, false
}

// sum writes the checksum of a UDP packet. On a veth, a checksum that is left to the sender's
// network card is not filled in. IPv4 needs none (RFC 3948, section 2.1), IPv6 does (RFC 8200,
// section 8.1).
func sum(p []byte) {
	at, protocol, ok := header(p)
	if !ok || protocol != unix.IPPROTO_UDP {
		return
	}
	udp := p[at:]
	udp[6], udp[7] = 0, 0
	if p[0]>>4 == 4 {
		return
	}
	n := unix.IPPROTO_UDP + uint64(len(udp)) // of the pseudo-header, which includes the addresses
	add := func(b []byte) {
		for ; len(b) > 1; b = b[2:] {
			n += uint64(binary.BigEndian.Uint16(b))
		}
		if len(b) > 0 {
			n += uint64(b[0]) << 8
		}
	}
	add(p[8:40])
	add(udp)
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	if n = ^n & 0xffff; n == 0 {
		n = 0xffff
	}
	binary.BigEndian.PutUint16(udp[6:], uint16(n))
}

package nat

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
)

// Blocks assigns the ports of a pool's addresses to sources by a formula (RFC 7422), so that an
// address and a port identify the source without a log. The sources of a family are numbered
// through the prefixes in their order, from 0. With b blocks for each address, source n has block n
// modulo b of address n divided by b, in the order of the pool. So prefixes and addresses that are
// added at the end move no source.
type Blocks struct {
	Size      uint16 // ports in a block, 1 or more
	FirstPort uint16 // of the first block
	// Sources do not overlap, and are few enough to be iterated.
	Sources []netip.Prefix
}

// String describes the blocks.
func (b *Blocks) String() string {
	return fmt.Sprintf("%d ports from %d for %v", b.Size, b.FirstPort, b.Sources)
}

// PerAddress returns the number of blocks of an address.
func (b *Blocks) PerAddress() int { return (65536 - int(b.FirstPort)) / int(b.Size) }

// Count returns the number of sources of a family; at least 2^32 if there are that many.
func (b *Blocks) Count(ipv6 bool) (n uint64) {
	for _, p := range b.Sources {
		if p.Addr().Is6() == ipv6 {
			n += 1 << min(p.Addr().BitLen()-p.Bits(), 32)
		}
	}
	return n
}

// blockAddresses returns the pool's addresses of a family in the order of assignment.
func (p Pool) blockAddresses(ipv6 bool) (addrs []netip.Addr) {
	for _, a := range p.Addresses {
		if a.Address.Is6() == ipv6 && !slices.Contains(addrs, a.Address) {
			addrs = append(addrs, a.Address)
		}
	}
	return addrs
}

// Block returns the address and the ports of a source of a pool with Blocks; ok is false if it has
// none.
func (p Pool) Block(source netip.Addr) (address netip.Addr, ports PortRange, ok bool) {
	n := 0
	for _, s := range p.Blocks.Sources {
		if s.Addr().Is6() != source.Is6() {
			continue
		}
		size := 1 << min(s.Addr().BitLen()-s.Bits(), 32)
		if !s.Contains(source) {
			n += size
			continue
		}
		n += int(binary.BigEndian.Uint32(tail(source))) & (size - 1)
		addrs, each := p.blockAddresses(source.Is6()), p.Blocks.PerAddress()
		if each == 0 || n/each >= len(addrs) {
			return netip.Addr{}, PortRange{}, false
		}
		first := int(p.Blocks.FirstPort) + n%each*int(p.Blocks.Size)
		return addrs[n/each], PortRange{uint16(first), uint16(first + int(p.Blocks.Size) - 1)}, true
	}
	return netip.Addr{}, PortRange{}, false
}

// Owner is the inverse of Block: it returns the source that has a port of an address.
func (p Pool) Owner(address netip.Addr, port uint16) (source netip.Addr, ok bool) {
	i := slices.Index(p.blockAddresses(address.Is6()), address)
	each := p.Blocks.PerAddress()
	if i < 0 || port < p.Blocks.FirstPort || int(port-p.Blocks.FirstPort)/int(p.Blocks.Size) >= each {
		return netip.Addr{}, false
	}
	n := i*each + int(port-p.Blocks.FirstPort)/int(p.Blocks.Size)
	for _, s := range p.Blocks.Sources {
		if s.Addr().Is6() != address.Is6() {
			continue
		}
		size := 1 << min(s.Addr().BitLen()-s.Bits(), 32)
		if n >= size {
			n -= size
			continue
		}
		b := s.Masked().Addr().AsSlice()
		last := b[len(b)-4:]
		binary.BigEndian.PutUint32(last, binary.BigEndian.Uint32(last)|uint32(n))
		source, _ = netip.AddrFromSlice(b)
		return source, true
	}
	return netip.Addr{}, false
}

// tail returns the last four bytes of an address.
func tail(a netip.Addr) []byte {
	b := a.AsSlice()
	return b[len(b)-4:]
}

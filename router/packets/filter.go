package packets

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/sockfilter"
)

// Filter selects packets: those for which everything that is set is true. The zero value selects
// every IP packet.
type Filter struct {
	// Host is the source or the destination. Not valid: any.
	Host netip.Addr
	// Protocols are the IP protocols to select. Nil: any. Extension headers of IPv6 are not followed.
	Protocols []uint8
	// Port is the source or destination port of TCP and UDP. 0: any. Of a fragmented packet, only
	// the first fragment has ports.
	Port uint16
}

// Offsets in the headers (RFC 791 section 3.1, RFC 8200 section 3).
const (
	fourFragment, fourProtocol, fourSource, fourDestination = 6, 9, 12, 16
	sixNext, sixSource, sixDestination, sixHeader           = 6, 8, 24, 40
	// fragmentOffset is the mask of the offset in the field of flags and offset.
	fragmentOffset = 0x1fff
)

// program returns the filter of a packet socket that has no link-layer header.
func (f Filter) program() (p sockfilter.Program) {
	four, six := f.four(), f.six()
	p.Add(bpf.LoadExtension{Num: bpf.ExtProto})
	p.If(bpf.JumpEqual, unix.ETH_P_IP, four...)
	p.Add(bpf.LoadExtension{Num: bpf.ExtProto})
	p.If(bpf.JumpEqual, unix.ETH_P_IPV6, six...)
	p.Add(sockfilter.Drop)
	return p
}

func (f Filter) four() (p sockfilter.Program) {
	if f.Host.IsValid() {
		if !f.Host.Is4() {
			return sockfilter.Program{sockfilter.Drop}
		}
		p.Add(either(f.Host.AsSlice(), fourSource, fourDestination)...)
	}
	p.Add(f.protocol(fourProtocol)...)
	if f.Port != 0 {
		p.Add(bpf.LoadAbsolute{Off: fourFragment, Size: 2})
		p.If(bpf.JumpBitsSet, fragmentOffset, sockfilter.Drop)
		p.Add(bpf.LoadMemShift{Off: 0})
		p.Add(f.port()...)
	}
	p.Add(sockfilter.Pass)
	return p
}

func (f Filter) six() (p sockfilter.Program) {
	if f.Host.IsValid() {
		if !f.Host.Is6() {
			return sockfilter.Program{sockfilter.Drop}
		}
		p.Add(either(f.Host.AsSlice(), sixSource, sixDestination)...)
	}
	p.Add(f.protocol(sixNext)...)
	if f.Port != 0 {
		p.Add(bpf.LoadConstant{Dst: bpf.RegX, Val: sixHeader})
		p.Add(f.port()...)
	}
	p.Add(sockfilter.Pass)
	return p
}

// either drops packets that have an address at neither of two offsets.
func either(a []byte, offsets ...uint32) (p sockfilter.Program) {
	// other runs when a word at the first offset is another one.
	other := sockfilter.Program{}
	for i := 0; i < len(a); i += 4 {
		other.Add(bpf.LoadAbsolute{Off: offsets[1] + uint32(i), Size: 4})
		other.If(bpf.JumpNotEqual, binary.BigEndian.Uint32(a[i:]), sockfilter.Drop)
	}
	// The rest of the first address, from its last word back to its first one.
	for i := len(a) - 4; i >= 0; i -= 4 {
		then := p
		p = sockfilter.Program{bpf.LoadAbsolute{Off: offsets[0] + uint32(i), Size: 4}}
		p.IfElse(bpf.JumpEqual, binary.BigEndian.Uint32(a[i:]), then, other)
	}
	return p
}

// protocol drops packets of other protocols than those of the filter.
func (f Filter) protocol(offset uint32) (p sockfilter.Program) {
	all := f.Protocols
	if f.Port != 0 && all == nil {
		all = []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP}
	}
	if all == nil {
		return nil
	}
	p = sockfilter.Program{sockfilter.Drop}
	for _, protocol := range all {
		rest := p
		p = nil
		p.If(bpf.JumpNotEqual, uint32(protocol), rest...)
	}
	return append(sockfilter.Program{bpf.LoadAbsolute{Off: offset, Size: 1}}, p...)
}

// port drops packets without the port, behind an IP header of the length in register X.
func (f Filter) port() (p sockfilter.Program) {
	p.Add(bpf.LoadIndirect{Off: 0, Size: 2})
	p.If(bpf.JumpNotEqual, uint32(f.Port),
		bpf.LoadIndirect{Off: 2, Size: 2}, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(f.Port), SkipTrue: 1}, sockfilter.Drop)
	return p
}

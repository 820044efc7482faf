package nftables

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
)

// prefixSet returns a set of prefixes that do not overlap. Its key includes the protocol, with any
// value, because the kernel keeps intervals as written only in concatenated keys.
func prefixSet(prefixes []netip.Prefix, ipv6 bool) *set {
	s := &set{shape: shape{isInterval: true, isConcat: true}, elements: map[string]element{}}
	for _, p := range outermost(prefixes) {
		if p.Addr().Is6() == ipv6 {
			key := slices.Concat(bound(p, 0), []byte{0, 0, 0, 0}, bound(p, 1), []byte{255, 0, 0, 0})
			s.elements[string(key)] = element{}
		}
	}
	return s
}

// outermost returns the prefixes that no other one contains.
func outermost(prefixes []netip.Prefix) (out []netip.Prefix) {
	sorted := make([]netip.Prefix, len(prefixes))
	for i, p := range prefixes {
		sorted[i] = p.Masked()
	}
	slices.SortFunc(sorted, netip.Prefix.Compare)
	for _, p := range sorted {
		if n := len(out); n == 0 || !(out[n-1].Bits() <= p.Bits() && out[n-1].Contains(p.Addr())) {
			out = append(out, p)
		}
	}
	return out
}

// inPrefixes matches packets whose address at an offset of the network header is in a set of
// prefixSet.
func inPrefixes(f family, offset uint32, name string) []expr.Any {
	return exprs(network(offset, f.size, register(0)), meta(expr.MetaKeyL4PROTO, register(f.size)),
		&expr.Lookup{SourceRegister: register(0), SetName: name})
}

// isIn matches packets whose address at an offset of the network header is in a prefix. It
// compares four bytes at a time: the kernel loads and compares one, two or four bytes faster than
// more.
func isIn(f family, offset uint32, p netip.Prefix) (match []expr.Any) {
	data := p.Masked().Addr().AsSlice()
	for bits, at := p.Bits(), 0; bits > 0; bits, at = bits-32, at+4 {
		whole := uint32(min(bits, 32)) / 8
		if whole == 3 || bits%8 != 0 && bits < 32 {
			mask := binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-min(bits, 32)))
			match = append(match, exprs(network(offset+uint32(at), 4, reg1),
				&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
				compare(expr.CmpOpEq, data[at:at+4]...))...)
			continue
		}
		match = append(match, exprs(network(offset+uint32(at), whole, reg1), compare(expr.CmpOpEq, data[at:at+int(whole)]...))...)
	}
	return match
}

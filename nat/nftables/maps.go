package nftables

import (
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// Mapped prefixes are written into the packets at the edge of the node: before connection tracking
// sees incoming packets, and after all other processing of outgoing ones. Therefore routes, flows
// and policies never see two spokes with the same addresses. The mapping itself keeps no state.
//
// IPv6 is left out: correcting its checksums takes an attribute that the library does not write.

// mapsOut is the priority after the guard.
const mapsOut nftables.ChainPriority = 310

// addMaps adds the chains that rewrite prefixes.
func (r *ruleset) addMaps(c nat.Config) {
	if len(c.Maps) == 0 {
		return
	}
	arrival := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookPrerouting, priority: *nftables.ChainPriorityRaw}
	departure := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookPostrouting, priority: mapsOut}
	f := familyOf(false)
	for _, m := range c.Maps {
		in, out := [2][]byte{m.Inside.Addr().AsSlice(), m.Mapped.Addr().AsSlice()}, [2][]byte{m.Mapped.Addr().AsSlice(), m.Inside.Addr().AsSlice()}
		for _, name := range slices.Sorted(slices.Values(m.Interfaces)) {
			came, goes := rule(comes(expr.CmpOpEq, name), isFamily(f)), rule(leaves(expr.CmpOpEq, name), isFamily(f))
			arrival.rules = append(append(arrival.rules, rule(came, rewrite(ipHeader(f.source), in, m.Inside.Bits()))), quoted(came, quotedDestination, in, m.Inside.Bits())...)
			departure.rules = append(append(departure.rules, rule(goes, rewrite(ipHeader(f.dst), out, m.Inside.Bits()))), quoted(goes, quotedSource, out, m.Inside.Bits())...)
		}
	}
	r.chains["map-in"], r.chains["map-out"] = arrival, departure
}

// location is the place of an IPv4 address in a packet, together with the checksum that covers it.
type location struct {
	base                 expr.PayloadBase
	offset, sum, sumFlag uint32
}

// ipHeader returns the location of an address in the packet's own header. The checksums of TCP and
// UDP cover it too.
func ipHeader(offset uint32) location {
	const pseudoHeader = 1 // NFT_PAYLOAD_L4CSUM_PSEUDOHDR
	return location{expr.PayloadBaseNetworkHeader, offset, 10, pseudoHeader}
}

// The addresses of the packet that an ICMP error quotes behind its header of 8 bytes (RFC 792).
// The quoted header's checksum is corrected too, so the sum of the whole message does not change
// and the ICMP checksum stays valid.
var (
	quotedSource      = location{expr.PayloadBaseTransportHeader, 8 + 12, 8 + 10, 0}
	quotedDestination = location{expr.PayloadBaseTransportHeader, 8 + 16, 8 + 10, 0}
)

// rewrite replaces a prefix of an address by another one of the same length, if the address is in
// it.
func rewrite(at location, prefix [2][]byte, bits int) []expr.Any {
	network, host := make([]byte, 4), make([]byte, 4)
	for i := range 32 {
		if i < bits {
			network[i/8] |= 0x80 >> (i % 8)
		} else {
			host[i/8] |= 0x80 >> (i % 8)
		}
	}
	load := &expr.Payload{DestRegister: reg1, Base: at.base, Offset: at.offset, Len: 4}
	return exprs(
		load,
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: network, Xor: make([]byte, 4)},
		compare(expr.CmpOpEq, prefix[0]...),
		load,
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: host, Xor: prefix[1]},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg1, Base: at.base, Offset: at.offset, Len: 4,
			CsumType: expr.CsumTypeInet, CsumOffset: at.sum, CsumFlags: at.sumFlag},
	)
}

// quoted rewrites an address in the packet that an ICMP error quotes.
func quoted(where []expr.Any, at location, prefix [2][]byte, bits int) (rules [][]expr.Any) {
	for _, types := range [][2]byte{{3, 5}, {11, 12}} { // the errors of RFC 792
		rules = append(rules, rule(where, exprs(
			meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_ICMP),
			transport(0, 1, reg1), compare(expr.CmpOpGte, types[0]), compare(expr.CmpOpLte, types[1])), rewrite(at, prefix, bits)))
	}
	return rules
}

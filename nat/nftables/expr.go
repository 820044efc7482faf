package nftables

import (
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// register returns the number of the register at an offset in bytes. The kernel reports a register
// by its 4-byte number, except for the four offsets at which a 16-byte register begins. With the
// same choice here, rules are read back as they were written.
func register(offset uint32) uint32 {
	if offset%16 == 0 {
		return unix.NFT_REG_1 + offset/16
	}
	return unix.NFT_REG32_00 + offset/4
}

const reg1 = unix.NFT_REG_1

// Expressions.

func meta(key expr.MetaKey, reg uint32) expr.Any { return &expr.Meta{Key: key, Register: reg} }

func compare(op expr.CmpOp, data ...byte) expr.Any {
	return &expr.Cmp{Op: op, Register: reg1, Data: data}
}

func network(offset, size, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
}

func transport(offset, size, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: size}
}

// mapLookup replaces register 1 by its value in a map.
func mapLookup(set string) expr.Any {
	return &expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: set}
}

// setLookup matches packets whose register 1 is in a set.
func setLookup(set string) expr.Any { return &expr.Lookup{SourceRegister: reg1, SetName: set} }

func verdict(kind expr.VerdictKind, chain string) expr.Any {
	return &expr.Verdict{Kind: kind, Chain: chain}
}

// rule joins the parts of a rule.
func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

// exprs is a part of a rule.
func exprs(e ...expr.Any) []expr.Any { return e }

// isFamily matches packets of a family.
func isFamily(f family) []expr.Any {
	return exprs(meta(expr.MetaKeyNFPROTO, reg1), compare(expr.CmpOpEq, f.nfproto))
}

// interfaceName returns a name as the kernel compares it, padded with zeros.
func interfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// leaves matches packets by the name of their outgoing interface.
func leaves(op expr.CmpOp, name string) []expr.Any {
	return exprs(meta(expr.MetaKeyOIFNAME, reg1), compare(op, interfaceName(name)...))
}

// leavesByIndex matches packets by the index of their outgoing interface.
func leavesByIndex(index uint32) []expr.Any {
	return exprs(meta(expr.MetaKeyOIF, reg1), compare(expr.CmpOpEq, nativeUint32(index)...))
}

// comes matches packets by the name of their incoming interface.
func comes(op expr.CmpOp, name string) []expr.Any {
	return exprs(meta(expr.MetaKeyIIFNAME, reg1), compare(op, interfaceName(name)...))
}

// encrypts matches packets that IPsec will encrypt. Packets from an xfrm interface pass
// postrouting again in clear text with the underlay as their outgoing interface, and a third time
// with the outer header.
func encrypts() []expr.Any {
	const xfrm = 4 // NFT_RT_XFRM
	return exprs(&expr.Rt{Register: reg1, Key: xfrm}, compare(expr.CmpOpEq, 1))
}

// hasOwnSource matches packets whose source is an address of the node or of a pool.
func hasOwnSource(f family) []expr.Any {
	return rule(isFamily(f), exprs(network(f.source, f.size, reg1), setLookup(ownSet(f.ipv6))))
}

// state compares the selected bits of a packet's conntrack state with zero.
func state(bits uint32, op expr.CmpOp) []expr.Any {
	return exprs(&expr.Ct{Register: reg1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		compare(op, 0, 0, 0, 0))
}

func nativeUint32(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

// begins matches packets in conntrack state new.
func begins() []expr.Any { return state(expr.CtStateBitNEW, expr.CmpOpNeq) }

// late matches TCP packets that do not open a connection (RFC 9293 section 3.5). In chains that
// see only the first packets of flows, these belong to connections that began elsewhere.
func late() []expr.Any {
	const fin, syn, rst, ack = 0x01, 0x02, 0x04, 0x10
	return exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_TCP),
		transport(13, 1, reg1),
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		compare(expr.CmpOpNeq, syn))
}

package nftables

import (
	"encoding/binary"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

func blocksMap(pool string, f family) string { return "blocks-" + pool + "-" + f.suffix }

// blockChain returns the chain of a pool with blocks. Its map leads from each source to its
// address with the first and the last port of its block. A source without a block is dropped.
func (r *ruleset) blockChain(p nat.Pool, f family) *chain {
	s := &set{shape: shape{isMap: true}, elements: map[string]element{}}
	for _, prefix := range p.Blocks.Sources {
		if prefix.Addr().Is6() != f.ipv6 {
			continue
		}
		for a := prefix.Masked().Addr(); prefix.Contains(a); a = a.Next() {
			address, ports, ok := p.Block(a)
			if !ok {
				break // nor does any later source have one
			}
			s.elements[string(a.AsSlice())] = element{data: string(slices.Concat(
				address.AsSlice(), binary.BigEndian.AppendUint16(nil, ports.First), []byte{0, 0},
				address.AsSlice(), binary.BigEndian.AppendUint16(nil, ports.Last), []byte{0, 0}))}
		}
	}
	name := blocksMap(p.Name, f)
	r.sets[name] = s
	r.sets[meterSet(p.Name, f)] = &set{shape: shape{isConcat: true, isDynamic: true}}
	return &chain{rules: [][]expr.Any{
		meter(p.Name, f, unix.IPPROTO_TCP),
		meter(p.Name, f, unix.IPPROTO_UDP),
		exprs(network(f.source, f.size, reg1),
			&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: name},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto), Specified: true,
				RegAddrMin: register(0), RegProtoMin: register(f.size), RegAddrMax: register(f.size + 4), RegProtoMax: register(2*f.size + 4)}),
		exprs(verdict(expr.VerdictGoto, dropped)),
	}}
}

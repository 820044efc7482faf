package reach

import (
	"encoding/binary"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// cell describes a byte of a register: it is value, or the byte at index of a field under mask.
type cell struct {
	field field
	index uint8
	mask  byte
	value byte
}

// way is a set of packets on their way through the rules.
type way struct {
	box
	translated string // the source after translation
	redirected bool   // the destination was translated
	registers  [64]cell
}

// within returns the part of a way whose key is in an element. exact means that all of this part
// matches, instead of only possibly.
func (p *way) within(at int, interval bool, key string) (hit box, exact, ok bool) {
	first, last := key, key
	if interval {
		first, last = key[:len(key)/2], key[len(key)/2:]
	}
	hit, exact = p.box, true
	cells := p.registers[at:]
	for i := 0; i < len(first); {
		c := cells[i]
		if c.field < 0 {
			if c.field == opaque {
				exact = false
			} else if c.value < first[i] || c.value > last[i] {
				return hit, false, false
			}
			i++
			continue
		}
		size := len(p.first[c.field])
		for j := range size {
			if cells[i+j] != (cell{field: c.field, index: uint8(j), mask: 0xff}) {
				return p.box, false, true // a part of a field
			}
		}
		if hit, ok = hit.meet(c.field, first[i:i+size], last[i:i+size]); !ok {
			return hit, false, false
		}
		i += size
	}
	return hit, exact, true
}

// offset returns the offset of a register in the registers' bytes.
func offset(reg uint32) int {
	if reg >= unix.NFT_REG32_00 {
		return int(reg-unix.NFT_REG32_00) * 4
	}
	return int(reg-unix.NFT_REG_1) * 16
}

// fill sets a register. The kernel pads the last four bytes with zeros.
func (p *way) fill(reg uint32, cells []cell) {
	at := offset(reg)
	n := copy(p.registers[at:], cells)
	for i := n; i%4 != 0; i++ {
		p.registers[at+i] = cell{field: known}
	}
}

func (p *way) constant(reg uint32, data []byte) {
	cells := make([]cell, len(data))
	for i, b := range data {
		cells[i] = cell{field: known, value: b}
	}
	p.fill(reg, cells)
}

func (p *way) unknown(reg uint32, size uint32) {
	p.fill(reg, slices.Repeat([]cell{{field: opaque}}, int(size)))
}

// load sets a register to bytes of a field.
func (p *way) load(reg uint32, f field, from, size uint32) {
	if f == source && p.translated != "" {
		p.constant(reg, []byte(p.translated[from:from+size]))
		return
	}
	cells := make([]cell, size)
	for i := range cells {
		cells[i] = cell{field: f, index: uint8(from) + uint8(i), mask: 0xff}
	}
	p.fill(reg, cells)
}

func (p *way) bitwise(e *expr.Bitwise) {
	cells := slices.Clone(p.registers[offset(e.SourceRegister):][:e.Len])
	for i := range cells {
		switch c := &cells[i]; {
		case c.field == known:
			c.value = c.value&e.Mask[i] ^ e.Xor[i]
		case c.field >= 0 && e.Xor[i] == 0:
			c.mask &= e.Mask[i]
		default:
			c.field = opaque
		}
	}
	p.fill(e.DestRegister, cells)
}

func native(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

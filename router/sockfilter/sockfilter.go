// Package sockfilter builds socket filters, which are programs in classic BPF, without counted
// jumps, and attaches them.
package sockfilter

import (
	"fmt"
	"math"
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Instructions that end a program.
var (
	Pass = bpf.RetConstant{Val: 1<<32 - 1} // the whole packet or message
	Drop = bpf.RetConstant{Val: 0}
)

// Program is a program, or part of one. Numbers are in network byte order, whatever the byte order
// of the host.
type Program []bpf.Instruction

// Add appends instructions.
func (p *Program) Add(instructions ...bpf.Instruction) { *p = append(*p, instructions...) }

// If appends instructions that run when a test of register A with a value is true.
func (p *Program) If(test bpf.JumpTest, value uint32, then ...bpf.Instruction) {
	if n := len(then); n <= math.MaxUint8 {
		p.Add(bpf.JumpIf{Cond: opposite[test], Val: value, SkipTrue: uint8(n)})
	} else { // a conditional jump goes no further
		p.Add(bpf.JumpIf{Cond: test, Val: value, SkipTrue: 1}, bpf.Jump{Skip: uint32(n)})
	}
	p.Add(then...)
}

// IfElse appends instructions for a test that is true, and others for one that is false.
func (p *Program) IfElse(test bpf.JumpTest, value uint32, then, otherwise Program) {
	p.If(test, value, slices.Concat(then, Program{bpf.Jump{Skip: uint32(len(otherwise))}})...)
	p.Add(otherwise...)
}

var opposite = map[bpf.JumpTest]bpf.JumpTest{
	bpf.JumpEqual: bpf.JumpNotEqual, bpf.JumpNotEqual: bpf.JumpEqual,
	bpf.JumpGreaterThan: bpf.JumpLessOrEqual, bpf.JumpLessOrEqual: bpf.JumpGreaterThan,
	bpf.JumpLessThan: bpf.JumpGreaterOrEqual, bpf.JumpGreaterOrEqual: bpf.JumpLessThan,
	bpf.JumpBitsSet: bpf.JumpBitsNotSet, bpf.JumpBitsNotSet: bpf.JumpBitsSet,
}

// Attach has the kernel run a program on packets or messages that arrive at a socket.
func Attach(fd int, p Program) error {
	raw, err := bpf.Assemble(p)
	if err != nil {
		return fmt.Errorf("assembling a socket filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})
}

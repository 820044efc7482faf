// Package sockfiltertest runs socket filters without a kernel.
package sockfiltertest

import (
	"slices"
	"testing"

	"golang.org/x/net/bpf"

	"github.com/isthmus-net/isthmus/router/sockfilter"
)

// Passes reports whether a program passes data. extensions are the kernel's metadata of the packet;
// a program that loads another extension fails the test.
func Passes(t testing.TB, p sockfilter.Program, data []byte, extensions map[bpf.Extension]uint32) bool {
	t.Helper()
	p = slices.Clone(p)
	for i, instruction := range p {
		if load, ok := instruction.(bpf.LoadExtension); ok {
			value, known := extensions[load.Num]
			if !known {
				t.Fatalf("instruction %d asks for extension %d", i, load.Num)
			}
			p[i] = bpf.LoadConstant{Dst: bpf.RegA, Val: value} // the VM has none of them
		}
	}
	vm, err := bpf.NewVM(p)
	if err != nil {
		t.Fatal(err)
	}
	n, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return n > 0
}

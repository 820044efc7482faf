package host

import (
	"net"
	"testing"
)

// Ring: pure.

func TestMTU(t *testing.T) {
	m := NewMachine("")
	all, err := net.Interfaces()
	if err != nil || len(all) == 0 {
		t.Fatal(all, err)
	}
	for _, i := range all {
		if got := m.MTU(i.Name); got != i.MTU {
			t.Errorf("%s: %d, want %d", i.Name, got, i.MTU)
		}
	}
	for _, name := range []string{"", "nothing-here", "a-name-that-is-longer-than-15-bytes"} {
		if got := m.MTU(name); got != 0 {
			t.Errorf("%q: %d", name, got)
		}
	}
}

package apipa

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"
)

func TestAllocateUntilExhausted(t *testing.T) {
	var used []netip.Prefix
	for range 4096 {
		p, err := Allocate(used)
		if err != nil {
			t.Fatal(err)
		}
		if p.Bits() != 30 || !Range.Overlaps(p) || p != p.Masked() {
			t.Fatalf("got %v", p)
		}
		used = append(used, p)
	}
	seen := map[netip.Prefix]bool{}
	for _, p := range used {
		if seen[p] {
			t.Fatalf("%v twice", p)
		}
		seen[p] = true
	}
	if _, err := Allocate(used); !errors.Is(err, ErrExhausted) {
		t.Errorf("the 4097th: got %v", err)
	}
}

func TestAllocateAvoidsUsed(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		var used []netip.Prefix
		for range r.IntN(40) {
			a := netip.AddrFrom4([4]byte{169, 254, byte(60 + r.IntN(10)), byte(r.IntN(256))})
			used = append(used, netip.PrefixFrom(a, 24+r.IntN(9)))
		}
		p, err := Allocate(used)
		if err != nil {
			t.Fatal(err)
		}
		for _, u := range used {
			if u.Overlaps(p) {
				t.Fatalf("%v overlaps %v", p, u)
			}
		}
	}
}

package apipa

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

func TestFreeUntilExhausted(t *testing.T) {
	b := NewBlocks()
	seen := map[netip.Prefix]bool{}
	for range 4096 {
		p, err := b.Free()
		if err != nil {
			t.Fatal(err)
		}
		if p.Bits() != 30 || !Range.Overlaps(p) || p != p.Masked() || seen[p] {
			t.Fatalf("got %v", p)
		}
		seen[p] = true
		b.Use(p)
	}
	if _, err := b.Free(); !errors.Is(err, ErrExhausted) {
		t.Errorf("the 4097th: got %v", err)
	}
	back := netip.MustParsePrefix("169.254.70.4/30")
	b.Release(back)
	if p, err := b.Free(); p != back {
		t.Errorf("got %v, %v, want %v", p, err, back)
	}
	b.Use(netip.MustParsePrefix("169.254.0.0/16"))
	if p, err := b.Free(); !errors.Is(err, ErrExhausted) {
		t.Errorf("got %v though all of it is in use", p)
	}
}

// TestFreeAvoidsUsed has random users come and go, and compares with a search through all of them.
func TestFreeAvoidsUsed(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	b := NewBlocks()
	var used []netip.Prefix
	for range 3000 {
		if len(used) > 0 && r.IntN(2) == 0 {
			i := r.IntN(len(used))
			b.Release(used[i])
			used = slices.Delete(used, i, i+1)
		} else {
			a := netip.AddrFrom4([4]byte{169, 254, byte(62 + r.IntN(6)), byte(r.IntN(256))})
			used = append(used, netip.PrefixFrom(a, 24+r.IntN(9)))
			b.Use(used[len(used)-1])
		}
		want := netip.PrefixFrom(Range.Addr(), 30)
		for slices.ContainsFunc(used, want.Overlaps) {
			want = netip.PrefixFrom(next(want.Addr()), 30)
		}
		if got, err := b.Free(); got != want {
			t.Fatalf("got %v, %v, want %v", got, err, want)
		}
	}
}

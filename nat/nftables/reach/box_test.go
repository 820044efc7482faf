package reach

import (
	"math/rand/v2"
	"testing"
)

// TestWithoutIsTheRest removes a part from a set of packets: each packet must be in the part or in
// exactly one other piece.
func TestWithoutIsTheRest(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	interval := func(low, high int) (first, last int) {
		first = low + r.IntN(high-low+1)
		return first, first + r.IntN(high-first+1)
	}
	for range 2000 {
		var whole, part box
		for f := range fieldCount {
			a, z := interval(0x00fe, 0x0103) // around a carry
			b, y := interval(a, z)
			number := func(n int) string { return string([]byte{byte(n >> 8), byte(n)}) }
			whole.first[f], whole.last[f], part.first[f], part.last[f] = number(a), number(z), number(b), number(y)
		}
		pieces := append(whole.without(part), part)
		all := 0
		for i, p := range pieces {
			if p.empty() {
				t.Fatalf("an empty piece: %x", p)
			}
			for _, q := range pieces[:i] {
				if _, ok := p.common(q); ok {
					t.Fatalf("%x and %x overlap", p, q)
				}
			}
			if c, ok := p.common(whole); !ok || c != p {
				t.Fatalf("%x is not within %x", p, whole)
			}
			all += size(p)
		}
		if all != size(whole) {
			t.Fatalf("%x without %x: %d of %d packets", whole, part, all, size(whole))
		}
	}
}

func size(b box) int {
	n := 1
	for f := range fieldCount {
		number := func(s string) int { return int(s[0])<<8 | int(s[1]) }
		n *= number(b.last[f]) - number(b.first[f]) + 1
	}
	return n
}

package apipa

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestFreeUntilExhausted(t *testing.T) {
	for _, test := range []struct {
		rule Rule
		bits int
		n    int
		back string
	}{
		{Default, 30, 4096, "169.254.70.4/30"},
		{Rule{From: []netip.Prefix{netip.MustParsePrefix("169.254.21.0/24"), netip.MustParsePrefix("169.254.40.0/30")}, Single: true}, 32, 130, "169.254.21.6/32"},
	} {
		var a Account
		seen := map[netip.Prefix]bool{}
		for i := range test.n {
			p, err := a.Free(test.rule)
			if err != nil {
				t.Fatalf("number %d: %v", i, err)
			}
			last := p.Addr().As4()[3] & 3
			if p.Bits() != test.bits || p != p.Masked() || !within(test.rule.From, p.Addr()) || seen[p] || test.bits == 32 && (last == 0 || last == 3) {
				t.Fatalf("number %d is %v", i, p)
			}
			seen[p] = true
			a.Use(p)
		}
		if p, err := a.Free(test.rule); !errors.Is(err, ErrExhausted) {
			t.Errorf("one more: got %v, %v", p, err)
		}
		back := netip.MustParsePrefix(test.back)
		a.Release(back)
		if p, err := a.Free(test.rule); p != back {
			t.Errorf("got %v, %v, want %v", p, err, back)
		}
		a.Use(netip.MustParsePrefix("169.254.0.0/15"))
		if p, err := a.Free(test.rule); !errors.Is(err, ErrExhausted) {
			t.Errorf("got %v although all addresses are in use", p)
		}
	}
}

// TestFreeAvoidsUsedAndReserved adds and removes users at random, and compares the result with a
// search through all of them.
func TestFreeAvoidsUsedAndReserved(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	prefix := func(low, n int) netip.Prefix {
		a := netip.AddrFrom4([4]byte{169, 254, byte(low + r.IntN(n)), byte(r.IntN(256))})
		return netip.PrefixFrom(a, 24+r.IntN(9))
	}
	var a Account
	var used []netip.Prefix
	for range 3000 {
		if len(used) > 0 && r.IntN(2) == 0 {
			i := r.IntN(len(used))
			a.Release(used[i])
			used = slices.Delete(used, i, i+1)
		} else {
			used = append(used, prefix(62, 6))
			a.Use(used[len(used)-1])
		}
		rule := Rule{From: []netip.Prefix{Range}, Reserved: []netip.Prefix{prefix(64, 1).Masked(), prefix(64, 3).Masked()}, Single: r.IntN(2) == 0}
		var want netip.Prefix
		for block := netip.PrefixFrom(Range.Addr(), 30); !want.IsValid(); block = netip.PrefixFrom(block.Addr().Next().Next().Next().Next(), 30) {
			candidates := []netip.Prefix{block}
			if rule.Single {
				candidates = []netip.Prefix{netip.PrefixFrom(block.Addr().Next(), 32), netip.PrefixFrom(block.Addr().Next().Next(), 32)}
			}
			for _, p := range candidates {
				if !want.IsValid() && !slices.ContainsFunc(used, p.Overlaps) && !slices.ContainsFunc(rule.Reserved, block.Overlaps) {
					want = p
				}
			}
		}
		if got, err := a.Free(rule); got != want {
			t.Fatalf("got %v, %v, want %v", got, err, want)
		}
		if p := prefix(60, 10); (a.Users(p) > 0) != slices.ContainsFunc(used, p.Overlaps) {
			t.Fatalf("%v has %d users", p, a.Users(p))
		}
	}
}

func TestCheck(t *testing.T) {
	strict := Rule{From: []netip.Prefix{Range}, Only: true, Bits: []int{30, 32}, PeerFirst: true, Reserved: []netip.Prefix{netip.MustParsePrefix("169.254.5.0/30")}}
	single := Rule{Within: []netip.Prefix{netip.MustParsePrefix("169.254.21.0/24"), netip.MustParsePrefix("169.254.22.0/24")}}
	for _, test := range []struct {
		rule          Rule
		local, remote string
		want          string // beginning of the text
	}{
		{strict, "169.254.64.2/30", "169.254.64.1", ""},
		{strict, "169.254.64.2/32", "169.254.64.1", ""},
		{strict, "169.254.64.1/30", "169.254.64.2", "has 169.254.64.1 for this node"},
		{strict, "169.254.64.2/32", "169.254.64.5", "has 169.254.64.2 for this node"},
		{strict, "169.254.64.2/31", "169.254.64.3", "is a /31"},
		{strict, "169.254.5.2/30", "169.254.5.1", "has 169.254.5.2 from 169.254.5.0/30, which is reserved"},
		{strict, "10.0.0.2/30", "10.0.0.1", "has 10.0.0.2, which is not in 169.254.0.0/16"},
		{single, "169.254.21.1/32", "169.254.22.255", ""},
		{single, "10.0.0.2/32", "10.1.255.4", ""},
		{single, "169.254.23.1/32", "169.254.22.2", "has 169.254.23.1; of 169.254.0.0/16 only"},
		{single, "10.0.0.2/32", "169.254.20.255", "has 169.254.20.255; of"},
		{Default, "10.0.0.1/31", "10.0.0.0", ""},
	} {
		rule, remedy := test.rule.Check(netip.MustParsePrefix(test.local), netip.MustParseAddr(test.remote))
		if (rule == "") != (test.want == "") || !strings.HasPrefix(rule, test.want) || (rule == "") != (remedy == "") {
			t.Errorf("%s %s: got %q, %q, want %q", test.local, test.remote, rule, remedy, test.want)
		}
	}
}

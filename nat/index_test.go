package nat

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// TestIndexAgreesWithMatch asks both about random flows through random policies.
func TestIndexAgreesWithMatch(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	prefix := func(first byte) netip.Prefix {
		a := netip.AddrFrom4([4]byte{first, byte(r.IntN(3)), byte(r.IntN(3)), byte(r.IntN(3))})
		return netip.PrefixFrom(a, []int{0, 8, 15, 16, 24, 31, 32}[r.IntN(7)])
	}
	hits := 0
	for range 50 {
		c := Config{}
		for i := range 30 {
			p := snat(fmt.Sprint("p", i), []netip.Prefix{prefix(10)}, []netip.Prefix{prefix(198)}, []string{"", "tcp", "udp", "icmp"}[r.IntN(4)])
			if p.Protocol == "tcp" && r.IntN(2) == 0 {
				p.Ports = []PortRange{{uint16(r.IntN(5)), uint16(5 + r.IntN(5))}}
			}
			if r.IntN(5) == 0 {
				p.Sources, p.Destinations = pfx("2001:db8::/32"), nil
			}
			c.Policies = append(c.Policies, p)
		}
		for ties := Ties(rulesOf(t, &c)); len(ties) > 0; ties = Ties(rulesOf(t, &c)) {
			for i, p := range c.Policies {
				if p.Name == ties[0].B {
					c.Policies = append(c.Policies[:i:i], c.Policies[i+1:]...)
					break
				}
			}
		}
		x := c.Index()
		for range 300 {
			f := Flow{Source: prefix(10).Addr(), Destination: prefix(198).Addr(), Protocol: []uint8{TCP, UDP, ICMP, 47}[r.IntN(4)], Port: uint16(r.IntN(12))}
			if r.IntN(6) == 0 {
				f.Source, f.Destination = addr("2001:db8::7"), addr("2001:db9::1")
			}
			got := ""
			if p := x.Find(f); p != nil {
				got = p.Name
				hits++
			}
			if want := c.Match(f).Policy; got != want {
				t.Fatalf("%+v: %q, want %q", f, got, want)
			}
		}
	}
	if hits < 1000 {
		t.Errorf("only %d flows match", hits)
	}
}

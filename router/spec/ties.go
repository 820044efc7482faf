package spec

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/nat"
)

// ties finds policies with the same precedence for the same flow.
func (c *checker) ties() {
	config := nat.Config{Pools: c.s.Pools, Policies: placeNames(c.s.Policies)}
	rules, err := config.Rules()
	if err != nil {
		return // see bounded
	}
	ties := nat.Ties(rules)
	if len(ties) == 0 {
		return
	}
	index := make(map[string]int, len(c.s.Policies))
	for i := len(c.s.Policies) - 1; i >= 0; i-- {
		index[c.s.Policies[i].Name] = i
	}
	for _, t := range ties {
		first, second := index[t.A], index[t.B]
		if first > second {
			first, second = second, first
		}
		c.Problem(c.paths[second], c.s.Policies[second].Name, "decides the same flows as "+c.paths[first]+" ("+c.s.Policies[first].Name+")", "make one of them more exact, or remove it")
	}
}

// placeNames returns the policies with an address in place of each name, the same for the same
// name. This finds policies that tie for every address of a name. The addresses are from networks
// that are not valid destinations: 0.0.0.0/8 (RFC 1122 section 3.2.1.3) and 100::/64 (RFC 6666).
func placeNames(policies []nat.Policy) []nat.Policy {
	number := map[string]uint32{}
	out := slices.Clone(policies)
	for i := range out {
		p := &out[i]
		p.Destinations = slices.Clone(p.Destinations)
		for _, name := range p.Names {
			n, ok := number[name]
			if !ok {
				n = uint32(len(number)) + 1
				number[name] = n
			}
			four, six := [4]byte{}, [16]byte{0: 1}
			binary.BigEndian.PutUint32(four[:], n)
			binary.BigEndian.PutUint32(six[12:], n)
			p.Destinations = append(p.Destinations, netip.PrefixFrom(netip.AddrFrom4(four), 32), netip.PrefixFrom(netip.AddrFrom16(six), 128))
		}
	}
	return out
}

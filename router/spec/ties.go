package spec

import (
	"fmt"
	"net/netip"

	"github.com/isthmus-net/isthmus/nat"
)

// ties finds policies that could decide the same flow with equal right: the same destination, the same source, and
// equally exact about the protocol and port that both name.
func (c *checker) ties() {
	type claim struct {
		source, destination netip.Prefix // a zero destination is everything
		exact               int
		protocol            string
	}
	type holder struct {
		index int
		ports []nat.PortRange
	}
	claimed := map[claim][]holder{}
	for i, p := range c.s.Policies {
		destinations := p.Destinations
		if len(destinations) == 0 {
			destinations = []netip.Prefix{{}}
		}
		exact := 0
		if p.Protocol != "" {
			exact++
		}
		if len(p.Ports) > 0 {
			exact++
		}
		reported := map[int]bool{}
		for _, s := range p.Sources {
			for _, d := range destinations {
				if d.IsValid() && d.Bits() == 0 {
					d = netip.Prefix{} // written out, everything is still everything
				}
				key := claim{s, d, exact, p.Protocol}
				for _, h := range claimed[key] {
					if h.index != i && !reported[h.index] && portsMeet(h.ports, p.Ports) {
						reported[h.index] = true
						c.problem(c.paths[i], p.Name, fmt.Sprintf("decides the same flows as %s (%s), from %s", c.paths[h.index], c.s.Policies[h.index].Name, s), "make one of them more exact, or remove it")
					}
				}
				claimed[key] = append(claimed[key], holder{i, p.Ports})
			}
		}
	}
}

func portsMeet(a, b []nat.PortRange) bool {
	if len(a) == 0 && len(b) == 0 {
		return true
	}
	for _, x := range a {
		for _, y := range b {
			if x.First <= y.Last && y.First <= x.Last {
				return true
			}
		}
	}
	return false
}

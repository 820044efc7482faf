package spec

import (
	"slices"

	"github.com/isthmus-net/isthmus/nat"
)

// ties finds policies that would decide the same flow with equal right.
func (c *checker) ties() {
	index := func(name string) int {
		return slices.IndexFunc(c.s.Policies, func(p nat.Policy) bool { return p.Name == name })
	}
	config := nat.Config{Policies: c.s.Policies}
	for _, t := range nat.Ties(config.Rules()) {
		first, second := index(t.A), index(t.B)
		if first > second {
			first, second = second, first
		}
		c.Problem(c.paths[second], c.s.Policies[second].Name, "decides the same flows as "+c.paths[first]+" ("+c.s.Policies[first].Name+")", "make one of them more exact, or remove it")
	}
}

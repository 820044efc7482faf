package nat

import "net/netip"

// Index finds the rule that decides on a flow without looking at every one: it groups the rules by
// the lengths of their prefixes, and asks each group for the prefixes of the flow. It finds what
// Match finds.
type Index struct {
	groups []group
}

// group is rules of one precedence and family.
type group struct {
	source, destination int // prefix lengths
	ipv6                bool
	rules               map[[2]netip.Prefix][]Rule // by source and destination
}

// Index makes an index of the configuration's rules, an empty one when there are more than
// MaxRules. The configuration must not be changed while it is in use.
func (c *Config) Index() *Index {
	x := &Index{}
	rules, err := c.Rules()
	if err != nil {
		return x // which no driver carries out either
	}
	type key struct {
		source, destination, specificity int
		ipv6                             bool
	}
	at := map[key]int{}
	for _, r := range rules { // in the order of precedence, in which the groups stay
		k := key{r.Source.Bits(), r.Destination.Bits(), r.specificity(), r.Source.Addr().Is6()}
		i, ok := at[k]
		if !ok {
			i = len(x.groups)
			at[k] = i
			x.groups = append(x.groups, group{k.source, k.destination, k.ipv6, map[[2]netip.Prefix][]Rule{}})
		}
		pair := [2]netip.Prefix{r.Source, r.Destination}
		x.groups[i].rules[pair] = append(x.groups[i].rules[pair], r)
	}
	return x
}

// Find returns the policy that decides on a flow, nil when there is none.
func (x *Index) Find(f Flow) *Policy {
	for i := range x.groups {
		g := &x.groups[i]
		if g.ipv6 != f.Source.Is6() {
			continue
		}
		source, _ := f.Source.Prefix(g.source)
		destination, _ := f.Destination.Prefix(g.destination)
		for _, r := range g.rules[[2]netip.Prefix{source, destination}] {
			if r.Matches(f) {
				return r.Policy
			}
		}
	}
	return nil
}

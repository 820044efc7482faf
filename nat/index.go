package nat

import "net/netip"

// Index finds the rule for a flow without checking every one: it groups the rules by the lengths of
// their prefixes, and looks up the prefixes of the flow in each group. Its result is that of Match.
type Index struct {
	groups []group
}

// group is rules of one precedence and family.
type group struct {
	source, destination int // prefix lengths
	ipv6                bool
	rules               map[[2]netip.Prefix][]Rule // by source and destination
}

// Index makes an index of the configuration's rules, an empty one if there are more than MaxRules.
// The configuration must not be changed while the index is in use.
func (c *Config) Index() *Index {
	x := &Index{}
	rules, err := c.Rules()
	if err != nil {
		return x // which no driver applies either
	}
	type key struct {
		source, destination, specificity int
		ipv6                             bool
	}
	at := map[key]int{}
	for _, r := range rules { // in order of precedence, which the groups keep
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

// Find returns the policy for a flow, nil if none matches.
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

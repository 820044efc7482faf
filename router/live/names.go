package live

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
)

// Conflict is an address of a name that was assigned to another policy.
type Conflict struct {
	Address netip.Addr
	Policy  string // the policy that has the name
	Name    string
	// the policy that has the address; empty: its rules together with the others would exceed
	// nat.MaxRules
	Winner string
}

// Extend returns a configuration in which the addresses of names are destinations of their
// policies. It never makes two policies tie: an address that would cause a tie stays with the
// policy whose static destination it is, then with the policy that has a name without a wildcard,
// then with the longest wildcard, then with the first policy by name. An address of a name is not
// denied or rejected toward sources of another policy that has a static destination, other than
// everything, which contains it: otherwise the owner of a zone could block any address. c itself is
// not changed.
func Extend(c nat.Config, addresses func(name string) []netip.Addr) (nat.Config, []Conflict) {
	type claim struct {
		policy int
		name   string
	}
	var claims []claim
	for i, p := range c.Policies {
		for _, name := range p.Names {
			claims = append(claims, claim{i, name})
		}
	}
	if len(claims) == 0 {
		return c, nil
	}
	slices.SortStableFunc(claims, func(a, b claim) int {
		return cmp.Or(cmp.Compare(vagueness(a.name), vagueness(b.name)), cmp.Compare(c.Policies[a.policy].Name, c.Policies[b.policy].Name), cmp.Compare(a.name, b.name))
	})

	// Only policies with the very same destination can tie.
	holders := map[netip.Prefix][]int{}
	for _, k := range claims {
		for _, a := range addresses(k.name) {
			holders[netip.PrefixFrom(a, a.BitLen())] = nil
		}
	}
	for i := range c.Policies {
		p := &c.Policies[i]
		destinations := p.Destinations
		if p.Action == nat.DNAT {
			destinations = p.Opens(c.Pool(p.Pool))
		}
		for _, d := range destinations {
			if _, ok := holders[d]; ok {
				holders[d] = append(holders[d], i)
			}
		}
	}
	static := map[netip.Prefix][]int{} // policies that let pass, by their destinations
	for i := range c.Policies {
		if p := &c.Policies[i]; p.Action != nat.Deny && p.Action != nat.Reject && p.Action != nat.DNAT {
			for _, d := range p.Destinations {
				if d.Bits() > 0 {
					static[d.Masked()] = append(static[d.Masked()], i)
				}
			}
		}
	}
	// shields returns the policy whose static destination an address is in, -1 when there is none.
	shields := func(p *nat.Policy, a netip.Addr) int {
		if p.Action != nat.Deny && p.Action != nat.Reject {
			return -1
		}
		for bits := a.BitLen(); bits > 0 && len(static) > 0; bits-- {
			in, _ := a.Prefix(bits)
			for _, i := range static[in] {
				if slices.ContainsFunc(p.Sources, func(s netip.Prefix) bool { return slices.ContainsFunc(c.Policies[i].Sources, s.Overlaps) }) {
					return i
				}
			}
		}
		return -1
	}
	out := c
	out.Policies = slices.Clone(c.Policies)
	for i := range out.Policies {
		if len(out.Policies[i].Names) > 0 {
			out.Policies[i].Destinations = slices.Clone(out.Policies[i].Destinations)
		}
	}
	var conflicts []Conflict
	// The name servers of a zone must not cause more rules than a document may have.
	_, rules := out.CountRules()
	// rules for one more IPv4 address, and for one more IPv6 address
	each := make([]int, len(out.Policies))
	each = append(each, each...)
	for i := range out.Policies {
		p := out.Policies[i]
		if len(p.Names) == 0 {
			continue
		}
		for family, a := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			p.Destinations = []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
			one, _ := (&nat.Config{Policies: []nat.Policy{p}}).CountRules()
			each[family*len(out.Policies)+i] = one[0]
		}
	}
	for _, k := range claims {
		mine := &out.Policies[k.policy]
		for _, a := range addresses(k.name) {
			dst := netip.PrefixFrom(a, a.BitLen())
			if slices.Contains(holders[dst], k.policy) {
				continue
			}
			if i := shields(mine, a); i >= 0 {
				conflicts = append(conflicts, Conflict{a, mine.Name, k.name, c.Policies[i].Name})
				continue
			}
			winner := slices.IndexFunc(holders[dst], func(other int) bool { return tie(*mine, c.Policies[other], dst) })
			if winner >= 0 {
				conflicts = append(conflicts, Conflict{a, mine.Name, k.name, c.Policies[holders[dst][winner]].Name})
				continue
			}
			more := each[k.policy]
			if a.Is6() {
				more = each[len(out.Policies)+k.policy]
			}
			if more > nat.MaxRules-rules {
				conflicts = append(conflicts, Conflict{Address: a, Policy: mine.Name, Name: k.name})
				continue
			}
			rules += more
			mine.Destinations = append(mine.Destinations, dst)
			holders[dst] = append(holders[dst], k.policy)
		}
	}
	for i := range out.Policies {
		// The order must not depend on which name was resolved first.
		if len(out.Policies[i].Names) > 0 {
			slices.SortFunc(out.Policies[i].Destinations, netip.Prefix.Compare)
		}
	}
	return out, conflicts
}

// vagueness orders names, the most exact first: names without a wildcard, then longer wildcards
// before shorter ones.
func vagueness(name string) int {
	if egress.IsWildcard(name) {
		return 256 - len(name)
	}
	return 0
}

// tie reports whether two policies match the same flows to a destination with equal rank.
func tie(a, b nat.Policy, dst netip.Prefix) bool {
	a.Destinations, b.Destinations = []netip.Prefix{dst}, []netip.Prefix{dst}
	if b.Action == nat.DNAT { // whose pool is not here
		b.Action = nat.Deny
	}
	c := nat.Config{Policies: []nat.Policy{a, b}}
	rules, err := c.Rules()
	return err != nil || len(nat.Ties(rules)) > 0
}

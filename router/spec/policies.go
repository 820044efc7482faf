package spec

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
)

func (c *checker) policy(path string, p *isthmusv1.EgressPolicy) {
	c.Name("policy", path+".name", p.GetName())
	c.paths = append(c.paths, path)
	out := nat.Policy{Name: p.GetName(), Action: nat.Action(p.GetAction()), Protocol: p.GetProtocol(), Pool: p.GetPool()}
	if out.Action == "" {
		out.Action = nat.SNAT
	}
	list := func(field string, texts []string) (prefixes []netip.Prefix) {
		listed := make(map[netip.Prefix]bool, len(texts))
		for i, text := range texts {
			at := fmt.Sprintf("%s.%s[%d]", path, field, i)
			if pfx, ok := c.Prefix(at, text); ok {
				if listed[pfx] {
					c.Problem(at, text, "is listed twice", "keep one of them")
					continue
				}
				listed[pfx] = true
				prefixes = append(prefixes, pfx)
			}
		}
		return prefixes
	}
	if len(p.GetSources()) == 0 {
		c.Missing(path+".sources", "give the prefixes whose flows it decides")
	}
	out.Sources = list("sources", p.GetSources())
	out.Destinations = list("destinations", p.GetDestinations())
	out.Names = c.domains(path+".names", p.GetNames())
	if _, known := nat.PolicyProtocol(out.Protocol, false); !known {
		c.Problem(path+".protocol", out.Protocol, "is not a valid protocol of a policy", `give "tcp", "udp" or "icmp", or leave it out`)
	}
	var places []int // of the valid ranges, in the list
	for i, text := range p.GetPorts() {
		at := fmt.Sprintf("%s.ports[%d]", path, i)
		first, last, ranged := strings.Cut(text, "-")
		if !ranged {
			last = first
		}
		a, errA := strconv.ParseUint(first, 10, 16)
		b, errB := strconv.ParseUint(last, 10, 16)
		if errA != nil || errB != nil || a == 0 || a > b {
			c.Problem(at, text, "is not a port or range of ports", `write it as "443" or "8000-8099"`)
			continue
		}
		r := nat.PortRange{First: uint16(a), Last: uint16(b)}
		out.Ports, places = append(out.Ports, r), append(places, i)
	}
	for _, i := range portOverlaps(out.Ports) {
		c.Problem(fmt.Sprintf("%s.ports[%d]", path, places[i]), p.GetPorts()[places[i]], "overlaps another range of the list", "write each port once")
	}
	if len(out.Ports) > 0 && !nat.TakesPorts(out.Protocol) {
		c.Problem(path+".ports", strings.Join(p.GetPorts()[:min(len(p.GetPorts()), maxShown)], ","), "needs a protocol with ports", `set protocol to "tcp" or "udp"`)
	}
	c.action(path, p, &out)
	c.s.Policies = append(c.s.Policies, out)
}

// domains checks the names of a policy.
func (c *checker) domains(path string, list []string) (out []string) {
	listed := map[string]bool{}
	for i, text := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		name, err := egress.ParseName(text)
		switch {
		case err != nil && strings.Contains(err.Error(), "address"):
			c.Problem(at, text, err.Error(), "write it in `destinations`")
			continue
		case err != nil:
			c.Problem(at, text, err.Error(), `write it as "api.partner.example" or "*.partner.example"`)
			continue
		case egress.IsWildcard(name) && !c.proxy:
			c.Problem(at, text, "is a wildcard, which only the DNS proxy can resolve", "set `egress.dnsProxy`, or name each name")
		case listed[name]:
			c.Problem(at, text, "is listed twice", "keep one of them")
			continue
		}
		listed[name] = true
		out = append(out, name)
		if c.domainNames[name] = true; len(c.domainNames) == maxNames+1 {
			c.Problem(at, text, "is one name more than 1000", "use prefixes, or wildcards")
		}
	}
	return out
}

// portOverlaps returns the places of ranges that overlap a former one of the list.
func portOverlaps(ports []nat.PortRange) (out []int) {
	order := make([]int, len(ports))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(ports[a].First, ports[b].First), cmp.Compare(a, b))
	})
	late := make([]bool, len(ports))
	for n := 1; n < len(order); n++ {
		// before is the range that ends last among those that begin earlier.
		before, i := order[n-1], order[n]
		if ports[before].Last >= ports[i].First {
			late[max(before, i)] = true
		}
		if ports[before].Last > ports[i].Last {
			order[n] = before
		}
	}
	for i, l := range late {
		if l {
			out = append(out, i)
		}
	}
	return out
}

// countRules returns the number of rules of each policy, and of all.
func (c *checker) countRules(policies []nat.Policy) (each []int, all int) {
	config := nat.Config{Pools: c.s.Pools, Policies: placeNames(policies)}
	return config.CountRules()
}

// bounded finds the policies that make more rules than a document may have, alone or with those
// before them. others is the number of rules of other policies. It returns true if it finds
// none: only then may rules be made.
func (c *checker) bounded(policies []nat.Policy, paths []string, others int) bool {
	each, all := c.countRules(policies)
	c.s.rules = min(all, math.MaxInt-others) + others
	if c.s.rules <= nat.MaxRules {
		return true
	}
	const remedy = "write fewer and larger prefixes or ranges of ports, or split it between nodes"
	sum := others
	for i, n := range each {
		rule := fmt.Sprintf("makes %d rules, one for each source, destination and range of ports, ", n)
		if n > nat.MaxRules {
			c.Problem(paths[i], policies[i].Name, rule+fmt.Sprintf("and all policies may make %d", nat.MaxRules), remedy)
		} else if sum += n; sum > nat.MaxRules {
			c.Problem(paths[i], policies[i].Name, rule+fmt.Sprintf("which are with the others more than %d", nat.MaxRules), remedy)
			break
		}
	}
	return false
}

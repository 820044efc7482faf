package spec

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/nat"
)

// A document must cost what its length costs: a short one can ask for the product of its lists. Most of what is compared with each other is
// looked up or sorted; for the rest the steps are counted.
const (
	// maxSteps is how many comparisons a check makes, which takes about a second. Without products, a text that Fits needs less.
	maxSteps = 1 << 27
	// maxTunnels is how many numbers the ledger has for tunnels.
	maxTunnels = 9999
	// maxMaps, maxPoolAddresses and maxPeers bound what is compared with each other when a plan is made and carried out.
	maxMaps          = 4096
	maxPoolAddresses = 4096
	maxPeers         = 20_000
)

// limited returns how many items of a list are looked at, and records when that is not all.
func (c *checker) limited(path string, n, most int) int {
	if n > most {
		c.Problem(path, fmt.Sprint(n), fmt.Sprintf("are more than %d", most), "keep at most as many, or use another node")
		return most
	}
	return n
}

// spend counts steps that are about to be made, and returns false when they are too many or the caller has given up: then they must not
// be made. The first time too many are asked for, it is a problem of the document.
func (c *checker) spend(steps int) bool {
	if c.tired || c.ctx != nil && c.ctx.Err() != nil {
		return false
	}
	if steps > maxSteps-c.steps {
		c.tired = true
		c.Problem("", "", fmt.Sprintf("takes more than %d comparisons to check", maxSteps), "write a document with fewer and larger prefixes, or shorter lists")
		return false
	}
	c.steps += steps
	return true
}

// CheckWithin is Check for a caller that may give up: it ends soon after ctx is done, with the error of ctx.
func CheckWithin(ctx context.Context, d Document, secrets Secrets) (*Spec, Problems, error) {
	c := newChecker(d, secrets)
	c.ctx = ctx
	c.document(d)
	if err := ctx.Err(); err != nil {
		return nil, nil, fmt.Errorf("checking the document: %w", err)
	}
	return &c.s, c.Problems(), nil
}

// overlaps finds, for each prefix of a list, another one that it overlaps, and calls found with the places of both, the later one
// first. It does not find every pair: that many may be there as the square of the list. shared says which equal prefixes may be there
// more than once with each other; nil: none.
func overlaps(list []placed, shared func(placed) bool, found func(later, earlier int)) {
	order := make([]int, len(list))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		p, q := list[a].prefix, list[b].prefix
		return cmp.Or(p.Addr().Compare(q.Addr()), cmp.Compare(p.Bits(), q.Bits()), cmp.Compare(a, b))
	})
	// group is equal prefixes: the first of those that may be shared, and of the others; -1: none.
	type group struct {
		prefix       netip.Prefix
		shared, sole int
	}
	first := func(g group) int {
		if g.shared >= 0 && (g.sole < 0 || g.shared < g.sole) {
			return g.shared
		}
		return g.sole
	}
	tell := func(a, b int) { found(max(a, b), min(a, b)) }
	var within []group // each contains the next
	for _, i := range order {
		p := list[i].prefix
		for len(within) > 0 && !within[len(within)-1].prefix.Contains(p.Addr()) {
			within = within[:len(within)-1]
		}
		alone := shared == nil || !shared(list[i])
		if n := len(within); n == 0 || within[n-1].prefix != p {
			within = append(within, group{p, -1, -1})
		}
		g := &within[len(within)-1]
		switch {
		case alone && first(*g) >= 0:
			tell(i, first(*g))
		case !alone && g.sole >= 0:
			tell(i, g.sole)
		}
		if n := len(within); n > 1 {
			tell(i, first(within[n-2]))
		}
		if alone && g.sole < 0 {
			g.sole = i
		} else if !alone && g.shared < 0 {
			g.shared = i
		}
	}
}

// insideOf returns the inside prefix that holds an address, and its path; false when there is none.
func (c *checker) insideOf(a netip.Addr) (placed, bool) {
	if c.insideAt == nil {
		c.insideAt = make(map[netip.Prefix]string, len(c.inside))
		for _, in := range c.inside {
			if _, ok := c.insideAt[in.prefix]; !ok {
				c.insideAt[in.prefix] = in.path
			}
		}
	}
	for bits := a.BitLen() - 2; bits <= a.BitLen(); bits++ { // see insidePair
		p, err := a.Prefix(bits)
		if path, ok := c.insideAt[p]; err == nil && ok {
			return placed{p, path}, true
		}
	}
	return placed{}, false
}

// poolFacts is what policies ask of a pool.
type poolFacts struct {
	pool  *nat.Pool
	has   [2]bool // addresses of IPv4, and of IPv6
	known map[netip.Addr]bool
}

// poolNamed returns the facts of a pool of the document; false when there is none of that name.
func (c *checker) poolNamed(name string) (*poolFacts, bool) {
	if c.pools == nil {
		c.pools = make(map[string]*poolFacts, len(c.s.Pools))
		for i := range c.s.Pools {
			p := &c.s.Pools[i]
			if c.pools[p.Name] != nil {
				continue
			}
			f := &poolFacts{pool: p, known: map[netip.Addr]bool{}}
			for _, a := range p.Addresses {
				f.known[a.Address], f.known[a.Public] = true, true
				if a.Address.Is4() {
					f.has[0] = true
				} else {
					f.has[1] = true
				}
			}
			c.pools[p.Name] = f
		}
	}
	f, ok := c.pools[name]
	return f, ok
}

// hasFamily says whether the pool has an address of the family of a.
func (f *poolFacts) hasFamily(a netip.Addr) bool {
	if a.Is4() {
		return f.has[0]
	}
	return f.has[1]
}

// countRules returns how many rules each of some policies makes, and all together.
func (c *checker) countRules(policies []nat.Policy) (each []int, all int) {
	config := nat.Config{Pools: c.s.Pools, Policies: placeNames(policies)}
	return config.CountRules()
}

// bounded finds the policies that make more rules than a document may have, alone or with those before them. others is how many rules
// there are beside theirs. It says whether there are none: then rules may be made.
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

// portOverlaps returns the places of ranges that overlap one before them in the list.
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
		// before is the one that reaches furthest of those that begin before.
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

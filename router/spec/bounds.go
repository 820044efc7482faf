package spec

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// The cost of a check must grow with the length of the document, not with the product of its lists.
// Most comparisons use maps or sorted lists; the others are counted as steps.
const (
	// maxSteps bounds the comparisons of a check to about a second. Without products, a text that
	// Fits needs fewer.
	maxSteps = 1 << 27
	// maxTunnels is the number of tunnel IDs of the ledger.
	maxTunnels = 9999
	// maxLinks bounds the links to other nodes.
	maxLinks = 64
	// maxMaps, maxPoolAddresses and maxPeers bound the comparisons of planning and applying.
	maxMaps          = 4096
	maxPoolAddresses = 4096
	maxPeers         = 20_000
)

// limited returns how many items of a list to check, and records a problem when that is not all.
func (c *checker) limited(path string, n, most int) int {
	if n > most {
		c.Problem(path, fmt.Sprint(n), fmt.Sprintf("are more than %d", most), "keep at most as many, or use another node")
		return most
	}
	return n
}

// spend counts steps before they are made. It returns false when they are too many or ctx is done:
// the caller must not make them then. The first excess is a problem of the document.
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

// overlaps finds for each prefix of a list another one that it overlaps, and calls found with the
// places of both, the later one first. It does not find every pair: their number grows with the
// square of the list. shared reports which prefixes may equal each other; nil: none.
func overlaps(list []placed, shared func(placed) bool, found func(later, earlier int)) {
	order := make([]int, len(list))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		p, q := list[a].prefix, list[b].prefix
		return cmp.Or(p.Addr().Compare(q.Addr()), cmp.Compare(p.Bits(), q.Bits()), cmp.Compare(a, b))
	})
	// group stands for equal prefixes: the first of those that may be shared, and of the others;
	// -1: none.
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
	pair := func(a, b int) { found(max(a, b), min(a, b)) }
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
			pair(i, first(*g))
		case !alone && g.sole >= 0:
			pair(i, g.sole)
		}
		if n := len(within); n > 1 {
			pair(i, first(within[n-2]))
		}
		if alone && g.sole < 0 {
			g.sole = i
		} else if !alone && g.shared < 0 {
			g.shared = i
		}
	}
}

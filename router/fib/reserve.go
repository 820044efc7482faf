package fib

import (
	"cmp"
	"net/netip"
	"slices"
)

// SetReserved sets the keys that routes must not divert from the node: the outside addresses of the
// tunnels' peers, because a route that covers one would draw encrypted packets into a tunnel; what
// the platform serves; the node's own networks. Such a route is withheld from the kernel. Default
// routes (of length 0) are not: by Metric they lose against the underlay's.
func (t *Table) SetReserved(all []Reserved) {
	all = slices.Clone(all)
	slices.SortFunc(all, func(a, b Reserved) int {
		return cmp.Or(a.Key.Compare(b.Key), cmp.Compare(a.Own, b.Own), cmp.Compare(a.Why, b.Why))
	})
	if slices.Equal(t.reservations, all) {
		return
	}
	t.reservations, t.reserved = all, newReserve(all)
	for k := range t.routes {
		t.withhold(k)
	}
}

// withholds reports whether the route of a key must not be in the kernel.
func (t *Table) withholds(k Key) bool { return t.reserved.taken(k) != nil && !t.own[k] }

// withhold decides again whether the route of a key, if there is one, must not be in the kernel.
func (t *Table) withhold(k Key) {
	if e := t.routes[k]; e != nil {
		before := e.winner()
		e.withheld = t.withholds(k)
		t.update(k, e, before)
	}
}

// reserve finds what a route would divert, by domain: see Reserved.
type reserve map[Domain]*domainReserve

type domainReserve struct {
	within  map[netip.Prefix]*Reserved
	lengths [2][129]bool // of within
	covered []*Reserved  // ascending
}

// newReserve makes a reserve of a sorted list.
func newReserve(all []Reserved) reserve {
	out := reserve{}
	for i := range all {
		r := &all[i]
		d := out[r.Key.Domain]
		if d == nil {
			d = &domainReserve{within: map[netip.Prefix]*Reserved{}}
			out[r.Key.Domain] = d
		}
		p := r.Key.Prefix.Masked()
		if d.within[p] == nil {
			d.within[p] = r
		}
		d.lengths[familyOf(p)][p.Bits()] = true
		if r.Covered {
			d.covered = append(d.covered, r)
		}
	}
	return out
}

// familyOf returns 0 for IPv4 and 1 for IPv6.
func familyOf(p netip.Prefix) int {
	if p.Addr().Is6() {
		return 1
	}
	return 0
}

// taken returns what a route would divert, nil for nothing.
func (r reserve) taken(k Key) *Reserved {
	p, d := k.Prefix, r[k.Domain]
	if p.Bits() == 0 || d == nil {
		return nil
	}
	six := familyOf(p)
	for bits := 0; bits <= p.Bits(); bits++ {
		if !d.lengths[six][bits] {
			continue
		}
		q, _ := p.Addr().Prefix(bits)
		if found := d.within[q]; found != nil {
			return found
		}
	}
	// The addresses of a prefix sort directly behind its first one.
	i, _ := slices.BinarySearchFunc(d.covered, p.Addr(), func(r *Reserved, a netip.Addr) int { return r.Key.Prefix.Addr().Compare(a) })
	for ; i < len(d.covered) && p.Contains(d.covered[i].Key.Prefix.Addr()); i++ {
		if p.Bits() > d.covered[i].Own {
			return d.covered[i]
		}
	}
	return nil
}

package gobgp

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// gatherAdmission is how long paths are gathered before the prefixes of limited peers are chosen
// again.
const gatherAdmission = 50 * time.Millisecond

// limited reports whether the rules could let more prefixes pass than the peer may get. GoBGP
// announces a path as soon as it arrives and cannot count announcements. Therefore GoBGP never
// gets the rules of such a peer, but a list of the prefixes that they let pass, cut to the limit.
func limited(e bgp.Export) bool {
	n := 0.0
	for _, r := range e.Allow {
		n += r.Capacity()
	}
	return e.MaxPrefixes > 0 && n > float64(e.MaxPrefixes)
}

// exactly returns rules that match the prefixes and no other.
func exactly(prefixes []netip.Prefix) []bgp.Rule {
	rules := make([]bgp.Rule, len(prefixes))
	for i, p := range prefixes {
		rules[i] = bgp.Rule{Prefix: p, Min: uint8(p.Bits()), Max: uint8(p.Bits())}
	}
	return rules
}

// admit chooses the prefixes of each limited peer. The node's own prefixes come first, since the
// user configured them and may mean them as aggregates; then short prefixes, which cover more;
// then low addresses.
func (r *rib) admit() map[string][]netip.Prefix {
	r.readmit = false
	out := make(map[string][]netip.Prefix)
	for _, p := range r.peers {
		all, ok := r.limited[p.Name]
		if !ok {
			continue
		}
		own := func(p netip.Prefix) int {
			if r.announce[p] {
				return 0
			}
			return 1
		}
		list := slices.SortedFunc(maps.Keys(all), func(a, b netip.Prefix) int {
			return cmp.Or(cmp.Compare(own(a), own(b)), cmp.Compare(a.Bits(), b.Bits()), a.Addr().Compare(b.Addr()))
		})
		out[p.Name] = list[:min(len(list), int(p.Export.MaxPrefixes))]
	}
	return out
}

// readmit reports whether a limited peer must get other prefixes than it has.
func (d *Driver) readmit() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.rib.readmit && !maps.EqualFunc(d.admitted, d.rib.admit(), slices.Equal)
}

// shrinkLocked removes from the admitted prefixes those that their peer must lose, and reports
// whether the removal must be sent before new ones are added.
func (d *Driver) shrinkLocked() (leaving bool) {
	next := d.rib.admit()
	for name, has := range d.admitted {
		wanted := make(map[netip.Prefix]bool)
		for _, p := range next[name] {
			wanted[p] = true
		}
		kept := slices.DeleteFunc(slices.Clone(has), func(p netip.Prefix) bool { return !wanted[p] })
		leaving = leaving || len(kept) < len(has) && len(kept) < len(wanted)
		d.admitted[name] = kept
	}
	return leaving
}

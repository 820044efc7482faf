package gobgp

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// gatherAdmission is how long paths wait for others before limited peers are told of them.
const gatherAdmission = 50 * time.Millisecond

// limited reports whether the rules could let out more than the peer may be told. GoBGP announces a path as soon as it
// comes and cannot count what it announces, so that such a peer is never given the rules: it is given the list of what
// they let out, cut to size.
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

// admit chooses what each limited peer is told: the node's own prefixes come first, since the user wrote them and may
// have meant them as aggregates, then short ones, which say more, then low addresses.
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

// readmit reports whether a limited peer is to be told something else than it is.
func (d *Driver) readmit() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.rib.readmit && !maps.EqualFunc(d.admitted, d.rib.admit(), slices.Equal)
}

// shrinkLocked takes out of what the peers are told what they shall not be told any longer, and reports whether that
// has to be sent before what comes in its place.
func (d *Driver) shrinkLocked() (leaving bool) {
	next := d.rib.admit()
	for name, told := range d.admitted {
		wanted := make(map[netip.Prefix]bool)
		for _, p := range next[name] {
			wanted[p] = true
		}
		kept := slices.DeleteFunc(slices.Clone(told), func(p netip.Prefix) bool { return !wanted[p] })
		leaving = leaving || len(kept) < len(told) && len(kept) < len(wanted)
		d.admitted[name] = kept
	}
	return leaving
}

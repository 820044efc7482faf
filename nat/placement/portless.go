package placement

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// Two flows of a protocol without ports from one address to one destination are indistinguishable.
// The kernel drops the second one, so its source is moved to an address that no other source uses
// toward that destination.

// wanted is how long a source is assumed to keep trying.
const wanted = 30 * time.Second

// wish is a flow without ports that a source is trying to begin.
type wish struct {
	pair
	protocol uint8
}

// at returns the spot of a wish under an address.
func (w wish) at(a netip.Addr) spot {
	return spot{w.pool, a, nat.Service{Destination: w.destination, Protocol: w.protocol}}
}

// want records that a source has tried to begin flows.
func (b *Book) want(u nat.Use, n uint64, now time.Time) {
	w := wish{pair{u.Pool, u.Source, u.Destination}, u.Protocol}
	if _, known := b.wants[w]; n > 0 && (known || len(b.wants) < maxPlacements) {
		b.wants[w] = now
	}
}

// hold records the addresses that sources use exclusively.
func (b *Book) hold(list []Holding, now time.Time) {
	b.whole, b.looked = make(map[spot]netip.Addr, len(list)), b.tried
	for _, h := range list {
		pool := b.pools[h.Address]
		if pool == "" {
			continue
		}
		b.whole[spot{pool, h.Address, h.Service}] = h.Source
		p := pair{pool, h.Source, h.Destination}
		delete(b.wants, wish{p, h.Protocol})
		if at := b.placed[p]; at != nil {
			at.needed = now
		}
	}
	maps.DeleteFunc(b.wants, func(_ wish, at time.Time) bool { return now.Sub(at) >= wanted })
}

// taken reports whether every address that a service may use is held by some source.
func (b *Book) taken(e nat.Exhausted) bool {
	usable := b.usable(e.Pool, e.Destination)
	return len(usable) > 0 && !slices.ContainsFunc(usable, func(a nat.PoolAddress) bool {
		_, held := b.whole[spot{e.Pool, a.Address, e.Service}]
		return !held
	})
}

// movePortless moves sources that are trying to begin flows without ports from an address that
// another source holds, and records which services are exhausted.
func (b *Book) movePortless(now time.Time) {
	if len(b.wants) == 0 {
		return
	}
	given := maps.Clone(b.whole)
	free := func(w wish, a netip.Addr) bool {
		who, held := given[w.at(a)]
		return !held || who == w.source
	}
	wishes := slices.SortedFunc(maps.Keys(b.wants), func(v, w wish) int {
		return cmp.Or(cmp.Compare(v.pool, w.pool), v.destination.Compare(w.destination), cmp.Compare(v.protocol, w.protocol), v.source.Compare(w.source))
	})
	for _, w := range wishes {
		pool, here := b.config.Pool(w.pool), b.address(w.pair)
		if pool.Blocks != nil || !here.IsValid() {
			delete(b.wants, w)
			continue
		}
		// Other flows of the source to this destination keep their address, whatever new flows
		// get.
		if !free(w, here) {
			to := netip.Addr{}
			for _, zone := range []string{b.config.Zone(w.source), ""} {
				for _, a := range pool.Usable(w.source.Is6(), zone) {
					if !to.IsValid() && free(w, a.Address) {
						to = a.Address
					}
				}
			}
			at := b.placed[w.pair]
			switch {
			case !to.IsValid():
				if e := (nat.Exhausted{Pool: w.pool, Service: w.at(here).Service}); b.taken(e) {
					b.full[e] = true
				}
				continue
			case at == nil && len(b.placed) >= maxPlacements:
				b.overflow = true
				continue
			case at == nil:
				at = &placed{}
				b.placed[w.pair] = at
			}
			at.former, at.address, at.needed = here, to, now
			here = to
		}
		given[w.at(here)] = w.source
	}
}

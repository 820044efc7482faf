package placement

import (
	"maps"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// Census is the content of the connection table.
type Census struct {
	Flows map[Holding]uint32 // TCP and UDP only
	// Portless are flows of protocols without ports. Each has exclusive use of its address toward
	// its destination.
	Portless []Holding
	// Entries is the number of all entries, Assured of those that the kernel does not evict early
	// when the table is full.
	Entries, Assured uint32
}

// WantsCensus reports whether the counts are too old, or an upper bound has reached a value at
// which its accuracy matters. cost is how long the last census took.
func (b *Book) WantsCensus(now time.Time, entries, limit uint32, cost time.Duration) bool {
	age := now.Sub(b.censusAt)
	// after reports whether a census is due, given its share of CPU time.
	after := func(least time.Duration, costs int) bool { return age >= max(least, time.Duration(costs)*cost) }
	if b.censusAt.IsZero() || b.tried != b.looked && after(100*time.Millisecond, 5) {
		return true
	}
	for _, c := range b.spots {
		switch grown := c.bound > uint64(c.exact); {
		case !grown:
		case c.likely+last >= Ports && c.exact < spent && after(200*time.Millisecond, 2),
			(c.bound >= spill && c.exact < spill || c.bound >= alarm && !c.alarm) && after(100*time.Millisecond, 5),
			c.bound >= spill && after(time.Second, 10):
			return true
		}
	}
	tableFull := limit > 0 && float64(entries) >= tableFull*float64(limit)
	return b.unknown > last && after(100*time.Millisecond, 5) ||
		(tableFull || len(b.full) > 0) && after(time.Second, 10) ||
		(b.unread() > 0 || len(b.spots) > 0) && after(30*time.Second, 100)
}

// Census replaces every bound by the exact count. The meter must have been read just before.
func (b *Book) Census(c Census, now time.Time) {
	elapsed := now.Sub(b.censusAt).Seconds()
	spots := map[spot]*count{}
	for h, n := range c.Flows {
		pool := b.pools[h.Address]
		if pool == "" {
			continue
		}
		s := spot{pool, h.Address, h.Service}
		if spots[s] == nil {
			spots[s] = &count{}
		}
		spots[s].exact += n
		spots[s].bound += uint64(n)
		spots[s].likely += uint64(n)
		if at := b.placed[pair{pool, h.Source, h.Destination}]; at != nil {
			at.needed = now
		}
	}
	for s, k := range spots {
		was := b.spots[s]
		if was == nil {
			continue
		}
		k.alarm = was.alarm && k.exact >= calm
		if elapsed > 0 && !b.censusAt.IsZero() {
			// Half of it comes from this interval, so that a single burst does not determine the
			// forecast.
			k.rising = k.exact > was.exact
			k.growth = was.growth/2 + (float64(k.exact)-float64(was.exact))/elapsed/2
		}
	}
	for _, k := range spots {
		k.alarm = k.alarm || k.exact >= alarm
	}
	many := map[place]bool{} // with an empty address
	for s, k := range spots {
		if k.exact >= spill {
			many[place{pool: s.pool, destination: s.Destination}] = true
		}
	}
	b.hold(c.Portless, now)
	b.known = map[pair]bool{}
	for h := range c.Flows {
		if pool := b.pools[h.Address]; many[place{pool: pool, destination: h.Destination}] {
			b.known[pair{pool, h.Source, h.Destination}] = true
		}
	}
	for p := range b.recent {
		if at := b.placed[p]; at != nil {
			at.needed = now
		}
	}
	b.spots, b.unknown, b.censusAt = spots, 0, now
	b.entries, b.assured = c.Entries, c.Assured
	b.drop(func(_ pair, at *placed) bool { return now.Sub(at.needed) >= idle })
	b.relieve()
	b.forget()
	b.bound()
}

// forget drops the numbers of refused packets to services that nothing uses and nothing refuses any
// more: sources can name any number of services.
func (b *Book) forget() {
	if len(b.refused) == 0 {
		return
	}
	used := map[nat.Service]bool{}
	for s := range b.spots {
		used[s.Service] = true
	}
	for s := range b.whole {
		used[s.Service] = true
	}
	for e := range b.full {
		used[e.Service] = true
	}
	maps.DeleteFunc(b.refused, func(s nat.Service, _ uint64) bool { return !used[s] })
}

// relieve ends the exhaustion of services that have free ports again, or no address at all.
func (b *Book) relieve() {
	maps.DeleteFunc(b.full, func(e nat.Exhausted, _ bool) bool {
		if nat.Portless(e.Protocol) {
			return !b.taken(e)
		}
		return len(b.usable(e.Pool, e.Destination)) == 0 || !b.everywhere(e, func(c *count) bool { return c.exact >= freed })
	})
}

// everywhere reports whether a condition holds for a service at all addresses that it may use.
func (b *Book) everywhere(e nat.Exhausted, is func(*count) bool) bool {
	for _, a := range b.usable(e.Pool, e.Destination) {
		if c := b.spots[spot{e.Pool, a.Address, e.Service}]; c == nil || !is(c) {
			return false
		}
	}
	return true
}

// Package placement decides which address flows get when the ports of an address run out, and what
// is refused when they have run out everywhere. It is pure: the caller reads the kernel, and
// applies the decisions.
//
// A census gives the exact number of ports in use. It takes a walk through all flows, so it is
// rare. Between censuses, the kernel counts flows that begin, but not those that end. Therefore
// the count at the census plus the flows that have begun since is an upper bound.
package placement

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// Ports is the number of flows to one service for which an address has ports: the kernel
// translates to ports from 1024 to 65535.
const Ports = 65536 - 1024

const (
	// spill is the number of ports in use from which on new flows are moved. It leaves time to
	// move them before an address is 85 % full, from where on the kernel often finds no port at
	// its first attempt.
	spill = Ports * 75 / 100
	// alarm begins an alarm of a use, calm ends it.
	alarm = Ports * 85 / 100
	calm  = Ports * 75 / 100
	// nearFull is the number from which on a source prefers an address of another zone.
	nearFull = alarm
	// margin is by how many ports in use another address must have less for a move to be
	// worthwhile.
	margin = Ports * 2 / 100
	// A service is exhausted when a census finds spent ports in use and so many flows have begun
	// since that no more than last ports can be left, which the kernel hardly ever finds. It is no
	// longer exhausted when a census finds less than freed.
	spent = Ports * 99 / 100
	last  = Ports / 1000
	freed = Ports * 98 / 100

	// horizon is for how many seconds the current rate of new flows is extrapolated when several
	// sources are moved at once. A longer one would treat an address as full that is still far
	// from it.
	horizon = 1
	// idle is how long a source keeps a placement that it does not need.
	idle = 10 * time.Minute
	// maxPlacements bounds the maps in the kernel.
	maxPlacements = 65536

	// tableFull and assuredFull are the fractions of the connection table in use, and in use by
	// flows that the kernel does not evict early, from which on new flows are refused. tableFree
	// and assuredFree end that.
	tableFull, tableFree     = 0.95, 0.93
	assuredFull, assuredFree = 0.90, 0.88
)

// Holding is the key by which flows are counted: their source, their service, and the address they
// leave with.
type Holding struct {
	Address, Source netip.Addr
	nat.Service
}

// spot is where ports are counted. The load of a destination is that of the fullest of its
// services.
type spot struct {
	pool    string
	address netip.Addr
	nat.Service
}

type place struct {
	pool                 string
	address, destination netip.Addr
}

// pair is the unit of placement.
type pair struct {
	pool                string
	source, destination netip.Addr
}

type placed struct {
	address netip.Addr
	needed  time.Time
	// former is the previous address, which flows that the meter has not shown yet may have got.
	former netip.Addr
}

type count struct {
	exact  uint32  // at the census
	bound  uint64  // upper bound now
	likely uint64  // estimate now, if no flow has ended
	growth float64 // recent flows per second
	rising bool    // between the last two censuses
	alarm  bool    // an alarm is active
}

// Book holds the state of the decisions. Its methods must not be called concurrently.
type Book struct {
	config nat.Config
	pools  map[netip.Addr]string // by address

	spots   map[spot]*count
	placed  map[pair]*placed
	recent  map[pair]float64 // recent new flows per second
	known   map[pair]bool    // pairs with flows at the census, in crowded places
	full    map[nat.Exhausted]bool
	refused map[nat.Service]uint64
	former  nat.Meter // the last meter read
	meterAt time.Time

	// whole holds the sources with exclusive use of an address toward a service without ports, at
	// the census.
	whole map[spot]netip.Addr
	// wants holds the sources that tried to begin a flow without ports, and when that was last
	// seen.
	wants         map[wish]time.Time
	tried, looked uint64 // total packets that tried to: now, and at the census

	begun, metered uint64 // totals: now, and when the meter was read
	unknown        uint64 // flows since the census whose pool address the meter does not show
	fullest        uint64 // bound of the fullest spot

	censusAt         time.Time
	entries, assured uint32
	tableFull        bool
	overflow         bool
}

// New returns a Book with the placements in the kernel.
func New(have []nat.Placement, now time.Time) *Book {
	b := &Book{spots: map[spot]*count{}, placed: map[pair]*placed{}, recent: map[pair]float64{}, full: map[nat.Exhausted]bool{}, refused: map[nat.Service]uint64{}, whole: map[spot]netip.Addr{}, wants: map[wish]time.Time{}}
	for _, p := range have {
		b.placed[pair{p.Pool, p.Source, p.Destination}] = &placed{address: p.Address, needed: now}
	}
	return b
}

// Configure sets pools and zones. A service is no longer exhausted when a pool has a new address
// with free ports for it.
func (b *Book) Configure(c nat.Config) {
	b.config, b.pools = c, map[netip.Addr]string{}
	for _, p := range c.Pools {
		for _, a := range p.Addresses {
			b.pools[a.Address] = p.Name
		}
	}
	maps.DeleteFunc(b.spots, func(s spot, _ *count) bool { return b.pools[s.address] != s.pool })
	maps.DeleteFunc(b.whole, func(s spot, _ netip.Addr) bool { return b.pools[s.address] != s.pool })
	b.drop(func(p pair, at *placed) bool { return b.pools[at.address] != p.pool || c.Pool(p.pool).Blocks != nil })
	b.relieve()
	b.bound()
}

// drop removes placements. The overflow ends as soon as there is room for another one, and not when
// one attempt succeeds: between two attempts, others may still be waiting.
func (b *Book) drop(which func(pair, *placed) bool) {
	maps.DeleteFunc(b.placed, which)
	b.overflow = b.overflow && len(b.placed) >= maxPlacements
}

// Has reports whether an address belongs to a pool.
func (b *Book) Has(a netip.Addr) bool { return b.pools[a] != "" }

func (b *Book) usable(pool string, destination netip.Addr) []nat.PoolAddress {
	return b.config.Pool(pool).Usable(destination.Is6(), "")
}

// address returns the address with which new flows of a pair leave.
func (b *Book) address(p pair) netip.Addr {
	pool := b.config.Pool(p.pool)
	if pool.Blocks != nil {
		a, _, _ := pool.Block(p.source)
		return a
	}
	if at := b.placed[p]; at != nil && slices.ContainsFunc(pool.Usable(p.source.Is6(), ""), func(a nat.PoolAddress) bool { return a.Address == at.address }) {
		return at.address
	}
	return pool.For(p.source, b.config.Zone(p.source))
}

func (b *Book) spot(s spot) *count {
	c := b.spots[s]
	if c == nil {
		c = &count{}
		b.spots[s] = c
	}
	return c
}

func (b *Book) bound() {
	b.fullest = 0
	for _, c := range b.spots {
		b.fullest = max(b.fullest, c.bound)
	}
	b.fullest += b.unknown
}

// Begun records how many flows have begun, and how many packets have tried to begin one without
// ports.
func (b *Book) Begun(n, portless uint64) {
	if n < b.begun {
		b.metered = 0 // the kernel's counter has restarted from 0
	}
	b.begun, b.tried = n, portless
}

// unread returns how many flows have begun since the meter was read.
func (b *Book) unread() uint64 { return b.begun - min(b.metered, b.begun) }

// WantsMeter reports whether a spot may have become too full, or flows are being refused.
func (b *Book) WantsMeter() bool {
	return b.meterAt.IsZero() || len(b.full) > 0 || b.tableFull || b.unread() > 0 && b.fullest+b.unread() >= spill
}

// Meter adds the flows that have begun since the meter was last read.
func (b *Book) Meter(m nat.Meter, now time.Time) { b.read(m, now, true) }

// Overlap is Meter for flows that began during a census, which may have counted them.
func (b *Book) Overlap(m nat.Meter, now time.Time) { b.read(m, now, false) }

func (b *Book) read(m nat.Meter, now time.Time, likely bool) {
	elapsed := max(now.Sub(b.meterAt).Seconds(), 0.001)
	for p, rate := range b.recent {
		if b.recent[p] = rate / 2; rate < 0.1 {
			delete(b.recent, p)
		}
	}
	since := func(had, has map[nat.Use]uint64, u nat.Use) uint64 {
		if n, was := had[u], has[u]; n <= was {
			return was - n
		}
		return has[u]
	}
	var known uint64
	for u := range m.Begun {
		n := since(b.former.Begun, m.Begun, u)
		if nat.Portless(u.Protocol) {
			b.want(u, n, now)
			continue
		}
		known += n
		if n == 0 || b.meterAt.IsZero() {
			continue // it began before the first census
		}
		p := pair{u.Pool, u.Source, u.Destination}
		b.recent[p] += float64(n) / elapsed / 2
		address := b.address(p)
		if !address.IsValid() {
			continue
		}
		c := b.spot(spot{u.Pool, address, u.Service})
		c.bound += n
		if likely {
			c.likely += n
		}
		if at := b.placed[p]; at != nil && at.former.IsValid() && b.pools[at.former] == p.pool {
			b.spot(spot{u.Pool, at.former, u.Service}).bound += n
		}
	}
	for _, at := range b.placed {
		at.former = netip.Addr{}
	}
	if n := b.unread(); n > known && !b.meterAt.IsZero() {
		b.unknown += n - known
	}
	for u := range m.Refused {
		b.refused[u.Service] += since(b.former.Refused, m.Refused, u)
	}
	b.former, b.metered, b.meterAt = m, b.begun, now
	b.bound()
}

// Place decides about new flows, and returns all placements, sorted.
func (b *Book) Place(now time.Time) []nat.Placement {
	loads := map[place]float64{}
	crowded := map[place]bool{}
	for s, c := range b.spots {
		at := place{s.pool, s.address, s.Destination}
		loads[at] = max(loads[at], float64(c.likely))
		crowded[at] = crowded[at] || c.bound >= spill
	}
	if b.fullest >= spill {
		b.move(loads, crowded, now)
	}
	b.movePortless(now)
	out := make([]nat.Placement, 0, len(b.placed))
	for p, at := range b.placed {
		out = append(out, nat.Placement{Pool: p.pool, Source: p.source, Destination: p.destination, Address: at.address})
	}
	slices.SortFunc(out, func(a, b nat.Placement) int {
		return cmp.Or(cmp.Compare(a.Pool, b.Pool), a.Source.Compare(b.Source), a.Destination.Compare(b.Destination))
	})
	return out
}

// move places the new flows of pairs that are filling crowded places elsewhere, the busiest pairs
// first. Where a place is nearly full, pairs that are not busy now must not begin flows there
// either.
func (b *Book) move(loads map[place]float64, crowded map[place]bool, now time.Time) {
	rate := maps.Clone(b.recent)
	for p := range b.known {
		if rate[p] == 0 && loads[place{p.pool, b.address(p), p.destination}] >= nearFull {
			rate[p] = 1
		}
	}
	busy := slices.SortedFunc(maps.Keys(rate), func(p, q pair) int {
		return cmp.Or(cmp.Compare(rate[q], rate[p]), p.source.Compare(q.source), p.destination.Compare(q.destination), cmp.Compare(p.pool, q.pool))
	})
	expected := maps.Clone(loads)
	for _, p := range busy {
		expected[place{p.pool, b.address(p), p.destination}] += rate[p] * horizon
	}
	for _, p := range busy {
		here := place{p.pool, b.address(p), p.destination}
		pool, coming := b.config.Pool(p.pool), rate[p]*horizon
		if !crowded[here] || pool.Blocks != nil {
			continue
		}
		emptiest := func(zone string) (place, bool) {
			best := here
			for _, a := range pool.Usable(p.source.Is6(), zone) {
				if at := (place{p.pool, a.Address, p.destination}); at != here && (best == here || expected[at] < expected[best]) {
					best = at
				}
			}
			return best, best != here && loads[best]+margin < loads[here] && expected[best] < expected[here]
		}
		to, better := emptiest(b.config.Zone(p.source))
		if !better || loads[to] >= nearFull {
			to, better = emptiest("")
		}
		if !better {
			continue
		}
		at := b.placed[p]
		if at == nil {
			if len(b.placed) >= maxPlacements {
				b.overflow = true
				continue
			}
			at = &placed{}
			b.placed[p] = at
		}
		at.former, at.address, at.needed = here.address, to.address, now
		expected[here] -= coming
		expected[to] += coming
	}
}

package placement

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// Overload decides what is refused: services to which every address of a pool has used up its ports, and everything while
// the table of connection tracking is full, whose size is limit.
func (b *Book) Overload(entries, limit uint32) nat.Overload {
	exhausted := func(c *count) bool { return c.exact >= spent && c.likely+last >= Ports }
	for s, c := range b.spots {
		// Of blocks each source has its own, and no source is refused for another one's.
		if e := (nat.Exhausted{Pool: s.pool, Service: s.Service}); exhausted(c) && b.config.Pool(s.pool).Blocks == nil && b.everywhere(e, exhausted) {
			b.full[e] = true
		}
	}
	used, assured := float64(entries), float64(b.assured)
	switch most := float64(limit); {
	case limit == 0:
		b.tableFull = false
	case b.tableFull:
		b.tableFull = used >= tableFree*most && assured >= assuredFree*most
	default:
		b.tableFull = used >= tableFull*most && assured >= assuredFull*most
	}
	o := nat.Overload{TableFull: b.tableFull}
	for e := range b.full {
		o.Exhausted = append(o.Exhausted, e)
	}
	slices.SortFunc(o.Exhausted, func(a, b nat.Exhausted) int {
		return cmp.Or(cmp.Compare(a.Pool, b.Pool), compareService(a.Service, b.Service))
	})
	return o
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

func compareService(a, b nat.Service) int {
	return cmp.Or(a.Destination.Compare(b.Destination), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
}

// Wait returns when to look next. Flows are thought to begin at 50,000 a second at most; what is beyond that is seen late, not missed.
func (b *Book) Wait(cost time.Duration) time.Duration {
	const rate = 50_000
	room := int64(spill) - int64(b.fullest+b.unread())
	if room < 0 {
		room = Ports - int64(b.fullest)
	}
	wait := time.Duration(room) * time.Second / rate
	return min(max(wait, 50*time.Millisecond, 4*cost), time.Second)
}

// Use is what is used of the ports of an address toward a service.
type Use struct {
	Pool    string
	Address netip.Addr
	nat.Service
	Used uint32 // flows at the census
	// Growth is how many more flows there are each second, lately.
	Growth float64
	// ExhaustedIn is when there will be no port left if it goes on like that; zero: never, or it does not grow any more.
	ExhaustedIn time.Duration
	// Alarm is set from 85 % on until there are less than 75 %.
	Alarm bool
	// Exhausted says that new flows to the service are refused, whatever the address.
	Exhausted bool
	// Refused counts the packets of those that were, to the service through any pool.
	Refused uint64
}

// Room is how many flows there is room for: one to a service without ports.
func (u Use) Room() uint32 {
	if nat.Portless(u.Protocol) {
		return 1
	}
	return Ports
}

// Free is how many more flows there is room for.
func (u Use) Free() uint32 { return u.Room() - min(u.Used, u.Room()) }

// Total is what is used of an address of a pool toward all services.
type Total struct {
	Pool            string
	Address         netip.Addr
	Flows, Services uint32
}

// Report is what was counted last.
type Report struct {
	// At is when the census was.
	At time.Time
	// Uses are the ones with the most ports in use, in the order of pool, address and service.
	Uses   []Use
	Totals []Total // of every address of every pool, in the same order
	// Placements is the number of placements in force. Overflow says that there were too many to make another one.
	Placements int
	Overflow   bool
	// Entries and Assured are from the census.
	Entries, Assured uint32
	TableFull        bool
	// TableRefused counts the packets of new flows that were refused because of it.
	TableRefused uint64
}

// Report returns what is known, with at most so many uses.
func (b *Book) Report(most int) Report {
	r := Report{At: b.censusAt, Placements: len(b.placed), Overflow: b.overflow, Entries: b.entries, Assured: b.assured, TableFull: b.tableFull, TableRefused: b.former.TableFull}
	totals := map[netip.Addr]*Total{}
	for _, p := range b.config.Pools {
		for _, a := range p.Addresses {
			totals[a.Address] = &Total{Pool: p.Name, Address: a.Address}
		}
	}
	for s, c := range b.spots {
		if c.exact == 0 {
			continue
		}
		if t := totals[s.address]; t != nil {
			t.Flows += c.exact
			t.Services++
		}
		u := Use{
			Pool: s.pool, Address: s.address, Service: s.Service, Used: c.exact, Growth: c.growth, Alarm: c.alarm,
			Exhausted: b.full[nat.Exhausted{Pool: s.pool, Service: s.Service}], Refused: b.refused[s.Service],
		}
		if c.rising && c.growth >= 0.01 { // of a burst that is over, the mean says something for a while
			u.ExhaustedIn = time.Duration(min(float64(u.Free())/c.growth, 1e9) * float64(time.Second))
		}
		r.Uses = append(r.Uses, u)
	}
	for s := range b.whole {
		if t := totals[s.address]; t != nil {
			t.Flows++
			t.Services++
		}
		r.Uses = append(r.Uses, Use{Pool: s.pool, Address: s.address, Service: s.Service, Used: 1,
			Exhausted: b.full[nat.Exhausted{Pool: s.pool, Service: s.Service}], Refused: b.refused[s.Service]})
	}
	order := func(a, b Use) int {
		return cmp.Or(cmp.Compare(a.Pool, b.Pool), a.Address.Compare(b.Address), compareService(a.Service, b.Service))
	}
	if len(r.Uses) > most {
		slices.SortFunc(r.Uses, func(a, b Use) int {
			return cmp.Or(-compareBool(a.Exhausted, b.Exhausted), cmp.Compare(b.Used, a.Used), order(a, b))
		})
		r.Uses = r.Uses[:most]
	}
	slices.SortFunc(r.Uses, order)
	for _, t := range totals {
		r.Totals = append(r.Totals, *t)
	}
	slices.SortFunc(r.Totals, func(a, b Total) int { return cmp.Or(cmp.Compare(a.Pool, b.Pool), a.Address.Compare(b.Address)) })
	return r
}

// At returns when the last census was.
func (b *Book) At() time.Time { return b.censusAt }

package placement

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// Overload decides what is refused: services for which every address of a pool has used up its
// ports, and all new flows while the connection table, whose size is limit, is full.
func (b *Book) Overload(entries, limit uint32) nat.Overload {
	exhausted := func(c *count) bool { return c.exact >= spent && c.likely+last >= Ports }
	for s, c := range b.spots {
		// With blocks, each source has its own ports, and is not refused because of another one.
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

// Wait returns when to check next. It assumes that at most 50,000 flows begin per second. If there
// are more, they are seen late, but not missed.
func (b *Book) Wait(cost time.Duration) time.Duration {
	const rate = 50_000
	room := int64(spill) - int64(b.fullest+b.unread())
	if room < 0 {
		room = Ports - int64(b.fullest)
	}
	wait := time.Duration(room) * time.Second / rate
	return min(max(wait, 50*time.Millisecond, 4*cost), time.Second)
}

// Use is the use of an address's ports toward a service.
type Use struct {
	Pool    string
	Address netip.Addr
	nat.Service
	Used uint32 // flows at the census
	// Growth is the recent increase of flows per second.
	Growth float64
	// ExhaustedIn is the time until no port is left at this growth; zero: never, or there is no
	// growth.
	ExhaustedIn time.Duration
	// Alarm is set from 85 % on until less than 75 % are in use.
	Alarm bool
	// Exhausted means that new flows to the service are refused at every address.
	Exhausted bool
	// Refused counts the refused packets to the service, through any pool.
	Refused uint64
}

// Room returns the maximum number of flows: one to a service without ports.
func (u Use) Room() uint32 {
	if nat.Portless(u.Protocol) {
		return 1
	}
	return Ports
}

// Free returns for how many more flows there is room.
func (u Use) Free() uint32 { return u.Room() - min(u.Used, u.Room()) }

// Total is the use of an address of a pool toward all services.
type Total struct {
	Pool            string
	Address         netip.Addr
	Flows, Services uint32
}

// Report holds the latest counts.
type Report struct {
	// At is the time of the census.
	At time.Time
	// Uses are those with the most ports in use, sorted by pool, address and service.
	Uses   []Use
	Totals []Total // for every address of every pool, in the same order
	// Placements is the number of active placements. Overflow means that there were too many to
	// add another one.
	Placements int
	Overflow   bool
	// Entries and Assured are from the census.
	Entries, Assured uint32
	TableFull        bool
	// TableRefused counts the packets of new flows that were refused because the table was full.
	TableRefused uint64
}

// Report returns the current state, with at most this many uses.
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
		if c.rising && c.growth >= 0.01 { // the average stays above zero for a while after a burst
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

// At returns the time of the last census.
func (b *Book) At() time.Time { return b.censusAt }

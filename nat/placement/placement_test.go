package placement

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

var web = nat.Service{Destination: addr("198.51.100.1"), Protocol: 6, Port: 443}

// world simulates a kernel with sources that open flows.
type world struct {
	t      *testing.T
	config nat.Config
	book   *Book
	now    time.Time
	flows  map[Holding]uint32
	meter  nat.Meter
	begun  uint64
	lost   uint64 // flows that found no port
	placed map[[2]netip.Addr]netip.Addr
	full   map[nat.Service]bool

	moves, censuses int
}

func newWorld(t *testing.T, addresses int) *world {
	w := &world{t: t, now: time.Unix(1e9, 0), flows: map[Holding]uint32{}, meter: nat.Meter{Begun: map[nat.Use]uint64{}, Refused: map[nat.Use]uint64{}}, full: map[nat.Service]bool{}, placed: map[[2]netip.Addr]netip.Addr{}}
	w.config.Pools = []nat.Pool{{Name: "p"}}
	for i := range addresses {
		w.config.Pools[0].Addresses = append(w.config.Pools[0].Addresses, nat.PoolAddress{Address: addr(fmt.Sprint("192.0.2.", 11+i))})
	}
	w.book = New(nil, w.now)
	w.book.Configure(w.config)
	return w
}

// used returns the ports in use of an address toward a service.
func (w *world) used(a netip.Addr, s nat.Service) (n uint32) {
	for h, m := range w.flows {
		if h.Address == a && h.Service == s {
			n += m
		}
	}
	return n
}

// open makes a source begin n flows, one after another.
func (w *world) open(source netip.Addr, s nat.Service, n int) {
	if w.full[s] {
		w.meter.Refused[nat.Use{Source: source, Service: s}] += uint64(n)
		return
	}
	a := w.placed[[2]netip.Addr{source, s.Destination}]
	if !a.IsValid() {
		a = w.config.Pools[0].For(source, w.config.Zone(source))
	}
	w.meter.Begun[nat.Use{Pool: "p", Source: source, Service: s}] += uint64(n)
	w.begun += uint64(n)
	got := min(uint32(n), Ports-w.used(a, s))
	w.flows[Holding{a, source, s}] += got
	w.lost += uint64(n) - uint64(got)
}

// tick does what the caller does, after some time.
func (w *world) tick(d time.Duration) {
	w.now = w.now.Add(d)
	w.book.Begun(w.begun, 0)
	if w.book.WantsMeter() {
		w.read()
	}
	var entries uint32
	for _, n := range w.flows {
		entries += n
	}
	if w.book.WantsCensus(w.now, entries, 0, 200*time.Millisecond) {
		w.read()
		w.censuses++
		w.book.Census(Census{Flows: w.flows, Entries: entries}, w.now)
	}
	before := len(w.placed)
	clear(w.placed)
	for _, p := range w.book.Place(w.now) {
		w.placed[[2]netip.Addr{p.Source, p.Destination}] = p.Address
	}
	w.moves += len(w.placed) - before
	clear(w.full)
	for _, e := range w.book.Overload(entries, 0).Exhausted {
		w.full[e.Service] = true
	}
	for s, c := range w.book.spots {
		if s.pool == "p" && c.bound+w.book.unknown+w.book.unread() < uint64(w.used(s.address, s.Service)) {
			w.t.Fatalf("%v: bound %d, exact count %d", s, c.bound, w.used(s.address, s.Service))
		}
	}
}

func (w *world) read() {
	m := nat.Meter{Begun: map[nat.Use]uint64{}, Refused: map[nat.Use]uint64{}}
	for u, n := range w.meter.Begun {
		m.Begun[u] = n
	}
	for u, n := range w.meter.Refused {
		m.Refused[u] = n
	}
	w.book.Meter(m, w.now)
}

func source(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }

// TestPoolFills opens 240,000 flows to one service through four addresses, which have room for
// 258,048, at 20,000 a second.
func TestPoolFills(t *testing.T) {
	for _, sources := range []int{4, 5, 16, 64, 400} {
		for _, even := range []bool{true, false} {
			w := newWorld(t, 4)
			r := rand.New(rand.NewPCG(1, uint64(sources)))
			w.tick(time.Second)
			for range 120 {
				if even {
					for i := range sources {
						w.open(source(i), web, 2000/sources)
					}
				} else {
					for range 10 {
						w.open(source(min(r.IntN(sources), r.IntN(sources))), web, 200)
					}
				}
				w.tick(100 * time.Millisecond)
			}
			if w.lost > w.begun/1000 {
				t.Errorf("%d sources, even %v: %d of %d flows lost, %d moves", sources, even, w.lost, w.begun, w.moves)
			}
			t.Logf("%d sources, even %v: %d lost, %d placed, %d censuses", sources, even, w.lost, w.moves, w.censuses)
		}
	}
}

// TestNothingMovesBelow checks that no source is moved while there is room.
func TestNothingMovesBelow(t *testing.T) {
	w := newWorld(t, 2)
	for range 100 {
		for i := range 20 {
			w.open(source(i), web, 30)
			if k := (Holding{w.config.Pools[0].For(source(i), ""), source(i), web}); w.flows[k] > 500 {
				w.flows[k] -= 30 // they end as fast as others begin
			}
		}
		w.tick(100 * time.Millisecond)
	}
	if len(w.placed) > 0 || w.lost > 0 {
		t.Errorf("%d placed, %d lost", len(w.placed), w.lost)
	}
	if w.begun < 50_000 {
		t.Error("the test proves nothing")
	}
}

// TestExhaustion fills all addresses, and then ends some of the flows.
func TestExhaustion(t *testing.T) {
	w := newWorld(t, 2)
	w.tick(time.Second)
	other := web
	other.Port = 80
	for range 100 {
		w.open(source(1), web, 1000)
		w.open(source(2), web, 1000)
		w.open(source(3), other, 10)
		w.tick(100 * time.Millisecond)
	}
	report := w.book.Report(10)
	for _, u := range report.Uses {
		if want := u.Service == web; u.Exhausted != want || u.Alarm != want || (u.Refused > 0) != want || want && u.Free() > last {
			t.Errorf("%+v", u)
		}
	}
	if w.lost > 8000 || len(report.Uses) != 3 {
		t.Errorf("%d flows were lost silently, more than begin in 0.4 s; uses: %+v", w.lost, report.Uses)
	}
	all := w.config.Pools[0].Addresses
	w.config.Pools[0].Addresses = append(slices.Clip(all), nat.PoolAddress{Address: addr("192.0.2.13")})
	w.book.Configure(w.config)
	lost := w.lost
	if w.tick(time.Millisecond); len(w.full) > 0 {
		t.Errorf("%v are refused although there is another address", w.full)
	}
	w.open(source(1), web, 1000)
	w.open(source(2), web, 1000)
	if w.lost > lost || w.used(addr("192.0.2.13"), web) != 2000 {
		t.Errorf("%d flows were lost, %d have the other address", w.lost-lost, w.used(addr("192.0.2.13"), web))
	}
	w.config.Pools[0].Addresses = all
	w.book.Configure(w.config)
	for h := range w.flows {
		w.flows[h] /= 2
	}
	w.tick(3 * time.Second)
	if len(w.full) > 0 || w.book.Report(10).Uses[0].Alarm {
		t.Errorf("%+v after half of the flows ended", w.book.Report(10))
	}
}

// TestPlacementsAge checks that a placement is kept while it is needed.
func TestPlacementsAge(t *testing.T) {
	w := newWorld(t, 2)
	a := w.config.Pools[0].Addresses
	p := nat.Placement{Pool: "p", Source: source(1), Destination: web.Destination, Address: a[0].Address}
	w.book = New([]nat.Placement{p}, w.now)
	w.book.Configure(w.config)
	h := Holding{a[1].Address, source(1), web} // it also has older flows at another address
	w.flows[h] = 5
	for range 60 {
		w.begun++ // a new flow makes the meter necessary
		w.tick(time.Minute)
	}
	if len(w.placed) != 1 {
		t.Error("a placement that is needed was removed")
	}
	delete(w.flows, h)
	w.tick(idle - time.Minute)
	if len(w.placed) != 1 {
		t.Error("a placement was removed at once")
	}
	w.begun++
	w.tick(time.Minute)
	w.begun++
	w.tick(time.Minute)
	if len(w.placed) != 0 {
		t.Error("a placement that is not needed stayed")
	}

	w.book = New([]nat.Placement{p}, w.now)
	w.config.Pools[0].Addresses = a[1:]
	w.book.Configure(w.config)
	if w.tick(time.Second); len(w.placed) != 0 {
		t.Error("a placement to an address that left stayed")
	}
}

// TestZonesSpill checks that the addresses of a source's zone are used first.
func TestZonesSpill(t *testing.T) {
	w := newWorld(t, 4)
	for i, z := range []string{"a", "a", "b", "b"} {
		w.config.Pools[0].Addresses[i].Zone = z
	}
	w.config.Zones = []nat.Zone{{Name: "a", Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}}
	w.book.Configure(w.config)
	w.tick(time.Second)
	inA := func() (n uint32) {
		return w.used(addr("192.0.2.11"), web) + w.used(addr("192.0.2.12"), web)
	}
	for range 50 {
		w.open(source(1), web, 2000)
		w.tick(100 * time.Millisecond)
	}
	if inA() < 2*nearFull-10_000 || w.lost > 0 {
		t.Errorf("%d flows in the zone, %d lost", inA(), w.lost)
	}
	for range 50 {
		w.open(source(1), web, 2000)
		w.tick(100 * time.Millisecond)
	}
	if inA() == uint32(w.begun) || w.lost > 0 {
		t.Errorf("%d of %d flows in the zone, %d lost", inA(), w.begun, w.lost)
	}
}

// TestBoundHolds opens and ends flows at random and loses meters. It checks in every tick that no
// bound is below the exact count.
func TestBoundHolds(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 9))
	w := newWorld(t, 3)
	w.tick(time.Second)
	for range 2000 {
		for range r.IntN(20) {
			s := web
			s.Port += uint16(r.IntN(2))
			w.open(source(r.IntN(30)), s, r.IntN(400))
		}
		if r.IntN(60) == 0 {
			for h, n := range w.flows {
				w.flows[h] -= n / uint32(2+r.IntN(10))
			}
		}
		if r.IntN(10) == 0 { // the source was idle
			clear(w.meter.Begun)
		}
		w.tick(time.Duration(r.IntN(300)) * time.Millisecond)
	}
	if w.moves == 0 || w.censuses < 10 {
		t.Errorf("%d moves, %d censuses: the test proves little", w.moves, w.censuses)
	}
}

func TestTableFull(t *testing.T) {
	b := New(nil, time.Unix(0, 0))
	for _, k := range []struct {
		entries, assured uint32
		want             bool
	}{
		{9400, 9400, false},
		{9500, 5000, false}, // the kernel can evict flows
		{9500, 9000, true},
		{9400, 9000, true},
		{9200, 8900, false},
		{9400, 9000, false},
		{9600, 9000, true},
		{9600, 8000, false},
	} {
		b.Census(Census{Entries: k.entries, Assured: k.assured}, time.Unix(0, 0))
		if got := b.Overload(k.entries, 10_000).TableFull; got != k.want {
			t.Errorf("%+v: %v", k, got)
		}
	}
	if b.Overload(1, 0).TableFull {
		t.Error("full without a limit")
	}
}

func TestReportKeepsTheFullest(t *testing.T) {
	w := newWorld(t, 1)
	for i := range 10 {
		s := web
		s.Port += uint16(i)
		w.open(source(1), s, 100*(i+1))
	}
	w.tick(time.Second)
	r := w.book.Report(3)
	if len(r.Uses) != 3 || !slices.IsSortedFunc(r.Uses, func(a, b Use) int { return int(a.Port) - int(b.Port) }) || r.Uses[0].Used != 800 ||
		len(r.Totals) != 1 || r.Totals[0].Flows != 5500 || r.Totals[0].Services != 10 {
		t.Errorf("%+v", r)
	}
}

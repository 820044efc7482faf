package placement

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// TestPortlessWishes checks that the record of sources that try is bounded, and that they are
// dropped when they have stopped trying.
func TestPortlessWishes(t *testing.T) {
	w := newWorld(t, 2)
	for i := range uint32(2 * maxPlacements) {
		source := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 10<<24+i)))
		w.book.want(nat.Use{Pool: "p", Source: source, Service: nat.Service{Destination: web.Destination, Protocol: 50}}, 1, w.now)
	}
	if n := len(w.book.wants); n != maxPlacements {
		t.Errorf("%d wishes, want %d", n, maxPlacements)
	}
	w.book.Place(w.now)
	if n := len(w.book.placed); n > 2 {
		t.Errorf("%d sources are placed under two addresses", n)
	}
	w.book.Census(Census{}, w.now.Add(wanted+time.Second))
	if n := len(w.book.wants); n != 0 {
		t.Errorf("%d wishes after no packet for %v", n, wanted)
	}
}

// TestOverflowEnds checks that the overflow of placements ends when there is room for another one,
// and not before.
func TestOverflowEnds(t *testing.T) {
	w := newWorld(t, 2)
	var have []nat.Placement
	for i := range uint32(maxPlacements) {
		source := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 11<<24+i)))
		have = append(have, nat.Placement{Pool: "p", Source: source, Destination: addr("198.51.100.2"), Address: addr("192.0.2.11")})
	}
	w.book = New(have, w.now)
	w.book.Configure(w.config)
	esp := nat.Service{Destination: web.Destination, Protocol: 50}
	here := w.book.address(pair{"p", source(1), web.Destination})
	census := Census{Portless: []Holding{{here, source(2), esp}}}
	try := func() bool {
		w.book.Census(census, w.now)
		w.book.want(nat.Use{Pool: "p", Source: source(1), Service: esp}, 1, w.now)
		w.book.Place(w.now)
		return w.book.Report(1).Overflow
	}
	if !try() {
		t.Fatal("no overflow")
	}
	if w.book.Census(census, w.now); !w.book.Report(1).Overflow {
		t.Error("the overflow ended without room")
	}
	w.now = w.now.Add(idle)
	if try() || w.book.Report(1).Placements != 1 {
		t.Errorf("%+v after the placements have ended", w.book.Report(1))
	}
	w.book = New(have, w.now)
	w.book.Configure(w.config)
	if !try() {
		t.Fatal("no overflow")
	}
	if w.book.Configure(nat.Config{}); w.book.Report(1).Overflow {
		t.Error("overflow without pools")
	}
}

// TestRefusedIsForgotten checks that refused packets are counted while a service is exhausted, and
// that services which a source has only tried once do not stay in memory.
func TestRefusedIsForgotten(t *testing.T) {
	w := newWorld(t, 1)
	at := w.config.Pools[0].Addresses[0].Address
	service := func(i int) nat.Service {
		return nat.Service{Destination: netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), Protocol: 50}
	}
	for i := range 200 {
		s := service(i)
		w.book.Census(Census{Portless: []Holding{{at, source(2), s}}}, w.now)
		use := nat.Use{Pool: "p", Source: source(1), Service: s}
		w.book.want(use, 1, w.now)
		w.book.Place(w.now)
		if o := w.book.Overload(1, 0); !slices.Contains(o.Exhausted, nat.Exhausted{Pool: "p", Service: s}) {
			t.Fatalf("service %d is not exhausted: %+v", i, o)
		}
		use.Pool = ""
		w.book.Meter(nat.Meter{Refused: map[nat.Use]uint64{use: 3}}, w.now)
		w.book.Census(Census{Portless: []Holding{{at, source(2), s}}}, w.now)
		if u := w.book.Report(1).Uses[0]; u.Service != s || u.Refused != 3 {
			t.Fatalf("%+v", u)
		}
	}
	if n := len(w.book.refused); n != 1 {
		t.Errorf("refused packets to %d services are counted, want 1", n)
	}
}

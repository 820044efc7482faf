package placement

import (
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// TestBlocksStay fills an address of a pool with blocks: its sources have their ports at this
// address only.
func TestBlocksStay(t *testing.T) {
	now := time.Unix(1e9, 0)
	b := New(nil, now)
	sources := netip.MustParsePrefix("10.0.0.0/25")
	p := nat.Pool{Name: "p", Addresses: []nat.PoolAddress{{Address: addr("192.0.2.11")}, {Address: addr("192.0.2.12")}},
		Blocks: &nat.Blocks{Size: 1000, FirstPort: 1024, Sources: []netip.Prefix{sources}}}
	b.Configure(nat.Config{Pools: []nat.Pool{p}})
	b.Meter(nat.Meter{}, now)
	b.Census(Census{}, now)
	begun := nat.Meter{Begun: map[nat.Use]uint64{}}
	full := Census{Flows: map[Holding]uint32{}}
	for a := sources.Addr(); sources.Contains(a); a = a.Next() {
		if at, _, ok := p.Block(a); ok && at == p.Addresses[0].Address {
			begun.Begun[nat.Use{Pool: "p", Source: a, Service: web}] = 1000
			full.Flows[Holding{at, a, web}] = 1000
		}
	}
	now = now.Add(time.Second)
	b.Begun(uint64(len(full.Flows))*1000, 0)
	b.Meter(begun, now)
	if c := b.spots[spot{"p", p.Addresses[1].Address, web}]; c != nil && c.bound > 0 {
		t.Errorf("%d flows are counted at the other address", c.bound)
	}
	b.Census(full, now)
	b.Meter(begun, now)
	if placed := b.Place(now); len(placed) > 0 {
		t.Errorf("%d placements, such as %+v", len(placed), placed[0])
	}
	// the last ports belong to no block
	full.Flows[Holding{p.Addresses[0].Address, sources.Addr(), web}] += 500
	for h, n := range full.Flows {
		full.Flows[Holding{p.Addresses[1].Address, h.Source, web}] = n
	}
	b.Census(full, now)
	if o := b.Overload(0, 0); len(o.Exhausted) > 0 {
		t.Errorf("%+v", o)
	}
}

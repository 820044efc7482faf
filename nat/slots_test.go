package nat

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// randomPool has up to 8 addresses of each family, with weights and zones.
func randomPool(r *rand.Rand) Pool {
	p := Pool{Name: "p"}
	for i := range 1 + r.IntN(8) {
		for _, format := range []string{"192.0.2.%d", "2001:db8::%x"} {
			p.Addresses = append(p.Addresses, PoolAddress{
				Address: addr(fmt.Sprintf(format, 16*i+1+r.IntN(16))), Weight: uint32(r.IntN(4)),
				Zone: []string{"", "a", "b"}[r.IntN(3)], Down: r.IntN(4) == 0,
			})
		}
	}
	r.Shuffle(len(p.Addresses), func(i, j int) { p.Addresses[i], p.Addresses[j] = p.Addresses[j], p.Addresses[i] })
	return p
}

func has(list []PoolAddress, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(o PoolAddress) bool { return o.Address == a })
}

// TestSlotsMoveOnlyWhatTheyMust changes one thing about a pool at a time.
func TestSlotsMoveOnlyWhatTheyMust(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 2))
	moved := 0
	for range 2000 {
		p := randomPool(r)
		ipv6, zone := r.IntN(2) == 0, []string{"", "a", "b", "elsewhere"}[r.IntN(4)]
		before, usable := p.Slots(ipv6, zone), p.Usable(ipv6, zone)
		shuffled := p
		shuffled.Addresses = slices.Clone(p.Addresses)
		slices.Reverse(shuffled.Addresses)
		if shuffled.Slots(ipv6, zone) != before {
			t.Fatalf("%+v: the order counts", p)
		}

		changed := shuffled
		switch i := r.IntN(len(p.Addresses)); r.IntN(4) {
		case 0:
			changed.Addresses[i].Down = !changed.Addresses[i].Down
		case 1:
			changed.Addresses = slices.Delete(changed.Addresses, i, i+1)
		case 2:
			changed.Addresses = append(changed.Addresses, PoolAddress{Address: addr(fmt.Sprint("198.51.100.", r.IntN(9)))})
		case 3:
			changed.Addresses[i].Weight++
		}
		after, usableNow := changed.Slots(ipv6, zone), changed.Usable(ipv6, zone)
		for i := range before {
			if !has(usable, before[i]) {
				t.Fatalf("%+v: slot %d has %v", p, i, before[i])
			}
			if before[i] == after[i] || len(usableNow) == 0 {
				continue
			}
			moved++
			// It moves because its address went or weighs less, or to one that came or weighs more.
			went := !slices.Contains(usableNow, usable[slices.IndexFunc(usable, func(a PoolAddress) bool { return a.Address == before[i] })])
			came := !slices.Contains(usable, usableNow[slices.IndexFunc(usableNow, func(a PoolAddress) bool { return a.Address == after[i] })])
			if !went && !came {
				t.Fatalf("slot %d moved from %v to %v, which are as they were\n%+v\n%+v", i, before[i], after[i], usable, usableNow)
			}
		}
	}
	if moved < 1000 {
		t.Errorf("only %d slots moved: the test shows little", moved)
	}
}

// TestUsable is the order of preference.
func TestUsable(t *testing.T) {
	a := PoolAddress{Address: addr("192.0.2.1"), Zone: "a"}
	b := PoolAddress{Address: addr("192.0.2.2"), Zone: "b"}
	none := PoolAddress{Address: addr("192.0.2.3")}
	down := func(x PoolAddress) PoolAddress { x.Down = true; return x }
	for _, k := range []struct {
		pool []PoolAddress
		zone string
		want []PoolAddress
	}{
		{[]PoolAddress{a, b, none}, "a", []PoolAddress{a}},
		{[]PoolAddress{a, b, none}, "c", []PoolAddress{a, b, none}},
		{[]PoolAddress{a, b, none}, "", []PoolAddress{a, b, none}},
		{[]PoolAddress{down(a), b, none}, "a", []PoolAddress{b, none}},
		{[]PoolAddress{down(a), down(b), none}, "b", []PoolAddress{none}},
		{[]PoolAddress{down(a), down(b)}, "b", []PoolAddress{down(a), down(b)}},
		{nil, "a", nil},
	} {
		if got := (Pool{Addresses: k.pool}).Usable(false, k.zone); !slices.Equal(got, k.want) {
			t.Errorf("%+v in zone %q: %+v, want %+v", k.pool, k.zone, got, k.want)
		}
	}
}

// TestSlotsFollowWeights looks at the shares of many pools: one pool deals out too few slots to be
// exact.
// TestHome has an address that is down: new flows leave it, and late ones keep it.
func TestHome(t *testing.T) {
	p := Pool{Addresses: []PoolAddress{{Address: netip.MustParseAddr("192.0.2.1"), Zone: "a"}, {Address: netip.MustParseAddr("192.0.2.2"), Zone: "b"}, {Address: netip.MustParseAddr("192.0.2.3"), Zone: "b"}}}
	q := Pool{Addresses: slices.Clone(p.Addresses)}
	q.Addresses[1].Down = true
	moved := 0
	for _, zone := range []string{"", "a", "b"} {
		for slot, home := range q.HomeSlots(false, zone) {
			if want := p.Slots(false, zone)[slot]; home != want {
				t.Fatalf("zone %q: slot %d is at %v with an address down, and at %v without", zone, slot, home, want)
			}
			if home != q.Slots(false, zone)[slot] {
				moved++
			}
		}
	}
	if source := netip.MustParseAddr("10.0.0.1"); q.Home(source, "b") != p.For(source, "b") || moved == 0 || !q.Addresses[1].Down {
		t.Errorf("home of %v: %v; %d slots moved", source, q.Home(source, "b"), moved)
	}
}

func TestSlotsFollowWeights(t *testing.T) {
	weights := []uint32{0, 1, 2, 4} // the first counts as 1
	var share [4]float64
	const pools = 200
	for i := range pools {
		p := Pool{}
		for j, w := range weights {
			p.Addresses = append(p.Addresses, PoolAddress{Address: netip.AddrFrom4([4]byte{192, 0, byte(i), byte(j)}), Weight: w})
		}
		for _, a := range p.Slots(false, "") {
			share[a.As4()[3]] += 1.0 / pools / Slots
		}
	}
	for j, want := range []float64{1. / 8, 1. / 8, 2. / 8, 4. / 8} {
		if math.Abs(share[j]-want) > 0.01 {
			t.Errorf("weight %d has %.3f of the slots, want %.3f", weights[j], share[j], want)
		}
	}
}

func TestZone(t *testing.T) {
	c := Config{Zones: []Zone{{"a", pfx("10.1.0.0/16", "2001:db8:a::/48")}, {"b", pfx("10.2.0.0/16")}}}
	for source, want := range map[string]string{"10.1.2.3": "a", "2001:db8:a::1": "a", "10.2.0.1": "b", "10.3.0.1": ""} {
		if got := c.Zone(addr(source)); got != want {
			t.Errorf("%s is in zone %q, want %q", source, got, want)
		}
	}
}

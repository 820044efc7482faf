package nat

import (
	"encoding/binary"

	"math"
	"net/netip"
	"slices"
)

// Slots is the number of parts that the sources are divided into. All sources in a slot leave with
// the same address.
const Slots = 256

// Slot returns the slot of a source.
func Slot(source netip.Addr) int { return int(Hash(source) >> 24) }

// Zone returns the name of the zone of a source; empty: none.
func (c *Config) Zone(source netip.Addr) string {
	for _, z := range c.Zones {
		if slices.ContainsFunc(z.Prefixes, func(p netip.Prefix) bool { return p.Contains(source) }) {
			return z.Name
		}
	}
	return ""
}

// Family returns the pool's addresses of one family, sorted and without duplicates.
func (p Pool) Family(ipv6 bool) []PoolAddress {
	var addrs []PoolAddress
	for _, a := range p.Addresses {
		if a.Address.Is6() == ipv6 {
			addrs = append(addrs, a)
		}
	}
	slices.SortStableFunc(addrs, func(a, b PoolAddress) int { return a.Address.Compare(b.Address) })
	return slices.CompactFunc(addrs, func(a, b PoolAddress) bool { return a.Address == b.Address })
}

// Usable returns the addresses of one family that new flows of a source in a zone may get: those of
// its zone that are not down; else those of any zone that are not down; else all, since an address
// that seems to be down may yet work and none surely does not.
func (p Pool) Usable(ipv6 bool, zone string) []PoolAddress {
	all := p.Family(ipv6)
	up := slices.DeleteFunc(slices.Clone(all), func(a PoolAddress) bool { return a.Down })
	if len(up) == 0 {
		return all
	}
	near := slices.DeleteFunc(slices.Clone(up), func(a PoolAddress) bool { return zone == "" || a.Zone != zone })
	if len(near) > 0 {
		return near
	}
	return up
}

// Slots assigns the slots to the usable addresses by weighted rendezvous hashing (highest random
// weight, Thaler and Ravishankar 1998): each slot goes to the address that scores highest for it,
// so that a new address takes its share and a removed one leaves its share, and no other slot
// moves. The addresses are zero if the pool has none of the family.
func (p Pool) Slots(ipv6 bool, zone string) (slots [Slots]netip.Addr) {
	addrs := p.Usable(ipv6, zone)
	for i := range slots {
		slots[i] = winner(addrs, i)
	}
	return slots
}

// For returns the address of the pool for a source in a zone that is not placed: always the same
// one while the pool does not change. It is zero if the pool has none of the family.
func (p Pool) For(source netip.Addr, zone string) netip.Addr {
	return winner(p.Usable(source.Is6(), zone), Slot(source))
}

// home returns the pool as it is while every address works.
func (p Pool) home() Pool {
	p.Addresses = slices.Clone(p.Addresses)
	for i := range p.Addresses {
		p.Addresses[i].Down = false
	}
	return p
}

// HomeSlots returns the slots of the pool while every address works; see Slots.
func (p Pool) HomeSlots(ipv6 bool, zone string) [Slots]netip.Addr { return p.home().Slots(ipv6, zone) }

// Home returns the address of a source in a zone while every address of the pool works; see For.
func (p Pool) Home(source netip.Addr, zone string) netip.Addr { return p.home().For(source, zone) }

func winner(addrs []PoolAddress, slot int) (winner netip.Addr) {
	best := math.Inf(-1)
	for _, a := range addrs {
		if s := score(a, slot); s > best {
			best, winner = s, a.Address
		}
	}
	return winner
}

// score is the score of an address for a slot. With u evenly distributed between 0 and 1, an
// address has the highest weight / -ln u in its weight's share of the slots.
func score(a PoolAddress, slot int) float64 {
	b := a.Address.As16()
	u := mix(binary.BigEndian.Uint64(b[8:]) + mix(binary.BigEndian.Uint64(b[:8])+mix(uint64(slot))))
	return float64(max(a.Weight, 1)) / -math.Log((float64(u>>11)+0.5)/(1<<53))
}

// mix is the output function of SplitMix64 (Steele, Lea, Flood 2014): a permutation in which every
// bit depends on every one.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

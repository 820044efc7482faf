package nat

import (
	"net/netip"
	"testing"
)

func blockPool() Pool {
	return Pool{Name: "b", Addresses: []PoolAddress{{Address: addr("192.0.2.30")}, {Address: addr("2001:db8:ff::1")}, {Address: addr("192.0.2.20")}},
		Blocks: &Blocks{Size: 1000, FirstPort: 1024, Sources: pfx("10.1.0.0/26", "10.9.0.7/32", "10.0.0.0/27", "2001:db8:1::/122")}}
}

// TestBlocksAreOneToOne gives every source its block, and every port of it back to the source.
func TestBlocksAreOneToOne(t *testing.T) {
	p := blockPool()
	owners := map[netip.AddrPort]netip.Addr{}
	n := map[bool]int{}
	for _, s := range p.Blocks.Sources {
		for a := s.Addr(); s.Contains(a); a = a.Next() {
			at, ports, ok := p.Block(a)
			if !ok || ports.First < 1024 || ports.Last-ports.First != 999 || at.Is6() != a.Is6() {
				t.Fatal(a, at, ports, ok)
			}
			for port := int(ports.First); port <= int(ports.Last); port++ {
				key := netip.AddrPortFrom(at, uint16(port))
				if other, taken := owners[key]; taken {
					t.Fatalf("%v belongs to %v and %v", key, other, a)
				}
				owners[key] = a
			}
			n[a.Is6()]++
		}
	}
	for _, a := range p.Addresses {
		for port := range 65536 {
			key := netip.AddrPortFrom(a.Address, uint16(port))
			if got, _ := p.Owner(key.Addr(), key.Port()); got != owners[key] {
				t.Fatalf("%v belongs to %v, want %v", key, got, owners[key])
			}
		}
	}
	if n[false] != 97 || p.Blocks.Count(false) != 97 || n[true] != 64 || p.Blocks.Count(true) != 64 || p.Blocks.PerAddress() != 64 {
		t.Error(n, p.Blocks.Count(false), p.Blocks.Count(true), p.Blocks.PerAddress())
	}
	for _, k := range []struct {
		source, address string
		ports           PortRange
	}{
		{"10.1.0.0", "192.0.2.30", PortRange{1024, 2023}},
		{"10.1.0.63", "192.0.2.30", PortRange{64024, 65023}},
		// the second of the document, not the second by value
		{"10.9.0.7", "192.0.2.20", PortRange{1024, 2023}},
		{"10.0.0.31", "192.0.2.20", PortRange{33024, 34023}},
		{"2001:db8:1::2", "2001:db8:ff::1", PortRange{3024, 4023}},
	} {
		if at, ports, ok := p.Block(addr(k.source)); !ok || at != addr(k.address) || ports != k.ports {
			t.Errorf("%s: %v %v %v", k.source, at, ports, ok)
		}
	}
	for _, stranger := range []string{"10.1.0.64", "2001:db8:1::40", "192.0.2.30"} {
		if at, ports, ok := p.Block(addr(stranger)); ok || at.IsValid() {
			t.Errorf("%s has %v %v", stranger, at, ports)
		}
	}
}

func TestBlocksMoveNobodyWhenTheyGrow(t *testing.T) {
	p, q := blockPool(), blockPool()
	q.Addresses = append(q.Addresses, PoolAddress{Address: addr("192.0.2.1")})
	q.Blocks.Sources = append(q.Blocks.Sources, pfx("10.8.0.0/26")...)
	for _, s := range p.Blocks.Sources {
		for a := s.Addr(); s.Contains(a); a = a.Next() {
			at, ports, _ := p.Block(a)
			if now, portsNow, ok := q.Block(a); !ok || now != at || portsNow != ports {
				t.Errorf("%v moves from %v %v to %v %v", a, at, ports, now, portsNow)
			}
		}
	}
	if at, _, _ := q.Block(addr("10.8.0.63")); at != addr("192.0.2.1") {
		t.Error(at)
	}
}

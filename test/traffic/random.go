package traffic

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// Random makes configurations and flows in which much overlaps.
type Random struct{ *rand.Rand }

func (r Random) prefix(bytes [4]byte) netip.Prefix {
	bits := []int{0, 8, 12, 14, 15, 16, 20, 23, 24, 31, 32}[r.IntN(11)]
	return netip.PrefixFrom(netip.AddrFrom4(bytes), bits).Masked()
}

// inside and outside return addresses of small families of prefixes.
func (r Random) inside() [4]byte {
	return [4]byte{[]byte{10, 44}[r.IntN(2)], byte(r.IntN(3)), byte(r.IntN(2)), byte(1 + r.IntN(3))}
}
func (r Random) outside() [4]byte {
	return [4]byte{198, byte(50 + r.IntN(3)), byte(r.IntN(2)), byte(1 + r.IntN(3))}
}

// to6 makes an IPv6 address or prefix of an IPv4 one.
func to6(a [4]byte) netip.Addr {
	if a[0] == 10 || a[0] == 44 {
		return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, a[0], a[1], a[2], 15: a[3]})
	}
	return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 0xb0, a[1], a[2], 15: a[3]})
}

// Source returns a prefix of sources.
func (r Random) Source() netip.Prefix { return r.either(r.inside()) }

func (r Random) either(a [4]byte) netip.Prefix {
	if r.IntN(3) > 0 {
		return r.prefix(a)
	}
	bits := []int{0, 32, 48, 52, 56, 60, 64, 127, 128}[r.IntN(9)]
	return netip.PrefixFrom(to6(a), bits).Masked()
}

// Policy returns a policy that the driver accepts, whose pool is one of "one", "many", "four-only"
// and "blocks". Servers and proxies are in 172.17.0.0/16 and 2001:db8:a:ffff::/64.
func (r Random) Policy(name string) nat.Policy {
	p := nat.Policy{Name: name, Action: nat.SNAT, Pool: []string{"one", "many", "four-only", "blocks"}[r.IntN(4)]}
	if r.IntN(2) == 0 {
		p.Action, p.Pool = []nat.Action{nat.Deny, nat.Reject, nat.NoNAT, nat.Redirect, nat.Redirect, nat.DNAT}[r.IntN(6)], ""
	}
	for range 1 + r.IntN(3) {
		p.Sources = append(p.Sources, r.either(r.inside()))
	}
	for range r.IntN(3) {
		p.Destinations = append(p.Destinations, r.either(r.outside()))
	}
	if p.Action == nat.NoNAT { // only what is not refused
		p.Destinations = append(p.Destinations, netip.MustParsePrefix("198.51.0.0/16"), netip.MustParsePrefix("2001:db8:b0::/44"))
	}
	if p.Action == nat.SNAT || p.Action == nat.NoNAT {
		p.Pickup = r.IntN(3) > 0
		if r.IntN(3) == 0 {
			p.Timeouts = nat.Timeouts{TCPEstablished: time.Duration(1+r.IntN(2)) * time.Hour, UDPStream: time.Minute}
		}
	}
	p.Protocol = []string{"", "tcp", "udp", "icmp"}[r.IntN(4)]
	if p.Action == nat.Redirect || p.Action == nat.DNAT {
		p.Protocol = []string{"tcp", "udp"}[r.IntN(2)]
		p.To = netip.AddrPortFrom(netip.AddrFrom4([4]byte{172, 17, 0, byte(1 + r.IntN(3))}), []uint16{0, 3128}[r.IntN(2)])
		if r.IntN(3) == 0 {
			p.To = netip.AddrPortFrom(netip.MustParseAddr("2001:db8:a:ffff::1"), p.To.Port())
		}
	}
	if p.To.IsValid() && r.IntN(2) == 0 { // else few flows find it
		p.Sources = append(p.Sources, netip.PrefixFrom(p.To.Addr(), r.IntN(2)*4).Masked())
		p.Ports = []nat.PortRange{{First: 1, Last: uint16(5 + r.IntN(20))}}
	}
	if p.Action == nat.Redirect {
		p.Down, p.Bypass = r.IntN(3) == 0, r.IntN(2) == 0
	}
	if p.Action == nat.DNAT {
		p.Pool, p.Destinations = []string{"one", "many"}[r.IntN(2)], nil
		p.Sources = append(p.Sources, r.either(r.outside()))
	}
	if p.Protocol == "tcp" || p.Protocol == "udp" {
		for range r.IntN(3) {
			first := uint16(1 + r.IntN(20))
			p.Ports = append(p.Ports, nat.PortRange{First: first, Last: first + uint16(r.IntN(5))})
		}
	}
	if p.Action == nat.DNAT && len(p.Ports) == 0 {
		p.Ports = []nat.PortRange{{First: 7, Last: 9}}
	}
	return Permitted(p)
}

// Permitted removes the sources that must not leave untranslated.
func Permitted(p nat.Policy) nat.Policy {
	if p.Action == nat.NoNAT {
		p.Sources = slices.DeleteFunc(p.Sources, func(src netip.Prefix) bool {
			return slices.ContainsFunc(p.Destinations, func(dst netip.Prefix) bool { return nat.Exposes(src, dst) })
		})
	}
	return p
}

// Flow returns a flow from 10.0.0.0/8, 44.0.0.0/8 or 2001:db8::/32 toward 198.48.0.0/12 or
// 2001:db8:b0::/48, or to or from addresses of the pools.
func (r Random) Flow() nat.Flow {
	f := nat.Flow{Protocol: []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_GRE, unix.IPPROTO_NONE}[r.IntN(5)]}
	src, dst := r.inside(), r.outside()
	if f.Source, f.Destination = netip.AddrFrom4(src), netip.AddrFrom4(dst); r.IntN(3) == 0 {
		f.Source, f.Destination = to6(src), to6(dst)
		if f.Protocol == unix.IPPROTO_ICMP {
			f.Protocol = unix.IPPROTO_ICMPV6
		}
		if f.Protocol == unix.IPPROTO_NONE {
			// connection tracking, and so NAT, ignores "no next header" of IPv6
			f.Protocol = unix.IPPROTO_GRE
		}
	}
	if f.Protocol == unix.IPPROTO_TCP || f.Protocol == unix.IPPROTO_UDP {
		f.Port = uint16(1 + r.IntN(25))
	}
	if r.IntN(4) == 0 { // to an address of a pool, from either side
		f.Protocol, f.Port = []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP}[r.IntN(2)], uint16(1+r.IntN(25))
		if f.Outside = r.IntN(2) == 0; f.Outside {
			f.Source = f.Destination
		}
		f.Destination = addr([]string{"192.0.2.11", "192.0.2.21", "203.0.113.11"}[r.IntN(3)])
		if f.Source.Is6() {
			f.Destination = addr([]string{"2001:db8:ff::11", "2001:db8:ff::22"}[r.IntN(2)])
		}
		if f.Outside && f.Destination == addr("203.0.113.11") {
			// a packet from outside to the public address of the pool does not arrive with it
			f.Destination = addr("192.0.2.11")
		}
	}
	f.Late = f.Protocol == unix.IPPROTO_TCP && r.IntN(2) == 0 && f.Destination != addr("203.0.113.11")
	return f
}

// Flows returns at most n flows by id. No two of them look the same on the way.
func (r Random) Flows(n int) map[uint16]nat.Flow {
	flows, seen := map[uint16]nat.Flow{}, map[nat.Flow]bool{}
	for id := uint16(1); id <= uint16(n); id++ {
		f := r.Flow()
		key := f
		key.Late = false // one flow, whatever it begins with
		if f.Protocol == unix.IPPROTO_GRE || f.Protocol == unix.IPPROTO_NONE {
			// only the source distinguishes two such flows, so one address carries only one
			key.Source = netip.Addr{}
		}
		if !seen[key] {
			seen[key] = true
			flows[id] = f
		}
	}
	return flows
}

// RemoveTies removes policies until none tie.
func RemoveTies(c *nat.Config) {
	ties := func() []nat.Tie {
		rules, err := c.Rules()
		if err != nil {
			panic(err)
		}
		return nat.Ties(rules)
	}
	for all := ties(); len(all) > 0; all = ties() {
		c.Policies = slices.DeleteFunc(c.Policies, func(p nat.Policy) bool { return p.Name == all[0].B })
	}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

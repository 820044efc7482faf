package nftables

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// random makes configurations and flows in which much overlaps.
type random struct{ *rand.Rand }

func (r random) prefix(bytes [4]byte) netip.Prefix {
	bits := []int{0, 8, 12, 14, 15, 16, 20, 23, 24, 31, 32}[r.IntN(11)]
	return netip.PrefixFrom(netip.AddrFrom4(bytes), bits).Masked()
}

// inside and outside return addresses of small families of prefixes.
func (r random) inside() [4]byte {
	return [4]byte{10, byte(r.IntN(3)), byte(r.IntN(2)), byte(1 + r.IntN(3))}
}
func (r random) outside() [4]byte {
	return [4]byte{198, byte(50 + r.IntN(3)), byte(r.IntN(2)), byte(1 + r.IntN(3))}
}

// to6 makes an IPv6 address or prefix of an IPv4 one.
func to6(a [4]byte) netip.Addr {
	if a[0] == 10 {
		return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 0xa, a[1], a[2], 15: a[3]})
	}
	return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 0xb0, a[1], a[2], 15: a[3]})
}

func (r random) either(a [4]byte) netip.Prefix {
	if r.IntN(3) > 0 {
		return r.prefix(a)
	}
	bits := []int{0, 32, 48, 52, 56, 60, 64, 127, 128}[r.IntN(9)]
	return netip.PrefixFrom(to6(a), bits).Masked()
}

func (r random) policy(name string) nat.Policy {
	p := nat.Policy{Name: name, Action: nat.SNAT, Pool: []string{"one", "many", "four-only"}[r.IntN(3)]}
	if r.IntN(4) == 0 {
		p.Action, p.Pool = nat.Deny, ""
	}
	for range 1 + r.IntN(3) {
		p.Sources = append(p.Sources, r.either(r.inside()))
	}
	for range r.IntN(3) {
		p.Destinations = append(p.Destinations, r.either(r.outside()))
	}
	p.Protocol = []string{"", "tcp", "udp", "icmp"}[r.IntN(4)]
	if p.Protocol == "tcp" || p.Protocol == "udp" {
		for range r.IntN(3) {
			first := uint16(1 + r.IntN(20))
			p.Ports = append(p.Ports, nat.PortRange{First: first, Last: first + uint16(r.IntN(5))})
		}
	}
	return p
}

func (r random) flow() nat.Flow {
	f := nat.Flow{Protocol: []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_GRE, unix.IPPROTO_NONE}[r.IntN(5)]}
	src, dst := r.inside(), r.outside()
	if f.Source, f.Destination = netip.AddrFrom4(src), netip.AddrFrom4(dst); r.IntN(3) == 0 {
		f.Source, f.Destination = to6(src), to6(dst)
		if f.Protocol == unix.IPPROTO_ICMP {
			f.Protocol = unix.IPPROTO_ICMPV6
		}
		if f.Protocol == unix.IPPROTO_NONE {
			f.Protocol = unix.IPPROTO_GRE // connection tracking, and so NAT, ignores "no next header" of IPv6
		}
	}
	if f.Protocol == unix.IPPROTO_TCP || f.Protocol == unix.IPPROTO_UDP {
		f.Port = uint16(1 + r.IntN(25))
	}
	return f
}

// settle removes policies until none tie.
func settle(c *nat.Config) {
	for ties := nat.Ties(c.Rules()); len(ties) > 0; ties = nat.Ties(c.Rules()) {
		c.Policies = slices.DeleteFunc(c.Policies, func(p nat.Policy) bool { return p.Name == ties[0].B })
	}
}

// TestKernelAgreesWithMatch changes policies at random and sends the first packet of random flows through a router. What comes out, and
// with which source, must be what nat.Config.Match says, and the counters what was sent, across all changes.
func TestKernelAgreesWithMatch(t *testing.T) {
	r := random{rand.New(rand.NewPCG(7, 7))}
	s := newSite(t)
	d := newDriver(t, s.router)
	c := nat.Config{Underlay: "up0", Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")},
		Pools: []nat.Pool{
			pool("one", "192.0.2.11", "2001:db8:ff::11"),
			pool("many", "192.0.2.21", "192.0.2.22", "192.0.2.23", "2001:db8:ff::21", "2001:db8:ff::22", "2001:db8:ff::23", "2001:db8:ff::24"),
			pool("four-only", "192.0.2.31"),
		},
		Zones: []nat.Zone{{Name: "a", Prefixes: pfx("10.0.0.0/16", "10.2.1.0/24")}, {Name: "b", Prefixes: pfx("10.1.0.0/16", "2001:db8:a:100::/56")}}}
	counted := map[string]uint64{}
	var guarded uint64
	outcomes := map[string]int{}
	for round := range 25 {
		for range 1 + r.IntN(4) {
			if n := len(c.Policies); n > 12 || n > 3 && r.IntN(3) == 0 {
				i := r.IntN(n)
				delete(counted, c.Policies[i].Name)
				c.Policies = slices.Delete(slices.Clone(c.Policies), i, i+1)
			}
		}
		for i := range 1 + r.IntN(5) {
			c.Policies = append(slices.Clone(c.Policies), r.policy(fmt.Sprintf("p%d-%d", round, i)))
		}
		if n := len(c.Policies); n > 2 { // edit one, and keep its name
			c.Policies[r.IntN(n)].Sources = []netip.Prefix{r.either(r.inside()), r.either(r.inside())}
		}
		settle(&c)
		c.Pools = slices.Clone(c.Pools)
		for i := range c.Pools { // addresses get other zones, weights and states
			c.Pools[i].Addresses = slices.Clone(c.Pools[i].Addresses)
			for j := range c.Pools[i].Addresses {
				a := &c.Pools[i].Addresses[j]
				a.Zone, a.Weight, a.Down = []string{"", "a", "b", "c"}[r.IntN(4)], uint32(r.IntN(4)), r.IntN(4) == 0
			}
		}
		for name := range counted {
			if !slices.ContainsFunc(c.Policies, func(p nat.Policy) bool { return p.Name == name }) {
				delete(counted, name)
			}
		}
		apply(t, d, c)
		s.forgetFlows()

		flows := map[uint16]nat.Flow{}
		seen := map[nat.Flow]bool{}
		for id := uint16(1); id <= 150; id++ {
			f := r.flow()
			key := f
			if f.Protocol == unix.IPPROTO_GRE || f.Protocol == unix.IPPROTO_NONE {
				key.Source = netip.Addr{} // nothing but the source tells two such flows apart, so one address carries only one
			}
			if seen[key] {
				continue
			}
			seen[key] = true
			flows[id] = f
			s.transmit(f, id, 0x02)
		}
		got := s.receive(100 * time.Millisecond)
		for id, f := range flows {
			want := c.Match(f)
			if want.Policy != "" {
				counted[want.Policy]++
			} else {
				guarded++
			}
			out, passed := got[id]
			outcomes[fmt.Sprint(want.Policy != "", passed)]++
			if passed != want.Address.IsValid() || passed && out.source != want.Address {
				t.Errorf("round %d: %+v: %v %v, want %+v", round, f, passed, out, want)
			}
			delete(got, id)
		}
		for id, out := range got {
			t.Errorf("round %d: nobody sent %d %v", round, id, out)
		}
		state, err := d.Observe(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		have := map[string]uint64{}
		for _, p := range state.Policies {
			if p.Flows.Packets > 0 {
				have[p.Name] = p.Flows.Packets
			}
		}
		for _, p := range c.Policies {
			if have[p.Name] != counted[p.Name] && len(policyRules(c, p.Name)) > 0 {
				t.Errorf("round %d: policy %s counts %d, want %d", round, p.Name, have[p.Name], counted[p.Name])
			}
			if len(policyRules(c, p.Name)) == 0 {
				delete(counted, p.Name)
			}
		}
		if state.Guard.Packets != guarded {
			t.Errorf("round %d: the guard counts %d, want %d", round, state.Guard.Packets, guarded)
		}
		if t.Failed() {
			t.Fatalf("policies %+v\n%s", c.Policies, s.router.Run("nft list table inet isthmus"))
		}
	}
	t.Log(d.Writes(), "transactions;", outcomes)
	for _, want := range []string{"true true", "true false", "false false"} {
		if outcomes[want] < 50 {
			t.Errorf("only %d flows of kind %q", outcomes[want], want)
		}
	}
}

func policyRules(c nat.Config, name string) []nat.Rule {
	return slices.DeleteFunc(c.Rules(), func(r nat.Rule) bool { return r.Policy.Name != name })
}

// TestLayersDoNotOverlap checks what the kernel requires of a map's elements, and that precedence decides between layers.
func TestLayersDoNotOverlap(t *testing.T) {
	for seed := range uint64(60) {
		r := random{rand.New(rand.NewPCG(seed, 3))}
		c := nat.Config{Underlay: "up0"}
		for i := range 60 {
			c.Policies = append(c.Policies, r.policy(fmt.Sprint("p", i)))
		}
		settle(&c)
		set, err := compile(c)
		if err != nil {
			t.Fatal(err)
		}
		rules := c.Rules()
		layer := make([]int, len(rules))
		for i := range rules {
			for name, s := range set.sets {
				if e, ok := s.elements[ruleKey(&rules[i])]; ok && e.policy == rules[i].Policy.Name {
					fmt.Sscanf(name, "policy-%d-", &layer[i])
				}
			}
		}
		for i := range rules {
			for j := range i {
				if a, b := rules[j], rules[i]; a.Source.Overlaps(b.Source) && a.Destination.Overlaps(b.Destination) &&
					(a.Protocol == 0 || b.Protocol == 0 || a.Protocol == b.Protocol && a.Ports.First <= b.Ports.Last && b.Ports.First <= a.Ports.Last) &&
					layer[j] >= layer[i] {
					t.Fatalf("%+v in %d does not come before %+v in %d", a, layer[j], b, layer[i])
				}
			}
		}
	}
}

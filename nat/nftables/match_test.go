package nftables

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
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
	return [4]byte{[]byte{10, 44}[r.IntN(2)], byte(r.IntN(3)), byte(r.IntN(2)), byte(1 + r.IntN(3))}
}
func (r random) outside() [4]byte {
	return [4]byte{198, byte(50 + r.IntN(3)), byte(r.IntN(2)), byte(1 + r.IntN(3))}
}

// to6 makes an IPv6 address or prefix of an IPv4 one.
func to6(a [4]byte) netip.Addr {
	if a[0] == 10 || a[0] == 44 {
		return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, a[0], a[1], a[2], 15: a[3]})
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
	return permitted(p)
}

// permitted takes the sources away that must not leave untranslated.
func permitted(p nat.Policy) nat.Policy {
	if p.Action == nat.NoNAT {
		p.Sources = slices.DeleteFunc(p.Sources, func(src netip.Prefix) bool {
			return slices.ContainsFunc(p.Destinations, func(dst netip.Prefix) bool { return nat.Exposes(src, dst) })
		})
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
			f.Destination = addr("192.0.2.11") // nobody outside sends to the public address of the pool and arrives with it
		}
	}
	f.Late = f.Protocol == unix.IPPROTO_TCP && r.IntN(2) == 0 && f.Destination != addr("203.0.113.11")
	return f
}

// flows returns flows by id, no two of which look the same on the way.
func (r random) flows() map[uint16]nat.Flow {
	flows, seen := map[uint16]nat.Flow{}, map[nat.Flow]bool{}
	for id := uint16(1); id <= 150; id++ {
		f := r.flow()
		key := f
		key.Late = false // one flow, whatever it begins with
		if f.Protocol == unix.IPPROTO_GRE || f.Protocol == unix.IPPROTO_NONE {
			key.Source = netip.Addr{} // nothing but the source tells two such flows apart, so one address carries only one
		}
		if !seen[key] {
			seen[key] = true
			flows[id] = f
		}
	}
	return flows
}

// disagree sends the first packets of flows, and returns what is not as nat.Config.Match says. All servers and proxies are inside.
func (s *site) disagree(c nat.Config, flows map[uint16]nat.Flow) (wrong []string) {
	s.t.Helper()
	s.forgetFlows()
	for id, f := range flows {
		flags := byte(syn)
		if f.Late {
			flags = ack
		}
		s.transmit(f, id, flags)
	}
	s.resets = 0
	outside, inside := s.receive(100*time.Millisecond), s.hear(s.catchInside, 10*time.Millisecond)
	refused := 0
	for id, f := range flows {
		want := c.Match(f)
		if want.Action == nat.Reject && f.Protocol == unix.IPPROTO_TCP && !slices.Contains(c.Own, f.Destination) && !isPool(c, f.Destination) {
			refused++
		}
		out, passed := outside[id]
		delete(outside, id)
		if want.To.IsValid() {
			if passed {
				wrong = append(wrong, fmt.Sprintf("%+v: left as %v, want %+v", f, out, want))
			}
			out, passed = inside[id]
			at := map[bool]int{false: 22, true: 42}[f.Source.Is6()] // of the destination port
			passed = passed && netip.AddrPortFrom(out.destination, binary.BigEndian.Uint16(out.packet[at:])) == want.To
		}
		if passed != want.Address.IsValid() || passed && out.source != want.Address {
			wrong = append(wrong, fmt.Sprintf("%+v: %v %v, want %+v", f, passed, out, want))
		} else if passed && want.Ports != (nat.PortRange{}) {
			if port, has := out.port(); has && (port < want.Ports.First || port > want.Ports.Last) {
				wrong = append(wrong, fmt.Sprintf("%+v leaves with port %d, want one of %v", f, port, want.Ports))
			}
		}
	}
	if s.resets != refused {
		wrong = append(wrong, fmt.Sprintf("%d resets inside, want %d", s.resets, refused))
	}
	for id, out := range outside {
		if out.source != addr("192.0.2.1") && out.source != addr("2001:db8:ff::1") { // the node's own, as an ICMP error
			wrong = append(wrong, fmt.Sprintf("nobody sent %d %v %x", id, out, out.packet))
		}
	}
	return wrong
}

func isPool(c nat.Config, a netip.Addr) bool {
	return slices.ContainsFunc(c.Pools, func(p nat.Pool) bool {
		return slices.ContainsFunc(p.Addresses, func(o nat.PoolAddress) bool { return o.Address == a })
	})
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
	// Half of the sources have a block; the others may not use the pool.
	blocks := pool("blocks", "192.0.2.42", "192.0.2.41", "2001:db8:ff::41")
	blocks.Blocks = &nat.Blocks{Size: 20000, FirstPort: 2000, Sources: []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/30"), netip.MustParsePrefix("10.1.1.2/31"), netip.MustParsePrefix("2001:db8:a:1::2/127"), netip.MustParsePrefix("2001:db8:a::1/128")}}
	c := nat.Config{Underlay: "up0", Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")},
		Pools: []nat.Pool{
			pool("one", "192.0.2.11", "2001:db8:ff::11"),
			pool("many", "192.0.2.21", "192.0.2.22", "192.0.2.23", "2001:db8:ff::21", "2001:db8:ff::22", "2001:db8:ff::23", "2001:db8:ff::24"),
			pool("four-only", "192.0.2.31"), blocks,
		},
		Zones: []nat.Zone{{Name: "a", Prefixes: pfx("10.0.0.0/16", "10.2.1.0/24")}, {Name: "b", Prefixes: pfx("10.1.0.0/16", "2001:db8:a:100::/56")}}}
	c.Pools[0].Addresses[0].Public = addr("203.0.113.11")
	s.router.Run("ip addr add 192.0.2.11/32 dev up0\nip addr add 192.0.2.21/32 dev up0\nip addr add 2001:db8:ff::11/128 dev up0 nodad\nip addr add 2001:db8:ff::22/128 dev up0 nodad")
	for strings.Count(s.router.Run("ip -6 route show table local"), "local 2001:db8:ff::") < 3 { // added a moment later
		time.Sleep(10 * time.Millisecond)
	}
	local := func(a netip.Addr) bool {
		return slices.Contains(strings.Fields("192.0.2.11 192.0.2.21 2001:db8:ff::11 2001:db8:ff::22"), a.String())
	}
	counted := map[string]uint64{}
	unsure := map[string]bool{} // a policy that counted nothing of what it decided, since it ended before
	var guarded uint64
	outcomes := map[string]int{}
	for round := range 45 {
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
			p := &c.Policies[r.IntN(n)]
			p.Sources = []netip.Prefix{r.either(r.inside()), r.either(r.inside())}
			*p = permitted(*p)
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
		flows := r.flows()
		for _, wrong := range s.disagree(c, flows) {
			t.Errorf("round %d: %s", round, wrong)
		}
		for _, f := range flows {
			want := c.Match(f)
			switch {
			case local(f.Destination) && want.Action != nat.DNAT:
				unsure[want.Policy] = true // it ends at the node
			case want.Policy == "" || f.Late && want.Action != nat.Reject && want.Action != nat.DNAT && !want.Address.IsValid() && !picksUp(c, want.Policy):
				guarded++
			default:
				counted[want.Policy]++
				if i := slices.IndexFunc(c.Policies, func(p nat.Policy) bool { return p.Name == want.Policy }); want.Action == nat.SNAT && c.Policies[i].Pool == "blocks" && !want.Address.IsValid() {
					guarded++ // it has no block
				}
			}
			outcomes[fmt.Sprintf("%s %v", want.Action, want.Address.IsValid())]++
			if f.Late {
				outcomes[fmt.Sprintf("late %v", want.Address.IsValid())]++
			}
			if want.Ports != (nat.PortRange{}) {
				outcomes["block"]++
			}
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
			if have[p.Name] != counted[p.Name] && !unsure[p.Name] && len(policyRules(c, p.Name)) > 0 {
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
			t.Fatalf("policies %+v", c.Policies)
		}
	}
	t.Log(d.Writes(), "transactions;", outcomes)
	for _, want := range []string{"snat true", "snat false", "deny false", "reject false", "no-nat true", " false", "late true", "late false", "redirect true", "dnat true", "block"} {
		if outcomes[want] < 10 {
			t.Errorf("only %d flows of kind %q", outcomes[want], want)
		}
	}
}

// TestMutationIsSeen changes the kernel's rules by hand and expects that the comparison above finds it.
func TestMutationIsSeen(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := nat.Config{Underlay: "up0", Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")}, Pools: []nat.Pool{pool("one", "192.0.2.11"), pool("two", "192.0.2.21")}}
	c.Policies = []nat.Policy{
		{Name: "all", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Pool: "one"},
		{Name: "some", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.50.0.0/16"), Pool: "two", Pickup: true},
		{Name: "plain", Action: nat.NoNAT, Sources: pfx("44.0.0.0/8"), Destinations: pfx("198.50.0.0/16")},
		{Name: "no", Action: nat.Deny, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.0.0/16"), Protocol: "udp"},
		{Name: "never", Action: nat.Reject, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.0.0/16"), Protocol: "tcp"},
		{Name: "proxy", Action: nat.Redirect, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.52.0.0/16"), Protocol: "tcp", To: netip.MustParseAddrPort("172.17.0.1:3128")},
		{Name: "web", Action: nat.DNAT, Sources: pfx("0.0.0.0/0"), Protocol: "tcp", Ports: []nat.PortRange{{First: 1, Last: 20}}, Pool: "one", To: netip.AddrPortFrom(addr("172.17.0.2"), 0)},
	}
	s.router.Run("ip addr add 192.0.2.11/32 dev up0\nip addr add 192.0.2.21/32 dev up0")
	apply(t, d, c)
	r := random{rand.New(rand.NewPCG(1, 1))}
	flows := r.flows()
	for id := uint16(151); id <= 600; id++ { // more, but no two alike
		f := r.flow()
		f.Protocol, f.Port = unix.IPPROTO_TCP, uint16(1+r.IntN(25))
		if !slices.ContainsFunc(slices.Collect(maps.Values(flows)), func(o nat.Flow) bool { o.Late = f.Late; return o == f }) {
			flows[id] = f
		}
	}
	maps.DeleteFunc(flows, func(_ uint16, f nat.Flow) bool { return f.Source.Is6() })
	if wrong := s.disagree(c, flows); len(wrong) > 0 {
		t.Fatalf("before any mutation: %q", wrong)
	}
	for _, command := range []string{
		"flush chain inet isthmus egress",
		"flush chain inet isthmus forward",
		"flush chain inet isthmus arrival",
		"flush chain inet isthmus pool-two-4",
		"flush chain inet isthmus to-web",
		"insert rule inet isthmus egress oifname up0 accept",
		"insert rule inet isthmus policy-4 accept",
		"insert rule inet isthmus pickup-4 goto dropped",
		"insert rule inet isthmus plain-4 goto dropped",
		"delete element inet isthmus own4 { 192.0.2.21 }",
		"flush map inet isthmus plain-1-4",
		"flush map inet isthmus policy-1-4",
		"flush map inet isthmus policy-2-4",
		"flush map inet isthmus pickup-1-4",
		"flush map inet isthmus reject-1-4",
		"flush map inet isthmus proxy-1-4",
		"flush map inet isthmus front-1-4",
		"flush map inet isthmus hairpin4",
	} {
		s.router.Run("nft " + command)
		if wrong := s.disagree(c, flows); len(wrong) == 0 {
			t.Errorf("nothing is seen of %q", command)
		}
		apply(t, d, c)
	}
	if wrong := s.disagree(c, flows); len(wrong) > 0 {
		t.Errorf("after all was mended: %q", wrong)
	}
}

func picksUp(c nat.Config, name string) bool {
	return slices.ContainsFunc(c.Policies, func(p nat.Policy) bool { return p.Name == name && p.Pickup })
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

package nftables

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/traffic"
	"golang.org/x/sys/unix"
)

// disagree sends the first packets of flows, and returns those whose result differs from
// nat.Config.Match. All servers and proxies are inside.
func (s *site) disagree(c nat.Config, flows map[uint16]nat.Flow) []string {
	s.t.Helper()
	s.forgetFlows()
	arrived, err := traffic.Site{Inside: s.in, Outside: s.out, Servers: s.in}.Send(flows)
	if err != nil {
		s.t.Fatal(err)
	}
	return arrived.Wrong(flows, c.Own, func(f nat.Flow) traffic.Fate {
		want := c.Match(f)
		fate := traffic.Fate{To: want.To, Ports: want.Ports, Why: fmt.Sprintf("%+v", want)}
		if want.Address.IsValid() {
			fate.Sources = []netip.Addr{want.Address}
		}
		fate.Reset = want.Action == nat.Reject && f.Protocol == unix.IPPROTO_TCP && !slices.Contains(c.Own, f.Destination) && !isPool(c, f.Destination)
		return fate
	})
}

func isPool(c nat.Config, a netip.Addr) bool {
	return slices.ContainsFunc(c.Pools, func(p nat.Pool) bool {
		return slices.ContainsFunc(p.Addresses, func(o nat.PoolAddress) bool { return o.Address == a })
	})
}

// TestKernelAgreesWithMatch changes policies at random and sends the first packets of random flows
// through a router. The packets that leave, and their sources, must be those that nat.Config.Match
// returns, and the counters must match the packets sent, across all changes.
func TestKernelAgreesWithMatch(t *testing.T) {
	r := traffic.Random{Rand: rand.New(rand.NewPCG(7, 7))}
	s := newSite(t)
	d := newDriver(t, s.router)
	// Half of the sources have a block; the others may not use the pool.
	blocks := pool("blocks", "192.0.2.42", "192.0.2.41", "2001:db8:ff::41")
	blocks.Blocks = &nat.Blocks{Size: 20000, FirstPort: 2000, Sources: []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/30"), netip.MustParsePrefix("10.1.1.2/31"), netip.MustParsePrefix("2001:db8:a:1::2/127"), netip.MustParsePrefix("2001:db8:a::1/128")}}
	c := nat.Config{Underlay: "up0", Attachments: inside("tun0"), Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")},
		Pools: []nat.Pool{
			pool("one", "192.0.2.11", "2001:db8:ff::11"),
			pool("many", "192.0.2.21", "192.0.2.22", "192.0.2.23", "2001:db8:ff::21", "2001:db8:ff::22", "2001:db8:ff::23", "2001:db8:ff::24"),
			pool("four-only", "192.0.2.31"), blocks,
		},
		Zones: []nat.Zone{{Name: "a", Prefixes: pfx("10.0.0.0/16", "10.2.1.0/24")}, {Name: "b", Prefixes: pfx("10.1.0.0/16", "2001:db8:a:100::/56")}}}
	c.Pools[0].Addresses[0].Public = addr("203.0.113.11")
	s.router.Run("ip addr add 192.0.2.11/32 dev up0\nip addr add 192.0.2.21/32 dev up0\nip addr add 2001:db8:ff::11/128 dev up0 nodad\nip addr add 2001:db8:ff::22/128 dev up0 nodad")
	// added a moment later
	for strings.Count(s.router.Run("ip -6 route show table local"), "local 2001:db8:ff::") < 3 {
		time.Sleep(10 * time.Millisecond)
	}
	local := func(a netip.Addr) bool {
		return slices.Contains(strings.Fields("192.0.2.11 192.0.2.21 2001:db8:ff::11 2001:db8:ff::22"), a.String())
	}
	counted := map[string]uint64{}
	// policies that may have decided flows without counting them, because these ended earlier
	unsure := map[string]bool{}
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
			c.Policies = append(slices.Clone(c.Policies), r.Policy(fmt.Sprintf("p%d-%d", round, i)))
		}
		if n := len(c.Policies); n > 2 { // edit one policy, and keep its name
			p := &c.Policies[r.IntN(n)]
			p.Sources = []netip.Prefix{r.Source(), r.Source()}
			*p = traffic.Permitted(*p)
		}
		traffic.RemoveTies(&c)
		c.Pools = slices.Clone(c.Pools)
		for i := range c.Pools { // change zones, weights and states of addresses
			c.Pools[i].Shared = r.IntN(2) == 0
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
		flows := r.Flows(150)
		for _, wrong := range s.disagree(c, flows) {
			t.Errorf("round %d: %s", round, wrong)
		}
		for _, f := range flows {
			want := c.Match(f)
			switch {
			case local(f.Destination) && want.Action != nat.DNAT:
				unsure[want.Policy] = true // the flow ends at the node
			case want.Policy == "" || f.Late && want.Action != nat.Reject && want.Action != nat.DNAT && !want.Address.IsValid() && !picksUp(c, want.Policy):
				guarded++
			default:
				counted[want.Policy]++
				if i := slices.IndexFunc(c.Policies, func(p nat.Policy) bool { return p.Name == want.Policy }); want.Action == nat.SNAT && c.Policies[i].Pool == "blocks" && !want.Address.IsValid() {
					guarded++ // the source has no block
				}
			}
			outcomes[fmt.Sprintf("%s %v", want.Action, want.Address.IsValid())]++
			if f.Late {
				outcomes[fmt.Sprintf("late %v", want.Address.IsValid())]++
				first := f
				first.Late = false
				if want.Address.IsValid() && want.Address != c.Match(first).Address {
					outcomes["home"]++
				}
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
	if outcomes["home"] == 0 {
		t.Error("no late flow kept an address that new flows do not get")
	}
}

// TestMutationIsSeen changes the kernel's rules by hand and checks that the comparison above
// detects it.
func TestMutationIsSeen(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	c := nat.Config{Underlay: "up0", Attachments: inside("tun0"), Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")}, Pools: []nat.Pool{pool("one", "192.0.2.11"), pool("two", "192.0.2.21")}}
	c.Policies = []nat.Policy{
		{Name: "all", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Pool: "one"},
		{Name: "some", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.50.0.0/16"), Pool: "two", Pickup: true},
		{Name: "plain", Action: nat.NoNAT, Sources: pfx("44.0.0.0/8"), Destinations: pfx("198.50.0.0/16")},
		{Name: "no", Action: nat.Deny, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.0.0/16"), Protocol: "udp"},
		{Name: "never", Action: nat.Reject, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.51.0.0/16"), Protocol: "tcp"},
		{Name: "proxy", Action: nat.Redirect, Sources: pfx("10.0.0.0/8"), Destinations: pfx("198.52.0.0/16"), Protocol: "tcp", To: netip.MustParseAddrPort("172.17.0.1:3128")},
		{Name: "web", Action: nat.DNAT, Sources: pfx("0.0.0.0/0"), Protocol: "tcp", Ports: []nat.PortRange{{First: 1, Last: 20}}, Pool: "one", To: netip.AddrPortFrom(addr("172.17.0.2"), 0)},
	}
	c.Pools[1].Shared = true
	s.router.Run("ip addr add 192.0.2.11/32 dev up0\nip addr add 192.0.2.21/32 dev up0")
	apply(t, d, c)
	r := traffic.Random{Rand: rand.New(rand.NewPCG(1, 1))}
	flows := r.Flows(150)
	for id := uint16(151); id <= 600; id++ { // more flows, but all different
		f := r.Flow()
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
		"flush chain inet isthmus late-two-4",
		"flush map inet isthmus late-two-4",
		"flush chain inet isthmus to-web",
		"insert rule inet isthmus egress oifname up0 accept",
		"insert rule inet isthmus policy-4 accept",
		"insert rule inet isthmus pickup-4 goto dropped",
		"insert rule inet isthmus plain-4 goto dropped",
		"insert rule inet isthmus guard-own ip saddr 192.0.2.21 drop",
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
			t.Errorf("%q is not detected", command)
		}
		apply(t, d, c)
	}
	if wrong := s.disagree(c, flows); len(wrong) > 0 {
		t.Errorf("after all was restored: %q", wrong)
	}
}

func picksUp(c nat.Config, name string) bool {
	return slices.ContainsFunc(c.Policies, func(p nat.Policy) bool { return p.Name == name && p.Pickup })
}

func policyRules(c nat.Config, name string) []nat.Rule {
	rules, err := c.Rules()
	if err != nil {
		panic(err)
	}
	return slices.DeleteFunc(rules, func(r nat.Rule) bool { return r.Policy.Name != name })
}

// TestLayersDoNotOverlap checks the kernel's requirements on the elements of a map, and that
// precedence decides between layers.
func TestLayersDoNotOverlap(t *testing.T) {
	for seed := range uint64(60) {
		r := traffic.Random{Rand: rand.New(rand.NewPCG(seed, 3))}
		c := nat.Config{Underlay: "up0", Attachments: inside("tun0")}
		for i := range 60 {
			c.Policies = append(c.Policies, r.Policy(fmt.Sprint("p", i)))
		}
		traffic.RemoveTies(&c)
		set, err := compile(c)
		if err != nil {
			t.Fatal(err)
		}
		rules, err := c.Rules()
		if err != nil {
			t.Fatal(err)
		}
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

// TestProxyBeforeFront sends a flow from inside to an address with a port forward, which a more
// specific policy redirects to a proxy.
func TestProxyBeforeFront(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	p := pool("p", "192.0.2.11", "2001:db8:ff::11")
	p.Addresses[0].Public, p.Addresses[1].Public = addr("203.0.113.11"), addr("2001:db8:c::11")
	https := []nat.PortRange{{First: 443, Last: 443}}
	c := nat.Config{Underlay: "up0", Attachments: inside("tun0"), Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")}, Pools: []nat.Pool{p}}
	for suffix, k := range map[string]struct{ inside, client, public, server, proxy string }{
		"4": {"10.0.0.0/8", "10.0.0.0/24", "203.0.113.11/32", "172.17.0.1:8443", "172.17.0.2:3128"},
		"6": {"2001:db8:a::/48", "2001:db8:a::/64", "2001:db8:c::11/128", "[2001:db8:a:ffff::1]:8443", "[2001:db8:a:ffff::2]:3128"},
	} {
		c.Policies = append(c.Policies,
			nat.Policy{Name: "open" + suffix, Action: nat.DNAT, Pool: "p", Sources: pfx(k.inside), Protocol: "tcp", Ports: https, To: netip.MustParseAddrPort(k.server)},
			nat.Policy{Name: "proxy" + suffix, Action: nat.Redirect, Sources: pfx(k.client), Destinations: pfx(k.public), Protocol: "tcp", Ports: https, To: netip.MustParseAddrPort(k.proxy)})
	}
	apply(t, d, c)
	flows := map[uint16]nat.Flow{}
	for i, k := range [][2]string{{"10.0.0.1", "203.0.113.11"}, {"10.1.0.1", "203.0.113.11"}, {"2001:db8:a::1", "2001:db8:c::11"}, {"2001:db8:a:1::1", "2001:db8:c::11"}} {
		f := nat.Flow{Source: addr(k[0]), Destination: addr(k[1]), Protocol: unix.IPPROTO_TCP, Port: 443}
		flows[uint16(i+1)] = f
		if want := []nat.Action{nat.Redirect, nat.DNAT}[i%2]; c.Match(f).Action != want {
			t.Errorf("%v matches %+v, want %s", f, c.Match(f), want)
		}
	}
	for _, wrong := range s.disagree(c, flows) {
		t.Error(wrong)
	}
}

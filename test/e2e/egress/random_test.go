package egress

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// seedVariable repeats a run of TestRandomPolicies.
const seedVariable = "ISTHMUS_SEED"

// node is the hub's own address in TestRandomPolicies.
var node = netip.MustParseAddr("192.0.2.100")

// The networks behind the hub's two inside interfaces.
const (
	insidePrefixes = "10.0.0.0/8 44.0.0.0/8 2001:db8:a::/48 2001:db8:2c::/48"
	serverPrefixes = "172.17.0.0/16 2001:db8:a:ffff::/64"
)

// site is a hub between taps that see every packet.
type site struct {
	*world
	traffic.Site
}

// beginSite builds it: all links have one address and no neighbour discovery, so that every packet
// arrives at once.
func beginSite(t *testing.T) *site {
	l, err := lab.New(lab.Options{})
	s := &site{world: &world{T: t}}
	s.ok(err)
	t.Cleanup(func() {
		if t.Failed() && s.hub != nil && s.hub.Process != nil {
			log, _ := os.ReadFile(s.hub.Process.Log)
			t.Logf("%s", log)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	s.hub, s.inside, s.partner, s.proxy = daemon.New(l.Node("hub"), daemon.Build(t, "../../..")), l.Node("inside"), l.Node("partner"), l.Node("proxy")
	for name, other := range map[string]*lab.Node{"in0": s.inside, "wan": s.partner, "px0": s.proxy} {
		l.Link(lab.End{Node: s.hub.Node, Name: name}, lab.End{Node: other, Name: "r0"})
		for n, dev := range map[*lab.Node]string{s.hub.Node: name, other: "r0"} {
			n.IP("link set %s down", dev)
			n.IP("link set %s address 02:00:00:00:00:01 arp off", dev)
			n.IP("link set %s up", dev)
		}
		other.IP("route add 0.0.0.0/0 dev r0")
		other.IP("route add ::/0 dev r0")
	}
	s.hub.IP("addr add %v/32 dev wan", node)
	s.hub.IP("addr add 172.31.1.1/32 dev px0")
	s.hub.IP("addr add 2001:db8:fe::1/128 dev px0")
	for dev, prefixes := range map[string]string{"in0": insidePrefixes, "px0": serverPrefixes, "wan": "0.0.0.0/0 ::/0"} {
		for _, p := range daemon.Prefixes(strings.Fields(prefixes)...) {
			s.hub.IP("route add %v dev %s", p, dev)
		}
	}
	for _, a := range []string{"172.17.0.9/32", "2001:db8:a:ffff::9/128"} { // without a listener
		s.proxy.IP("addr add %s dev lo", a)
	}
	s.ok(l.Up(t.Context()))
	for _, n := range []*lab.Node{s.inside, s.partner, s.proxy} {
		s.ok(n.Sysctl("ipv4/ip_forward", "0"))
		s.ok(n.Sysctl("ipv6/conf/all/forwarding", "0"))
	}
	// Packets of the taps get no answer; the probes do.
	_, err = s.proxy.ExecInput(t.Context(), `table inet quiet {
		chain input { type filter hook input priority 0; ip saddr != 172.31.1.1 drop; ip6 saddr != 2001:db8:fe::1 drop; }
	}`, "nft", "-f", "-")
	s.ok(err)
	for n, tap := range map[*lab.Node]**traffic.Tap{s.inside: &s.Inside, s.partner: &s.Outside, s.proxy: &s.Servers} {
		s.ok(n.Do(func() (err error) { *tap, err = traffic.OpenTap(); return err }))
		t.Cleanup((*tap).Close)
	}
	s.leaks, err = s.partner.Capture("", daemon.Prefixes("10.0.0.0/8", "172.16.0.0/12")...)
	s.ok(err)
	s.hub.Start(t)
	return s
}

var randomPools = []nat.Pool{
	randomPool("one", "192.0.2.11", "2001:db8:ff::11"),
	randomPool("many", "192.0.2.21", "192.0.2.22", "192.0.2.23", "2001:db8:ff::21", "2001:db8:ff::22", "2001:db8:ff::23", "2001:db8:ff::24"),
	randomPool("four-only", "192.0.2.31"),
}

// randomPool returns a pool. Its first address has another public address in the pool "one".
func randomPool(name string, addresses ...string) nat.Pool {
	p := nat.Pool{Name: name}
	for _, text := range addresses {
		a := netip.MustParseAddr(text)
		p.Addresses = append(p.Addresses, nat.PoolAddress{Address: a, Public: a})
	}
	if name == "one" {
		p.Addresses[0].Public = netip.MustParseAddr("203.0.113.11")
	}
	return p
}

// legal turns a policy that the driver accepts into one that a document may have, if it can.
func legal(p nat.Policy) (nat.Policy, bool) {
	if p.Pool == "blocks" {
		p.Pool = "many"
	}
	p.Destinations = slices.DeleteFunc(p.Destinations, func(d netip.Prefix) bool { return p.Action == nat.NoNAT && d.Bits() == 0 })
	p.Sources = slices.DeleteFunc(p.Sources, func(src netip.Prefix) bool {
		return p.To.IsValid() && src.Addr().Is4() != p.To.Addr().Is4() || // another family
			p.Action == nat.Redirect && src.Contains(p.To.Addr()) || // a loop
			p.Action == nat.SNAT && p.Pool == "four-only" && src.Addr().Is6()
	})
	p = traffic.Permitted(p)
	for _, list := range []*[]netip.Prefix{&p.Sources, &p.Destinations} {
		slices.SortFunc(*list, netip.Prefix.Compare)
		*list = slices.Compact(*list)
	}
	slices.SortFunc(p.Ports, func(a, b nat.PortRange) int { return cmp.Compare(a.First, b.First) })
	var ports []nat.PortRange
	for _, r := range p.Ports {
		if n := len(ports); n > 0 && r.First <= ports[n-1].Last {
			ports[n-1].Last = max(ports[n-1].Last, r.Last)
		} else {
			ports = append(ports, r)
		}
	}
	p.Ports = ports
	if p.Action == nat.Redirect && p.Down {
		dead := "172.17.0.9:3128"
		if p.To.Addr().Is6() {
			dead = "[2001:db8:a:ffff::9]:3128"
		}
		p.To = netip.MustParseAddrPort(dead)
	}
	return p, len(p.Sources) > 0
}

// distinct returns size policies that do not tie, whether their proxies are down or not.
func distinct(r traffic.Random, round, size int) []nat.Policy {
	c := nat.Config{Pools: randomPools}
	down := map[string]bool{}
	for i := 0; len(c.Policies) < size; i++ {
		if p, ok := legal(r.Policy(fmt.Sprintf("p%d-%d", round, i))); ok {
			down[p.Name], p.Down = p.Down, false
			c.Policies = append(c.Policies, p)
			traffic.RemoveTies(&c)
		}
	}
	for i := range c.Policies {
		c.Policies[i].Down = down[c.Policies[i].Name]
	}
	return c.Policies
}

// randomDocument writes it as a user would.
func randomDocument(policies []nat.Policy) (string, error) {
	texts := func(prefixes []netip.Prefix) (out []string) {
		for _, p := range prefixes {
			out = append(out, p.String())
		}
		return out
	}
	egress := &isthmusv1.Egress{}
	for _, p := range randomPools {
		out := &isthmusv1.Pool{Name: p.Name}
		for _, a := range p.Addresses {
			out.Addresses = append(out.Addresses, &isthmusv1.PoolAddress{Address: a.Address.String(), PublicAddress: a.Public.String()})
		}
		egress.Pools = append(egress.Pools, out)
	}
	for _, p := range policies {
		out := &isthmusv1.EgressPolicy{Name: p.Name, Action: string(p.Action), Sources: texts(p.Sources), Destinations: texts(p.Destinations), Protocol: p.Protocol, Pool: p.Pool, Pickup: p.Pickup}
		for _, r := range p.Ports {
			out.Ports = append(out.Ports, r.String())
		}
		if t := p.Timeouts; t != (nat.Timeouts{}) {
			out.Timeouts = &isthmusv1.FlowTimeouts{TcpEstablished: durationpb.New(t.TCPEstablished), UdpStream: durationpb.New(t.UDPStream)}
		}
		if p.To.IsValid() {
			if out.To = p.To.String(); p.To.Port() == 0 {
				out.To = p.To.Addr().String()
			}
		}
		if p.Bypass {
			out.WhenDown = "bypass"
		}
		if p.Down { // probed once, and not again while the test listens
			out.Probes = &isthmusv1.Probes{Targets: []string{"tcp://" + p.To.String()}, Fall: 1, Interval: durationpb.New(time.Hour)}
		}
		egress.Policies = append(egress.Policies, out)
	}
	attachments := []*isthmusv1.Attachment{
		{Name: "inside", Interface: "in0", Sources: strings.Fields(insidePrefixes)}, {Name: "servers", Interface: "px0", Sources: strings.Fields("172.31.1.1/32 2001:db8:fe::/64 " + serverPrefixes)},
	}
	return spec.Encode(&isthmusv1.Spec{Attachments: attachments, Node: &isthmusv1.Node{Name: "hub"}, Underlay: &isthmusv1.Underlay{Interface: "wan", Address: node.String()}, Egress: egress})
}

// model implements the documentation of EgressPolicy, and shares no code with the implementation of
// policies.
type model []nat.Policy

// opened returns the addresses of a pool, or of all pools if the name is empty. With public it also
// returns their public addresses.
func opened(pool string, public bool) (all []netip.Addr) {
	for _, p := range randomPools {
		for _, a := range p.Addresses {
			if p.Name != pool && pool != "" {
				continue
			}
			if all = append(all, a.Address); public {
				all = append(all, a.Public)
			}
		}
	}
	return all
}

// winner returns the policy that decides, nil if none does.
func (m model) winner(f nat.Flow) (winner *nat.Policy) {
	longest := func(prefixes []netip.Prefix, a netip.Addr) int {
		bits := -1
		for _, p := range prefixes {
			if p.Contains(a) {
				bits = max(bits, p.Bits())
			}
		}
		return bits
	}
	protocol := map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "icmp"}[f.Protocol]
	best := []int{-1}
	for i := range m {
		p := &m[i]
		rank := []int{0, 0, longest(p.Sources, f.Source)}
		switch {
		case p.Action == nat.DNAT:
			if !slices.Contains(opened(p.Pool, true), f.Destination) {
				continue
			}
			rank[0] = f.Destination.BitLen()
		case len(p.Destinations) > 0:
			rank[0] = longest(p.Destinations, f.Destination)
		}
		switch {
		case len(p.Ports) > 0:
			rank[1] = 2
		case p.Protocol != "":
			rank[1] = 1
		}
		if rank[0] < 0 || rank[2] < 0 || p.Protocol != "" && p.Protocol != protocol || p.Action == nat.Redirect && p.Down && p.Bypass ||
			len(p.Ports) > 0 && !slices.ContainsFunc(p.Ports, func(r nat.PortRange) bool { return r.First <= f.Port && f.Port <= r.Last }) {
			continue
		}
		if slices.Compare(rank, best) > 0 {
			winner, best = p, rank
		}
	}
	return winner
}

// fate returns the expected result of a flow.
func (m model) fate(f nat.Flow) (fate traffic.Fate) {
	p := m.winner(f)
	if p == nil {
		return traffic.Fate{Why: "no policy"}
	}
	fate.Why = fmt.Sprintf("%s %s", p.Action, p.Name)
	here := f.Destination == node || slices.Contains(opened("", false), f.Destination)
	switch {
	case p.Action == nat.Reject, p.Action == nat.Redirect && p.Down:
		fate.Reset = f.Protocol == unix.IPPROTO_TCP && !here
	case p.Action == nat.Deny, f.Late && !p.Pickup:
	case p.Action == nat.DNAT, p.Action == nat.Redirect && !here && !f.Outside:
		fate.Sources, fate.To = []netip.Addr{f.Source}, p.To
		if p.To.Port() == 0 {
			fate.To = netip.AddrPortFrom(p.To.Addr(), f.Port)
		}
		if p.Action == nat.DNAT && !f.Outside {
			fate.Sources[0] = f.Destination
		}
	case here || f.Outside:
	case p.Action == nat.NoNAT:
		fate.Sources = []netip.Addr{f.Source}
	case p.Action == nat.SNAT:
		fate.Sources = slices.DeleteFunc(opened(p.Pool, false), func(a netip.Addr) bool { return a.Is4() != f.Source.Is4() })
	}
	return fate
}

// TestRandomPolicies applies random documents and sends the first packets of random flows. The
// interface and the source with which each packet leaves must be those of a model that has been
// written after the documentation, and so must be the result of nat.Config.Match.
func TestRandomPolicies(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv(seedVariable); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s=%d", seedVariable, seed)
	r := traffic.Random{Rand: rand.New(rand.NewPCG(seed, 0))}
	s := beginSite(t)
	const rounds, size = 15, 40
	outcomes := map[string]int{}
	sent := 0
	type client struct {
		pool   string
		source netip.Addr
	}
	as := map[client]netip.Addr{}
	// sources that may be moved, since a flow without ports has an address for itself
	alone := map[[2]netip.Addr]bool{}
	for round := range rounds {
		c := nat.Config{Underlay: "wan", Own: []netip.Addr{node}, Pools: randomPools}
		c.Policies = distinct(r, round, size)
		document, err := randomDocument(c.Policies)
		s.ok(err)
		s.hub.Apply(t, document)
		down := 0
		for _, p := range c.Policies {
			if p.Down {
				down++
			}
		}
		s.down(down)
		s.ok(s.hub.Do(traffic.Forget))
		_, err = s.Servers.Receive(time.Millisecond) // packets of the probes
		s.ok(err)
		flows := r.Flows(400)
		heard, err := s.Send(flows)
		s.ok(err)
		for _, f := range flows {
			if nat.Portless(f.Protocol) {
				alone[[2]netip.Addr{f.Source, f.Destination}] = true
			}
		}
		m := model(c.Policies)
		for _, wrong := range heard.Wrong(flows, c.Own, m.fate) {
			t.Errorf("round %d: %s", round, wrong)
		}
		for id, f := range flows {
			fate, match := m.fate(f), c.Match(f)
			if match.Address.IsValid() != (len(fate.Sources) > 0) || match.Address.IsValid() && !slices.Contains(fate.Sources, match.Address) || match.Address.IsValid() && match.To != fate.To {
				t.Errorf("round %d: %+v: Match says %+v, the model %+v", round, f, match, fate)
			}
			p := m.winner(f)
			if p == nil {
				outcomes["no policy"]++
				continue
			}
			outcomes[fmt.Sprintf("%s %v", p.Action, len(fate.Sources) > 0)]++
			if out, left := heard.Outside.Packets[id]; left && p.Action == nat.SNAT && !alone[[2]netip.Addr{f.Source, f.Destination}] {
				k := client{p.Pool, f.Source}
				if former, known := as[k]; known && former != out.Source {
					t.Errorf("round %d: %+v leaves as %v, and left as %v before", round, f, out.Source, former)
				}
				as[k] = out.Source
			}
		}
		sent += len(flows)
		if t.Failed() {
			t.Fatalf("the document:\n%s", document)
		}
	}
	t.Logf("%d flows through %d documents of %d policies: %v", sent, rounds, size, outcomes)
	for _, want := range []string{"snat true", "snat false", "no-nat true", "deny false", "reject false", "redirect true", "redirect false", "dnat true", "no policy"} {
		if outcomes[want] == 0 {
			t.Errorf("no flow of kind %q", want)
		}
	}
	if n, who, err := s.leaks.Stop(); n > 0 || err != nil {
		t.Errorf("%d packets left with an inside source (%v): %v", n, who, err)
	}
}

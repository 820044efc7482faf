package nftables

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// sides is a router with two attachments, an underlay with the network of a third attachment
// behind it, and an interface that no document names. Each has a tap on its other side.
type sides struct {
	*site
	taps   map[string]*traffic.Tap
	routes map[string][]netip.Prefix
}

func newSides(t *testing.T) *sides {
	s := &sides{site: newSite(t), routes: map[string][]netip.Prefix{
		"tun0":  pfx("10.0.0.0/8", "2001:db8:a::/48"),
		"tun1":  pfx("172.16.0.0/16", "2001:db8:c::/48"),
		"mgmt0": pfx("192.168.0.0/16", "2001:db8:d::/48"),
		"up0":   pfx("0.0.0.0/0", "10.50.0.0/16", "::/0"),
	}}
	s.taps = map[string]*traffic.Tap{"tun0": s.in, "up0": s.out}
	for _, name := range []string{"tun1", "mgmt0"} {
		other := netns.New(t)
		netns.Veth(s.router, name, other, "far0")
		s.router.Run("ip link set " + name + " down\nip link set " + name + " address 02:00:00:00:00:01 arp off\nip link set " + name + " up")
		s.router.Run("sysctl -qw net.ipv4.conf." + name + ".rp_filter=0 net.ipv4.conf." + name + ".send_redirects=0")
		other.Run("sysctl -qw net.ipv6.auto_flowlabels=0\nip link set far0 down\nip link set far0 address 02:00:00:00:00:01 arp off\nip link set far0 up\nip route add default dev far0\nip -6 route add default dev far0\nsysctl -qw net.ipv4.ip_forward=0")
		var err error
		other.Do(func() { s.taps[name], err = traffic.OpenTap() })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.taps[name].Close)
		for _, p := range s.routes[name] {
			s.router.Run(fmt.Sprintf("ip route add %v dev %s", p, name))
		}
	}
	s.router.Run("ip route add 10.50.0.0/16 dev up0")
	s.router.Run("ip addr add 198.18.0.10/32 dev mgmt0\nip addr add 192.0.2.11/32 dev up0\nip -6 addr add 2001:db8:ff::11/128 dev up0 nodad\nip -6 addr add 2001:db8:d::10/128 dev mgmt0 nodad")
	// added a moment later
	for strings.Count(s.router.Run("ip -6 route show table local"), "local 2001:db8:") < 3 {
		time.Sleep(10 * time.Millisecond)
	}
	return s
}

// way returns the interface by which the router sends to an address.
func (s *sides) way(a netip.Addr) (out string) {
	bits := -1
	for name, prefixes := range s.routes {
		for _, p := range prefixes {
			if p.Contains(a) && p.Bits() > bits {
				out, bits = name, p.Bits()
			}
		}
	}
	return out
}

func sidesConfig() nat.Config {
	return nat.Config{
		Underlay: "up0", Own: []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1"), addr("198.18.0.10"), addr("2001:db8:d::10")},
		Attachments: []nat.Attachment{
			{Interface: "tun0", Sources: pfx("10.0.0.0/16", "10.3.0.0/16", "2001:db8:a::/48")},
			{Interface: "tun1", Sources: pfx("172.16.0.0/17", "10.9.1.0/24", "10.9.3.0/24", "10.9.4.0/23", "2001:db8:c::/48", "2001:db8:c:1::/64")},
			{Interface: "up0", Sources: pfx("10.200.0.0/24", "2001:db8:e::/64")},
		},
		Pools: []nat.Pool{pool("p", "192.0.2.11", "2001:db8:ff::11")},
		Policies: []nat.Policy{
			{Name: "all", Action: nat.SNAT, Sources: pfx("10.0.0.0/8", "172.16.0.0/12", "2001:db8::/40"), Pool: "p", Pickup: true},
			{Name: "partner", Action: nat.NoNAT, Sources: pfx("172.16.1.0/24"), Destinations: pfx("10.50.0.0/16")},
			{Name: "partner6", Action: nat.NoNAT, Sources: pfx("2001:db8:c:1::/64"), Destinations: pfx("2001:db8:b:1::/64")},
			{Name: "metadata", Action: nat.SNAT, Sources: pfx("10.0.1.0/24"), Destinations: pfx("169.254.169.254/32"), Protocol: "tcp", Ports: []nat.PortRange{{First: 80, Last: 80}}, Pool: "p"},
			{Name: "smtp", Action: nat.Reject, Sources: pfx("0.0.0.0/0", "::/0"), Protocol: "tcp", Ports: []nat.PortRange{{First: 25, Last: 25}}},
			{Name: "open", Action: nat.DNAT, Sources: pfx("0.0.0.0/0"), Protocol: "tcp", Ports: []nat.PortRange{{First: 443, Last: 443}}, Pool: "p", To: netip.MustParseAddrPort("172.16.1.5:8443")},
			{Name: "open6", Action: nat.DNAT, Sources: pfx("::/0"), Protocol: "tcp", Ports: []nat.PortRange{{First: 443, Last: 443}}, Pool: "p", To: netip.MustParseAddrPort("[2001:db8:c:1::5]:8443")},
		},
	}
}

// fate returns where the first packet of a flow comes out that came by an interface, with which
// source and destination. out is empty when it must not come out. It follows the documentation of
// nat.Attachment and nat.Policy.
func (s *sides) fate(c nat.Config, in string, f nat.Flow) (out string, source, destination netip.Addr, why string) {
	reason := func(out string, opened bool) nat.Reason { return c.Crosses(in, out, f, opened) }
	armed := slices.ContainsFunc(c.Arms(), func(p netip.Prefix) bool { return p.Contains(f.Source) })
	f.Outside = in == "up0" && !armed
	if in != "up0" && slices.Contains(c.Own, f.Source) || isPool(c, f.Source) {
		// The kernel itself drops an IPv4 packet with a source of its own, but not an IPv6 packet.
		if f.Source.Is4() || s.way(f.Destination) == "up0" {
			return "", source, destination, "a source of the node"
		}
	}
	if slices.Contains(c.Own, f.Destination) || isPool(c, f.Destination) {
		d := c.Match(f)
		if !d.To.IsValid() {
			return "", source, destination, "for the node"
		}
		to := s.way(d.To.Addr())
		translated := f
		translated.Destination = d.To.Addr()
		if f.Outside && s.way(f.Source) != "up0" && c.Crosses(in, to, translated, false) != "" {
			return "", source, destination, "from the underlay with a source that is elsewhere"
		}
		if r := reason(to, true); r != "" {
			return "", source, destination, string(r)
		}
		return to, d.Address, d.To.Addr(), "opened"
	}
	to := s.way(f.Destination)
	if r := reason(to, false); r != "" {
		return "", source, destination, string(r)
	}
	if slices.ContainsFunc(c.Arms(), func(p netip.Prefix) bool { return p.Contains(f.Destination) }) || to != "up0" {
		return to, f.Source, f.Destination, "inside"
	}
	if d := c.Match(f); d.Address.IsValid() {
		return to, d.Address, f.Destination, "policy " + d.Policy
	}
	return "", source, destination, "no policy lets it"
}

// TestEverySide sends packets of every protocol from every side to every side, in both families,
// with sources and destinations of all sides, the node's own, the platform's and foreign ones.
// Where a packet comes out, and with which addresses, must agree with a model of the document, and
// every drop must be counted.
func TestEverySide(t *testing.T) {
	t.Run("by index", func(t *testing.T) { everySide(t, nil) })
	t.Run("by name", func(t *testing.T) {
		everySide(t, nat.Links{{Interface: "tun0", Index: 7001}, {Interface: "up0", Index: 7002}})
	})
}

// everySide runs the test with indexes of interfaces, by default those in use.
func everySide(t *testing.T, links nat.Links) {
	s := newSides(t)
	d := newDriver(t, s.router)
	c := sidesConfig()
	c.Links = links
	apply(t, d, c)
	random := rand.New(rand.NewPCG(3, 9))
	addresses := map[bool][]netip.Addr{}
	for _, text := range strings.Fields(`10.0.0.7 10.0.1.7 10.1.0.7 10.3.0.7 10.9.1.7 10.9.2.7 10.9.5.7 10.50.0.9 172.16.0.7 172.16.1.5 172.16.1.7 172.16.200.7 192.168.0.7 10.200.0.7 10.200.1.7
		198.51.100.7 8.8.8.8 192.0.2.1 192.0.2.11 192.0.2.77 198.18.0.10 169.254.169.254 169.254.7.7 168.63.129.16 100.100.100.200
		2001:db8:a::7 2001:db8:a:5::7 2001:db8:c::7 2001:db8:c:1::7 2001:db8:c:1::5 2001:db8:d::7 2001:db8:e::7 2001:db8:b::7 2001:db8:b:1::7 2001:db8:ff::1 2001:db8:ff::11 2001:db8:ff::77 2001:db8:d::10 fd00:ec2::254`) {
		a := addr(text)
		addresses[a.Is6()] = append(addresses[a.Is6()], a)
	}
	ends := slices.Sorted(maps.Keys(s.taps))
	passed, drops, reasons := 0, 0, map[string]int{}
	for round := range 40 {
		type sent struct {
			in string
			nat.Flow
		}
		flows := map[uint16]sent{}
		seen := map[nat.Flow]bool{}
		for id := uint16(1); id <= 250; id++ {
			six := random.IntN(2) == 0
			f := nat.Flow{Protocol: []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_GRE, unix.IPPROTO_ESP, 103, 89, 4, 41}[random.IntN(9)]}
			f.Source, f.Destination = addresses[six][random.IntN(len(addresses[six]))], addresses[six][random.IntN(len(addresses[six]))]
			if six && f.Protocol == unix.IPPROTO_ICMP {
				f.Protocol = unix.IPPROTO_ICMPV6
			}
			if f.Protocol == unix.IPPROTO_TCP || f.Protocol == unix.IPPROTO_UDP {
				f.Port = []uint16{80, 443, 25, 53, 179}[random.IntN(5)]
			}
			in := ends[random.IntN(len(ends))]
			if id == 1 { // a rare case that chance seldom finds
				in, f = "tun0", nat.Flow{Source: addr("10.0.1.7"), Destination: addr("169.254.169.254"), Protocol: unix.IPPROTO_TCP, Port: 80}
			}
			key := f
			if f.Protocol != unix.IPPROTO_TCP && f.Protocol != unix.IPPROTO_UDP && f.Protocol != unix.IPPROTO_ICMP && f.Protocol != unix.IPPROTO_ICMPV6 {
				// only the source distinguishes two such flows, so one address can have only one
				key.Source = netip.Addr{}
				back := nat.Flow{Protocol: f.Protocol, Destination: f.Source}
				if seen[back] {
					continue // it would be an answer
				}
			}
			if f.Source == f.Destination || seen[key] {
				continue
			}
			seen[key] = true
			flows[id] = sent{in, f}
		}
		s.forgetFlows()
		for id, f := range flows {
			if err := s.taps[f.in].Send(f.Flow, id, syn); err != nil {
				t.Fatal(err)
			}
		}
		arrived := map[string]map[uint16]traffic.Packet{}
		for name, tap := range s.taps {
			arrived[name] = s.arrivals(tap, 100*time.Millisecond)
		}
		for id, f := range flows {
			out, source, destination, why := s.fate(c, f.in, f.Flow)
			reasons[why]++
			if out != "" {
				passed++
			} else {
				drops++
			}
			for name := range s.taps {
				got, here := arrived[name][id]
				if here && (slices.Contains(c.Own, got.Source) || isPool(c, got.Source)) && got.Source != source && (got.Source != f.Source || got.Destination != f.Destination) {
					here = false // a packet of the node itself that looks like it by chance
				}
				switch {
				case here != (name == out):
					t.Errorf("round %d: by %s %v > %v protocol %d port %d: at %s: %v, want at %q (%s): %v", round, f.in, f.Source, f.Destination, f.Protocol, f.Port, name, here, out, why, got)
				case here && (got.Source != source || got.Destination != destination):
					t.Errorf("round %d: by %s %v > %v protocol %d port %d: at %s as %v, want %v > %v (%s)", round, f.in, f.Source, f.Destination, f.Protocol, f.Port, name, got, source, destination, why)
				}
			}
		}
		if t.Failed() {
			t.Fatalf("%s", s.router.Run("nft list ruleset"))
		}
	}
	state, err := d.Observe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d passed, %d did not: %v; counted %v", passed, drops, reasons, state.Drops)
	for _, r := range nat.Reasons {
		if r != nat.DropGuard && (reasons[string(r)] == 0 && r != nat.DropPlatform && r != nat.DropInput || state.Drops[r].Packets == 0) {
			t.Errorf("%s: expected %d times, counted %v", r, reasons[string(r)], state.Drops[r])
		}
	}
	for _, why := range []string{"inside", "opened", "policy all", "policy partner", "policy metadata"} {
		if reasons[why] == 0 {
			t.Errorf("no packet passed as %q: the test shows nothing", why)
		}
	}
}

// TestFlowsUnderWay sends packets of established flows from the interfaces where they belong and
// from others.
func TestFlowsUnderWay(t *testing.T) {
	t.Run("by index", func(t *testing.T) { flowsUnderWay(t, nil) })
	t.Run("by name", func(t *testing.T) {
		flowsUnderWay(t, nat.Links{{Interface: "tun0", Index: 7001}, {Interface: "up0", Index: 7002}})
	})
}

func flowsUnderWay(t *testing.T, links nat.Links) {
	const protocol = 103 // without ports, so that all packets with the addresses belong to the flow
	s := newSides(t)
	d := newDriver(t, s.router)
	c := sidesConfig()
	c.Links = links
	apply(t, d, c)
	id := uint16(0)
	send := func(what, in, source, destination, out, as, to string) {
		t.Helper()
		id++
		if err := s.taps[in].Send(nat.Flow{Source: addr(source), Destination: addr(destination), Protocol: protocol}, id, 0); err != nil {
			t.Fatal(err)
		}
		for name, tap := range s.taps {
			got, here := s.arrivals(tap, 50*time.Millisecond)[id]
			if here != (name == out) || here && (got.Source != addr(as) || got.Destination != addr(to)) {
				t.Errorf("%s: by %s %s > %s: at %s: %v %v, want at %q as %s > %s", what, in, source, destination, name, here, got, out, as, to)
			}
		}
	}
	const a, b, server, partner, public = "10.0.0.7", "172.16.0.7", "172.16.1.7", "10.50.0.9", "192.0.2.11"
	const a6, b6 = "2001:db8:a::7", "2001:db8:c::7"
	for _, k := range [][2]string{{a, b}, {a6, b6}} {
		send("begins", "tun0", k[0], k[1], "tun1", k[0], k[1])
		send("is answered", "tun1", k[1], k[0], "tun0", k[1], k[0])
		send("goes on", "tun0", k[0], k[1], "tun1", k[0], k[1])
		for _, in := range []string{"up0", "mgmt0"} {
			send("joined", in, k[0], k[1], "", k[0], k[1])
			send("answered by another", in, k[1], k[0], "", k[0], k[1])
		}
	}
	send("translated", "tun0", a, "198.51.100.7", "up0", public, "198.51.100.7")
	send("answered", "up0", "198.51.100.7", public, "tun0", "198.51.100.7", a)
	send("goes on", "tun0", a, "198.51.100.7", "up0", public, "198.51.100.7")
	send("joined", "up0", a, "198.51.100.7", "", a, a)
	send("joined", "mgmt0", a, "198.51.100.7", "", a, a)
	send("answered by an unknown interface", "mgmt0", "198.51.100.7", public, "", a, a)
	send("plain", "tun1", server, partner, "up0", server, partner)
	send("plain, answered", "up0", partner, server, "tun1", partner, server)
	send("plain goes on", "tun1", server, partner, "up0", server, partner)
	send("plain, joined", "mgmt0", partner, server, "", a, a)

	// The routes of established flows change.
	s.router.Run("ip route replace 172.16.0.0/16 dev mgmt0\nip route add 198.51.100.0/24 dev mgmt0\nip route replace 10.50.0.0/16 dev tun0")
	send("to an unknown interface", "tun0", a, b, "", a, a)
	send("to an unknown interface", "tun0", a, "198.51.100.7", "", a, a)
	s.router.Run("ip route replace 172.16.0.0/16 dev up0")
	send("untranslated to the underlay", "tun0", a, b, "", a, a)
}

// TestMetadata checks that no packet from a spoke or from the Internet reaches an address at which
// the platform serves its machines, whichever interface the route leads by, neither as the
// packet's destination nor as the target of a policy. Tunnels lead to other networks and are
// exempt, and the node itself reaches these addresses.
func TestMetadata(t *testing.T) {
	s := newSides(t)
	d := newDriver(t, s.router)
	c := sidesConfig()
	c.Tunnels = []nat.Tunnel{{Interface: "tun0"}}
	c.Attachments = append(c.Attachments, nat.Attachment{Interface: "up0", Sources: pfx("100.64.0.0/10", "fd00::/8")})
	c.Policies = []nat.Policy{
		{Name: "all", Action: nat.SNAT, Sources: pfx("10.0.0.0/8", "172.16.0.0/12", "2001:db8::/40"), Pool: "p"},
		{Name: "plain", Action: nat.NoNAT, Sources: pfx("172.16.1.0/24"), Destinations: pfx("169.254.0.0/17")},
		{Name: "open", Action: nat.DNAT, Sources: pfx("0.0.0.0/0"), Protocol: "udp", Ports: []nat.PortRange{{First: 80, Last: 80}}, Pool: "p", To: netip.MustParseAddrPort("169.254.169.254:80")},
		{Name: "open-azure", Action: nat.DNAT, Sources: pfx("0.0.0.0/0"), Protocol: "udp", Ports: []nat.PortRange{{First: 81, Last: 81}}, Pool: "p", To: netip.MustParseAddrPort("168.63.129.16:80")},
		{Name: "open6", Action: nat.DNAT, Sources: pfx("::/0"), Protocol: "udp", Ports: []nat.PortRange{{First: 80, Last: 80}}, Pool: "p", To: netip.MustParseAddrPort("[fd00:ec2::254]:80")},
		{Name: "proxied", Action: nat.Redirect, Sources: pfx("10.0.0.0/16"), Protocol: "udp", Ports: []nat.PortRange{{First: 82, Last: 82}}, To: netip.MustParseAddrPort("169.254.169.254:80")},
	}
	apply(t, d, c)
	all := pfx("169.254.169.254/32", "168.63.129.16/32", "100.100.100.200/32", "fd00:ec2::254/128")
	dropped := func() uint64 {
		state, err := d.Observe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return state.Drops[nat.DropPlatform].Packets
	}
	id := uint16(0)
	for _, leads := range []string{"up0", "tun1", "tun0"} {
		for _, p := range all {
			s.router.Run(fmt.Sprintf("ip route replace %v dev %s", p, leads))
		}
		for _, k := range []struct {
			by, source, destination string
			port                    uint16
		}{
			{"tun0", "10.0.0.7", "169.254.169.254", 80}, {"tun0", "10.0.0.7", "168.63.129.16", 80}, {"tun0", "10.0.0.7", "100.100.100.200", 80},
			{"tun0", "2001:db8:a::7", "fd00:ec2::254", 80}, {"tun1", "172.16.1.7", "169.254.169.254", 80}, {"tun1", "2001:db8:c::7", "fd00:ec2::254", 80},
			{"up0", "10.200.0.7", "169.254.169.254", 80}, {"up0", "10.200.0.7", "100.100.100.200", 80}, {"up0", "2001:db8:e::7", "fd00:ec2::254", 80},
			{"up0", "198.51.100.7", "169.254.169.254", 80}, {"mgmt0", "192.168.0.7", "169.254.169.254", 80},
			{"tun0", "10.0.0.7", "192.0.2.11", 80}, {"tun1", "172.16.1.7", "192.0.2.11", 80}, {"up0", "198.51.100.7", "192.0.2.11", 80}, {"up0", "10.200.0.7", "192.0.2.11", 80},
			{"tun0", "10.0.0.7", "192.0.2.11", 81}, {"up0", "198.51.100.7", "192.0.2.11", 81},
			{"tun0", "2001:db8:a::7", "2001:db8:ff::11", 80}, {"up0", "2001:db8:b::7", "2001:db8:ff::11", 80},
			{"tun0", "10.0.0.7", "198.51.100.7", 82},
		} {
			id++
			s.forgetFlows()
			if err := s.taps[k.by].Send(nat.Flow{Source: addr(k.source), Destination: addr(k.destination), Protocol: unix.IPPROTO_UDP, Port: k.port}, id, 0); err != nil {
				t.Fatal(err)
			}
			came := false
			for _, tap := range s.taps {
				got, here := s.arrivals(tap, 20*time.Millisecond)[id]
				came = came || here && nat.PlatformOf(got.Destination).IsValid()
			}
			if came && leads != "tun0" {
				t.Errorf("by %s %s > %s port %d reached the platform by %s", k.by, k.source, k.destination, k.port, leads)
			}
			if !came && leads == "tun0" && k.by == "tun1" && k.port == 80 && k.destination[:3] != "192" {
				t.Errorf("by %s %s > %s does not come into the tunnel", k.by, k.source, k.destination)
			}
		}
		if leads != "tun0" && dropped() == 0 {
			t.Error("nothing was counted")
		}
		s.forgetFlows()
		before := dropped()
		for _, p := range all {
			s.router.Do(func() {
				c, err := net.Dial("udp", netip.AddrPortFrom(p.Addr(), 80).String())
				if err == nil {
					_, err = c.Write([]byte("x"))
					c.Close()
				}
				// a namespace without a suitable IPv6 address has no source
				if err != nil && p.Addr().Is4() {
					t.Errorf("the node itself to %v by %s: %v", p, leads, err)
				}
			})
		}
		if n := dropped() - before; n > 0 {
			t.Errorf("%d packets of the node itself were dropped toward the platform by %s", n, leads)
		}
	}
}

package nftables

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
	"golang.org/x/sys/unix"
)

// Ring: namespace.

func pfx(list ...string) (p []netip.Prefix) {
	for _, s := range list {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// inside returns attachments that accept every source.
func inside(interfaces ...string) (all []nat.Attachment) {
	for _, name := range interfaces {
		all = append(all, nat.Attachment{Interface: name, Sources: pfx("0.0.0.0/0", "::/0")})
	}
	return all
}

func newDriver(t testing.TB, ns *netns.NS) *Driver {
	t.Helper()
	f, err := os.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	d := New(Options{NetNS: int(f.Fd())})
	spaces.Store(d, ns)
	t.Cleanup(func() { spaces.Delete(d) })
	return d
}

// spaces holds the namespaces of drivers.
var spaces sync.Map

// withLinks returns a configuration with the indexes of its interfaces, as the router passes it.
func withLinks(t testing.TB, d *Driver, c nat.Config) nat.Config {
	t.Helper()
	ns, ok := spaces.Load(d)
	if !ok {
		t.Fatal("the driver has no namespace")
	}
	ns.(*netns.NS).Do(func() {
		for _, name := range slices.Sorted(slices.Values(append(c.Attached(), c.Underlay))) {
			if i, err := net.InterfaceByName(name); err == nil {
				c.Links = append(c.Links, nat.Link{Interface: name, Index: uint32(i.Index)})
			}
		}
	})
	return c
}

// apply applies a configuration, and adds the indexes of interfaces unless it has some.
func apply(t testing.TB, d *Driver, c nat.Config) {
	t.Helper()
	if c.Links == nil {
		c = withLinks(t, d, c)
	}
	if err := d.Apply(context.Background(), c); err != nil {
		t.Fatal(err)
	}
}

func pool(name string, addrs ...string) nat.Pool {
	p := nat.Pool{Name: name}
	for _, a := range addrs {
		p.Addresses = append(p.Addresses, nat.PoolAddress{Address: addr(a), Public: addr(a)})
	}
	return p
}

// example returns a configuration that uses every feature.
func example() nat.Config {
	return nat.Config{
		Underlay: "up0", Attachments: inside("tun0", "tun1"),
		Own:   []netip.Addr{addr("192.0.2.1"), addr("2001:db8:ff::1")},
		Zones: []nat.Zone{{Name: "a", Prefixes: pfx("10.1.0.0/16")}, {Name: "b", Prefixes: pfx("10.2.0.0/16", "10.3.0.0/16")}},
		Pools: []nat.Pool{pool("partner", "192.0.2.11"), pool("web", "192.0.2.21", "192.0.2.22", "192.0.2.23", "2001:db8:ff::21", "2001:db8:ff::22")},
		Policies: []nat.Policy{
			{Name: "default", Action: nat.SNAT, Sources: pfx("10.0.0.0/8", "2001:db8:a::/48"), Pool: "web"},
			{Name: "partner", Action: nat.SNAT, Sources: pfx("10.1.0.0/16", "10.2.0.0/16"), Destinations: pfx("198.51.100.0/24"), Protocol: "tcp", Ports: []nat.PortRange{{First: 443, Last: 443}, {First: 8000, Last: 8099}}, Pool: "partner"},
			{Name: "no-smtp", Action: nat.Deny, Sources: pfx("0.0.0.0/0", "::/0"), Protocol: "tcp", Ports: []nat.PortRange{{First: 25, Last: 25}}},
			{Name: "no-ping", Action: nat.Deny, Sources: pfx("10.3.0.0/16"), Protocol: "icmp"},
			{Name: "refused", Action: nat.Reject, Sources: pfx("10.3.0.0/16"), Protocol: "tcp"},
			{Name: "slow", Action: nat.SNAT, Sources: pfx("10.7.0.0/16"), Pool: "web", Pickup: true, Timeouts: nat.Timeouts{TCPEstablished: 2 * time.Hour, UDP: 2 * time.Minute}},
			{Name: "plain", Action: nat.NoNAT, Sources: pfx("198.18.0.0/16", "2001:db8:a:1::/64"), Destinations: pfx("198.51.100.0/24", "2001:db8:b::/48"), Timeouts: nat.Timeouts{UDPStream: time.Hour}},
			{Name: "open", Action: nat.DNAT, Sources: pfx("0.0.0.0/0"), Protocol: "tcp", Ports: []nat.PortRange{{First: 443, Last: 443}}, Pool: "partner", To: netip.MustParseAddrPort("10.1.0.5:8443"), Timeouts: nat.Timeouts{TCPClosing: time.Minute}},
			{Name: "open6", Action: nat.DNAT, Sources: pfx("::/0"), Protocol: "udp", Ports: []nat.PortRange{{First: 53, Last: 53}}, Pool: "web", To: netip.AddrPortFrom(addr("2001:db8:a::5"), 0)},
			{Name: "proxied", Action: nat.Redirect, Sources: pfx("10.8.0.0/16"), Protocol: "tcp", To: netip.MustParseAddrPort("10.1.0.6:3128")},
		},
		Clamps:   []nat.Clamp{{Interface: "tun0", IPv4: 1360, IPv6: 1340}, {Interface: "tun1", IPv4: 1300}},
		Sessions: []nat.Session{{Interface: "tun0", Address: addr("169.254.0.1")}, {Interface: "tun1", Address: addr("169.254.0.3")}},
		API:      nat.API{Port: 7443, From: pfx("203.0.113.0/28", "2001:db8:f::/64")},
		Input:    nat.Input{Drop: true, SSH: pfx("203.0.113.0/28", "10.1.0.0/24")},
		Tunnels:  []nat.Tunnel{{Interface: "tun0"}, {Interface: "tun1", Port: 51820}},
		Maps:     []nat.Map{{Interfaces: []string{"tun1", "tun0"}, Inside: netip.MustParsePrefix("10.1.0.0/20"), Mapped: netip.MustParsePrefix("100.64.16.0/20")}},
	}
}

func TestApplyAgainWritesNothing(t *testing.T) {
	ns := netns.New(t)
	d := newDriver(t, ns)
	apply(t, d, example())
	before := ns.Run("nft -a list table inet isthmus")
	apply(t, d, example())
	shuffled := example()
	slices.Reverse(shuffled.Policies)
	slices.Reverse(shuffled.Pools)
	slices.Reverse(shuffled.Clamps)
	slices.Reverse(shuffled.Sessions)
	slices.Reverse(shuffled.Attachments)
	apply(t, d, shuffled)
	other := newDriver(t, ns) // as after a restart
	apply(t, other, example())
	if d.Writes() != 1 || other.Writes() != 0 {
		t.Errorf("%d and %d transactions, want 1 and 0", d.Writes(), other.Writes())
	}
	if after := ns.Run("nft -a list table inet isthmus"); after != before {
		t.Errorf("changed:\n%s\nbefore:\n%s", after, before)
	}
}

// TestFrameIsKept checks which changes leave the rules alone: the handles of rules and chains
// stay.
func TestFrameIsKept(t *testing.T) {
	ns := netns.New(t)
	d := newDriver(t, ns)
	c := example()
	apply(t, d, c)
	before := ns.Run("nft -a list chain inet isthmus egress")
	c.Policies = append(c.Policies, nat.Policy{Name: "more", Action: nat.SNAT, Sources: pfx("10.4.0.0/16"), Destinations: pfx("203.0.113.0/24"), Pool: "partner"})
	c.Own = append(c.Own, addr("192.0.2.99"))
	c.Clamps, c.Sessions = c.Clamps[:1], c.Sessions[:1]
	apply(t, d, c)
	if after := ns.Run("nft -a list chain inet isthmus egress"); after != before {
		t.Errorf("changed:\n%s\nbefore:\n%s", after, before)
	}
}

// TestHealing checks that every manual change of the table is detected and undone.
func TestHealing(t *testing.T) {
	ns := netns.New(t)
	d := newDriver(t, ns)
	apply(t, d, example())
	list := func() string { // in any order
		out, _ := ns.Try("nft list table inet isthmus")
		words := strings.FieldsFunc(out, func(r rune) bool { return strings.ContainsRune(" ,\n\t", r) })
		slices.Sort(words)
		return strings.Join(words, " ")
	}
	before := list()
	for _, command := range []string{
		"delete table inet isthmus",
		"flush chain inet isthmus guard",
		"flush table inet isthmus",
		"insert rule inet isthmus guard accept",
		"add rule inet isthmus forward counter",
		"add rule inet isthmus forward tcp dport { 1, 2 } accept",
		"add chain inet isthmus mine",
		"add chain inet isthmus guard { policy drop ; }",
		"add set inet isthmus mine { type ipv4_addr ; }",
		"add element inet isthmus own4 { 10.0.0.7 }",
		"delete element inet isthmus own4 { 192.0.2.1 }",
		"delete element inet isthmus policy-1-4 { 10.1.0.0/16 . 198.51.100.0/24 . tcp . 443 }",
		"add element inet isthmus policy-1-4 { 10.9.0.0/16 . 198.51.100.0/24 . tcp . 443 : accept }",
		"flush map inet isthmus mss4",
		"flush chain inet isthmus input",
		"add element inet isthmus bgp4 { eth7 . 10.0.0.1 }",
		"add element inet isthmus attached { eth7 }",
		"insert rule inet isthmus ssh accept",
		"flush chain inet isthmus icmp-6",
		"add rule inet isthmus icmp-4 accept",
		"delete element inet isthmus tunnels { tun0 }",
		"add element inet isthmus tunnel-ports { 22 }",
		"flush set inet isthmus api4",
		"delete element inet isthmus from { tun0 }",
		"flush chain inet isthmus from-tun0",
		"flush chain inet isthmus drop-platform",
		"flush chain inet isthmus leave",
		"flush map inet isthmus pool-web-4",
		"add element inet isthmus full-web-4 { 198.51.100.1 . tcp . 443 }",
		"add element inet isthmus table-full { ipv4 }",
		"flush chain inet isthmus pool-web-6",
		"flush map inet isthmus zones-4",
		"flush chain inet isthmus arrival",
		"flush chain inet isthmus rejected",
		"flush chain inet isthmus map-in",
		"flush chain inet isthmus to-open",
		"add rule inet isthmus plain-4 accept",
		"flush map inet isthmus front4",
		"flush map inet isthmus hairpin4",
		"flush map inet isthmus reject-1-4",
		"delete element inet isthmus pool4 { 192.0.2.11 }",
	} {
		ns.Run("nft " + command)
		if list() == before && !strings.Contains(command, "counter") {
			t.Errorf("%s: did nothing", command)
		}
		apply(t, d, example())
		if after := list(); after != before {
			t.Errorf("%s: not healed:\n%s", command, after)
		}
	}
	ns.Run("nft add table inet other\nnft add table ip isthmus")
	writes := d.Writes()
	apply(t, d, example())
	if d.Writes() != writes {
		t.Error("tables of others are taken for ours")
	}
}

// TestReplaceInSpiteOfStrangers replaces a table after objects that were read have disappeared, or
// while objects cannot be deleted.
func TestReplaceInSpiteOfStrangers(t *testing.T) {
	ns := netns.New(t)
	d := newDriver(t, ns)
	apply(t, d, example())
	want, err := compile(example())
	if err != nil {
		t.Fatal(err)
	}
	replace := func(whole bool) error {
		conn, err := d.open()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.CloseLasting()
		have, _, err := read(conn)
		if err != nil {
			t.Fatal(err)
		}
		have.sets["gone"] = &set{}
		return d.replace(conn, have, want, whole)
	}
	before := ns.Run("nft -a list table inet isthmus")
	if err := replace(false); err == nil {
		t.Error("deleting a missing set succeeded")
	}
	if after := ns.Run("nft -a list table inet isthmus"); after != before {
		t.Error("a failed transaction changed something")
	}
	if err := replace(true); err != nil {
		t.Error(err)
	}
	other := newDriver(t, ns)
	apply(t, other, example())
	if other.Writes() != 0 {
		t.Error("the table is not as wanted after it was replaced as a whole")
	}
}

func TestBadConfigChangesNothing(t *testing.T) {
	ns := netns.New(t)
	d := newDriver(t, ns)
	apply(t, d, example())
	c := example()
	c.Policies = append(c.Policies,
		nat.Policy{Name: "a", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Pool: "web"},
		nat.Policy{Name: "b", Action: "masquerade", Sources: pfx("10.5.0.0/16")},
		nat.Policy{Name: "c", Action: nat.Deny, Sources: pfx("10.6.0.0/16"), Ports: []nat.PortRange{{First: 1, Last: 2}}})
	err := d.Apply(context.Background(), c)
	for _, want := range []string{"policies a and default claim the same flows", `policy b: unknown action "masquerade"`, "policy c: ports without tcp or udp"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	if d.Writes() != 1 {
		t.Errorf("%d transactions, want 1", d.Writes())
	}
	state, err := d.Observe(context.Background())
	if err != nil || !state.Present || len(state.Policies) != 10 {
		t.Errorf("state %+v, %v", state, err)
	}
}

func TestObserveNothing(t *testing.T) {
	state, err := newDriver(t, netns.New(t)).Observe(context.Background())
	if err != nil || state.Present || state.Policies != nil {
		t.Errorf("state %+v, %v", state, err)
	}
}

// TestTakesOverSecondRejectChain writes the table of a daemon that had a second chain, "reject",
// for flows that cannot begin. A new daemon takes it over under traffic: no allowed packet is
// lost, no rejected packet passes, and the counters of policies are carried over.
func TestTakesOverSecondRejectChain(t *testing.T) {
	s := newSite(t)
	c := guardConfig()
	c.Policies = append(c.Policies, nat.Policy{Name: "no", Action: nat.Reject, Sources: pfx("0.0.0.0/0", "::/0"), Destinations: pfx("198.51.100.0/24", "2001:db8:b::/48")})
	former := newDriver(t, s.router)
	c = withLinks(t, former, c)
	old, err := compile(c)
	if err != nil {
		t.Fatal(err)
	}
	old.chains["reject"] = old.chains[rejected]
	led := 0
	for _, rule := range old.chains["begins"].rules {
		for _, e := range rule {
			if v, ok := e.(*expr.Verdict); ok && v.Chain == rejected {
				v.Chain = "reject"
				led++
			}
		}
	}
	if led == 0 {
		t.Fatal("no rule leads to the second chain")
	}
	conn, err := former.open()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseLasting()
	if err := former.replace(conn, nil, old, false); err != nil {
		t.Fatal(err)
	}

	allowed := nat.Flow{Source: addr("10.0.0.1"), Destination: addr("203.0.113.1"), Protocol: unix.IPPROTO_TCP, Port: 443}
	refused := allowed
	refused.Destination = addr("198.51.100.1")
	stop, done, began := make(chan struct{}), make(chan uint16), make(chan struct{})
	go func() {
		for id := uint16(1); ; id++ {
			select {
			case <-stop:
				done <- id - 1
				return
			default:
			}
			f := allowed
			if id%2 == 0 {
				f = refused
			}
			s.transmit(f, id, syn)
			if id == 600 {
				close(began)
			}
			time.Sleep(100 * time.Microsecond)
		}
	}()
	<-began
	d := newDriver(t, s.router)
	apply(t, d, c)
	time.Sleep(20 * time.Millisecond)
	close(stop)
	sent := <-done
	passed := s.receive(50 * time.Millisecond)
	for id := uint16(1); id <= sent; id++ {
		if _, ok := passed[id]; ok != (id%2 == 1) {
			t.Errorf("packet %d of %d: passed: %v", id, sent, ok)
		}
	}
	if d.Writes() != 1 {
		t.Errorf("%d transactions, want 1", d.Writes())
	}
	state, err := d.Observe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range state.Policies {
		// Packets between reading and replacing are not counted.
		if got, all := p.Flows.Packets, uint64(sent)/2; p.Name == "no" && (got > all || got < all*3/4) {
			t.Errorf("the policy counts %d of %d", p.Flows.Packets, sent/2)
		}
	}
	if out := s.router.Run("nft list table inet isthmus"); strings.Contains(out, "chain reject {") {
		t.Errorf("the second chain is still there:\n%s", out)
	}
	if got, err := d.Differences(t.Context(), c); err != nil || len(got) > 0 {
		t.Errorf("%q, %v", got, err)
	}
}

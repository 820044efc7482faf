package nat

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

func pfx(list ...string) (p []netip.Prefix) {
	for _, s := range list {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func snat(name string, sources, destinations []netip.Prefix, protocol string, ports ...PortRange) Policy {
	return Policy{Name: name, Action: SNAT, Sources: sources, Destinations: destinations, Protocol: protocol, Ports: ports, Pool: "p"}
}

func TestMatchPrecedence(t *testing.T) {
	c := Config{Pools: []Pool{{Name: "p", Addresses: []PoolAddress{{Address: addr("192.0.2.1")}, {Address: addr("2001:db8::1")}}}}, Policies: []Policy{
		snat("all", pfx("10.0.0.0/8", "2001:db8::/32"), nil, ""),
		snat("source", pfx("10.1.0.0/16"), nil, ""),
		snat("tcp", pfx("10.0.0.0/8"), nil, "tcp"),
		snat("port", pfx("10.0.0.0/8"), nil, "tcp", PortRange{443, 443}),
		snat("destination", pfx("10.0.0.0/8"), pfx("198.51.100.0/24"), ""),
		snat("icmp", pfx("10.0.0.0/8", "2001:db8::/32"), nil, "icmp"),
		{Name: "deny", Action: Deny, Sources: pfx("0.0.0.0/0"), Destinations: pfx("198.51.100.7/32")},
	}}
	for _, k := range []struct {
		source, destination string
		protocol            uint8
		port                uint16
		want                string
	}{
		{"10.0.0.1", "203.0.113.1", UDP, 53, "all"},
		{"10.1.0.1", "203.0.113.1", UDP, 53, "source"},
		{"10.1.0.1", "203.0.113.1", TCP, 80, "tcp"}, // a protocol counts for more than a source
		{"10.1.0.1", "203.0.113.1", TCP, 443, "port"},
		{"10.1.0.1", "203.0.113.1", UDP, 443, "source"},
		// a destination counts for more than a port
		{"10.1.0.1", "198.51.100.1", TCP, 443, "destination"},
		{"10.1.0.1", "198.51.100.7", TCP, 443, "deny"},
		{"172.16.0.1", "198.51.100.7", ICMP, 0, "deny"},
		{"172.16.0.1", "198.51.100.8", ICMP, 0, ""},
		{"10.0.0.1", "203.0.113.1", ICMP, 0, "icmp"},
		{"2001:db8::5", "2001:db9::1", ICMPv6, 0, "icmp"},
		{"2001:db8::5", "2001:db9::1", ICMP, 0, "all"},
		{"2001:db8::5", "2001:db9::1", TCP, 443, "all"},
	} {
		d := c.Match(Flow{Source: addr(k.source), Destination: addr(k.destination), Protocol: k.protocol, Port: k.port})
		if d.Policy != k.want {
			t.Errorf("%+v: %q", k, d.Policy)
		}
		if passes := k.want != "" && k.want != "deny"; d.Address.IsValid() != passes || passes && d.Address.Is4() != addr(k.source).Is4() {
			t.Errorf("%+v: address %v", k, d.Address)
		}
	}
}

func TestTies(t *testing.T) {
	for _, k := range []struct {
		a, b Policy
		tie  bool
	}{
		{snat("a", pfx("10.0.0.0/8"), nil, ""), snat("b", pfx("10.0.0.0/8"), nil, ""), true},
		{snat("a", pfx("10.0.0.0/8"), nil, ""), snat("b", pfx("10.0.0.0/8"), pfx("0.0.0.0/0"), ""), true},
		{snat("a", pfx("10.0.0.0/8"), nil, ""), snat("b", pfx("10.0.0.0/9"), nil, ""), false},
		{snat("a", pfx("10.0.0.0/8"), nil, ""), snat("b", pfx("10.0.0.0/8"), nil, "tcp"), false},
		{snat("a", pfx("10.0.0.0/8"), nil, "udp"), snat("b", pfx("10.0.0.0/8"), nil, "tcp"), false},
		{snat("a", pfx("10.0.0.0/8"), nil, "tcp"), snat("b", pfx("10.0.0.0/8"), nil, "tcp", PortRange{80, 80}), false},
		{snat("a", pfx("10.0.0.0/8"), nil, "tcp", PortRange{80, 90}), snat("b", pfx("10.0.0.0/8"), nil, "tcp", PortRange{90, 95}), true},
		{snat("a", pfx("10.0.0.0/8"), nil, "tcp", PortRange{80, 90}), snat("b", pfx("10.0.0.0/8"), nil, "tcp", PortRange{91, 95}), false},
		{snat("a", pfx("10.0.0.0/8"), nil, "tcp", PortRange{1, 9}, PortRange{100, 200}), snat("b", pfx("10.0.0.0/8"), nil, "tcp", PortRange{20, 30}, PortRange{150, 150}), true},
		{snat("a", pfx("10.0.0.0/8", "172.16.0.0/12"), pfx("198.51.100.0/24"), ""), snat("b", pfx("172.16.0.0/12"), pfx("203.0.113.0/24", "198.51.100.0/24"), ""), true},
		// that is another mistake
		{snat("a", pfx("10.0.0.0/8"), nil, ""), snat("a", pfx("10.0.0.0/8"), nil, ""), false},
	} {
		c := Config{Policies: []Policy{k.a, k.b}}
		if got := Ties(rulesOf(t, &c)); (len(got) == 1 && got[0] == Tie{"a", "b"}) != k.tie || len(got) > 1 {
			t.Errorf("%+v and %+v: %v, want %v", k.a, k.b, got, k.tie)
		}
	}
}

func TestRulesSayEachThingOnce(t *testing.T) {
	c := Config{Policies: []Policy{snat("a", pfx("10.0.0.1/8", "10.0.0.0/8", "2001:db8::/32"), pfx("198.51.100.0/24"), "tcp",
		PortRange{443, 443}, PortRange{80, 90}, PortRange{91, 91}, PortRange{85, 86})}}
	var ports []PortRange
	for _, r := range rulesOf(t, &c) {
		ports = append(ports, r.Ports)
	}
	if want := []PortRange{{80, 91}, {443, 443}}; !slices.Equal(ports, want) {
		t.Errorf("ports %v, want %v", ports, want)
	}
}

func TestUnresolvedNamesMatchNothing(t *testing.T) {
	p := snat("a", pfx("10.0.0.0/8"), nil, "")
	p.Names = []string{"api.example"}
	c := Config{Policies: []Policy{p}}
	if rules := rulesOf(t, &c); len(rules) != 0 {
		t.Errorf("rules %v", rules)
	}
	c.Policies[0].Destinations = pfx("198.51.100.7/32")
	if rules := rulesOf(t, &c); len(rules) != 1 {
		t.Errorf("rules %v", rules)
	}
}

func TestExplain(t *testing.T) {
	c := Config{Own: []netip.Addr{addr("192.0.2.9")}, Pools: []Pool{{Name: "p", Addresses: []PoolAddress{{Address: addr("192.0.2.1")}}}}, Policies: []Policy{
		snat("web", pfx("10.0.0.0/8"), pfx("198.51.100.0/24"), "tcp", PortRange{443, 443}, PortRange{8000, 8099}),
		snat("dns", pfx("10.0.0.0/8"), nil, "udp", PortRange{53, 53}),
		{Name: "late", Action: SNAT, Pool: "p", Pickup: true, Sources: pfx("10.9.0.0/16")},
		{Name: "no", Action: Deny, Sources: pfx("10.0.0.0/8"), Protocol: "icmp"},
	}}
	for _, k := range []struct {
		source, destination string
		protocol            uint8
		port                uint16
		late                bool
		want                string
	}{
		{"10.0.0.1", "198.51.100.1", TCP, 80, false, "no policy has it; web comes nearest, for ports 443"},
		{"10.0.0.1", "203.0.113.1", TCP, 443, false, "no policy has it; web comes nearest, for destinations in 198.51.100.0/24"},
		{"172.16.0.1", "198.51.100.1", TCP, 443, false, "no policy has it; web comes nearest, for sources in 10.0.0.0/8"},
		{"172.16.0.1", "203.0.113.1", UDP, 53, false, "no policy has it; dns comes nearest, for sources in 10.0.0.0/8"},
		{"10.0.0.1", "198.51.100.1", UDP, 53, true, "policy dns decides such flows, but this one did not begin here, and the policy has no pickup"},
		{"10.9.0.1", "203.0.113.1", TCP, 22, true, "policy late decides such flows, but the packet is of none that is known or can begin with it"},
		{"10.0.0.1", "203.0.113.1", ICMP, 0, false, "policy no (deny) lets no such flow leave"},
		{"192.0.2.1", "203.0.113.1", TCP, 443, false, "someone inside uses an address of this node as source"},
		{"192.0.2.9", "203.0.113.1", TCP, 443, false, "someone inside uses an address of this node as source"},
	} {
		f := Flow{Source: addr(k.source), Destination: addr(k.destination), Protocol: k.protocol, Port: k.port, Late: k.late}
		if got := c.Explain(f); got != k.want {
			t.Errorf("%+v:\n%s, want\n%s", f, got, k.want)
		}
	}
	if got := (&Config{}).Explain(Flow{Source: addr("10.0.0.1")}); got != "no policies are configured" {
		t.Error(got)
	}
}

func TestExposes(t *testing.T) {
	for _, k := range []struct {
		source, destination string
		want                bool
	}{
		{"10.0.0.0/8", "198.51.100.0/24", true},
		{"10.0.0.0/8", "0.0.0.0/0", true},
		{"0.0.0.0/0", "198.51.100.0/24", true},
		{"192.0.0.0/8", "198.51.100.0/24", true},
		{"100.64.0.0/10", "198.51.100.0/24", true},
		{"169.254.1.0/24", "198.51.100.0/24", true},
		{"fd00::/8", "2001:db8::/32", true},
		{"10.0.0.0/8", "172.0.0.0/8", true},
		{"10.0.0.0/8", "172.16.0.0/12", false},
		{"10.0.0.0/8", "192.168.7.0/24", false},
		{"203.0.113.0/24", "198.51.100.0/24", false},
		{"203.0.113.0/24", "0.0.0.0/1", false},
		{"2001:db8::/48", "2001:db9::/48", false},
	} {
		if got := Exposes(netip.MustParsePrefix(k.source), netip.MustParsePrefix(k.destination)); got != k.want {
			t.Errorf("%s to %s: %v", k.source, k.destination, got)
		}
	}
}

func rulesOf(t *testing.T, c *Config) []Rule {
	t.Helper()
	rules, err := c.Rules()
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

// TestRulesAreCountedFirst: what a short text multiplies to is known before it is made, and more
// than MaxRules are not made.
func TestRulesAreCountedFirst(t *testing.T) {
	many := func(n int, base byte) (out []netip.Prefix) {
		for i := range n {
			out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{base, byte(i >> 8), byte(i), 0}), 24))
		}
		return out
	}
	ports := func(n int) (out []PortRange) {
		for i := range n {
			out = append(out, PortRange{uint16(1 + 2*i), uint16(1 + 2*i)})
		}
		return out
	}
	pool := Pool{Name: "p"}
	for i := range 300 {
		pool.Addresses = append(pool.Addresses, PoolAddress{Address: netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)})})
	}
	dnat := Policy{Name: "d", Action: DNAT, Pool: "p", Protocol: "tcp", Sources: many(2, 10), Ports: ports(300), To: netip.MustParseAddrPort("10.0.0.1:80")}
	for _, k := range []struct {
		policies []Policy
		want     int
	}{
		{[]Policy{snat("a", many(300, 10), many(300, 20), "tcp", ports(399)...)}, 300 * 300 * 399},
		{[]Policy{snat("a", many(256, 10), many(256, 20), ""), snat("b", many(256, 11), many(256, 20), "")}, MaxRules},
		{[]Policy{snat("a", many(256, 10), many(256, 20), ""), snat("b", many(256, 11), many(256, 20), ""), snat("c", pfx("12.0.0.0/8"), pfx("20.0.0.0/8"), "")}, MaxRules + 1},
		{[]Policy{dnat}, 2 * 300 * 300},
		{[]Policy{snat("a", many(60000, 10), many(60000, 20), "tcp", ports(32000)...), snat("b", many(60000, 10), many(60000, 20), "tcp", ports(32000)...)}, 2 * 60000 * 60000 * 32000},
		{[]Policy{snat("a", slices.Concat(many(10, 10), pfx("2001:db8::/32")), nil, "")}, 11},
	} {
		c := Config{Pools: []Pool{pool}, Policies: k.policies}
		_, all := c.CountRules()
		if all != k.want {
			t.Errorf("%d rules are counted, want %d", all, k.want)
		}
		rules, err := c.Rules()
		if (err != nil) != (k.want > MaxRules) || err == nil && len(rules) != k.want || err != nil && rules != nil {
			t.Errorf("of %d rules %d are made: %v", k.want, len(rules), err)
		}
	}
}

// TestMatchIsTheFirstRule: the rule that is found without making all is the first that matches.
func TestMatchIsTheFirstRule(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	some := func(first byte) (out []netip.Prefix) {
		for range 1 + r.IntN(3) {
			out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{first, byte(r.IntN(2)), byte(r.IntN(2)), 0}), 8+8*r.IntN(3)).Masked())
		}
		return out
	}
	for range 200 {
		c := Config{}
		for i := range 8 {
			p := snat(fmt.Sprint("p", i), some(10), some(20), []string{"", "tcp", "udp"}[r.IntN(3)])
			if p.Protocol != "" && r.IntN(2) == 0 {
				p.Ports = []PortRange{{uint16(1 + r.IntN(3)), uint16(3 + r.IntN(3))}, {10, 10}}
			}
			c.Policies = append(c.Policies, p)
		}
		rules := rulesOf(t, &c)
		for range 20 {
			f := Flow{Source: netip.AddrFrom4([4]byte{10, byte(r.IntN(2)), byte(r.IntN(2)), 1}), Destination: netip.AddrFrom4([4]byte{20, byte(r.IntN(2)), byte(r.IntN(2)), 1}), Protocol: []uint8{TCP, UDP, ICMP}[r.IntN(3)], Port: uint16(r.IntN(12))}
			want := ""
			if i := slices.IndexFunc(rules, func(r Rule) bool { return r.Matches(f) }); i >= 0 {
				want = rules[i].Policy.Name
			}
			if got := c.Match(f).Policy; got != want {
				t.Fatalf("%v: policy %q decides, want %q", f, got, want)
			}
		}
	}
}

// TestTiesAreBounded: policies that all tie cost no more than the returned pairs.
func TestTiesAreBounded(t *testing.T) {
	for _, name := range []func(int) string{func(i int) string { return fmt.Sprint("p", i) }, func(int) string { return "same" }} {
		var c Config
		for i := range 20000 {
			c.Policies = append(c.Policies, snat(name(i), pfx("10.0.0.0/8"), nil, "tcp", PortRange{1, uint16(2 + i)}))
		}
		rules := rulesOf(t, &c)
		if n := testing.AllocsPerRun(1, func() {
			if got := len(Ties(rules)); got > MaxTies+1 {
				t.Errorf("%d ties", got)
			}
		}); n > 10*MaxTies {
			t.Errorf("%v allocations", n)
		}
	}
}

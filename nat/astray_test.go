package nat

import (
	"net/netip"
	"testing"
)

func TestAstray(t *testing.T) {
	p := func(list ...string) (out []netip.Prefix) {
		for _, s := range list {
			out = append(out, netip.MustParsePrefix(s))
		}
		return out
	}
	pool := netip.MustParseAddr("192.0.2.5")
	c := Config{
		Underlay: "up0", Pools: []Pool{{Name: "p", Addresses: []PoolAddress{{Address: pool, Public: pool}}}},
		Attachments: []Attachment{{Interface: "t-a", Sources: p("10.1.0.0/16")}, {Interface: "t-b", Sources: p("10.2.0.0/16")}},
		Maps:        []Map{{Inside: p("10.9.0.0/24")[0], Mapped: p("100.64.0.0/24")[0]}},
		Policies: []Policy{
			{Name: "all", Action: SNAT, Sources: p("10.0.0.0/8"), Pool: "p"},
			{Name: "plain", Action: NoNAT, Sources: p("10.1.7.0/24"), Destinations: p("198.51.100.0/24")},
			{Name: "dns", Action: DNAT, Sources: p("198.51.100.0/24"), Protocol: "udp", Ports: []PortRange{{53, 53}}, Pool: "p", To: netip.MustParseAddrPort("10.1.0.53:5353")},
			{Name: "log", Action: Redirect, Sources: p("10.0.0.0/8"), Destinations: p("203.0.113.0/24"), Protocol: "udp", Ports: []PortRange{{514, 514}}, To: netip.MustParseAddrPort("10.2.0.9:0")},
			{Name: "sick", Action: Redirect, Sources: p("10.0.0.0/8"), Destinations: p("203.0.114.0/24"), Protocol: "udp", Ports: []PortRange{{514, 514}}, To: netip.MustParseAddrPort("10.2.0.9:0"), Down: true},
		},
	}
	leaves := func(a netip.Addr) bool { return !a.IsPrivate() }
	astray := c.Astray(leaves)
	track := func(protocol uint8, source, destination, leavesAs, goesTo string, port, serverPort uint16) Track {
		a := netip.MustParseAddr
		return Track{Source: a(source), Destination: a(destination), LeavesAs: a(leavesAs), GoesTo: a(goesTo), Protocol: protocol, Port: port, ServerPort: serverPort}
	}
	for name, k := range map[string]struct {
		t    Track
		ends bool
	}{
		"translated":                                 {track(UDP, "10.1.0.1", "198.51.100.7", "192.0.2.5", "198.51.100.7", 53, 53), false},
		"not translated":                             {track(UDP, "10.1.0.1", "198.51.100.7", "10.1.0.1", "198.51.100.7", 53, 53), true},
		"not translated, TCP":                        {track(TCP, "10.1.0.1", "198.51.100.7", "10.1.0.1", "198.51.100.7", 53, 53), false},
		"not translated, ICMP":                       {track(ICMP, "10.1.0.1", "198.51.100.7", "10.1.0.1", "198.51.100.7", 0, 0), true},
		"not translated, as a policy says":           {track(UDP, "10.1.7.1", "198.51.100.7", "10.1.7.1", "198.51.100.7", 53, 53), false},
		"answers to outside that leave so":           {track(UDP, "198.51.100.7", "10.1.7.1", "198.51.100.7", "10.1.7.1", 53, 53), false},
		"answers to outside that the guard drops":    {track(UDP, "198.51.100.7", "10.1.0.1", "198.51.100.7", "10.1.0.1", 53, 53), true},
		"between attachments":                        {track(UDP, "10.1.0.1", "10.2.0.1", "10.1.0.1", "10.2.0.1", 53, 53), false},
		"to the node":                                {track(UDP, "10.1.0.1", "192.0.2.5", "10.1.0.1", "192.0.2.5", 53, 53), false},
		"from the node":                              {track(UDP, "192.0.2.5", "10.1.0.1", "192.0.2.5", "10.1.0.1", 53, 53), false},
		"of the node":                                {track(UDP, "192.0.2.1", "198.51.100.7", "192.0.2.1", "198.51.100.7", 53, 53), false},
		"to its server":                              {track(UDP, "198.51.100.7", "192.0.2.5", "198.51.100.7", "10.1.0.53", 53, 5353), false},
		"to a former server":                         {track(UDP, "198.51.100.7", "192.0.2.5", "198.51.100.7", "10.1.0.54", 53, 5353), true},
		"to a former port":                           {track(UDP, "198.51.100.7", "192.0.2.5", "198.51.100.7", "10.1.0.53", 53, 5354), true},
		"to a server of a policy that is gone":       {track(UDP, "198.51.100.7", "192.0.2.5", "198.51.100.7", "10.1.0.54", 54, 54), false},
		"to a proxy that keeps the port":             {track(UDP, "10.1.0.1", "203.0.113.9", "10.1.0.1", "10.2.0.9", 514, 514), false},
		"to a former proxy":                          {track(UDP, "10.1.0.1", "203.0.113.9", "10.1.0.1", "10.2.0.8", 514, 514), true},
		"to a former proxy, and the present is down": {track(UDP, "10.1.0.1", "203.0.114.9", "10.1.0.1", "10.2.0.8", 514, 514), false},
		"mapped": {track(UDP, "10.1.0.1", "100.64.0.9", "10.1.0.1", "10.9.0.9", 53, 53), false},
	} {
		if got := astray(k.t); (got != "") != k.ends {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestOrphaned(t *testing.T) {
	a, p := netip.MustParseAddr, netip.MustParsePrefix
	c := Config{
		Own: []netip.Addr{a("192.0.2.1")}, Pools: []Pool{{Name: "p", Addresses: []PoolAddress{{Address: a("192.0.2.5")}}}},
		Attachments: []Attachment{{Interface: "t-a", Sources: []netip.Prefix{p("10.1.0.0/16")}}},
		Maps:        []Map{{Inside: p("10.9.0.0/24"), Mapped: p("100.64.0.0/24")}},
	}
	orphaned := c.Orphaned(func(x netip.Addr) bool { return x == a("192.0.2.7") })
	for name, k := range map[string]struct {
		source, destination, leavesAs, goesTo string
		want                                  bool
	}{
		"of a pool":                       {"10.1.0.1", "198.51.100.7", "192.0.2.5", "198.51.100.7", false},
		"of no pool any more":             {"10.1.0.1", "198.51.100.7", "192.0.2.6", "198.51.100.7", true},
		"of an address of the machine":    {"10.1.0.1", "198.51.100.7", "192.0.2.7", "198.51.100.7", false},
		"of the node's own address":       {"10.1.0.1", "198.51.100.7", "192.0.2.1", "198.51.100.7", false},
		"not translated":                  {"10.1.0.1", "198.51.100.7", "10.1.0.1", "198.51.100.7", false},
		"translated by others":            {"172.17.0.2", "198.51.100.7", "192.0.2.6", "198.51.100.7", false},
		"shown as mapped":                 {"10.1.0.1", "198.51.100.7", "100.64.0.7", "198.51.100.7", false},
		"forwarded at a pool's address":   {"198.51.100.7", "192.0.2.5", "198.51.100.7", "10.1.0.9", false},
		"forwarded at a former address":   {"198.51.100.7", "192.0.2.6", "198.51.100.7", "10.1.0.9", true},
		"forwarded at one of the machine": {"198.51.100.7", "192.0.2.7", "198.51.100.7", "10.1.0.9", false},
		"redirected to a proxy":           {"10.1.0.1", "198.51.100.7", "10.1.0.1", "10.1.0.9", false},
		"turned back inside":              {"10.1.0.1", "192.0.2.6", "192.0.2.6", "10.1.0.9", false},
	} {
		got := orphaned(Track{Source: a(k.source), Destination: a(k.destination), LeavesAs: a(k.leavesAs), GoesTo: a(k.goesTo), Protocol: TCP})
		if got != k.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

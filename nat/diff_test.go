package nat

import (
	"fmt"
	"net/netip"
	"testing"
)

func TestEndings(t *testing.T) {
	a := netip.MustParseAddr
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	base := func() Config {
		return Config{
			Underlay: "eth0", Own: []netip.Addr{a("10.9.0.4")},
			Pools: []Pool{
				{Name: "p", Addresses: []PoolAddress{{Address: a("10.9.0.5"), Public: a("203.0.113.5")}, {Address: a("10.9.0.6"), Public: a("203.0.113.6")}}},
				{Name: "own", Addresses: []PoolAddress{{Address: a("10.9.0.4"), Public: a("203.0.113.4")}}},
			},
			Policies: []Policy{
				{Name: "all", Action: SNAT, Sources: p("10.0.0.0/8"), Pool: "p"},
				{Name: "plain", Action: NoNAT, Sources: p("10.1.0.0/16"), Destinations: p("10.200.0.0/16")},
			},
			Maps: []Map{{Interfaces: []string{"t-a", "t-b"}, Inside: p("10.3.0.0/24")[0], Mapped: p("100.64.3.0/24")[0]}},
		}
	}
	track := func(source, destination, as, to netip.Addr) Track {
		return Track{Source: source, Destination: destination, LeavesAs: as, GoesTo: to}
	}
	flows := map[string]Track{
		"as 5":           track(a("10.1.0.1"), a("198.51.100.1"), a("10.9.0.5"), a("198.51.100.1")),
		"as own":         track(a("10.9.0.4"), a("198.51.100.1"), a("10.9.0.4"), a("198.51.100.1")),
		"forwarded at 6": track(a("198.51.100.1"), a("10.9.0.6"), a("198.51.100.1"), a("10.1.0.9")),
		"turned at 5":    track(a("10.1.0.1"), a("10.9.0.5"), a("10.9.0.5"), a("10.1.0.9")),
		"plain":          track(a("10.1.0.1"), a("10.200.0.1"), a("10.1.0.1"), a("10.200.0.1")),
		"plain inward":   track(a("10.200.0.1"), a("10.1.0.1"), a("10.200.0.1"), a("10.1.0.1")),
		"plain once":     track(a("10.1.0.1"), a("10.200.0.1"), a("10.9.0.5"), a("10.200.0.1")),
		"mapped":         track(a("100.64.3.1"), a("198.51.100.1"), a("10.9.0.5"), a("198.51.100.1")),
		"to mapped":      track(a("10.1.0.1"), a("100.64.3.1"), a("10.1.0.1"), a("100.64.3.1")),
		"not mapped yet": track(a("10.3.0.1"), a("198.51.100.1"), a("10.9.0.5"), a("198.51.100.1")),
	}
	for name, k := range map[string]struct {
		change func(*Config)
		want   []string // kind, name and words of an ending, and how many flows it has
	}{
		"nothing":             {func(*Config) {}, nil},
		"an address goes":     {func(c *Config) { c.Pools[0].Addresses = c.Pools[0].Addresses[:1] }, []string{"pool p from 203.0.113.6: 1"}},
		"the pool goes":       {func(c *Config) { c.Pools = c.Pools[1:] }, []string{"pool p from 203.0.113.5: 4", "pool p from 203.0.113.6: 1"}},
		"it moves":            {func(c *Config) { c.Pools[1].Addresses, c.Pools[0].Addresses = c.Pools[0].Addresses, nil }, nil},
		"what is own remains": {func(c *Config) { c.Pools = c.Pools[:1] }, nil},
		"another own address": {func(c *Config) { c.Own[0] = a("10.9.0.7"); c.Pools = c.Pools[:1] }, []string{"pool own from 203.0.113.4: 1"}},
		"weights and zones":   {func(c *Config) { c.Pools[0].Addresses[0].Weight = 9; c.Pools[0].Silent = true }, nil},
		"deny":                {func(c *Config) { c.Policies[0].Action = Deny }, nil},
		"another pool":        {func(c *Config) { c.Policies[0].Pool = "own" }, nil},
		"no policy":           {func(c *Config) { c.Policies = nil }, []string{"policy plain without translation: 2"}},
		"plain becomes snat":  {func(c *Config) { c.Policies[1].Action = SNAT }, []string{"policy plain without translation: 2"}},
		"plain to others":     {func(c *Config) { c.Policies[1].Destinations = p("10.201.0.0/16") }, []string{"policy plain without translation: 2"}},
		"plain to more":       {func(c *Config) { c.Policies[1].Destinations = p("10.0.0.0/8") }, []string{"policy plain without translation: 0"}},
		"plain by a new name": {func(c *Config) { c.Policies[1].Name = "x" }, nil},
		"no map":              {func(c *Config) { c.Maps = nil }, []string{"map 100.64.3.0/24 of 100.64.3.0/24: 2"}},
		"a tunnel less":       {func(c *Config) { c.Maps[0].Interfaces = []string{"t-a"} }, []string{"map 100.64.3.0/24 of 100.64.3.0/24: 2"}},
		"a tunnel more":       {func(c *Config) { c.Maps[0].Interfaces = []string{"t-a", "t-b", "t-c"} }, []string{"map 100.64.3.0/24 of 10.3.0.0/24: 1"}},
		"another prefix": {func(c *Config) { c.Maps[0].Mapped = p("100.64.4.0/24")[0] },
			[]string{"map 100.64.3.0/24 of 100.64.3.0/24: 2", "map 100.64.4.0/24 of 10.3.0.0/24: 1"}},
	} {
		b := base()
		k.change(&b)
		var got []string
		for _, e := range Endings(base(), b) {
			n := 0
			for _, f := range flows {
				if e.Has(f) {
					n++
				}
			}
			got = append(got, fmt.Sprintf("%s %s %s: %d", e.Kind, e.Name, e.Flows, n))
		}
		if fmt.Sprintf("%q", got) != fmt.Sprintf("%q", k.want) {
			t.Errorf("%s: %q, want %q", name, got, k.want)
		}
	}
	if e := Endings(Config{}, base()); len(e) != 1 || e[0].Kind != "map" {
		t.Errorf("the first configuration: %v", e)
	}
}

// TestEndingsOfServers: of a policy with another server, flows without a connection end that go to
// the former one, whichever policy opens the port now.
func TestEndingsOfServers(t *testing.T) {
	client, at, inside := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("10.9.0.5"), []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	open := func(name, to string, ports ...PortRange) Policy {
		return Policy{Name: name, Action: DNAT, Sources: inside, Pool: "p", Protocol: "udp", Ports: ports, To: netip.MustParseAddrPort(to)}
	}
	config := func(p ...Policy) Config {
		return Config{Pools: []Pool{{Name: "p", Addresses: []PoolAddress{{Address: at, Public: at}}}}, Policies: p}
	}
	had := config(open("dns", "10.1.0.8:53", PortRange{53, 53}), open("sip", "10.1.0.9:0", PortRange{5060, 5069}))
	flows := []Track{
		{Source: client, Destination: at, LeavesAs: client, GoesTo: netip.MustParseAddr("10.1.0.8"), Protocol: UDP, Port: 53, ServerPort: 53},
		{Source: client, Destination: at, LeavesAs: client, GoesTo: netip.MustParseAddr("10.1.0.8"), Protocol: TCP, Port: 53, ServerPort: 53},
		{Source: client, Destination: at, LeavesAs: client, GoesTo: netip.MustParseAddr("10.1.0.9"), Protocol: UDP, Port: 5061, ServerPort: 5061},
		{Source: client, Destination: netip.MustParseAddr("10.1.0.8"), LeavesAs: client, GoesTo: netip.MustParseAddr("10.1.0.8"), Protocol: UDP, Port: 53, ServerPort: 53},
	}
	only := open("web", "10.1.0.8:80")
	only.Protocol = "tcp"
	web := had
	web.Policies = append([]Policy{only}, had.Policies...)
	only.To = netip.MustParseAddrPort("10.1.0.8:81")
	if e := Endings(web, config(only, had.Policies[0], had.Policies[1])); len(e) > 0 {
		t.Errorf("of TCP flows it is said that they end: %+v", e)
	}
	for name, k := range map[string]struct {
		now  Config
		want string
	}{
		"the same":           {had, ""},
		"they go":            {config(), ""},
		"another server":     {config(open("dns", "10.1.0.7:53", PortRange{53, 53}), had.Policies[1]), "dns to 10.1.0.8:53 [0]"},
		"another port there": {config(open("dns", "10.1.0.8:54", PortRange{53, 53}), had.Policies[1]), "dns to 10.1.0.8:53 [0]"},
		"another name":       {config(open("other", "10.1.0.7:0", PortRange{5060, 5062}), had.Policies[0]), "sip to 10.1.0.9 [2]"},
		"other ports":        {config(open("dns", "10.1.0.7:53", PortRange{54, 54}), had.Policies[1]), "dns to 10.1.0.8:53 []"},
	} {
		got := ""
		for _, e := range Endings(had, k.now) {
			var of []int
			for i, f := range flows {
				if e.Has(f) {
					of = append(of, i)
				}
			}
			if got += fmt.Sprint(e.Name, " ", e.Flows, " ", of); e.Kind != "policy" {
				t.Errorf("%s: %+v", name, e)
			}
		}
		if got != k.want {
			t.Errorf("%s: %q, want %q", name, got, k.want)
		}
	}
}

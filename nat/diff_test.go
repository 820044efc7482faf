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
	flows := map[string]Track{
		"as 5":           {a("10.1.0.1"), a("198.51.100.1"), a("10.9.0.5"), a("198.51.100.1")},
		"as own":         {a("10.9.0.4"), a("198.51.100.1"), a("10.9.0.4"), a("198.51.100.1")},
		"forwarded at 6": {a("198.51.100.1"), a("10.9.0.6"), a("198.51.100.1"), a("10.1.0.9")},
		"turned at 5":    {a("10.1.0.1"), a("10.9.0.5"), a("10.9.0.5"), a("10.1.0.9")},
		"plain":          {a("10.1.0.1"), a("10.200.0.1"), a("10.1.0.1"), a("10.200.0.1")},
		"plain inward":   {a("10.200.0.1"), a("10.1.0.1"), a("10.200.0.1"), a("10.1.0.1")},
		"plain once":     {a("10.1.0.1"), a("10.200.0.1"), a("10.9.0.5"), a("10.200.0.1")},
		"mapped":         {a("100.64.3.1"), a("198.51.100.1"), a("10.9.0.5"), a("198.51.100.1")},
		"to mapped":      {a("10.1.0.1"), a("100.64.3.1"), a("10.1.0.1"), a("100.64.3.1")},
		"not mapped yet": {a("10.3.0.1"), a("198.51.100.1"), a("10.9.0.5"), a("198.51.100.1")},
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

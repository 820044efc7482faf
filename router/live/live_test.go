package live

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// target has something of everything that facts bear on.
func target() plan.Target {
	return plan.Target{
		Underlay: spec.Underlay{Interface: "eth0", Address: addr("10.9.0.4")},
		Tunnels: []tunnel.Config{
			{Name: "a", Interface: "t-a", IPsec: &tunnel.IPsec{RemoteAddress: addr("203.0.113.1")}, Inside: []tunnel.Inside{{Local: prefix("169.254.9.2/30"), Remote: addr("169.254.9.1")}}},
			{Name: "b", Interface: "t-b", WireGuard: &tunnel.WireGuard{}},
		},
		BGP:    bgp.Config{ASN: 64620, Announce: []netip.Prefix{prefix("10.0.0.0/8"), prefix("100.64.0.0/24")}},
		Health: []egress.ProbedPool{{Name: "p", Addresses: []netip.Addr{addr("10.9.0.5"), addr("10.9.0.6")}, Announce: []netip.Prefix{prefix("198.51.100.0/24")}, Probes: egress.Probes{Targets: []egress.Target{{Scheme: "tcp", Host: "probe.example", Port: 1}}}}},
		NAT: nat.Config{
			Underlay: "eth0", Own: []netip.Addr{addr("10.9.0.4")},
			Attachments: []nat.Attachment{{Interface: "t-a", Sources: []netip.Prefix{prefix("10.1.0.0/16")}}},
			Pools:       []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: addr("10.9.0.5")}, {Address: addr("10.9.0.6")}}}, {Name: "own", Addresses: []nat.PoolAddress{{Address: addr("10.9.0.4")}}}},
			Policies: []nat.Policy{
				{Name: "named", Action: nat.SNAT, Sources: []netip.Prefix{prefix("10.1.0.0/16")}, Names: []string{"api.example"}, Pool: "p"},
				{Name: "proxy", Action: nat.Redirect, Sources: []netip.Prefix{prefix("10.1.0.0/16")}, To: netip.MustParseAddrPort("10.1.0.9:3128")},
			},
			Maps: []nat.Map{{Inside: prefix("10.3.0.0/24"), Mapped: prefix("100.64.0.0/24"), Interfaces: []string{"t-a", "t-b"}}},
		},
	}
}

// machine is what a node with this target has around it.
var machine = fib.Surroundings{
	Devices:   map[string]fib.Device{"eth0": {Index: 2}, "t-a": {Index: 7}, "eth9": {Index: 9}},
	Addresses: []fib.Assigned{{Interface: "eth0", Prefix: prefix("10.9.0.4/24")}, {Interface: "eth9", Prefix: prefix("10.8.0.4/24")}, {Interface: "eth0", Prefix: prefix("10.9.0.6/24")}, {Interface: "t-a", Prefix: prefix("169.254.9.2/30")}},
	Routes:    []fib.Foreign{{Table: fib.TableMain, Interface: "eth0", Prefix: prefix("0.0.0.0/0"), Gateway: addr("10.9.0.1")}},
}

// TestOf: each fact shows in the effective configuration, and by itself alone.
func TestOf(t *testing.T) {
	base := Facts{Machine: machine, Read: true, APIPort: 7443}
	announced := func(e Effective) string { return fmt.Sprint(e.BGP.Announce) }
	down := func(e Effective) (out string) {
		for _, p := range e.NAT.Pools {
			for _, a := range p.Addresses {
				if a.Down {
					out += a.Address.String() + " "
				}
			}
		}
		return strings.TrimSpace(out)
	}
	shared := func(t *plan.Target) { t.Takeover.Paths = []egress.Path{{}} }
	for name, k := range map[string]struct {
		change func(*plan.Target)
		facts  func(*Facts)
		of     func(Effective) string
		want   string
	}{
		"the port of the API": {nil, nil, func(e Effective) string { return fmt.Sprint(e.NAT.API.Port) }, "7443"},
		"own addresses, without those of pools and attachments": {nil, nil, func(e Effective) string { return fmt.Sprint(e.NAT.Own) }, "[10.9.0.4 10.8.0.4]"},
		"own addresses of a machine that was not read":          {nil, func(f *Facts) { *f = Facts{} }, func(e Effective) string { return fmt.Sprint(e.NAT.Own) }, "[10.9.0.4]"},
		"links that are there":                                  {nil, nil, func(e Effective) string { return fmt.Sprint(e.NAT.Links) }, "[{eth0 2} {t-a 7}]"},
		"pool addresses, without the node's own":                {nil, nil, func(e Effective) string { return fmt.Sprint(e.PoolAddresses) }, "map[eth0:[10.9.0.5 10.9.0.6]]"},

		"nothing known of an address":       {nil, nil, down, ""},
		"an address that does not work":     {nil, func(f *Facts) { f.Pools = []egress.PoolHealth{{Name: "p", Unusable: []netip.Addr{addr("10.9.0.6")}}} }, down, "10.9.0.6"},
		"a pool that is not known yet":      {nil, nil, announced, "[10.0.0.0/8 100.64.0.0/24 198.51.100.0/24]"},
		"a pool with a usable address":      {nil, func(f *Facts) { f.Pools = []egress.PoolHealth{{Name: "p", Usable: 1}} }, announced, "[10.0.0.0/8 100.64.0.0/24 198.51.100.0/24]"},
		"a pool without a usable address":   {nil, func(f *Facts) { f.Pools = []egress.PoolHealth{{Name: "p"}} }, announced, "[10.0.0.0/8 100.64.0.0/24]"},
		"a shared pool that is not known":   {shared, nil, announced, "[10.0.0.0/8 100.64.0.0/24]"},
		"a shared pool without a verdict":   {shared, func(f *Facts) { f.Pools = []egress.PoolHealth{{Name: "p", Usable: 2}} }, announced, "[10.0.0.0/8 100.64.0.0/24]"},
		"a shared pool with an answer":      {shared, func(f *Facts) { f.Pools = []egress.PoolHealth{{Name: "p", Usable: 1, Healthy: 1}} }, announced, "[10.0.0.0/8 100.64.0.0/24 198.51.100.0/24]"},
		"a map with one tunnel that is up":  {nil, func(f *Facts) { f.TunnelsDown = map[string]bool{"t-a": true} }, announced, "[10.0.0.0/8 100.64.0.0/24 198.51.100.0/24]"},
		"a map without a tunnel that is up": {nil, func(f *Facts) { f.TunnelsDown = map[string]bool{"t-a": true, "t-b": true} }, announced, "[10.0.0.0/8 198.51.100.0/24]"},

		"a proxy that does not work": {nil, func(f *Facts) { f.ProxiesDown = map[string]bool{"proxy": true} }, func(e Effective) string { return fmt.Sprint(e.NAT.Policies[0].Down, e.NAT.Policies[1].Down) }, "false true"},
		"a name without addresses":   {nil, nil, func(e Effective) string { return fmt.Sprint(e.NAT.Policies[0].Destinations) }, "[]"},
		"a name with an address":     {nil, func(f *Facts) { f.Names = func(string) []netip.Addr { return []netip.Addr{addr("198.51.100.9")} } }, func(e Effective) string { return fmt.Sprint(e.NAT.Policies[0].Destinations, len(e.Conflicts)) }, "[198.51.100.9/32] 0"},
		"names that are needed":      {nil, nil, func(e Effective) string { return fmt.Sprint(e.Names) }, "[api.example probe.example]"},
		"families that are needed": {nil, nil, func(e Effective) string {
			return fmt.Sprint(e.Unused("api.example", false), e.Unused("api.example", true))
		}, "false true"},
	} {
		t.Run(name, func(t *testing.T) {
			given, facts := target(), base
			if k.change != nil {
				k.change(&given)
			}
			if k.facts != nil {
				k.facts(&facts)
			}
			before := fmt.Sprintf("%+v", given)
			if got := k.of(Of(&given, facts)); got != k.want {
				t.Errorf("%s, want %s", got, k.want)
			}
			if after := fmt.Sprintf("%+v", given); after != before {
				t.Errorf("the target has changed to %s", after)
			}
		})
	}
}

// TestReserved: what a route must not take, by where it comes from.
func TestReserved(t *testing.T) {
	given := target()
	find := func(f Facts, p string) string {
		var all []string
		for _, r := range Of(&given, f).Reserved {
			if r.Key == fib.Main(prefix(p)) {
				all = append(all, fmt.Sprint(r.Why[:min(20, len(r.Why))], " ", r.Covered))
			}
		}
		slices.Sort(all)
		return strings.Join(all, "; ")
	}
	facts := Facts{Machine: machine, Read: true, Resolvers: []netip.Addr{addr("192.0.2.53"), addr("127.0.0.53")}}
	for p, want := range map[string]string{
		"127.0.0.0/8":        "which no router forw false",
		"10.9.0.1/32":        "a router of the unde true",
		"192.0.2.53/32":      "a DNS server of this true",
		"127.0.0.53/32":      "",
		"10.9.0.4/32":        "an address of pool o false; an address of this n false",
		"10.8.0.0/24":        "the network that int false",
		"10.9.0.5/32":        "an address of pool p false",
		"169.254.9.1/32":     "an inside address of false",
		"169.254.9.2/32":     "an inside address of false",
		"203.0.113.1/32":     "the outside address  true",
		"100.100.100.200/32": "at which Alibaba Clo false",
	} {
		if got := find(facts, p); got != want {
			t.Errorf("%s: %q, want %q", p, got, want)
		}
	}
	facts.Resolvers = []netip.Addr{addr("100.100.100.200")}
	if got := find(facts, "100.100.100.200/32"); !strings.Contains(got, "at which the cloud's true") {
		t.Errorf("the resolver of Alibaba Cloud: %q", got)
	}
}

// TestPure: the same target and the same facts make the same.
func TestPure(t *testing.T) {
	given, facts := target(), Facts{Machine: machine, Read: true, Names: func(string) []netip.Addr { return []netip.Addr{addr("198.51.100.9")} }}
	a, b := Of(&given, facts), Of(&given, facts)
	a.Unused, b.Unused, a.Inside, b.Inside = nil, nil, nil, nil
	if !reflect.DeepEqual(a, b) {
		t.Errorf("%+v\n%+v", a, b)
	}
}

package spec

import (
	"fmt"
	"strings"
	"testing"
)

// goodEgress is a valid document with every kind of egress object.
const goodEgress = `node: {name: hub-1, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: aws, inside: [{local: 169.254.64.2/30}], ipsec: {remoteAddress: 198.51.100.1, psk: aws-0}}
announce: [10.9.0.0/24]
egress:
  zones:
  - {name: a, sources: [172.16.0.0/16, 2001:db8:a::/48]}
  - {name: b, sources: [172.17.0.0/16]}
  resolvers: [10.9.0.2, "10.9.0.3:5353", "2001:db8::53"]
  nameFloor: 1m
  dnsProxy: {listen: [169.254.64.2]}
  pools:
  - name: partner
    addresses: [{address: 10.9.0.10, zone: a, weight: 3}, {address: 10.9.0.11, zone: b}]
    probes: {targets: ["tcp://198.51.100.7:443", "https://api.partner.example/health", "icmp://2001:db8::7"], timeout: 1s, quorum: 2}
    announce: [0.0.0.0/0]
  - {name: other, addresses: [{address: 10.9.0.12, publicAddress: 203.0.113.12}], probes: {targets: ["icmp://198.51.100.7"]}}
  takeover: {watch: [169.254.64.1], interval: 0.1s}
  policies:
  - {name: api, sources: [172.16.0.0/12], names: [API.partner.example., "*.example.com"], pool: partner}
  - {name: web, sources: [172.16.0.0/12], names: [api.partner.example], protocol: tcp, ports: ["443"], pool: other}
`

func TestEgressHealthAndNames(t *testing.T) {
	s, problems := parse(goodEgress)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for what, pair := range map[string][2]string{
		"zones":     {fmt.Sprint(s.Zones), "[{a [172.16.0.0/16 2001:db8:a::/48]} {b [172.17.0.0/16]}]"},
		"address":   {fmt.Sprint(s.Pools[0].Addresses), "[10.9.0.10 (zone a, weight 3) 10.9.0.11 (zone b)]"},
		"probes":    {fmt.Sprintf("%+v", s.Health[0].Probes), "{Targets:[tcp://198.51.100.7:443 https://api.partner.example:443/health icmp://[2001:db8::7]] Interval:5s Timeout:1s HoldDown:1m0s Rise:2 Fall:3 Quorum:2}"},
		"announce":  {fmt.Sprint(s.Health[0].Announce, len(s.Health)), "[0.0.0.0/0] 2"},
		"names":     {fmt.Sprint(s.Policies[0].Names), "[api.partner.example *.example.com]"},
		"resolvers": {fmt.Sprint(s.Names.Resolvers), "[10.9.0.2:53 10.9.0.3:5353 [2001:db8::53]:53]"},
		"times":     {fmt.Sprint(s.Names.Floor, s.Names.Grace), "1m0s 24h0m0s"},
		"takeover":  {fmt.Sprint(s.Takeover), "{[{ invalid IP 169.254.64.1}] 100ms 4 [{10.9.0.10 10.9.0.10} {10.9.0.11 10.9.0.11} {10.9.0.12 203.0.113.12}]}"},
		"proxy":     {fmt.Sprint(s.Names.Proxy), "[{169.254.64.2 }]"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: %s, want %s", what, pair[0], pair[1])
		}
	}
}

// TestEgressMistakes checks that one changed line of goodEgress makes exactly one problem.
func TestEgressMistakes(t *testing.T) {
	var many, targets []string
	for i := range maxNames {
		many = append(many, fmt.Sprintf("n%d.example", i))
	}
	for i := range maxTargets + 1 {
		targets = append(targets, fmt.Sprintf("\"icmp://198.51.100.%d\"", i+1))
	}
	for _, k := range []struct{ from, to, want string }{
		{"watch: [169.254.64.1]", "watch: []", `egress.takeover.watch: is required`},
		{"watch: [169.254.64.1]", "watch: [169.254.64.2]", `egress.takeover.watch[0]: "169.254.64.2" is not a remote inside address of a tunnel`},
		{"- {name: aws, ", "- {name: aws, disabled: true, ", `egress.takeover.watch: "169.254.64.1" are only in tunnels that are disabled`},
		{"watch: [169.254.64.1]", "watch: [169.254.64.1, 169.254.64.1]", `egress.takeover.watch[1]: "169.254.64.1" is listed twice`},
		{"interval: 0.1s", "interval: 0.05s", `egress.takeover.interval: "50ms" is not from 100ms to 10s`},
		{"interval: 0.1s", "fall: 1", `egress.takeover.fall: "1" is not from 2 to 100`},
		{`, probes: {targets: ["icmp://198.51.100.7"]}}`, "}", `egress.pools[1].probes: is required with`},
		{"API.partner.example., ", strings.Join(many, ", ") + ", ", `egress.policies[0].names[1000]: "*.example.com" is one name more than 1000`},
		{`["tcp://198.51.100.7:443", "https`, "[" + strings.Join(targets, ", ") + `, "https`, `egress.pools[0].probes.targets: "19" are more than 16`},
		{"[172.17.0.0/16]}", "[172.17.0.0/16]}\n  - {name: a, sources: [172.18.0.0/16]}", `egress.zones[2].name: "a" is the name of egress.zones[0].name too`},
		{"[172.17.0.0/16]", "[172.16.7.0/24, 172.17.0.0/16]", `egress.zones[1].sources[0]: "172.16.7.0/24" overlaps 172.16.0.0/16 of egress.zones[0].sources[0]`},
		{"[172.17.0.0/16]", "[]", `egress.zones[1].sources: is required`},
		{"zone: b", "zone: c", `egress.pools[0].addresses[1].zone: "c" is not a zone of this document`},
		{"weight: 3", "weight: 101", `egress.pools[0].addresses[0].weight: "101" is not from 1 to 100`},
		{"198.51.100.7:443", "198.51.100.7", `egress.pools[0].probes.targets[0]: "tcp://198.51.100.7" has no port`},
		{"tcp://198.51.100.7:443", "tcp://224.0.0.1:443", `"224.0.0.1" is not a unicast address`},
		{"https://api.partner.example/health", "https://api..example/", `has a host that is neither an address nor a domain name`},
		{"icmp://2001:db8::7", "tcp://198.51.100.7:443", `egress.pools[0].probes.targets[2]: "tcp://198.51.100.7:443" is listed twice`},
		{"timeout: 1s", "timeout: 6s", `egress.pools[0].probes.timeout: "6s" is not a whole number of seconds from 1s to 5s`},
		{"quorum: 2", "quorum: 3", `egress.pools[0].probes.quorum: "3" is more than the 2 targets of 10.9.0.10`},
		{`"tcp://198.51.100.7:443", "https://api.partner.example/health", `, "", `has none of the family of 10.9.0.10`},
		{`targets: ["tcp://198.51.100.7:443", "https://api.partner.example/health", "icmp://2001:db8::7"], `, "", `egress.pools[0].probes.targets: is required`},
		{"announce: [0.0.0.0/0]", "announce: [10.9.0.0/24]", `egress.pools[0].announce[0]: "10.9.0.0/24" is in ` + "`announce` too"},
		{"{name: other, addresses", "{name: other, announce: [0.0.0.0/0], addresses", `egress.pools[1].announce[0]: "0.0.0.0/0" is egress.pools[0].announce[0] too`},
		{"[10.9.0.2, ", "[10.9.0.2, \"10.9.0.2:53\", ", `egress.resolvers[1]: "10.9.0.2:53" is listed twice`},
		{"[10.9.0.2, ", "[dns.example, ", `egress.resolvers[0]: "dns.example" is not the address of a DNS server`},
		{"[10.9.0.2, ", "[0.0.0.0, ", `egress.resolvers[0]: "0.0.0.0" is not a unicast address`},
		{"nameFloor: 1m", "nameFloor: 2h", `egress.nameFloor: "2h0m0s" is not`},
		{"nameFloor: 1m", "nameHold: 59s", `egress.nameHold: "59s" is not`},
		{"nameFloor: 1m", "portlessTimeout: 9s", `egress.portlessTimeout: "9s" is not`},
		{"nameFloor: 1m", "portlessTimeout: 10.5s", `egress.portlessTimeout: "10.5s" is not a whole number of seconds`},
		{"nameFloor: 1m", "nameHold: 721h", `egress.nameHold: "721h0m0s" is not`},
		{"nameFloor: 1m", "nameGrace: 721h", `egress.nameGrace: "721h0m0s" is not`},
		{"listen: [169.254.64.2]", "listen: [10.9.0.4], from: [none]", `egress.dnsProxy.from[0]: "none" is not a tunnel or attachment`},
		{"listen: [169.254.64.2]", "listen: [10.9.0.4, 10.9.0.4]", `egress.dnsProxy.listen[1]: "10.9.0.4" is listed twice`},
		{"listen: [169.254.64.2]", "listen: [169.254.64.2], from: [none]", `egress.dnsProxy.from: has no meaning while`},
		{"listen: [169.254.64.2]", "listen: [10.9.0.10]", `egress.dnsProxy.listen[0]: "10.9.0.10" is an address of pool partner`},
		{"listen: [169.254.64.2]", "listen: [168.63.129.16]", `egress.dnsProxy.listen[0]: "168.63.129.16" is an address at which the cloud's platform`},
		{"listen: [169.254.64.2]", "listen: [127.0.0.1]", `egress.dnsProxy.listen[0]: "127.0.0.1" is not a unicast address`},
		{"listen: [169.254.64.2]", "listen: [10.9.1.1, 10.9.1.2, 10.9.1.3, 10.9.1.4, 10.9.1.5]", `egress.dnsProxy.listen[4]: "10.9.1.5" is one more than 4 addresses`},
		{"listen: [169.254.64.2]", "listen: [169.254.64.1]", `egress.dnsProxy.listen[0]: "169.254.64.1" is not a local inside address of a tunnel`},
		{"listen: [169.254.64.2]", "listen: []", `egress.dnsProxy.listen: is required`},
		{"  dnsProxy: {listen: [169.254.64.2]}\n", "", `egress.policies[0].names[1]: "*.example.com" is a wildcard, which only the DNS proxy can resolve`},
		{"*.example.com", "*.com", `egress.policies[0].names[1]: "*.com" matches a whole top-level domain`},
		{"*.example.com", "198.51.100.7", `egress.policies[0].names[1]: "198.51.100.7" is an address`},
		{"*.example.com", "a_b-.example", `egress.policies[0].names[1]: "a_b-.example" is not a valid domain name`},
		{"*.example.com", "api.partner.example", `egress.policies[0].names[1]: "api.partner.example" is listed twice`},
		{"protocol: tcp, ports: [\"443\"], ", "", `egress.policies[1]: "web" decides the same flows as egress.policies[0] (api)`},
	} {
		text := strings.Replace(goodEgress, k.from, k.to, 1)
		if text == goodEgress {
			t.Errorf("%s: the text has not changed", k.want)
			continue
		}
		_, problems := parse(text)
		if len(problems) != 1 || !strings.Contains(problems.Error(), k.want) {
			t.Errorf("got %v, want %q", problems, k.want)
		}
		for _, p := range problems {
			if p.Path == "" || p.Rule == "" || p.Remedy == "" {
				t.Errorf("problem lacks path, rule or remedy: %+v", p)
			}
		}
	}
}

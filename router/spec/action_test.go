package spec

import (
	"fmt"
	"strings"
	"testing"
)

// TestActions checks valid and invalid policies of every action in an otherwise valid document.
func TestActions(t *testing.T) {
	document := func(policies string) string {
		return `node: {name: hub-1}
underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.9}
egress:
  pools:
    - {name: p, addresses: [{address: 10.9.0.11, publicAddress: 203.0.113.11}, {address: 10.9.0.12}]}
    - {name: own, addresses: [{address: 10.9.0.4}]}
  policies:
` + policies + "\n"
	}
	for _, k := range []struct{ policy, want string }{
		{`{name: a, action: no-nat, sources: [198.18.0.0/16], destinations: [198.51.100.0/24], pickup: true}`, ""},
		{`{name: a, action: no-nat, sources: [10.1.0.0/16], destinations: [172.20.0.0/16]}`, ""},
		{`{name: a, action: no-nat, sources: ["fd00:1::/48"], destinations: ["fd00:2::/48"]}`, ""},
		{`{name: a, action: reject, sources: [0.0.0.0/0], protocol: tcp, ports: ["25"]}`, ""},
		{`{name: a, action: dnat, sources: [198.51.100.0/24], protocol: tcp, ports: ["443"], pool: p, to: "10.0.1.5:8443", timeouts: {tcpEstablished: 2h}}`, ""},
		{`{name: a, action: dnat, sources: [198.51.100.0/24], protocol: tcp, ports: ["443"], pool: p, destinations: [203.0.113.11/32], to: 10.0.1.5}`, ""},
		{`{name: a, action: redirect, sources: [10.1.0.0/16], protocol: tcp, ports: ["80"], to: "10.2.0.9:3128", whenDown: bypass}`, ""},
		{`{name: a, action: redirect, sources: [10.1.0.0/16], protocol: tcp, to: "10.2.0.9:3128", probes: {interval: 1s}}`, ""},
		{`{name: a, action: redirect, sources: [10.1.0.0/16], protocol: udp, to: 10.2.0.9, probes: {targets: ["icmp://10.2.0.9"]}}`, ""},
		{`{name: a, sources: [10.1.0.0/16], pool: p, timeouts: {udp: 2m, udpStream: 5m, tcpClosing: 4m}}`, ""},

		{`{name: a, action: masquerade, sources: [10.1.0.0/16]}`, `.action: "masquerade" is not a valid action; give one of ["snat" "no-nat" "deny" "reject" "dnat" "redirect"]`},
		{`{name: a, action: no-nat, sources: [10.1.0.0/16], destinations: [198.51.100.0/24]}`, `.sources[0]: "10.1.0.0/16" has private addresses, which must not leave toward 198.51.100.0/24, which is public`},
		{`{name: a, action: no-nat, sources: [0.0.0.0/0], destinations: [198.51.100.0/24]}`, `.sources[0]: "0.0.0.0/0" has private addresses`},
		{`{name: a, action: no-nat, sources: [169.254.0.0/16], destinations: [198.51.100.0/24]}`, `.sources[0]: "169.254.0.0/16" has private addresses`},
		{`{name: a, action: no-nat, sources: [10.1.0.0/16], destinations: [172.0.0.0/8]}`, `.sources[0]: "10.1.0.0/16" has private addresses`},
		{`{name: a, action: no-nat, sources: ["fd00::/8"], destinations: ["2001:db8::/32"]}`, `.sources[0]: "fd00::/8" has private addresses`},
		{`{name: a, action: no-nat, sources: [198.18.0.0/16]}`, `.destinations: is required; name the prefixes toward which the source is kept`},
		{`{name: a, action: no-nat, sources: [198.18.0.0/16], destinations: [0.0.0.0/0]}`, `.destinations[0]: "0.0.0.0/0" covers every address`},
		{`{name: a, action: no-nat, sources: [198.18.0.0/16], destinations: [198.51.100.0/24], pool: p}`, `.pool: "p" has no meaning with action no-nat`},
		{`{name: a, action: no-nat, sources: [198.18.0.0/16], destinations: [198.51.100.0/24], names: [api.example]}`, `.names: "api.example" has no meaning with action no-nat`},
		{`{name: a, action: deny, sources: [10.1.0.0/16], pickup: true}`, `.pickup: "true" has no meaning with action deny`},
		{`{name: a, action: reject, sources: [10.1.0.0/16], timeouts: {udp: 2m}}`, `.timeouts: "timeouts" has no meaning with action reject`},
		{`{name: a, sources: [10.1.0.0/16], pool: p, timeouts: {udp: 200h}}`, `.timeouts.udp: "200h0m0s" is not a whole number of seconds from 1s to 120h0m0s`},
		{`{name: a, sources: [10.1.0.0/16], pool: p, to: "10.2.0.9:80"}`, `.to: "10.2.0.9:80" has no meaning with action snat`},
		{`{name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, pool: p, to: "10.2.0.9:80"}`, `.ports: is required`},
		{`{name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80"], pool: p}`, `.to: is required`},
		{`{name: a, action: dnat, sources: [0.0.0.0/0], ports: ["80"], pool: p, to: "10.2.0.9:80"}`, `.ports: "80" needs a protocol with ports`},
		{`{name: a, action: redirect, sources: [10.1.0.0/16], protocol: icmp, to: "10.2.0.9:80"}`, `.protocol: "icmp" has no ports; set it to "tcp" or "udp"`},
		{`{name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80"], pool: p, to: "10.9.0.12:80"}`, `.to: "10.9.0.12:80" is an address of a pool`},
		{`{name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80"], pool: p, to: proxy}`, `.to: "proxy" is not an address with a port`},
		{`{name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80"], pool: p, to: "127.0.0.1:80"}`, `.to: "127.0.0.1" is not a unicast address of a host`},
		{`{name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80"], pool: p, destinations: [192.0.2.1/32], to: "10.2.0.9:80"}`, `.destinations[0]: "192.0.2.1/32" is not an address of pool p`},
		{`{name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["500"], pool: own, to: "10.2.0.9:80"}`, `.pool: "own" has the node's own address 10.9.0.4`},
		{`{name: a, action: dnat, sources: ["::/0"], protocol: tcp, ports: ["80"], pool: p, to: "10.2.0.9:80"}`, `.sources[0]: "::/0" is of another family than ` + "`to`"},
		{`{name: a, action: redirect, sources: [10.0.0.0/8], protocol: tcp, ports: ["80"], to: "10.2.0.9:3128"}`, `.to: "10.2.0.9:3128" is among the sources, so that the packets of the proxy come back to it`},
		{`{name: a, action: redirect, sources: [10.1.0.0/16], protocol: tcp, to: "10.2.0.9:3128", whenDown: wait}`, `.whenDown: "wait" is not a valid value`},
		{`{name: a, action: redirect, sources: [10.1.0.0/16], protocol: udp, to: "10.2.0.9:3128", probes: {}}`, `.probes.targets: is required; give the targets that must answer`},
		{`{name: a, action: redirect, sources: [10.1.0.0/16], protocol: tcp, to: 10.2.0.9, probes: {}}`, `.probes.targets: is required`},
		{`{name: a, action: redirect, sources: [10.1.0.0/16], protocol: tcp, to: "10.2.0.9:3128", probes: {targets: ["icmp://2001:db8::9"]}}`, `.probes.targets: has none of the family of 10.2.0.9`},
		{`{name: a, action: deny, sources: [10.1.0.0/16], probes: {}}`, `.probes: "probes" has no meaning with action deny`},
		{`{name: a, action: deny, sources: [10.1.0.0/16], flows: end}`, ""},
		{`{name: a, action: reject, sources: [10.1.0.0/16], flows: keep}`, ""},
		{`{name: a, action: deny, sources: [10.1.0.0/16], flows: all}`, `.flows: "all" is not a valid value`},
		{`{name: a, sources: [10.1.0.0/16], pool: p, flows: end}`, `.flows: "end" has no meaning with action snat`},
		{`{name: a, action: deny, sources: [10.1.0.0/16], whenDown: bypass}`, `.whenDown: "bypass" has no meaning with action deny`},
	} {
		_, problems := parse(document("    - " + k.policy))
		switch {
		case k.want == "" && len(problems) > 0:
			t.Errorf("%s: %v", k.policy, problems)
		case k.want != "" && (len(problems) != 1 || !strings.Contains(problems.Error(), "egress.policies[0]"+k.want)):
			t.Errorf("%s:\n%v, want one: %s", k.policy, problems, k.want)
		}
	}

	t.Log("the default probe of a proxy is a connection to it")
	s, problems := parse(document(`    - {name: a, action: redirect, sources: [10.1.0.0/16], protocol: tcp, to: "10.2.0.9:3128", probes: {fall: 1}}`))
	if len(problems) > 0 || len(s.Proxies) != 1 || s.Proxies[0].Name != "a" || fmt.Sprint(s.Proxies[0].Addresses, s.Proxies[0].Probes.Targets) != "[10.2.0.9] [tcp://10.2.0.9:3128]" {
		t.Errorf("%v, %v", s, problems)
	}
	t.Log("a proxy with its own way out makes no loop")
	if _, problems := parse(document(`    - {name: a, action: redirect, sources: [10.0.0.0/8], protocol: tcp, ports: ["80"], to: "10.2.0.9:3128"}
    - {name: b, sources: [10.2.0.9/32], protocol: tcp, ports: ["80"], pool: p}`)); len(problems) > 0 {
		t.Error(problems)
	}
	t.Log("forwarding a port and denying it to some makes no tie")
	if _, problems := parse(document(`    - {name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80"], pool: p, to: "10.2.0.9:3128"}
    - {name: b, action: deny, sources: [198.51.100.0/24], destinations: [10.9.0.11/32], protocol: tcp, ports: ["80"]}`)); len(problems) > 0 {
		t.Error(problems)
	}
	if _, problems := parse(document(`    - {name: a, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80"], pool: p, to: "10.2.0.9:3128"}
    - {name: b, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80-81"], pool: p, destinations: [203.0.113.11/32], to: "10.2.0.10:3128"}`)); !strings.Contains(problems.Error(), "decides the same flows") {
		t.Errorf("two servers for one port: %v", problems)
	}
}

// TestMaps checks maps of one prefix behind two tunnels to two other prefixes.
func TestMaps(t *testing.T) {
	good := `node: {name: hub-1, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.9}
tunnels:
  - {name: a, inside: [{local: 169.254.10.2/30}], wireguard: {privateKey: wg-site, peerPublicKey: "` + strings.Repeat("A", 43) + `=", listenPort: 51820}}
  - {name: b, inside: [{local: 172.30.11.2/30}], wireguard: {privateKey: wg-site, peerPublicKey: "` + strings.Repeat("A", 43) + `=", listenPort: 51821}}
peers:
  - {name: a, tunnel: a, asn: 65001, import: {allow: [{prefix: 172.16.0.0/12, le: 24}]}, export: {allow: [{prefix: 100.64.0.0/10, le: 24}]}}
staticRoutes:
  - {prefix: 172.31.0.0/16, tunnels: [b]}
egress:
  pools: [{name: p, addresses: [{address: 10.9.0.11}]}]
  maps:
    - {tunnels: [a], inside: 10.1.0.0/16, mapped: 100.64.0.0/16}
    - {tunnels: [b], inside: 10.1.0.0/16, mapped: 100.65.0.0/16}
`
	s, problems := parse(good)
	if len(problems) > 0 || len(s.Maps) != 2 {
		t.Fatal(problems)
	}
	for _, k := range []struct{ from, to, want string }{
		{"mapped: 100.65.0.0/16", "mapped: 100.64.0.0/16", `egress.maps[1].mapped: "100.64.0.0/16" overlaps 100.64.0.0/16 of egress.maps[0]`},
		{"mapped: 100.65.0.0/16", "mapped: 100.65.0.0/17", `egress.maps[1].mapped: "100.65.0.0/17" is not as long as inside, /16`},
		{"mapped: 100.65.0.0/16", "mapped: 10.9.0.0/16", `has the node's own address 10.9.0.4`},
		{"mapped: 100.65.0.0/16", "mapped: 10.9.0.0/16", `has the address of egress.pools[0].addresses[0]`},
		{"mapped: 100.65.0.0/16", "mapped: 169.254.0.0/16", `egress.maps[1]: "169.254.0.0/16" has link-local addresses`},
		{"mapped: 100.65.0.0/16", "mapped: 172.30.0.0/16", `egress.maps[1]: "172.30.0.0/16" has an inside address, of tunnels[1].inside[0].local`},
		{"mapped: 100.65.0.0/16", `mapped: "fd00::/16"`, `egress.maps[1].mapped: "fd00::/16" is not a part of IPv4`},
		{"tunnels: [b], inside", "tunnels: [a], inside", `egress.maps[1].inside: "10.1.0.0/16" overlaps 10.1.0.0/16 of egress.maps[0], which has the same tunnel`},
		{"tunnels: [b], inside", "tunnels: [], inside", `egress.maps[1].tunnels: is required`},
		{"tunnels: [b], inside", "tunnels: [z], inside", `egress.maps[1].tunnels[0]: "z" is not a tunnel of this document`},
		{"{prefix: 172.16.0.0/12, le: 24}", "{prefix: 10.0.0.0/8, le: 24}", `peers[0].import.allow[0]: "10.0.0.0/8 le 24" accepts routes to 10.1.0.0/16, which is mapped to 100.64.0.0/16`},
		{"prefix: 172.31.0.0/16", "prefix: 10.1.7.0/24", `staticRoutes[0].prefix: "10.1.7.0/24" is behind a map from 10.1.0.0/16 to 100.65.0.0/16`},
		{"prefix: 172.31.0.0/16", "prefix: 100.64.0.0/16", `staticRoutes[0].prefix: "100.64.0.0/16" is the mapped prefix of a map`},
		{"egress:\n", "attachments: [{name: lan, interface: eth1, sources: [10.7.0.0/16], routes: [{prefix: 100.64.0.0/16, via: 10.7.0.1}]}]\negress:\n", `attachments[0].routes[0].prefix: "100.64.0.0/16" is the mapped prefix of a map`},
	} {
		text := strings.Replace(good, k.from, k.to, 1)
		if _, problems := parse(text); text == good || !strings.Contains(problems.Error(), k.want) {
			t.Errorf("%s: %v, want %s", k.to, problems, k.want)
		}
	}
	t.Log("a map restricts no other spoke")
	if _, problems := parse(strings.Replace(good, "{prefix: 172.16.0.0/12, le: 24}", "{prefix: 0.0.0.0/0}", 1)); len(problems) > 0 {
		t.Error(problems)
	}
}

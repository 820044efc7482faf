package main

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/spec"
)

// specExamples has an example for each message of spec.proto, as docs/spec.md shows it: the parts
// of a document that matter. exampleBase has the others.
var specExamples = map[string]string{
	"Spec": `node: {name: hub-1, asn: 64620}
underlay: {interface: eth0, address: 203.0.113.9}
access: {api: [198.51.100.128/28]}
tunnels:
- {name: branch, inside: [{local: 169.254.80.1/30}], wireguard: {privateKey: wg-branch, peerPublicKey: "uxKtjSR/HgPr5/2mKg3++n6zfPx6H2aGymuvit1Nxn8=", listenPort: 51820}}
staticRoutes:
- {prefix: 10.20.0.0/24, tunnels: [branch]}
egress:
  pools: [{name: partner, addresses: [{address: 203.0.113.10}]}]
  policies: [{name: branch, sources: [10.20.0.0/24], pool: partner}]
`,
	"Metrics": `tunnels:
- {name: branch, inside: [{local: 169.254.80.1/30}], wireguard: {privateKey: wg-branch, peerPublicKey: "uxKtjSR/HgPr5/2mKg3++n6zfPx6H2aGymuvit1Nxn8=", listenPort: 51820}}
metrics: {listen: [169.254.80.1], from: [10.20.0.0/24]}
`,
	"Events": `events:
  export:
  - {name: siem, syslog: "10.20.0.5:514"}
`,
	"EventTarget": `events:
  export:
  - {name: siem, syslog: "10.20.0.5:514", protocol: udp}
  - {name: pager, webhook: "https://hooks.example.com/isthmus", secret: pager-key, minSeverity: warning}
`,
	"Attachment": `attachments:
- {name: lan, interface: eth1, sources: [10.50.0.0/24]}
`,
	"AttachmentRoute": `attachments:
- {name: vpc, interface: eth0, sources: [10.9.64.0/18], routes: [{prefix: 10.9.64.0/18, via: 10.9.0.1}]}
`,
	"Access": `access: {api: [198.51.100.128/28], input: drop, ssh: [198.51.100.128/28]}
`,
	"Node": `node: {name: hub-1, asn: 64620, routerId: 10.9.0.4}
`,
	"Underlay": `underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.9}
`,
	"Tunnel": `tunnels:
- name: aws-0
  cloud: aws
  ipsec: {remoteAddress: 198.51.100.10, psk: aws-0}
  inside: [{local: 169.254.64.2/30}]
  sources: [172.16.0.0/16]
`,
	"Inside": `tunnels:
- name: azure-0
  ipsec: {remoteAddress: 198.51.100.60, psk: azure-0}
  inside: [{local: 169.254.21.1/32, remote: 169.254.21.2}, {local: fd00:64::2/126}]
`,
	"IPsec": `tunnels:
- name: branch
  ipsec:
    remoteAddress: 198.51.100.7
    remoteIdentity: gateway.branch.example
    psk: branch
    ikeProposals: [aes256-sha256-modp2048]
    espProposals: [aes256-sha256-modp2048]
    udpEncapsulation: always
`,
	"WireGuard": `tunnels:
- name: branch
  inside: [{local: 169.254.80.1/30}]
  wireguard:
    privateKey: wg-branch
    peerPublicKey: "uxKtjSR/HgPr5/2mKg3++n6zfPx6H2aGymuvit1Nxn8="
    presharedKey: wg-branch-psk
    endpoint: "198.51.100.7:51820"
    listenPort: 51820
`,
	"Peer": `peers:
- name: aws-0
  tunnel: aws-0
  asn: 64512
  password: bgp-aws-0
  import: {allow: [{prefix: 172.16.0.0/16, le: 24}]}
  export: {allow: [{prefix: 0.0.0.0/0}]}
  maxPrefixes: 100
`,
	"NodeLink": `links:   # of node a; node b has the same with "node: a", its own key and the endpoint of a
- name: b
  node: b
  lanes: 3
  inside: [169.254.96.0/26]
  wireguard: {privateKey: link, peerPublicKey: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", endpoint: "203.0.113.20:51900", listenPort: 51900}
peers:
- {name: b, tunnel: b, asn: 64602, import: {allow: [{prefix: 10.20.0.0/16, le: 24}]}, export: {allow: [{prefix: 10.10.0.0/16, le: 24}]}}
`,
	"PrefixRule": `peers:
- name: aws-0
  tunnel: aws-0
  asn: 64512
  import: {allow: [{prefix: 172.16.0.0/16}, {prefix: 172.17.0.0/16, ge: 20, le: 24}]}   # one prefix; parts of another one
`,
	"ImportPolicy": `peers:
- {name: aws-0, tunnel: aws-0, asn: 64512, import: {allow: [{prefix: 172.16.0.0/16, le: 24}], localPreference: 200}}
`,
	"ExportPolicy": `peers:
- {name: aws-0, tunnel: aws-0, asn: 64512, export: {allow: [{prefix: 0.0.0.0/0}, {prefix: 10.20.0.0/16, le: 24}]}}
`,
	"StaticRoute": `staticRoutes:
- {prefix: 10.20.0.0/24, tunnels: [branch]}
- {prefix: 10.20.0.0/16, blackhole: true}
`,
	"Egress": `egress:
  pools: [{name: partner, addresses: [{address: 203.0.113.10}]}]
  policies: [{name: spokes, sources: [172.16.0.0/16], pool: partner}]
  log: {maxAge: 720h}
`,
	"Takeover": `egress:
  pools: [{name: partner, addresses: [{address: 203.0.113.10}], probes: {targets: ["icmp://198.51.100.7"]}}]
  policies: [{name: spokes, sources: [172.16.0.0/16], pool: partner, pickup: true}]
  takeover: {watch: [169.254.80.2]}
`,
	"Zone": `egress:
  zones: [{name: a, sources: [172.16.0.0/20]}, {name: b, sources: [172.16.16.0/20]}]
  pools: [{name: partner, addresses: [{address: 203.0.113.10, zone: a}, {address: 203.0.113.11, zone: b}]}]
  policies: [{name: spokes, sources: [172.16.0.0/16], pool: partner}]
`,
	"DNSProxy": `egress:
  dnsProxy: {listen: [169.254.80.1]}
  pools: [{name: partner, addresses: [{address: 203.0.113.10}]}]
  policies: [{name: example, sources: [172.16.0.0/16], names: ["*.partner.example"], pool: partner}]
`,
	"TranslationLog": `egress:
  log: {maxAge: 2160h, maxBytes: 17179869184}
`,
	"Pool": `egress:
  pools:
  - name: partner
    addresses: [{address: 203.0.113.10}, {address: 203.0.113.11}]
    exhausted: drop
    probes: {targets: ["tcp://198.51.100.7:443"]}
    announce: [0.0.0.0/0]
`,
	"Probes": `egress:
  pools:
  - name: partner
    addresses: [{address: 203.0.113.10}]
    probes: {targets: ["tcp://198.51.100.7:443", "icmp://198.51.100.8"], interval: 5s, fall: 3, quorum: 1}
`,
	"Blocks": `egress:
  pools:
  - name: partner
    addresses: [{address: 203.0.113.10}]
    blocks: {size: 252, sources: [172.16.1.0/24]}
  policies: [{name: spokes, sources: [172.16.1.0/24], pool: partner}]
`,
	"PoolAddress": `egress:
  pools:
  - name: partner
    addresses: [{address: 10.9.0.5, publicAddress: 203.0.113.10, weight: 2}, {address: 10.9.0.6, publicAddress: 203.0.113.11}]
`,
	"EgressPolicy": `egress:
  pools: [{name: partner, addresses: [{address: 203.0.113.10}]}]
  policies:
  - {name: api, sources: [172.16.0.0/16], destinations: [198.51.100.0/24], protocol: tcp, ports: ["443"], pool: partner}
  - {name: server, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["8443"], pool: partner, to: "172.16.1.5:443"}
  - {name: rest, action: reject, sources: [172.16.0.0/16]}
`,
	"PolicyList": `policies:
- {name: api, sources: [172.16.0.0/16], destinations: [198.51.100.0/24], pool: partner}
`,
	"FlowTimeouts": `egress:
  pools: [{name: partner, addresses: [{address: 203.0.113.10}]}]
  policies:
  - {name: dns, sources: [172.16.0.0/16], protocol: udp, ports: ["53"], pool: partner, timeouts: {udp: 10s, udpStream: 10s}}
`,
	"PrefixMap": `egress:
  maps:
  - {tunnels: [aws-0], inside: 10.20.0.0/24, mapped: 100.64.1.0/24}
  - {tunnels: [branch], inside: 10.20.0.0/24, mapped: 100.64.2.0/24}
`,
}

// exampleBase has the parts of a document that an example needs and does not show. policies stands
// for the input of isthmus policy set.
var exampleBase = map[string]string{
	"node":     "node: {name: hub-1, asn: 64620}\n",
	"underlay": "underlay: {interface: eth0, address: 203.0.113.9}\n",
	"tunnels": `tunnels:
- {name: aws-0, ipsec: {remoteAddress: 198.51.100.10, psk: aws-0}, inside: [{local: 169.254.64.2/30}]}
- {name: branch, inside: [{local: 169.254.80.1/30}], wireguard: {privateKey: wg-branch, peerPublicKey: "uxKtjSR/HgPr5/2mKg3++n6zfPx6H2aGymuvit1Nxn8=", listenPort: 51820}}
`,
}

// specWishes leads from what a reader wants to a field and the message that has it.
var specWishes = [][3]string{
	{"the node to be reachable by its operators", "access.api", "Access"},
	{"Prometheus behind a spoke to read the metrics without a certificate", "metrics.listen", "Metrics"},
	{"the node's events in a log server or a SIEM", "events.export.syslog", "EventTarget"},
	{"the node's events as JSON at a URL of mine", "events.export.webhook", "EventTarget"},
	{"all other ports of the node closed", "access.input: drop", "Access"},
	{"SSH to stay open for operators", "access.ssh", "Access"},
	{"a public address that the cloud translates to the node's", "underlay.publicAddress", "Underlay"},
	{"a path with a smaller MTU", "underlay.mtu", "Underlay"},
	{"a tunnel to a cloud's VPN gateway", "tunnels[].cloud", "Tunnel"},
	{"a tunnel to another IKEv2 gateway", "tunnels[].ipsec", "IPsec"},
	{"other ciphers", "tunnels[].ipsec.ikeProposals", "IPsec"},
	{"IPsec through a firewall that drops ESP", "tunnels[].ipsec.udpEncapsulation", "IPsec"},
	{"a site with WireGuard", "tunnels[].wireguard", "WireGuard"},
	{"a site with a changing address", "tunnels[].wireguard.endpoint", "WireGuard"},
	{"fixed addresses inside a tunnel", "tunnels[].inside", "Inside"},
	{"only some sources to come in by a tunnel", "tunnels[].sources", "Tunnel"},
	{"a peer that does not answer pings to stay up", "tunnels[].probe", "Tunnel"},
	{"a LAN at a second card as a spoke", "attachments", "Attachment"},
	{"a VPC whose route table points at the node", "attachments[].routes", "AttachmentRoute"},
	{"BGP with the other end", "peers", "Peer"},
	{"to accept some prefixes of a peer", "peers[].import.allow", "ImportPolicy"},
	{"to prefer one peer's routes", "peers[].import.localPreference", "ImportPolicy"},
	{"to announce some prefixes to a peer", "peers[].export.allow", "ExportPolicy"},
	{"to originate a prefix", "announce", "Spec"},
	{"TCP MD5", "peers[].password", "Peer"},
	{"a limit of prefixes", "peers[].maxPrefixes", "Peer"},
	{"two sites with the same ASN", "peers[].asOverride", "Peer"},
	{"a route without BGP", "staticRoutes", "StaticRoute"},
	{"one source address toward a partner", "egress.pools", "Pool"},
	{"a rule who may go where", "egress.policies", "EgressPolicy"},
	{"destinations by name", "egress.policies[].names", "EgressPolicy"},
	{"to refuse traffic", "egress.policies[].action", "EgressPolicy"},
	{"a server of a spoke open to the Internet", "egress.policies[].to", "EgressPolicy"},
	{"an address that does not work to get no new flows", "egress.pools[].probes", "Probes"},
	{"the address and port to name the source without a log", "egress.pools[].blocks", "Blocks"},
	{"a log of who had which port", "egress.log", "TranslationLog"},
	{"two spokes with the same prefix", "egress.maps", "PrefixMap"},
	{"the hosts of a branch to reach the Internet through a hub", "underlay.defaultRoute", "Underlay"},
	{"a link of several lanes to another node", "links", "NodeLink"},
	{"another node to take over the addresses", "egress.takeover", "Takeover"},
}

func wishesSection() string {
	var b strings.Builder
	b.WriteString("## From a task to a field\n\n| I want | field | described in |\n| --- | --- | --- |\n")
	for _, w := range specWishes {
		fmt.Fprintf(&b, "| %s | `%s` | [%s](#%s) |\n", w[0], w[1], w[2], strings.ToLower(w[2]))
	}
	return b.String() + "\n"
}

// withExamples adds to each message of the page its example.
func withExamples(page string) (string, error) {
	heads := regexp.MustCompile(`(?m)^## (\w+)$`).FindAllStringSubmatchIndex(page, -1)
	if len(heads) != len(specExamples) {
		return "", fmt.Errorf("%d messages, and %d examples", len(heads), len(specExamples))
	}
	var b strings.Builder
	b.WriteString(page[:heads[0][0]])
	for i, h := range heads {
		name, end := page[h[2]:h[3]], len(page)
		if i+1 < len(heads) {
			end = heads[i+1][0]
		}
		text, ok := specExamples[name]
		if !ok {
			return "", fmt.Errorf("message %s has no example", name)
		}
		b.WriteString(strings.TrimRight(page[h[0]:end], "\n") + "\n\n```yaml\n" + text + "```\n")
		if i+1 < len(heads) {
			b.WriteString("\n")
		}
	}
	return b.String(), nil
}

// has reports whether a message of a type is set somewhere in m.
func has(m protoreflect.Message, name protoreflect.Name) (found bool) {
	if m.Descriptor().Name() == name {
		return true
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Message() == nil || f.IsMap():
		case f.IsList():
			for i := range v.List().Len() {
				found = found || has(v.List().Get(i).Message(), name)
			}
		default:
			found = found || has(v.Message(), name)
		}
		return !found
	})
	return found
}

// TestSpecExamples: each example is part of a document without a problem, and has its message.
func TestSpecExamples(t *testing.T) {
	for name, text := range specExamples {
		var m proto.Message = &isthmusv1.Spec{}
		document := text
		if name == "PolicyList" {
			m = &isthmusv1.PolicyList{}
			document = "egress:\n  pools: [{name: partner, addresses: [{address: 203.0.113.10}]}]\n  " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n  ") + "\n"
		}
		for part, base := range exampleBase {
			if !regexp.MustCompile(`(?m)^` + part + `:`).MatchString(document) {
				document += base
			}
		}
		if problems, _ := spec.Offline([]byte(document)); len(problems) > 0 {
			t.Errorf("%s: %v\n%s", name, problems, document)
		}
		if _, problems := spec.DecodeMessage([]byte(text), m); len(problems) > 0 || !has(m.ProtoReflect(), protoreflect.Name(name)) {
			t.Errorf("%s: the example does not have the message: %v", name, problems)
		}
	}
}

// TestSpecWishes: the fields that the table names exist, and the messages are those that have them.
func TestSpecWishes(t *testing.T) {
	for _, w := range specWishes {
		m := (&isthmusv1.Spec{}).ProtoReflect().Descriptor()
		path, _, _ := strings.Cut(w[1], ":")
		var at []string
		for step := range strings.SplitSeq(path, ".") {
			if m == nil {
				t.Fatalf("%s: nothing below a scalar", w[1])
			}
			at = append(at, string(m.Name()))
			f := m.Fields().ByJSONName(strings.TrimSuffix(step, "[]"))
			if f == nil || strings.HasSuffix(step, "[]") && !f.IsList() {
				t.Fatalf("%s: %s has no field %s", w[1], m.Name(), step)
			}
			m = f.Message()
		}
		if m != nil {
			at = append(at, string(m.Name()))
		}
		if at[len(at)-1] != w[2] && at[max(0, len(at)-2)] != w[2] {
			t.Errorf("%s is described in %v, not in %s", w[1], at, w[2])
		}
	}
}

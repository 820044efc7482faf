package plan

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
)

// terse is a document that leaves out all that it can.
const terse = `
node: {name: hub-1, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.9}
tunnels:
- {name: aws-0, cloud: aws, ipsec: {remoteAddress: 203.0.113.17, psk: k}}
- {name: azure-0, cloud: azure, ipsec: {remoteAddress: 203.0.113.18, psk: k}}
- {name: site, wireguard: {privateKey: w, peerPublicKey: AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=, endpoint: "203.0.113.19:51820", listenPort: 51820}}
peers:
- {name: aws-0, tunnel: aws-0, asn: 65002, import: {allow: [{prefix: 172.16.0.0/16, le: 24}]}}
- {name: azure-0, tunnel: azure-0, asn: 65010, address: 10.77.0.4}
- {name: site, tunnel: site, asn: 65030, export: {allow: [{prefix: 172.16.0.0/12, ge: 16}]}}
staticRoutes: [{prefix: 10.30.0.0/16, tunnels: [site]}]
attachments: [{name: lan, interface: eth1, routes: [{prefix: 10.50.0.0/16}]}]
links: [{name: west, node: b, inside: [169.254.96.0/26], wireguard: {privateKey: w, peerPublicKey: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", listenPort: 51900, endpoint: "198.51.100.9:51900"}}]
metrics: {listen: [10.50.0.1], from: [10.50.0.0/24]}
events: {export: [{name: siem, syslog: "10.20.0.5:514"}, {name: pager, webhook: "https://hooks.example.com/"}]}
egress:
  log: {}
  takeover: {watch: [169.254.99.1]}
  pools:
  - {name: partner, addresses: [{address: 10.9.0.5}], probes: {targets: ["tcp://198.51.100.7:443"]}}
  - {name: blocks, addresses: [{address: 10.9.0.6}], blocks: {size: 1000, sources: [10.60.0.0/30]}, probes: {targets: ["tcp://198.51.100.7:443"]}}
  policies:
  - {name: partner, sources: [172.16.0.0/16], pool: partner}
  - {name: stop, sources: [172.16.0.0/16], destinations: [198.51.100.0/24], action: deny}
  - {name: proxy, sources: [172.16.0.0/16], destinations: [198.51.101.0/24], protocol: tcp, action: redirect, to: "10.50.0.9:8080", probes: {}}
  maps: [{tunnels: [site], inside: 10.70.0.0/24, mapped: 10.71.0.0/24}]
`

// TestEffective: what the document leaves out is written out, and applying the result changes
// nothing.
func TestEffective(t *testing.T) {
	make := func(text string) (*isthmusv1.Spec, *spec.Spec, Target) {
		t.Helper()
		d, problems := spec.Decode([]byte(text))
		if len(problems) == 0 {
			d.Message.Tunnels = append(d.Message.Tunnels, pairTunnel())
		}
		s, more := spec.Check(d, func(string) (secret.Ref, bool) { return secret.Ref{}, true })
		target, _, third := Make(s, Ledger{}, Machine{Can: func(string) bool { return true }, Drop: true})
		if problems := slices.Concat(problems, more, third); len(problems) > 0 {
			t.Fatal(problems)
		}
		return d.Message, s, target
	}
	m, s, target := make(terse)
	full := Effective(m, s, target)

	text, err := spec.Encode(full)
	if err != nil {
		t.Fatal(err)
	}
	d, problems := spec.Decode([]byte(text))
	again, more := spec.Check(d, func(string) (secret.Ref, bool) { return secret.Ref{}, true })
	other, _, third := Make(again, Ledger{}, Machine{Can: func(string) bool { return true }})
	if problems := slices.Concat(problems, more, third); len(problems) > 0 {
		t.Fatalf("the effective document is refused: %v\n%s", problems, text)
	}
	if !reflect.DeepEqual(target, other) {
		t.Errorf("applying the effective document changes %+v\n%s", Diff(target, other), text)
	}
	if !proto.Equal(Effective(d.Message, again, other), full) {
		t.Error("the effective document has no effective form of its own")
	}

	// A field without a value has no default, or the machine decides at each moment.
	var unset []string
	left(full.ProtoReflect(), "", &unset)
	slices.Sort(unset)
	want := []string{
		"access.api", "access.ssh", "access.sshKeys", "announce", "attachments.routes.via",
		"egress.dnsProxy", "egress.nameHold", "egress.policies.destinations", "egress.policies.flows", "egress.policies.names", "egress.policies.pickup", "egress.policies.pool",
		"egress.policies.ports", "egress.policies.probes", "egress.policies.probes.quorum", "egress.policies.protocol", "egress.policies.timeouts", "egress.policies.to", "egress.policies.whenDown",
		"egress.pools.addresses.zone", "egress.pools.announce", "egress.pools.blocks", "egress.pools.probes.quorum", "egress.portlessTimeout", "egress.resolvers", "egress.takeover.link", "egress.zones",
		"events.export.protocol", "events.export.secret", "events.export.syslog", "events.export.webhook",
		"links.sources", "links.wireguard.presharedKey",
		"peers.allowOwnAs", "peers.asOverride", "peers.disableGracefulRestart", "peers.disabled", "peers.export.allow", "peers.export.maxPrefixes", "peers.export.med", "peers.export.prepend",
		"peers.import.allow", "peers.password", "staticRoutes.blackhole",
		"tunnels.cloud", "tunnels.disabled", "tunnels.ipsec.childRekeyBytes", "tunnels.ipsec.respondOnly", "tunnels.probe", "tunnels.sources", "tunnels.wireguard.endpoint", "tunnels.wireguard.presharedKey",
	}
	if unset = slices.Compact(unset); !slices.Equal(unset, want) {
		t.Errorf("fields without a value:\n%s", strings.Join(unset, "\n"))
	}
}

// pairTunnel leads to the node that shares the pools.
func pairTunnel() *isthmusv1.Tunnel {
	return &isthmusv1.Tunnel{Name: "pair", Inside: []*isthmusv1.Inside{{Local: "169.254.99.2/30"}}, Encryption: &isthmusv1.Tunnel_Wireguard{Wireguard: &isthmusv1.WireGuard{
		PrivateKey: "w", PeerPublicKey: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", ListenPort: 51821, Keepalive: duration(5e9)}}}
}

// left adds the paths of the fields of a message, and of those in it, that have no value.
func left(m protoreflect.Message, path string, out *[]string) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		at := strings.TrimPrefix(path+"."+f.JSONName(), ".")
		switch {
		case f.ContainingOneof() != nil && !f.HasOptionalKeyword() && !m.Has(f):
		case !m.Has(f):
			*out = append(*out, at)
		case f.IsList() && f.Message() != nil:
			for j := range m.Get(f).List().Len() {
				left(m.Get(f).List().Get(j).Message(), at, out)
			}
		case f.Message() != nil && f.Message().FullName() != "google.protobuf.Duration":
			left(m.Get(f).Message(), at, out)
		}
	}
}

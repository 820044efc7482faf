package spec

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
)

// stored returns every secret of testdata/clouds.yaml.
func stored(name string) (secret.Ref, bool) {
	ok := strings.Contains(" aws-0 azure gcp wg-site ", " "+name+" ")
	return secret.Ref{Name: name, Fingerprint: "f"}, ok
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func parse(text string) (*Spec, Problems) {
	d, problems := Decode([]byte(text))
	s, more := Check(d, stored)
	return s, append(problems, more...)
}

func TestGoodDocument(t *testing.T) {
	s, problems := parse(string(read(t, "clouds.yaml")))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for what, pair := range map[string][2]any{
		"router id":       {s.Node.RouterID, netip.MustParseAddr("10.9.0.4")},
		"identity":        {s.Tunnels[0].IPsec.LocalIdentity, "203.0.113.9"},
		"aws remote":      {s.Tunnels[0].Inside[0].Remote, netip.MustParseAddr("169.254.64.1")},
		"aws mtu":         {s.Tunnels[0].MTU, 1438},
		"azure mtu":       {s.Tunnels[1].MTU, 1422},
		"wireguard mtu":   {s.Tunnels[3].MTU, 1440},
		"site remote":     {s.Tunnels[3].Inside[0].Remote, netip.MustParseAddr("169.254.80.0")},
		"gcp unallocated": {len(s.Tunnels[2].Inside), 0},
		"peer local":      {s.Peers[0].LocalAddress, netip.MustParseAddr("169.254.64.2")},
		"peer ttl":        {s.Peers[0].TTL, uint8(1)},
		"azure ttl":       {s.Peers[1].TTL, uint8(4)},
		"azure hold":      {s.Peers[1].HoldTime, 3 * time.Minute},
		"azure keepalive": {s.Peers[1].Keepalive, time.Minute},
		"import":          {s.Peers[0].Import.Allow[0], bgp.Rule{Prefix: netip.MustParsePrefix("172.16.0.0/16"), Min: 16, Max: 24}},
		"med":             {*s.Peers[0].Export.MED, uint32(0)},
		"ports":           {fmt.Sprint(s.Policies[1].Ports), "[25 465-587]"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: got %v, want %v", what, pair[0], pair[1])
		}
	}
}

// TestReadme checks the document of the README, the first one that a user sees.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(text), "```yaml\n")
	document, _, closed := strings.Cut(after, "```")
	if !ok || !closed {
		t.Fatal("README.md has no document")
	}
	s, problems := parse(document)
	if len(problems) > 0 || len(s.Tunnels) == 0 || len(s.Policies) == 0 {
		t.Error(problems)
	}
}

// TestDataPath checks how the document turns into the liveness of a tunnel's data: the clouds whose
// gateways do not answer echo requests get none, unless the document says that they do.
func TestDataPath(t *testing.T) {
	for _, tt := range []struct {
		fields, ipsec string
		probe         tunnel.Probe
		udp           bool
		problem       string
	}{
		{"", "", tunnel.ProbeAuto, false, ""},
		{"probe: true", "", tunnel.ProbeStrict, false, ""},
		{"probe: false", "", tunnel.ProbeOff, false, ""},
		{"cloud: aws", "", tunnel.ProbeAuto, false, ""},
		{"cloud: azure", "", tunnel.ProbeOff, false, ""},
		{"cloud: azure-vwan", "", tunnel.ProbeOff, false, ""},
		{"cloud: gcp", "", tunnel.ProbeOff, false, ""},
		{"cloud: gcp, probe: true", "", tunnel.ProbeStrict, false, ""},
		{"", "udpEncapsulation: always", tunnel.ProbeAuto, true, ""},
		{"", "udpEncapsulation: auto", tunnel.ProbeAuto, false, ""},
		{"", "udpEncapsulation: never", tunnel.ProbeAuto, false, `tunnels[0].ipsec.udpEncapsulation is not a valid value: "never"`},
	} {
		fields := strings.Join(slices.DeleteFunc([]string{"name: a", tt.fields}, func(s string) bool { return s == "" }), ", ")
		ipsec := strings.Join(slices.DeleteFunc([]string{"remoteAddress: 198.51.100.7, psk: aws-0", tt.ipsec}, func(s string) bool { return s == "" }), ", ")
		s, problems := parse("node: {name: n, asn: 64620}\nunderlay: {interface: wan, address: 192.0.2.1}\ntunnels:\n- {" + fields + ", ipsec: {" + ipsec + "}}\n")
		if tt.problem != "" {
			if len(problems) != 1 || problems[0].Path+" "+problems[0].Rule+": "+strconv.Quote(problems[0].Value) != tt.problem || problems[0].Remedy == "" {
				t.Errorf("%s: %v", tt.ipsec, problems)
			}
			continue
		}
		if len(problems) > 0 || s.Tunnels[0].Probe != tt.probe || s.Tunnels[0].IPsec.ForceUDP != tt.udp {
			t.Errorf("%+v: %v, %v", tt, problems, s)
		}
	}
}

// TestOffline checks that a document without mistakes has no problem without a node, and what is
// left to the node.
func TestOffline(t *testing.T) {
	const tunnels = "tunnels:\n- {name: a, ipsec: {remoteAddress: 198.51.100.7, psk: k}}\n- {name: b, ipsec: {remoteAddress: 198.51.100.8, psk: l}}\n"
	for _, tt := range []struct{ text, problem, note string }{
		{"node: {name: n, asn: 64620}\nunderlay: {interface: wan, address: 192.0.2.1}\n" + tunnels, "", "uses secrets, which were not checked: k, l"},
		{"node: {name: n, asn: 64620}\nunderlay: {interface: wan, address: auto, publicAddress: auto}\n" + tunnels, "", "is known on the node alone"},
		{"node: {name: n, asn: 64620}\nunderlay: {interface: wan, address: 192.0.2.1, publicAdress: x}\n" + tunnels, "publicAdress", ""},
		{"node: {name: n}\nunderlay: {interface: wan, address: 192.0.2.1}\npeers: [{name: p, tunnel: t, asn: 1}]\n", "tunnel", ""},
		{"", "is empty", ""},
	} {
		problems, notes := Offline([]byte(tt.text))
		if (tt.problem == "") != (len(problems) == 0) || !strings.Contains(fmt.Sprint(problems), tt.problem) || !strings.Contains(fmt.Sprint(notes), tt.note) {
			t.Errorf("%q: problems %v, notes %v", tt.text, problems, notes)
		}
	}
}

// TestNoConsequences checks that a mistake is one problem: not one more for the field that was
// meant, for a field within a value that could not be read, or for what refers to it.
func TestNoConsequences(t *testing.T) {
	const head = "node: {name: n, asn: 64620}\nunderlay: {interface: eth0, address: 10.9.0.4}\n"
	for text, want := range map[string]string{
		"egress: {pools: [{name: p, addresses: [10.9.0.4]}], policies: [{name: a, sources: [10.0.0.0/8], pool: p}]}":           "egress.pools[0].addresses[0]: \"10.9.0.4\" must be a group of fields; write `{address: 10.9.0.4}`",
		"egress: {pools: [{name: p, addresses: [{address: 10.9.0}]}], policies: [{name: a, sources: [10.0.0.0/8], pool: p}]}":  `egress.pools[0].addresses[0].address: "10.9.0" is not an IP address`,
		"egress: {pools: [{name: p, addresses: [{address: 10.9.0.4}]}], policies: [{name: a, source: [10.0.0.0/8], pool: p}]}": `egress.policies[0].source: is an unknown field; did you mean "sources"?`,
		"egress: {pools: {name: p}, policies: [{name: a, sources: [10.0.0.0/8], pool: p}]}":                                    `egress.pools: must be a list`,
		"egress: {pools: [{nam: p, addresses: [{address: 10.9.0.4}]}], policies: [{name: a, sources: [10.0.0.0/8], pool: p}]}": `egress.pools[0].nam: is an unknown field; did you mean "name"?`,
		"egress: {zones: z, pools: [{name: p, addresses: [{address: 10.9.0.4, zone: z}]}]}":                                    `egress.zones: "z" must be a list`,
		"tunnels: {name: x}\npeers: [{name: x, tunnel: x, asn: 65000}]":                                                        `tunnels: must be a list`,
		"announce: [{prefix: 10.0.0.0/8}]": `announce[0]: must be text; write the text itself, not a list or a group of fields`,
		"egress: {pools: [{name: p, addresses: [{address: 10.9.0.4}]}], policies: [{name: a, sources: [\"fd00::/8\"], pool: p}]}": `egress.policies[0].sources[0]: "fd00::/8" is of a family without an address in pool p`,
		"egress: {pool: [], pools: [{name: p, addresses: []}]}":                                                                   "egress.pool: is an unknown field; did you mean \"pools\"?\negress.pools[0].addresses: is required",
	} {
		var got []string
		_, problems := parse(head + text)
		for _, p := range problems {
			_, without, _ := strings.Cut(p.String(), ": ") // the line
			got = append(got, without)
		}
		wants := strings.Split(want, "\n")
		if !slices.EqualFunc(got, wants, strings.HasPrefix) {
			t.Errorf("%s\ngot  %q\nwant %q", text, got, wants)
		}
	}
}

func TestEveryMistakeIsReported(t *testing.T) {
	_, problems := parse(string(read(t, "fifteen.yaml")))
	for _, want := range []string{
		`line 1: node.name: "Hub_1" is not a valid name`,
		`line 1: node.asn: "23456" is a reserved AS number`,
		`line 2: underlay.address: "10.9.0.4/24" is not an IP address`,
		`line 3: tunnel: is an unknown field; did you mean "tunnels"?`,
		`line 6: tunnels[0].ipsec.psk: "nowhere" is not a stored secret; store it with`,
		`line 6: tunnels[0].ipsec.ikeProposals[0]: "aes256-sha256" has the word`,
		`line 6: tunnels[0].ipsec.childRekey: "10s" is not a whole number of seconds from 5m0s to 24h0m0s`,
		`line 7: tunnels[0].inside[0].local: "169.254.64.0/30" is the network or broadcast address`,
		`line 8: tunnels[1].name: "a" is the name of tunnels[0].name too`,
		`line 9: tunnels[1].wireguard.peerPublicKey: "short" is not a valid public key`,
		`line 9: tunnels[1].wireguard.listenPort: "4500" is the port of IKE`,
		`line 10: tunnels[1].inside[0]: "169.254.169.253/30" takes the address of the cloud's metadata service`,
		`line 12: peers[0].tunnel: "b" is not a tunnel of this document`,
		`line 12: peers[0].asn: "65002" must be a whole number`,
		`line 12: peers[0].holdTime: "1s" is not a whole number of seconds from 3s`,
		`line 13: announce[0]: "10.0.0.1/8" has host bits set; write 10.0.0.0/8`,
		`line 14: staticRoutes[0].tunnels: is required`,
		`line 16: egress.policies[0].pool: "none" is not a pool of this document`,
	} {
		if !strings.Contains(problems.Error(), want) {
			t.Errorf("no problem begins with %q", want)
		}
	}
	if t.Failed() {
		t.Logf("problems:\n%v", problems)
	}
	for _, p := range problems {
		if p.Path == "" || p.Rule == "" || p.Remedy == "" {
			t.Errorf("problem lacks path, rule or remedy: %+v", p)
		}
	}
}

// TestOneMistake checks that one changed line of the valid document makes exactly one problem.
func TestOneMistake(t *testing.T) {
	good := string(read(t, "clouds.yaml"))
	for _, test := range []struct{ name, from, to, want string }{
		{"doubled field", "asn: 64620}", "asn: 64620, asn: 1}", "node.asn: is given twice"},
		{"both encryptions", "psk: aws-0, childRekey: 45m}", "psk: aws-0}\n    wireguard: {}", `tunnels[0].wireguard: conflicts with "ipsec"`},
		{"snake case", "publicAddress: 203.0.113.9", "public_address: 203.0.113.9", `did you mean "publicAddress"?`},
		{"number as text", "name: hub-1", "name: 7", `node.name: "7" must be text; put it in quotes`},
		{"scalar for a list", "announce: [10.9.0.0/24]", "announce: 10.9.0.0/24", "announce: \"10.9.0.0/24\" must be a list"},
		{"secret in the document", "psk: azure", "psk: Sup3r/Secret+Value", "tunnels[1].ipsec.psk: is not a stored secret"},
		{"same peer twice", "198.51.100.20", "198.51.100.10", "tunnels[1].ipsec.remoteAddress: \"198.51.100.10\" has the same pair of identities as tunnels[0].ipsec"},
		{"inside overlap", "169.254.80.1/31", "169.254.64.1/31", "overlaps 169.254.64.0/30 of tunnels[0].inside[0].local"},
		{"inside on the way to the peer", "169.254.80.1/31", "198.51.100.41/31", `tunnels[3].inside[0].local: "198.51.100.40/31" holds 198.51.100.40, where the peer of tunnel site is reached`},
		{"inside on the way to another peer", "remote: 169.254.21.2", "remote: 198.51.100.10", `tunnels[1].inside[0].remote: "198.51.100.10/32" holds 198.51.100.10, where the peer of tunnel aws-0 is reached`},
		{"remote missing", ", remote: 169.254.21.2", "", "tunnels[1].inside[0].remote: is required"},
		{"wrong family endpoint", "address: 10.9.0.4, publicAddress: 203.0.113.9", "address: 10.9.0.4, publicAddress: \"2001:db8::1\"", "underlay.publicAddress: \"2001:db8::1\" is of another address family"},
		{"own AS", "asn: 65003", "asn: 64620", "peers[2].asn: \"64620\" is this node's own number"},
		{"keepalive", "holdTime: 3m", "holdTime: 3m, keepalive: 2m", "peers[1].keepalive: \"2m0s\" is not a whole number of seconds from 1s to 1m0s"},
		{"blocks", "addresses: [", "blocks: {size: 500, sources: [10.8.0.0/24]}, addresses: [", "egress.pools[0].blocks.sources: \"256\" are more IPv4 sources than"},
		{"policy tie", "action: deny}", "action: deny}\n    - {name: tie, sources: [172.16.0.0/12], protocol: tcp, ports: [\"500-600\"], pool: partner}", "egress.policies[2]: \"tie\" decides the same flows as egress.policies[1] (no-mail)"},
		{"pool family", "sources: [172.16.0.0/12, 192.168.0.0/16]", "sources: [\"fd00::/8\"]", "egress.policies[0].sources[0]: \"fd00::/8\" is of a family without an address in pool partner"},
		{"public address twice", "pools:", "pools: [{name: q, addresses: [{address: 10.9.0.50, publicAddress: 203.0.113.50}, {address: 10.9.0.51, publicAddress: 203.0.113.50}]}]\n  x:", "egress.pools[0].addresses[1].publicAddress: \"203.0.113.50\" is the public address of egress.pools[0].addresses[0] too"},
		{"public address of another's", "pools:", "pools: [{name: q, addresses: [{address: 10.9.0.50, publicAddress: 203.0.113.50}, {address: 203.0.113.50}]}]\n  x:", "egress.pools[0].addresses[1].publicAddress: \"203.0.113.50\" is the public address of egress.pools[0].addresses[0] too"},
		{"public address of the underlay", "pools:", "pools: [{name: q, addresses: [{address: 10.9.0.50, publicAddress: 203.0.113.9}]}]\n  x:", "egress.pools[0].addresses[0].publicAddress: \"203.0.113.9\" is the public address of underlay too"},
		{"link-local pool", "pools:", "pools: [{name: q, addresses: [{address: \"fe80::1\"}]}]\n  x:", "egress.pools[0].addresses[0].address: \"fe80::1\" is link-local, which no router forwards"},
		{"default route", "underlay: {", "underlay: {defaultRoute: hub, ", "underlay.defaultRoute: \"hub\" is not a valid value; give \"underlay\" or \"tunnels\""},
		{"exhausted", "{name: partner, addresses", "{name: partner, exhausted: burn, addresses", "egress.pools[0].exhausted: \"burn\" is not a valid value"},
		{"second document", "announce: [10.9.0.0/24]", "---", "is a second document"},
		{"router id", "address: 10.9.0.4, publicAddress: 203.0.113.9", "address: \"2001:db8::4\"", "node.routerId: is required"},
		{"mss", "- name: aws-0\n    ipsec", "- name: aws-0\n    mss: 1400\n    ipsec", "tunnels[0].mss: \"1400\" does not fit the MTU of 1438; give at most 1398"},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := strings.Replace(good, test.from, test.to, 1)
			if text == good {
				t.Fatal("the text has not changed")
			}
			_, problems := parse(text)
			if !strings.Contains(problems.Error(), test.want) {
				t.Errorf("got %v, want %q", problems, test.want)
			}
			if strings.Contains(problems.Error(), "Sup3r") {
				t.Error("the secret is repeated")
			}
		})
	}
}

// TestCloudRefuses checks that one changed line of a valid document with a tunnel to each cloud
// breaks a rule of that cloud.
func TestCloudRefuses(t *testing.T) {
	good := `node: {name: hub-1, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.9}
tunnels:
- {name: aws, cloud: aws, inside: [{local: 169.254.64.2/30}], ipsec: {remoteAddress: 198.51.100.1, psk: aws-0}}
- {name: azure, cloud: azure, inside: [{local: 169.254.21.1/32, remote: 169.254.21.2}], ipsec: {remoteAddress: 198.51.100.2, psk: aws-0}}
- {name: vwan, cloud: azure-vwan, inside: [{local: 169.254.21.1/32, remote: 10.51.230.4}], ipsec: {remoteAddress: 198.51.100.3, psk: aws-0}}
- {name: gcp, cloud: gcp, inside: [{local: 169.254.65.1/30}], ipsec: {remoteAddress: 198.51.100.4, psk: aws-0}}
- {name: oci, cloud: oci, inside: [{local: 169.254.66.1/31}], ipsec: {remoteAddress: 198.51.100.5, psk: aws-0}}
peers:
- {name: aws, tunnel: aws, asn: 64512}
- {name: azure, tunnel: azure, asn: 65515}
- {name: vwan, tunnel: vwan, asn: 65515}
- {name: gcp, tunnel: gcp, asn: 64530}
- {name: oci, tunnel: oci, asn: 31898}
`
	if _, problems := parse(good); len(problems) > 0 {
		t.Fatal(problems)
	}
	var many []string
	for i := range 1001 {
		many = append(many, fmt.Sprintf("10.%d.%d.0/24", i/256, i%256))
	}
	for _, test := range []struct{ name, from, to, want string }{
		{"cloud", "cloud: aws", "cloud: amazon", `tunnels[0].cloud: "amazon" is not a known cloud; give one of aws, azure, azure-vwan, gcp, oci`},
		{"wireguard", "ipsec: {remoteAddress: 198.51.100.1, psk: aws-0}", "wireguard: {}", "tunnels[0].cloud: \"aws\" needs `ipsec`"},
		{"host order", "169.254.64.2/30", "169.254.64.1/30", `tunnels[0].inside[0]: "169.254.64.1/30" is refused by aws's gateway: has 169.254.64.1 for this node and 169.254.64.2 for the gateway`},
		{"reserved", "169.254.64.2/30", "169.254.5.2/30", "169.254.5.0/30, which is reserved"},
		{"not link-local", "169.254.64.2/30", "10.0.0.2/30", "is refused by aws's gateway: has 10.0.0.2, which is not in 169.254.0.0/16"},
		{"azure range", "remote: 169.254.21.2", "remote: 169.254.23.2", `tunnels[1].inside[0]: "169.254.21.1/32" is refused by azure's gateway: has 169.254.23.2`},
		{"google length", "169.254.65.1/30", "169.254.65.1/31", "is refused by gcp's gateway: is a /31"},
		{"oracle range", "169.254.66.1/31", "169.254.101.1/31", "from 169.254.100.0/22, which is reserved"},
		{"proposal", "psk: aws-0}}\n- {name: azure,", "psk: aws-0, ikeProposals: [aes256-sha256-modp1536]}}\n- {name: azure,", `tunnels[0].ipsec.ikeProposals[0]: "aes256-sha256-modp1536" is refused: aws's gateway takes no group modp1536; choose from ecp384`},
		{"pfs", "198.51.100.4, psk", "198.51.100.4, espProposals: [aes256gcm16], psk", "tunnels[3].ipsec.espProposals[0]: \"aes256gcm16\" is refused: gcp's gateway renews"},
		{"ike lifetime", "198.51.100.1, psk", "198.51.100.1, ikeRekey: 8h, psk", "tunnels[0].ipsec.ikeRekey: \"8h0m0s\" is not before aws's gateway ends the SA by itself, after 8h0m0s"},
		{"child lifetime", "198.51.100.1, psk", "198.51.100.1, childRekey: 1h, psk", "tunnels[0].ipsec.childRekey: \"1h0m0s\" is not before"},
		{"identity", "198.51.100.1, psk", "198.51.100.1, localIdentity: hub.example, psk", "tunnels[0].ipsec.localIdentity: \"hub.example\" is refused by aws's"},
		{"mtu", "cloud: aws", "cloud: aws, mtu: 1450", "tunnels[0].mtu: \"1450\" is more than aws's gateway passes, 1446"},
		{"hold time", "asn: 65515}\n- {name: vwan", "asn: 65515, holdTime: 30s}\n- {name: vwan", "peers[1].holdTime: \"30s\" is refused: azure's gateway has 3m0s"},
		{"passive", "asn: 65515}\n- {name: vwan", "asn: 65515, passive: true}\n- {name: vwan", "peers[1].passive: \"true\" is refused: azure's gateway never opens"},
		{"router asn", "asn: 64620", "asn: 8075", "node.asn: \"8075\" is refused by azure's gateway: reserved"},
		{"hub asn", "tunnel: vwan, asn: 65515", "tunnel: vwan, asn: 65000", "peers[2].asn: \"65000\" cannot be the number of azure-vwan's gateway: hubs have 65515"},
		{"google asn", "asn: 64530", "asn: 3356", "peers[3].asn: \"3356\" cannot be the number of gcp's gateway"},
		{"too many", "asn: 64512}", "asn: 64512, export: {allow: [{prefix: 10.0.0.0/8, ge: 24}]}}\nannounce: [" + strings.Join(many, ", ") + "]\npears:", "peers[0].export: \"1001\" prefixes of `announce` are more than export.maxPrefixes, 90"},
		{"export limit", "asn: 64512}", "asn: 64512, export: {maxPrefixes: 1001}}", "peers[0].export.maxPrefixes: \"1001\" is more than aws's gateway accepts: a transit gateway"},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := strings.Replace(good, test.from, test.to, 1)
			if text == good {
				t.Fatal("the text has not changed")
			}
			_, problems := parse(text)
			if !strings.Contains(problems.Error(), test.want) {
				t.Errorf("got %v, want %q", problems, test.want)
			}
			if n := strings.Count(problems.Error(), "node.asn:"); n > 2 {
				t.Errorf("said %d times", n)
			}
		})
	}
	// A document may choose any value that the gateway accepts, also against the preset.
	for from, to := range map[string]string{
		"cloud: aws,":          "cloud: aws, mtu: 1446, mss: 1300,",
		"198.51.100.2, psk":    "198.51.100.2, ikeProposals: [aes256-sha256-modp1024], espProposals: [aes256gcm16], childRekey: 7h, psk",
		"remote: 169.254.21.2": "remote: 10.1.255.4",
		"asn: 64512}":          "asn: 64512, holdTime: 90s, passive: true, export: {maxPrefixes: 1000}}",
	} {
		if _, problems := parse(strings.Replace(good, from, to, 1)); len(problems) > 0 {
			t.Errorf("%s: %v", to, problems)
		}
	}
}

func TestSyntaxErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":                              "is empty",
		"node: [":                       "is not valid YAML",
		"node: {\n  name: \t":           "line",
		"- a":                           "must be a group of fields",
		"{\"node\": {}}\n\"peers\": []": "line 2: is not valid YAML",
		"{\"node\": {}}}":               "is not valid YAML",
		"node: {}\n---\n{peers":         "is not valid YAML",
		"a: &a [*a, *a]":                "is an unknown field",
		strings.Repeat("x", MaxText+1):  "is larger than",
		"announce: [" + strings.Repeat("a,", maxSeparators+1) + "]": "lines and commas",
		"announce:" + strings.Repeat("\r- a", maxSeparators+1):      "lines and commas",
		"announce:" + strings.Repeat("\u2028- a", maxSeparators+1):  "lines and commas",
	} {
		if _, problems := Decode([]byte(text)); !strings.Contains(problems.Error(), want) {
			t.Errorf("%.20q: got %v, want %q", text, problems, want)
		}
	}
}

func TestEncodeDecode(t *testing.T) {
	d, problems := Decode(read(t, "clouds.yaml"))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	d.Message.Tunnels[0].GetIpsec().ChildRekeyBytes = 90e9
	text, err := Encode(d.Message)
	if err != nil {
		t.Fatal(err)
	}
	again, problems := Decode([]byte(text))
	if len(problems) > 0 || !proto.Equal(d.Message, again.Message) {
		t.Errorf("%v\n%s", problems, text)
	}
}

// TestSchemaKinds checks that the schema has only kinds of fields that the decoder supports.
func TestSchemaKinds(t *testing.T) {
	seen := map[protoreflect.FullName]bool{}
	var walk func(m protoreflect.MessageDescriptor)
	walk = func(m protoreflect.MessageDescriptor) {
		if seen[m.FullName()] || m.FullName() == "google.protobuf.Duration" {
			return
		}
		seen[m.FullName()] = true
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			switch f.Kind() {
			case protoreflect.MessageKind:
				walk(f.Message())
			case protoreflect.StringKind, protoreflect.BoolKind, protoreflect.Uint32Kind, protoreflect.Uint64Kind:
			default:
				t.Errorf("%s is of kind %s", f.FullName(), f.Kind())
			}
			if f.IsMap() {
				t.Errorf("%s is a map", f.FullName())
			}
		}
	}
	walk((&isthmusv1.Spec{}).ProtoReflect().Descriptor())
}

func FuzzDecode(f *testing.F) {
	f.Add(read(f, "clouds.yaml"))
	f.Add(read(f, "fifteen.yaml"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, problems := Decode(text)
		s, more := Check(d, stored)
		if s == nil || d.Message == nil {
			t.Fatal("nothing returned")
		}
		if len(problems)+len(more) > 0 {
			return
		}
		again, err := Encode(d.Message)
		if err != nil {
			t.Fatal(err)
		}
		if e, problems := Decode([]byte(again)); len(problems) > 0 || !proto.Equal(d.Message, e.Message) {
			t.Errorf("%v\n%s", problems, again)
		}
	})
}

// TestNothingFollows checks that a value that cannot be decoded makes no further problems.
func TestNothingFollows(t *testing.T) {
	good := string(read(t, "clouds.yaml"))
	for _, c := range []struct{ text, want string }{
		{"", "is empty; write at least `node` and `underlay`"},
		{"- a", "line 1: must be a group of fields; write `field: value` lines below it, such as `node: ...`"},
		{"node:\n\tname: a\n", "line 2: is not valid YAML: found character that cannot start any token; fix the syntax"},
		{"node: {name: a}\nunderlay: {\n", "line 3: is not valid YAML: did not find expected node content; fix the syntax"},
		{"node: {name: a}\nannounce: [\"10.0.0.0/8\" x]\n", "line 2: is not valid YAML: did not find expected ',' or ']'; fix the syntax"},
		{strings.Replace(good, "asn: 64620", `asn: "64620"`, 1), `line 2: node.asn: "64620" must be a whole number; write it in decimal digits, without quotes and leading zeros`},
		{strings.Replace(good, "asn: 64620", "asn: 064620", 1), `line 2: node.asn: "064620" must be a whole number; write it in decimal digits, without quotes and leading zeros`},
	} {
		if _, problems := parse(c.text); problems.Error() != c.want {
			t.Errorf("%.40q: got\n%v\nwant\n%s", c.text, problems, c.want)
		}
	}
}

// TestEncodeWide: numbers of 64 bits are strings in JSON, and numbers in a document.
func TestEncodeWide(t *testing.T) {
	m := &isthmusv1.Spec{
		Tunnels: []*isthmusv1.Tunnel{{Name: "a", Encryption: &isthmusv1.Tunnel_Ipsec{Ipsec: &isthmusv1.IPsec{ChildRekeyBytes: 1 << 40}}}},
		Egress:  &isthmusv1.Egress{Log: &isthmusv1.TranslationLog{MaxBytes: 1 << 33}},
	}
	text, err := Encode(m)
	if err != nil {
		t.Fatal(err)
	}
	if d, problems := Decode([]byte(text)); len(problems) > 0 || !proto.Equal(d.Message, m) {
		t.Errorf("%v\n%s", problems, text)
	}
}

// TestDefaultMTU: the underlay's MTU is that of the interface, between the least and that of the
// Internet.
func TestDefaultMTU(t *testing.T) {
	d, problems := Decode(read(t, "clouds.yaml"))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	d.Message.Underlay.Mtu = 0
	for seen, want := range map[int]int{0: 1500, 9001: 1500, 1460: 1460, 576: 1280} {
		s, _ := Check(d.Over(func(iface string) int {
			if iface != d.Message.Underlay.Interface {
				t.Errorf("asked for %s", iface)
			}
			return seen
		}), stored)
		if s.Underlay.MTU != want || !s.DerivedMTU {
			t.Errorf("interface of %d: %d, derived %v; want %d", seen, s.Underlay.MTU, s.DerivedMTU, want)
		}
	}
	d.Message.Underlay.Mtu = 1300
	if s, _ := Check(d.Over(func(string) int { return 1400 }), stored); s.Underlay.MTU != 1300 || s.DerivedMTU {
		t.Errorf("given: %d, derived %v", s.Underlay.MTU, s.DerivedMTU)
	}
}

package spec

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/secret"
)

const sidesHead = `node: {name: hub, asn: 64620}
underlay: {interface: wan, address: 10.9.0.4}
`

// sided checks a document and returns its problems and notes, one per line.
func sided(t *testing.T, text string) (problems, notes []string) {
	t.Helper()
	d, found := Decode([]byte(sidesHead + text))
	s, more := Check(d, func(name string) (secret.Ref, bool) { return secret.Ref{Name: name}, true })
	for _, p := range slices.Concat(found, more) {
		problems = append(problems, p.String())
	}
	if len(problems) == 0 {
		for _, p := range s.Notes() {
			notes = append(notes, p.String())
		}
	}
	return problems, notes
}

// TestSides checks the problems of attachments, sources and access.
func TestSides(t *testing.T) {
	for text, want := range map[string]string{
		`attachments: [{name: lan, interface: lan0, sources: [10.50.0.0/24], routes: [{prefix: 10.60.0.0/16, via: 10.50.0.254}]}]`:  "",
		`attachments: [{name: vpc, interface: wan, sources: [10.0.0.0/8]}, {name: vpc2, interface: wan, sources: [172.16.0.0/16]}]`: "",
		`attachments: [{name: lan, interface: lan0}]`:                                                                             "attachments[0].sources: is required",
		`attachments: [{name: lan, sources: [10.50.0.0/24]}]`:                                                                     "attachments[0].interface: is required",
		`attachments: [{name: lan, interface: lo, sources: [10.50.0.0/24]}]`:                                                      "not the name of an interface",
		`attachments: [{name: a, interface: lan0, sources: [10.50.0.0/24]}, {name: b, interface: lan0, sources: [10.51.0.0/24]}]`: `"lan0" is the interface of attachments[0] too`,
		`attachments: [{name: a, interface: lan0, sources: [10.50.0.0/24]}, {name: a, interface: lan1, sources: [10.51.0.0/24]}]`: "attachments[1].name",
		`attachments: [{name: vpc, interface: wan, sources: [0.0.0.0/1]}]`:                                                        "would make the Internet behind the underlay an inside network",
		`attachments: [{name: a, interface: lan0, sources: [10.50.0.0/24, 10.50.0.0/24]}]`:                                        "is given twice",
		`attachments: [{name: a, interface: lan0, routes: [{prefix: 10.60.0.0/16, via: 10.60.0.1}]}]`:                             "is in the prefix that it leads to",
		`attachments: [{name: a, interface: lan0, routes: [{prefix: 10.60.0.0/16, via: "2001:db8::1"}]}]`:                         "is of another address family",
		`attachments: [{name: a, interface: lan0, routes: [{prefix: 169.254.0.0/16}]}]`:                                           "which no router forwards",
		`staticRoutes: [{prefix: 169.254.0.0/16, blackhole: true}]`:                                                               "which no router forwards",
		`staticRoutes: [{prefix: 168.63.129.16/32, blackhole: true}]`:                                                             "at which the cloud's platform serves this node",
		`staticRoutes: [{prefix: 0.0.0.0/0, blackhole: true}]`:                                                                    "",
		`access: {api: [10.9.0.0/24, 10.9.0.1/24]}`:                                                                               "access.api[1]",
		`access: {ssh: [10.9.0.0/24, 10.9.0.9]}`:                                                                                  "access.ssh[1]",
		`access: {ssh: [` + strings.Repeat("10.0.0.0/8, ", 1000) + `10.1.0.0/16]}`:                                                "are more than 1000 prefixes",
		`access: {input: open}`: `give "drop" or "keep"`,
		`access: {input: keep, ssh: [10.9.0.0/24, "2001:db8::/64"]}`:                                                                                                                                 "",
		`attachments: [{name: a, interface: lan0, sources: [` + strings.Repeat("10.0.0.0/8, ", 1000) + `10.1.0.0/16]}]`:                                                                              "are more than 1000 prefixes",
		`egress: {pools: [{name: p, addresses: [{address: 10.9.0.5}]}], policies: [{name: x, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["80"], pool: p, to: "169.254.169.254:80"}]}`: "at which the cloud's platform serves this node",
		`egress: {pools: [{name: p, addresses: [{address: 10.9.0.5}], probes: {targets: ["http://169.254.169.254/latest"]}}]}`:                                                                       "at which the cloud's platform serves this node",
	} {
		problems, _ := sided(t, text)
		got := strings.Join(problems, "\n")
		if (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%.90s: %s, want %q", text, got, want)
		}
	}
}

// TestNotes checks the notes of valid documents with unexpected effects.
func TestNotes(t *testing.T) {
	const tunnel = `tunnels: [{name: t, wireguard: {privateKey: k, peerPublicKey: "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", listenPort: 51820}, inside: [{local: 169.254.64.2/30}]SOURCES}]
`
	for _, k := range []struct{ text, want string }{
		{"access: {api: [10.9.0.0/24]}\n", ""},
		{"", "access.api: is not given"},
		{"access: {api: [10.9.0.0/24]}\n" + strings.Replace(tunnel, "SOURCES", "", 1), `tunnels[0].sources: "t" lets in only packets of its peer itself`},
		{"access: {api: [10.9.0.0/24]}\n" + strings.Replace(tunnel, "SOURCES", ", sources: [10.1.0.0/16]", 1), ""},
		{"access: {api: [10.9.0.0/24]}\n" + strings.Replace(tunnel, "SOURCES", "", 1) + "staticRoutes: [{prefix: 10.1.0.0/16, tunnels: [t]}]\n", ""},
		{"access: {api: [10.9.0.0/24]}\n" + strings.Replace(tunnel, "SOURCES", "", 1) + "peers: [{name: p, tunnel: t, asn: 65001, import: {allow: [{prefix: 10.0.0.0/8, le: 24}, {prefix: 0.0.0.0/0}]}}]\n", ""},
		{"access: {api: [10.9.0.0/24]}\n" + strings.Replace(tunnel, "SOURCES", "", 1) + "peers: [{name: p, tunnel: t, asn: 65001, import: {allow: [{prefix: 0.0.0.0/0, le: 32}]}}]\n", "peers[0].import.allow[0]: \"0.0.0.0/0 le 32\" also allows prefixes that are never installed"},
		{"access: {api: [10.9.0.0/24]}\n" + strings.Replace(tunnel, "SOURCES", ", sources: [10.1.0.0/16], mtu: 1420", 1), ""},
		{"access: {api: [10.9.0.0/24]}\n" + strings.Replace(tunnel, "SOURCES", ", sources: [10.1.0.0/16], mtu: 1421", 1), `tunnels[0].mtu: "1421" is more than the underlay's MTU of 1500 leaves, 1420`},
	} {
		problems, notes := sided(t, k.text)
		if got := strings.Join(notes, "\n"); len(problems) > 0 || (k.want == "") != (got == "") || !strings.Contains(got, k.want) {
			t.Errorf("%s\n%s, problems %v, want %q", k.text, got, problems, k.want)
		}
	}
}

// TestAccessOf checks that AccessOf returns the valid parts of access of an invalid document, and
// that Sources checks a list like one of a document.
func TestAccessOf(t *testing.T) {
	d, _ := Decode([]byte("node: {name: \"\"}\naccess: {api: [10.9.0.0/24, nonsense], ssh: [\"2001:db8::/64\"], input: drop}\n"))
	if got, want := fmt.Sprint(AccessOf(d.Message)), "{[10.9.0.0/24] [2001:db8::/64] drop []}"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := AccessOf(nil); len(got.API)+len(got.SSH) > 0 || got.Input != "" {
		t.Errorf("of no document: %v", got)
	}
	list, problems := Sources("-api-from", []string{"10.9.0.0/24", "10.9.0.1/24", "10.0.0.7", "::ffff:10.0.0.0/120", "2001:db8::/32"})
	if got := fmt.Sprint(list); got != "[10.9.0.0/24 2001:db8::/32]" || len(problems) != 3 {
		t.Errorf("%s, %v", got, problems)
	}
	for i, value := range []string{"10.9.0.1/24", "10.0.0.7", "::ffff:10.0.0.0/120"} {
		if i < len(problems) && (problems[i].Value != value || problems[i].Path != fmt.Sprintf("-api-from[%d]", i+1)) {
			t.Errorf("%v, want that %s is refused", problems[i], value)
		}
	}
}

// TestOtherFamily: rules of the family that a session does not carry are noted, and a document with
// them is accepted, since those of former versions have them. A session of IPv4 carries both if the
// tunnel has a pair of each, and no other session for IPv6.
func TestOtherFamily(t *testing.T) {
	const tunnel = `tunnels: [{name: t, inside: [{local: 169.254.64.1/30}, {local: "fd00::1/126", remote: "fd00::2"}], wireguard: {privateKey: k, peerPublicKey: "aGVsbG8gd29ybGQgaGVsbG8gd29ybGQgaGVsbG8gISE=", listenPort: 51820}}]
peers: [{name: p, tunnel: t, asn: 65001, address: "%s", import: {allow: [{prefix: 10.1.0.0/16}, {prefix: "2001:db8::/32", le: 48}]}, export: {allow: [{prefix: "2001:db8::/32"}, {prefix: 10.2.0.0/16}]}}%s]
`
	second := map[string]string{"169.254.64.2": `, {name: q, tunnel: t, asn: 65001, address: "fd00::2"}`}
	for address, want := range map[string][]string{
		"169.254.64.2": {`peers[0].import.allow[1]: "2001:db8::/32 le 48" has no effect: the session carries only IPv4, the family of its address 169.254.64.2`, `peers[0].export.allow[0]: "2001:db8::/32" has no effect`},
		"fd00::2":      {`peers[0].import.allow[0]: "10.1.0.0/16" has no effect: the session carries only IPv6, the family of its address fd00::2`, `peers[0].export.allow[1]: "10.2.0.0/16" has no effect`},
	} {
		problems, notes := sided(t, fmt.Sprintf(tunnel, address, second[address]))
		var got []string
		for _, n := range notes {
			if strings.Contains(n, "has no effect") {
				got = append(got, n)
			}
		}
		if len(problems) > 0 || !slices.EqualFunc(got, want, strings.Contains) {
			t.Errorf("with %s: problems %q, notes %q", address, problems, got)
		}
	}
}

// TestBothFamilies lists the sessions that carry both families, by the IPv6 address that is the
// next hop.
func TestBothFamilies(t *testing.T) {
	const both, four = `{local: 169.254.64.1/30}, {local: "fd00::1/126", remote: "fd00::2"}`, `{local: 169.254.64.1/30}`
	const six, none = `import: {allow: [{prefix: "2001:db8::/32", le: 48}]}`, `import: {allow: [{prefix: 10.1.0.0/16}]}`
	for _, k := range []struct{ inside, peers, want string }{
		{both, "{name: p, tunnel: t, asn: 65001, " + six + "}", "fd00::1"},
		{both, `{name: p, tunnel: t, asn: 65001, export: {allow: [{prefix: "2001:db8::/32"}]}}`, "fd00::1"},
		{both, "{name: p, tunnel: t, asn: 65001, " + none + "}", "none"},
		{four, "{name: p, tunnel: t, asn: 65001, " + six + "}", "none"},
		{both, `{name: p, tunnel: t, asn: 65001, address: "fd00::2", ` + six + "}", "none"},
		{both, "{name: p, tunnel: t, asn: 65001, " + six + `}, {name: q, tunnel: t, asn: 65001, address: "fd00::2", ` + six + "}", "none none"},
	} {
		d, _ := Decode([]byte(sidesHead + "tunnels: [{name: t, inside: [" + k.inside + `], wireguard: {privateKey: k, peerPublicKey: "aGVsbG8gd29ybGQgaGVsbG8gd29ybGQgaGVsbG8gISE=", listenPort: 51820}}]` + "\npeers: [" + k.peers + "]\n"))
		s, problems := Check(d, func(name string) (secret.Ref, bool) { return secret.Ref{Name: name}, true })
		if len(problems) > 0 {
			t.Errorf("%+v: %v", k, problems)
			continue
		}
		var got []string
		for _, p := range s.Peers {
			local := "none"
			if p.OtherLocal.IsValid() {
				local = p.OtherLocal.String()
			}
			got = append(got, local)
		}
		if strings.Join(got, " ") != k.want {
			t.Errorf("%+v: %q", k, got)
		}
	}
}

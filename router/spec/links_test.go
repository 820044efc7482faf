package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/secret"
)

const linkText = `node: {name: a, asn: 64601}
underlay: {interface: eth0, address: 192.0.2.100}
tunnels: [{name: site, inside: [{local: 169.254.80.0/31}], wireguard: {privateKey: w, peerPublicKey: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", listenPort: 51820}}]
links: [{name: west, node: b, lanes: 3, inside: [169.254.96.0/26, "fd00:96::/122"], wireguard: {privateKey: w, peerPublicKey: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", listenPort: 51900, endpoint: "192.0.2.101:52000"}}]
peers: [{name: b, tunnel: west, asn: 64602, import: {allow: [{prefix: 10.2.0.0/16}, {prefix: "2001:db8:2::/48"}]}}]
staticRoutes: [{prefix: 10.9.0.0/16, tunnels: [west]}, {prefix: 10.8.0.0/16, tunnels: [west, site]}]
`

func checkLinks(text string, processors int) (*Spec, Problems) {
	d, problems := Decode([]byte(text))
	s, more := Check(d.With(processors), func(name string) (secret.Ref, bool) { return secret.Ref{Name: name, Fingerprint: "f"}, true })
	return s, append(problems, more...)
}

// TestLink reads a link: both ends derive the same pairs of addresses and ports.
func TestLink(t *testing.T) {
	s, problems := checkLinks(linkText, 8)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	other := strings.NewReplacer("name: a,", "name: b,", "node: b,", "node: a,", "192.0.2.100", "192.0.2.101", "192.0.2.101:52000", "192.0.2.100:51900", "listenPort: 51900", "listenPort: 52000", "asn: 64602", "asn: 64601", "asn: 64601}", "asn: 64602}").Replace(linkText)
	r, problems := checkLinks(other, 8)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	if len(s.Links) != 1 || fmt.Sprint(s.Links[0].Lanes) != "[west-1 west-2 west-3]" || len(s.Tunnels) != 4 || s.Tunnels[0].Name != "site" {
		t.Fatalf("links %+v, %d tunnels", s.Links, len(s.Tunnels))
	}
	seen := map[netip.Addr]bool{}
	for i := range s.Links[0].Inside {
		a, b := s.Links[0].Inside[i], r.Links[0].Inside[i]
		if a.Local.Addr() != b.Remote || b.Local.Addr() != a.Remote || !a.Local.IsSingleIP() || seen[a.Remote] {
			t.Errorf("addresses of the link: %v and %v", a, b)
		}
		seen[a.Remote], seen[b.Remote] = true, true
	}
	for i := 1; i <= 3; i++ {
		x, y := s.Tunnels[i], r.Tunnels[i]
		if x.Link != "west" || x.Number != i || x.WireGuard.ListenPort != uint16(51899+i) || x.WireGuard.Endpoint.Port() != y.WireGuard.ListenPort || y.WireGuard.Endpoint.Port() != x.WireGuard.ListenPort {
			t.Errorf("lane %d: %+v and %+v", i, x.WireGuard, y.WireGuard)
		}
		if len(x.Inside) != 2 || len(x.Own) != 2 || x.Own[0] != s.Links[0].Inside[0].Local.Addr() || x.MTU != 1440 {
			t.Fatalf("lane %d: %+v", i, x)
		}
		for j := range x.Inside {
			a, b := x.Inside[j], y.Inside[j]
			if a.Local.Addr() != b.Remote || b.Local.Addr() != a.Remote || a.Local.Masked() != b.Local.Masked() || a.Local.Bits() != a.Local.Addr().BitLen()-1 || seen[a.Remote] || seen[b.Remote] {
				t.Errorf("lane %d has %v, and %v at the other end", i, a, b)
			}
			seen[a.Remote], seen[b.Remote] = true, true
		}
	}
	p := s.Peers[0]
	if p.Tunnel != "west" || p.Address != s.Links[0].Inside[0].Remote || p.LocalAddress != s.Links[0].Inside[0].Local.Addr() || p.TTL != 1 || p.OtherLocal != s.Links[0].Inside[1].Local.Addr() {
		t.Errorf("peer %+v", p)
	}
	if r := s.Routes; !r[0].Resilient || !slices.Equal(r[0].Tunnels, s.Links[0].Lanes) || r[1].Resilient || len(r[1].Tunnels) != 4 {
		t.Errorf("routes %+v", r)
	}
	if got := SecretUses(FromMessage(nil).Message); got != nil {
		t.Error(got)
	}
	for processors, want := range map[int]int{0: 1, 2: 2, 64: 16} {
		if s, problems := checkLinks(strings.Replace(linkText, "lanes: 3, ", "", 1), processors); len(problems) > 0 || len(s.Links[0].Lanes) != want {
			t.Errorf("%d processors: %v, %v", processors, s.Links, problems)
		}
	}
}

func TestBadLinks(t *testing.T) {
	for _, k := range []struct{ old, now, want string }{
		{"node: b,", "", "links[0].node: is required"},
		{"node: b,", "node: a,", `links[0].node: "a" is this node`},
		{"node: b,", "node: B,", `links[0].node: "B" is not a valid name`},
		{"name: west,", "name: " + strings.Repeat("w", 61) + ",", "has more than 60 characters"},
		{"name: west,", "name: site,", `links[0].name: "site" is the name of tunnels[0].name too`},
		{"name: site,", "name: west-2,", "gives lane 2 the name of tunnels[0].name"},
		{"lanes: 3", "lanes: 17", `links[0].lanes: "17" is not from 1 to 16`},
		{"listenPort: 51900", "listenPort: 65534", "leaves no port for each of 3 lanes"},
		{":52000", ":65534", "leaves no port for each of 3 lanes"},
		{"listenPort: 51900", "listenPort: 51818", "gives lane 3 the port 51820, which is the port of tunnels[0]"},
		{"listenPort: 51900", "listenPort: 51820", "is the port of tunnels[0].wireguard"},
		{"169.254.96.0/26, ", "169.254.96.0/27, ", "is not a block of 64 addresses; give a /26"},
		{"169.254.96.0/26, ", "169.254.80.0/26, ", "overlaps"},
		{"169.254.96.0/26, ", "169.254.169.192/26, ", "takes the address of the cloud's metadata service"},
		{`169.254.96.0/26, "fd00:96::/122"`, "169.254.96.0/26, 169.254.97.0/26", "is a second block of the same address family"},
		{`inside: [169.254.96.0/26, "fd00:96::/122"], `, "", "links[0].inside: is required"},
		{"endpoint: \"192.0.2.101:52000\"", "endpoint: \"169.254.96.9:52000\"", "where the peer of tunnel west-1 is reached"},
		{"tunnels: [west]", "tunnels: [east]", `staticRoutes[0].tunnels[0]: "east" is not a tunnel of this document`},
	} {
		text := strings.Replace(linkText, k.old, k.now, 1)
		if text == linkText {
			t.Fatalf("%q is not in the document", k.old)
		}
		if _, problems := checkLinks(text, 4); !strings.Contains(fmt.Sprint(problems), k.want) {
			t.Errorf("%q: %v, want %q", k.now, problems, k.want)
		}
	}
	many := linkText
	for i := range 64 {
		many = strings.Replace(many, "links: [", fmt.Sprintf("links: [{name: l%d, node: b, lanes: 1, inside: [10.77.%d.0/26], wireguard: {privateKey: w, peerPublicKey: \"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\", listenPort: %d}}, ", i, i, 53000+i), 1)
	}
	if _, problems := checkLinks(many, 4); !strings.Contains(fmt.Sprint(problems), "are more than 64") {
		t.Errorf("65 links: %v", problems)
	}
}

// TestTakeoverByLink watches the other node of a link on each lane and outside them.
func TestTakeoverByLink(t *testing.T) {
	text := linkText + `egress:
  pools: [{name: partner, addresses: [{address: 203.0.113.5}], probes: {targets: ["icmp://198.51.100.7"]}}]
  takeover: {link: west}
`
	s, problems := checkLinks(text, 8)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	if got, want := fmt.Sprint(s.Takeover.Paths), "[{ invalid IP 169.254.96.3} { invalid IP 169.254.96.5} { invalid IP 169.254.96.7} {eth0 192.0.2.100 192.0.2.101}]"; got != want {
		t.Errorf("paths %s, want %s", got, want)
	}
	for _, k := range []struct{ from, to, want string }{
		{"link: west", "link: east", `egress.takeover.link: "east" is not a link`},
		{"link: west", "link: site", `egress.takeover.link: "site" is not a link`},
		{"link: west", "link: west, watch: [169.254.96.3]", "egress.takeover.watch: \"169.254.96.3\" is given with `link`"},
		{`, endpoint: "192.0.2.101:52000"`, "", "egress.takeover.link: \"west\" has no `endpoint`"},
	} {
		_, problems := checkLinks(strings.Replace(text, k.from, k.to, 1), 8)
		if len(problems) != 1 || !strings.Contains(problems[0].String(), k.want) {
			t.Errorf("%s: %v, want %s", k.to, problems, k.want)
		}
	}
	// A link without addresses is refused where they stand.
	_, problems = checkLinks(strings.Replace(text, `inside: [169.254.96.0/26, "fd00:96::/122"], `, "", 1), 8)
	if !strings.Contains(fmt.Sprint(problems), "links[0].inside: is required") || strings.Contains(fmt.Sprint(problems), "takeover") {
		t.Errorf("no addresses: %v", problems)
	}
}

package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/spec"
)

const linkDocument = `node: {name: a, asn: 64601}
underlay: {interface: eth0, address: 192.0.2.100}
links: [{name: west, node: b, lanes: 2, inside: [169.254.96.0/26], wireguard: {privateKey: w, peerPublicKey: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", listenPort: 51900}}]
peers: [{name: b, tunnel: west, asn: 64602, import: {allow: [{prefix: 10.2.0.0/16}]}}]
staticRoutes: [{prefix: 10.9.0.0/16, tunnels: [west]}]
`

// TestLinks plans a link of two lanes: one session, which may come by each lane, a route of its own
// to the other end, and the same sources for each lane.
func TestLinks(t *testing.T) {
	target, ledger := mustMake(t, parse(t, linkDocument), Ledger{})
	if len(target.Links) != 1 || fmt.Sprint(target.Links[0].Lanes) != "[west-1 west-2]" || len(target.Tunnels) != 2 || len(ledger.Tunnels) != 2 {
		t.Fatalf("links %+v, tunnels %+v", target.Links, target.Tunnels)
	}
	lanes := []string{target.Tunnels[0].Interface, target.Tunnels[1].Interface}
	p := target.BGP.Peers[0]
	if p.Interface != "" || !slices.Equal(p.Lanes, lanes) || p.TTL != 1 || !p.Passive == p.Address.Less(p.LocalAddress) {
		t.Errorf("peer %+v", p)
	}
	if got := fmt.Sprint(target.NAT.Sessions); got != fmt.Sprint([]nat.Session{{Interface: lanes[0], Address: p.Address}, {Interface: lanes[1], Address: p.Address}}) {
		t.Errorf("sessions from %s", got)
	}
	hops := []fib.NextHop{{Interface: lanes[0]}, {Interface: lanes[1]}}
	for _, want := range []fib.Route{
		{Key: fib.Main(netip.MustParsePrefix("10.9.0.0/16")), NextHops: hops, Resilient: true},
		{Key: fib.Main(netip.MustParsePrefix("169.254.96.1/32")), NextHops: hops, Resilient: true, Own: true},
	} {
		if !slices.ContainsFunc(target.Routes, func(r fib.Route) bool { return fmt.Sprint(r) == fmt.Sprint(want) }) {
			t.Errorf("no route %v in %v", want, target.Routes)
		}
	}
	for i, a := range target.NAT.Attachments {
		if got, want := fmt.Sprint(a.Sources), fmt.Sprintf("[10.2.0.0/16 10.9.0.0/16 169.254.96.1/32 169.254.96.%d/32]", 2*i+3); got != want {
			t.Errorf("lane %d: sources %s, want %s", i+1, got, want)
		}
	}
	// A kernel without WireGuard, with more lanes than devices that are possible in the daemon.
	s := parse(t, linkDocument)
	for i := range 16 {
		tu := s.Tunnels[1]
		tu.Name = spec.LaneName("east", i)
		s.Tunnels = append(s.Tunnels, tu)
	}
	_, _, problems := Make(s, Ledger{}, Machine{Can: func(c string) bool { return c == "tun" }})
	if len(problems) != 1 || problems[0].Path != "links[0].wireguard" {
		t.Errorf("18 lanes without WireGuard in the kernel: %v", problems)
	}
}

// TestTakeoverByLink sends the echo requests by each lane and by the underlay.
func TestTakeoverByLink(t *testing.T) {
	text := strings.Replace(linkDocument, "listenPort: 51900", "listenPort: 51900, endpoint: \"192.0.2.101:51900\"", 1) + `egress:
  pools: [{name: partner, addresses: [{address: 203.0.113.5}], probes: {targets: ["icmp://198.51.100.7"]}}]
  takeover: {link: west}
`
	target, _ := mustMake(t, parse(t, text), Ledger{})
	want := fmt.Sprintf("[{%s 169.254.96.2 169.254.96.3} {%s 169.254.96.4 169.254.96.5} {eth0 192.0.2.100 192.0.2.101}]", target.Tunnels[0].Interface, target.Tunnels[1].Interface)
	if got := fmt.Sprint(target.Takeover.Paths); got != want || !target.NAT.Pools[0].Shared {
		t.Errorf("paths %s, want %s; shared %v", got, want, target.NAT.Pools[0].Shared)
	}
}

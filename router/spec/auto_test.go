package spec

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/secret"
)

func TestAuto(t *testing.T) {
	a := netip.MustParseAddr
	told := Platform{Known: true, Interfaces: map[string]netip.Addr{"eth0": a("10.9.0.4")}, Public: map[netip.Addr]netip.Addr{a("10.9.0.4"): a("203.0.113.9"), a("10.9.0.5"): a("203.0.113.10")}}
	const text = `node: {name: hub, asn: 64620}
underlay: {interface: eth0, address: auto, publicAddress: auto}
tunnels: [{name: t, ipsec: {remoteAddress: 198.51.100.10, psk: k}}]
egress:
  pools: [{name: p, addresses: [{address: 10.9.0.5, publicAddress: auto}]}]
`
	stored := func(string) (secret.Ref, bool) { return secret.Ref{Name: "k"}, true }
	d, problems := Decode([]byte(text))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	s, problems := Check(d.On(told), stored)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	if s.Underlay.Address != a("10.9.0.4") || s.Underlay.PublicAddress != a("203.0.113.9") || s.Node.RouterID != a("10.9.0.4") || s.Pools[0].Addresses[0].Public != a("203.0.113.10") ||
		s.Tunnels[0].IPsec.LocalIdentity != "203.0.113.9" || s.Tunnels[0].IPsec.LocalAddress != a("10.9.0.4") {
		t.Errorf("%+v, %+v, %+v", s.Underlay, s.Pools, s.Tunnels[0].IPsec)
	}
	for what, c := range map[string]struct {
		platform Platform
		wants    []string
	}{
		"no platform":  {Platform{}, []string{`line 2: underlay.address: "auto" is unknown, because no platform`, `line 2: underlay.publicAddress: "auto"`, `line 5: egress.pools[0].addresses[0].publicAddress: "auto"`}},
		"no interface": {Platform{Known: true, Public: told.Public}, []string{`underlay.address: "auto" is unknown, because the platform reports no interface eth0`}},
		"no public address": {Platform{Known: true, Interfaces: told.Interfaces}, []string{`underlay.publicAddress: "auto" is unknown, because the platform reports no public address for 10.9.0.4`,
			`egress.pools[0].addresses[0].publicAddress: "auto" is unknown, because the platform reports no public address for 10.9.0.5`}},
		"one for two": {Platform{Known: true, Interfaces: told.Interfaces, Public: map[netip.Addr]netip.Addr{a("10.9.0.4"): a("203.0.113.9"), a("10.9.0.5"): a("203.0.113.9")}}, []string{"is the public address of underlay too"}},
	} {
		_, problems := Check(d.On(c.platform), stored)
		for _, want := range c.wants {
			if !strings.Contains(fmt.Sprint(problems), want) {
				t.Errorf("%s: %v; want %q", what, problems, want)
			}
		}
		if len(problems) != len(c.wants) {
			t.Errorf("%s: %d problems: %v", what, len(problems), problems)
		}
	}
}

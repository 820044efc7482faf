package report

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// TestWayConditions: conditions report a tunnel that would not leave by the underlay, and an
// underlay that differs from the document.
func TestWayConditions(t *testing.T) {
	p := netip.MustParsePrefix
	seen := fib.Surroundings{
		Devices:   map[string]fib.Device{"eth0": {Index: 2, MTU: 1500}, "eth1": {Index: 3, MTU: 1400}},
		Addresses: []fib.Assigned{{Interface: "eth0", Prefix: p("10.9.0.4/24")}},
		Routes: []fib.Foreign{
			{Table: fib.TableMain, Prefix: p("0.0.0.0/0"), Interface: "eth0", Gateway: netip.MustParseAddr("10.9.0.1")},
			{Table: fib.TableMain, Prefix: p("203.0.113.0/24"), Interface: "eth1", Metric: 100},
			{Table: fib.TableMain, Prefix: p("203.0.113.128/25"), Interface: "eth0"},
		},
	}
	target := plan.Target{Underlay: spec.Underlay{Interface: "eth0", Address: netip.MustParseAddr("10.9.0.4"), MTU: 1500}, Tunnels: []tunnel.Config{
		{Name: "near", IPsec: &tunnel.IPsec{RemoteAddress: netip.MustParseAddr("203.0.113.129")}},
		{Name: "far", WireGuard: &tunnel.WireGuard{Endpoint: netip.MustParseAddrPort("192.0.2.9:51820")}},
		{Name: "waits", WireGuard: &tunnel.WireGuard{}},
	}}
	types := func() (out []string) {
		for _, c := range wayConditions(target, seen) {
			out = append(out, c.Type)
		}
		return out
	}
	if got := types(); len(got) > 0 {
		t.Errorf("conditions %q, want none", got)
	}
	target.Tunnels[0].IPsec = &tunnel.IPsec{RemoteAddress: netip.MustParseAddr("203.0.113.9")}
	target.Underlay.MTU = 9001
	if got := types(); !slices.Equal(got, []string{"UnderlayMTU", "NotByUnderlay"}) {
		t.Errorf("conditions %q, want UnderlayMTU and NotByUnderlay", got)
	}
	target.Underlay.Address = netip.MustParseAddr("10.9.0.5")
	if got := types(); !slices.Equal(got, []string{"NoUnderlayAddress", "UnderlayMTU", "NotByUnderlay"}) {
		t.Errorf("conditions %q", got)
	}
}

func TestInterfaceConditions(t *testing.T) {
	target := plan.Target{Underlay: spec.Underlay{Interface: "eth0"}, Tunnels: []tunnel.Config{{Name: "site"}},
		Attachments: []plan.Attachment{{Name: "lan", Interface: "eth1"}, {Name: "near", Interface: "eth0"}, {Name: "site", Interface: "t-site"}}}
	for _, k := range []struct {
		seen map[string]fib.Device
		want string
	}{
		{nil, ""},
		{map[string]fib.Device{"eth0": {}, "eth1": {}}, ""},
		{map[string]fib.Device{"eth0": {}, "eth1": {Down: true}}, "interface eth1 of attachment lan is down or has no carrier: nothing passes there"},
		{map[string]fib.Device{"lo": {}, "eth1": {}}, "interface eth0 of the underlay is not on this machine; compare with `ip link`"},
	} {
		var got []string
		for _, c := range interfaceConditions(target, fib.Surroundings{Devices: k.seen}) {
			got = append(got, c.Message)
		}
		if strings.Join(got, "; ") != k.want {
			t.Errorf("%v: %q, want %q", k.seen, got, k.want)
		}
	}
}

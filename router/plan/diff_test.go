package plan

import (
	"net/netip"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
)

// TestEditedForward: when a forward goes, flows end for which one that is not edited has another server.
func TestEditedForward(t *testing.T) {
	at, client := netip.MustParseAddr("10.9.0.5"), netip.MustParseAddr("198.51.100.1")
	open := func(name, to string, ports ...nat.PortRange) nat.Policy {
		return nat.Policy{Name: name, Action: nat.DNAT, Sources: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Pool: "p", Protocol: "udp", Ports: ports, To: netip.MustParseAddrPort(to)}
	}
	target := func(p ...nat.Policy) Target {
		return Target{NAT: nat.Config{Pools: []nat.Pool{{Name: "p", Addresses: []nat.PoolAddress{{Address: at, Public: at}}}}, Policies: p}}
	}
	one, all := open("dns", "10.1.0.8:53", nat.PortRange{First: 53, Last: 53}), open("all", "10.1.0.7:53")
	changes := DiffPolicies(target(one, all), target(all), []string{"dns"})
	flow := nat.Track{Source: client, Destination: at, LeavesAs: client, GoesTo: netip.MustParseAddr("10.1.0.8"), Protocol: 17, Port: 53, ServerPort: 53}
	if len(changes) != 1 || len(changes[0].Ends) != 1 || !changes[0].Ends[0].Has(flow) {
		t.Errorf("%+v", changes)
	}
}

package plan

import (
	"fmt"
	"net/netip"
	"strings"
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

// TestBeatenDeny: a new policy that denies is shown with those that win over it, also when it is edited alone.
func TestBeatenDeny(t *testing.T) {
	p := func(s ...string) (out []netip.Prefix) {
		for _, one := range s {
			out = append(out, netip.MustParsePrefix(one))
		}
		return out
	}
	deny := nat.Policy{Name: "quarantine", Action: nat.Deny, Sources: p("172.16.1.10/32")}
	all := nat.Policy{Name: "all", Action: nat.SNAT, Sources: p("172.16.0.0/16"), Pool: "p"}
	api := nat.Policy{Name: "api", Action: nat.SNAT, Sources: p("172.16.0.0/16"), Destinations: p("198.51.100.0/24"), Pool: "p"}
	elsewhere := nat.Policy{Name: "elsewhere", Action: nat.SNAT, Sources: p("172.16.2.0/24"), Destinations: p("198.51.100.0/24"), Pool: "p", Protocol: "tcp"}
	denied := nat.Policy{Name: "denied", Action: nat.Reject, Sources: p("172.16.0.0/16"), Destinations: p("198.51.100.9/32")}
	target := func(p ...nat.Policy) Target { return Target{NAT: nat.Config{Policies: p}} }
	before, after := target(all, api, elsewhere, denied), target(all, api, elsewhere, denied, deny)
	const want = "does not hold everywhere: part of what it names is let pass by more specific policies: api"
	for what, changes := range map[string][]Change{"document": Diff(before, after), "edit": DiffPolicies(before, after, []string{"quarantine"})} {
		if len(changes) != 1 || len(changes[0].Fields) != 1 || changes[0].Fields[0] != want {
			t.Errorf("%s: %+v", what, changes)
		}
	}
	deny.Destinations = p("198.51.100.0/24", "0.0.0.0/0")
	if changes := Diff(before, target(all, api, elsewhere, denied, deny)); len(changes) != 1 || len(changes[0].Fields) != 0 {
		t.Errorf("a source that is longer wins: %+v", changes)
	}

	// The work is bounded, and so are the words.
	large := []nat.Policy{deny}
	large[0].Destinations = nil
	for i := range 12 {
		more := api
		more.Name, more.Destinations = fmt.Sprintf("api-%02d", i), p(fmt.Sprintf("198.51.%d.0/24", i))
		large = append(large, more)
	}
	if changes := Diff(Target{}, target(large...)); len(changes) != 13 || !strings.HasSuffix(changes[0].Fields[0], "api-04 and 7 more") {
		t.Errorf("%+v", changes[0])
	}
	large[0].Sources = nil // none overlaps, so that each must be looked at
	for i := range 6000 {
		large[0].Sources = append(large[0].Sources, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32))
		large[1].Destinations = append(large[1].Destinations, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 32))
	}
	if changes := Diff(Target{}, target(large...)); len(changes) != 13 || !strings.Contains(changes[0].Fields[0], "not looked for among so many rules") {
		t.Errorf("%+v", changes[0].Fields)
	}
}

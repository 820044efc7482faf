package plan

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/test/golden"
)

// TestEditedForward checks that removing a forward ends flows for which another policy, which is
// not edited, has another server.
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

// TestBeatenDeny checks that a new policy that denies is shown with the policies that win over it,
// also in an edit of single policies.
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
	const want = "does not apply everywhere: more specific policies let some of its flows pass: api"
	for what, changes := range map[string][]Change{"document": Diff(before, after), "edit": DiffPolicies(before, after, []string{"quarantine"})} {
		if len(changes) != 1 || changes[0].Fields[0] != want {
			t.Errorf("%s: %+v", what, changes)
		}
	}
	deny.Destinations = p("198.51.100.0/24", "0.0.0.0/0")
	if changes := Diff(before, target(all, api, elsewhere, denied, deny)); len(changes) != 1 || changes[0].Fields[0] != "action: deny" {
		t.Errorf("a source that is longer wins: %+v", changes)
	}

	// The work and the length of the text are bounded.
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
	large[0].Sources = nil // none overlaps, so that each must be compared
	for i := range 6000 {
		large[0].Sources = append(large[0].Sources, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32))
		large[1].Destinations = append(large[1].Destinations, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 32))
	}
	if changes := Diff(Target{}, target(large...)); len(changes) != 13 || !strings.Contains(changes[0].Fields[0], "too many rules to find other policies") {
		t.Errorf("%+v", changes[0].Fields)
	}
}

// TestAdded checks that a plan shows the fields of new objects as the document has them, none of
// them with the value of before, and those of the first hundred objects of a kind.
func TestAdded(t *testing.T) {
	doc := `node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: a, cloud: aws, inside: [{local: 169.254.21.2/30, remote: 169.254.21.1}], ipsec: {remoteAddress: 198.51.100.1, psk: k}}
- {name: b, inside: [{local: 169.254.22.2/30, remote: 169.254.22.1}], wireguard: {privateKey: w, listenPort: 51820, peerPublicKey: bmOXLzJnsXqCGUN0mVAw3WYkY/xj4qzv3ZmJTA4uiTo=}}
peers:
- {name: a, tunnel: a, asn: 64512, import: {allow: [{prefix: 10.0.0.0/8, le: 24}]}, export: {allow: [{prefix: 0.0.0.0/0}], med: 10}}
staticRoutes: [{prefix: 10.5.0.0/16, tunnels: [b]}]
announce: [10.6.0.0/16]
egress:
  log: {}
  pools: [{name: p, addresses: [{address: 10.9.0.4}, {address: 10.9.0.5, publicAddress: 203.0.113.5}]}]
  policies: [{name: x, sources: [10.0.0.0/28, 10.1.0.0/28], pool: p, protocol: tcp, ports: ["443", 8000-8010]}]
`
	target, _ := mustMake(t, parse(t, doc), Ledger{})
	var b strings.Builder
	for _, c := range Diff(Target{}, target) {
		fmt.Fprintf(&b, "%s %s %s\n", c.Action, c.Kind, c.Name)
		for _, f := range c.Fields {
			fmt.Fprintf(&b, "    %s\n", f)
		}
	}
	golden.Check(t, "testdata/added.golden", b.String())

	var many Target
	for i := range maxDetailed + 1 {
		many.NAT.Pools = append(many.NAT.Pools, nat.Pool{Name: fmt.Sprintf("p%03d", i), Silent: true})
	}
	changes := Diff(Target{}, many)
	if n := len(changes); n != maxDetailed+1 || len(changes[n-2].Fields) == 0 || len(changes[n-1].Fields) > 0 {
		t.Errorf("%d changes, the last ones %+v", n, changes[max(0, n-2):])
	}
}

// TestAccessChanges checks that a plan shows which sources lose the API and SSH, and no others.
func TestAccessChanges(t *testing.T) {
	const all = "services of the machine that the document does not open get no new flows, and SSH from "
	for _, k := range []struct {
		machine  Machine
		from, to string // of access; a hyphen: no document
		want     string
	}{
		{Machine{}, "-", "", ""},
		{Machine{}, "-", "api: [10.9.0.0/24]", "add access api (+ from: 10.9.0.0/24)"},
		{Machine{}, "-", "input: drop", "access input (input: keep -> drop): " + all + "every source ends"},
		{Machine{}, "", "input: drop, ssh: [10.9.0.0/24]", "access input (input: keep -> drop, + ssh: 10.9.0.0/24): " + all + "other sources than 10.9.0.0/24 ends"},
		{Machine{}, "ssh: [10.9.0.0/24]", "", "access input (- ssh: 10.9.0.0/24)"},
		{Machine{Drop: true}, "-", "", ""},
		{Machine{Drop: true}, "-", "ssh: [10.9.0.0/24]", "access input (+ ssh: 10.9.0.0/24)"},
		{Machine{Drop: true}, "input: keep", "", "access input (input: keep -> drop): " + all + "every source ends"},
		{Machine{Drop: true}, "ssh: [10.9.0.0/24, 10.8.0.0/24]", "ssh: [10.9.0.0/25, 10.9.0.128/25]", "access input (- ssh: 10.8.0.0/24, - ssh: 10.9.0.0/24, + ssh: 10.9.0.0/25, + ssh: 10.9.0.128/25): SSH from 10.8.0.0/24 ends where no source of access.ssh covers it any more"},
		{Machine{}, "api: [10.9.0.0/24]", "api: [10.9.0.0/25, 10.9.0.128/26]", "access api (- from: 10.9.0.0/24, + from: 10.9.0.0/25, + from: 10.9.0.128/26): clients in 10.9.0.0/24 lose the API where no source covers them any more; its unix socket stays"},
		{Machine{}, "api: [\"2001:db8::/64\", 10.9.0.0/24]", "api: [\"2001:db8::/63\", 10.0.0.0/8]", "access api (- from: 10.9.0.0/24, - from: 2001:db8::/64, + from: 10.0.0.0/8, + from: 2001:db8::/63)"},
		{Machine{API: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24")}}, "api: [10.9.0.0/25]", "", "access api (- from: 10.9.0.0/25)"},
		{Machine{}, "api: [10.1.0.0/24, 10.2.0.0/24, 10.3.0.0/24, 10.4.0.0/24, 10.5.0.0/24]", "api: [10.6.0.0/24]", "clients in 10.1.0.0/24, 10.2.0.0/24, 10.3.0.0/24, 10.4.0.0/24, 1 more lose the API"},
	} {
		k.machine.Can = everything
		target := func(access string) Target {
			if access == "-" {
				return Nothing(k.machine, spec.Access{})
			}
			out, _, problems := Make(parse(t, "node: {name: n}\nunderlay: {interface: eth0, address: 10.9.0.4}\naccess: {"+access+"}\n"), Ledger{}, k.machine)
			if len(problems) > 0 {
				t.Fatal(problems)
			}
			return out
		}
		var got []string
		for _, c := range Diff(target(k.from), target(k.to)) {
			if c.Kind == "access" {
				line := fmt.Sprintf("%s access %s (%s)", c.Action, c.Name, strings.Join(c.Fields, ", "))
				if c.Interrupts != "" {
					line += ": " + c.Interrupts
				}
				got = append(got, line)
			}
		}
		if s := strings.Join(got, "; "); (k.want == "") != (s == "") || !strings.Contains(s, strings.TrimPrefix(k.want, "add ")) || strings.HasSuffix(k.want, ")") != strings.HasSuffix(s, ")") {
			t.Errorf("%q -> %q: %s, want %s", k.from, k.to, s, k.want)
		}
	}
}

// TestCovered checks that comparing two lists of prefixes does not enumerate addresses, and that
// the time is bounded by the lengths of the lists.
func TestCovered(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	some := func(n, least int) (out []netip.Prefix) {
		for range n {
			p, err := netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(256))}).Prefix(least + random.IntN(33-least))
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, p)
		}
		return out
	}
	yes := 0
	for range 3000 {
		p, others := some(1, 24)[0], some(random.IntN(8), 24)
		want := true
		for a := p.Addr(); p.Contains(a); a = a.Next() {
			want = want && slices.ContainsFunc(others, func(o netip.Prefix) bool { return o.Contains(a) })
		}
		if want {
			yes++
		}
		if covered(p, others) != want {
			t.Fatalf("%v in %v: %v", p, others, !want)
		}
	}
	if yes < 100 || yes > 2900 {
		t.Errorf("%d of 3000 are covered: the test shows little", yes)
	}
	var hosts []netip.Prefix
	for i := range 1000 {
		hosts = append(hosts, netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 14: byte(i >> 8), 15: byte(i)}), 128))
	}
	if covered(netip.MustParsePrefix("::/0"), hosts) {
		t.Error("a thousand hosts cover everything")
	}
}

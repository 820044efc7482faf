package plan

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/apipa"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

func everything(string) bool { return true }

func parse(t testing.TB, text string) *spec.Spec {
	t.Helper()
	d, problems := spec.Decode([]byte(text))
	s, more := spec.Check(d, func(name string) (secret.Ref, bool) { return secret.Ref{Name: name, Fingerprint: "f"}, true })
	if problems = append(problems, more...); len(problems) > 0 {
		t.Fatalf("%v\n%s", problems, text)
	}
	return s
}

// document returns a document with tunnels of the given names, all with allocated inside addresses,
// and a peer in each.
func document(names ...string) string {
	var b strings.Builder
	b.WriteString("node: {name: n, asn: 64620}\nunderlay: {interface: eth0, address: 10.9.0.4}\ntunnels:\n")
	for _, n := range names {
		i, _ := strconv.Atoi(strings.Trim(n, "abcdefghijklmnopqrstuvwxyz-"))
		fmt.Fprintf(&b, "- {name: %s, ipsec: {remoteAddress: 198.51.%d.%d, psk: k}}\n", n, 100+i/250, 1+i%250)
	}
	b.WriteString("peers:\n")
	for _, n := range names {
		fmt.Fprintf(&b, "- {name: %s, tunnel: %s, asn: 65000}\n", n, n)
	}
	return b.String()
}

func mustMake(t testing.TB, s *spec.Spec, l Ledger) (Target, Ledger) {
	t.Helper()
	target, ledger, problems := Make(s, l, Machine{Can: everything})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return target, ledger
}

func TestOrderAndRestartChangeNothing(t *testing.T) {
	first, ledger := mustMake(t, parse(t, document("b-2", "a-1", "c-3")), Ledger{})
	stored, err := json.Marshal(ledger)
	if err != nil {
		t.Fatal(err)
	}
	var read Ledger
	if err := json.Unmarshal(stored, &read); err != nil {
		t.Fatal(err)
	}
	second, again := mustMake(t, parse(t, document("c-3", "b-2", "a-1")), read)
	if d := Diff(first, second); len(d) > 0 {
		t.Errorf("the same document in another order: %+v", d)
	}
	if !reflect.DeepEqual(again, read) {
		t.Errorf("ledger went from %+v to %+v", read, again)
	}
}

func TestRemovedTunnelComesBackAsItWas(t *testing.T) {
	first, ledger := mustMake(t, parse(t, document("a-1", "b-2")), Ledger{})
	_, ledger = mustMake(t, parse(t, document("b-2")), ledger)
	_, ledger = mustMake(t, parse(t, document("b-2", "d-4")), ledger)
	back, _ := mustMake(t, parse(t, document("b-2", "a-1")), ledger)
	if d := Diff(first, back); len(d) > 0 {
		t.Errorf("got %+v", d)
	}
}

// TestChoicesNeverClash checks for random documents that no two tunnels share IDs, interfaces or
// addresses, and that a tunnel changes only if the document changes it.
func TestChoicesNeverClash(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	ledger := Ledger{}
	former := map[string]tunnel.Config{}
	for range 60 {
		var names []string
		for i := range 40 {
			if r.IntN(2) == 0 {
				name := fmt.Sprintf("t-%d", i)
				if i%5 == 0 {
					name = fmt.Sprintf("tunnel-%d-with-a-name-that-is-long", i)
				}
				names = append(names, name)
			}
		}
		r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		var target Target
		target, ledger = mustMake(t, parse(t, document(names...)), ledger)
		ids, ifaces, blocks := map[uint32]bool{}, map[string]bool{}, map[netip.Prefix]bool{}
		now := map[string]tunnel.Config{}
		for _, c := range target.Tunnels {
			block := c.Inside[0].Local.Masked()
			if ids[c.ID] || ifaces[c.Interface] || blocks[block] || len(c.Interface) > 15 {
				t.Fatalf("clash: %+v", c)
			}
			ids[c.ID], ifaces[c.Interface], blocks[block] = true, true, true
			if was, ok := former[c.Name]; ok && !reflect.DeepEqual(was, c) {
				t.Fatalf("%s changed from %+v to %+v", c.Name, was, c)
			}
			now[c.Name] = c
		}
		former = now
		for _, p := range target.BGP.Peers {
			c := now[p.Tunnel]
			if p.Address != c.Inside[0].Remote || p.LocalAddress != c.Inside[0].Local.Addr() || p.Interface != c.Interface || p.TTL != 1 {
				t.Fatalf("peer %+v does not fit tunnel %+v", p, c)
			}
		}
	}
}

// TestInsideAddressesNeverClash checks for random documents with tunnels to every cloud, some with
// given addresses, that no two tunnels share addresses, the cloud accepts them, and none changes
// without need.
func TestInsideAddressesNeverClash(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	clouds := append(cloud.Names(), "")
	ledger := Ledger{}
	former := map[string]tunnel.Inside{}
	for range 150 {
		var b strings.Builder
		b.WriteString("node: {name: n, asn: 64620}\nunderlay: {interface: eth0, address: 10.9.0.4}\ntunnels:\n")
		rules := map[string]apipa.Rule{}
		given := map[string]bool{}
		var taken []netip.Prefix
		for i := range 40 {
			name := clouds[r.IntN(len(clouds))]
			if r.IntN(4) > 0 {
				name = clouds[i%len(clouds)] // a tunnel seldom changes its cloud
			}
			rule := apipa.Default
			if p, ok := cloud.Lookup(name); ok {
				rule = p.Inside.Is
			}
			if r.IntN(3) == 0 {
				continue
			}
			tu := fmt.Sprintf("t-%d", i)
			rules[tu] = rule
			inside := ""
			// Given addresses come from the first addresses that the allocator tries.
			if r.IntN(5) == 0 {
				a := rule.From[0].Addr().As4()
				a[3] += byte(4 * r.IntN(12))
				block := netip.PrefixFrom(netip.AddrFrom4(a), 30)
				if !overlaps(taken, block) {
					taken = append(taken, block)
					peer := block.Addr().Next()
					inside = fmt.Sprintf(", inside: [{local: %s/30, remote: %s}]", peer.Next(), peer)
					if rule.Single {
						own := peer.Next()
						if r.IntN(2) == 0 {
							own, peer = peer, own
						}
						inside = fmt.Sprintf(", inside: [{local: %s/32, remote: %s}]", own, peer)
					}
					given[tu] = true
				}
			}
			fmt.Fprintf(&b, "- {name: %s, cloud: %q, ipsec: {remoteAddress: 198.51.100.%d, psk: k}%s}\n", tu, name, 1+i, inside)
		}
		var target Target
		target, ledger = mustMake(t, parse(t, b.String()), ledger)
		owners := map[netip.Addr]string{}
		now := map[string]tunnel.Inside{}
		for _, c := range target.Tunnels {
			in, rule := c.Inside[0], rules[c.Name]
			now[c.Name] = in
			if bad, _ := rule.Check(in.Local, in.Remote); bad != "" {
				t.Fatalf("%s: %+v %s", c.Name, in, bad)
			}
			block := in.Local.Masked()
			all := []netip.Addr{in.Remote}
			for a := block.Addr(); block.Contains(a); a = a.Next() {
				if a != in.Remote {
					all = append(all, a)
				}
			}
			for _, a := range all {
				kind := c.Name
				if rule.Single && a == in.Local.Addr() && in.Local.IsSingleIP() {
					kind = "this node"
				}
				if o, ok := owners[a]; ok && (o != "this node" || kind != o) {
					t.Fatalf("%s has %v of %s\n%s", c.Name, a, o, b.String())
				}
				owners[a] = kind
			}
		}
		for name, in := range now {
			was, ok := former[name]
			if !ok || was == in || given[name] {
				continue
			}
			// It may change only when its cloud refuses the former addresses or a document gives
			// them to another tunnel.
			bad, _ := rules[name].Check(was.Local, was.Remote)
			moved := bad != "" || rules[name].Single != was.Local.IsSingleIP() || overlaps(taken, was.Local.Masked()) || overlaps(taken, netip.PrefixFrom(was.Remote, 32))
			if !moved {
				t.Fatalf("%s went from %v to %v\n%s", name, was, in, b.String())
			}
		}
		former = map[string]tunnel.Inside{}
		for name, in := range now {
			if !given[name] {
				former[name] = in
			}
		}
	}
}

func overlaps(list []netip.Prefix, p netip.Prefix) bool {
	return slices.ContainsFunc(list, p.Overlaps)
}

// TestCloudFillsIn checks that a tunnel and its peers get their defaults from its cloud, and that
// all tunnels to Azure have one local address, also when the document gives it to one of them.
func TestCloudFillsIn(t *testing.T) {
	text := `node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.9}
tunnels:
- {name: aws, cloud: aws, ipsec: {remoteAddress: 198.51.100.1, psk: k}}
- {name: azure-0, cloud: azure, ipsec: {remoteAddress: 198.51.100.2, psk: k}}
- {name: azure-1, cloud: azure, ipsec: {remoteAddress: 198.51.100.3, psk: k}}
peers:
- {name: aws, tunnel: aws, asn: 64512}
- {name: azure-0, tunnel: azure-0, asn: 65515}
- {name: azure-1, tunnel: azure-1, asn: 65515}
`
	target, ledger := mustMake(t, parse(t, text), Ledger{})
	var got []string
	for i, c := range target.Tunnels {
		p := target.BGP.Peers[i]
		got = append(got, fmt.Sprint(c.Inside[0].Local, c.Inside[0].Remote, " ", c.MTU, target.NAT.Clamps[i].IPv4, c.IPsec.ChildRekey, c.IPsec.ChildRekeyBytes, " ", p.LocalAddress, p.Address, " ", p.HoldTime, p.Keepalive, p.TTL, p.MaxPrefixes))
	}
	want := []string{
		"169.254.64.2/30 169.254.64.1 1438 1398 45m0s 0 169.254.64.2 169.254.64.1 30s 10s 1 5000",
		"169.254.21.1/32 169.254.21.2 1400 1350 6h0m0s 90000000000 169.254.21.1 169.254.21.2 3m0s 1m0s 255 4000",
		"169.254.21.1/32 169.254.21.5 1400 1350 6h0m0s 90000000000 169.254.21.1 169.254.21.5 3m0s 1m0s 255 4000",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if again, _ := mustMake(t, parse(t, text), ledger); len(Diff(target, again)) > 0 {
		t.Errorf("the same again: %+v", Diff(target, again))
	}
	text = strings.Replace(text, "{name: azure-0, cloud: azure,", "{name: azure-0, cloud: azure, inside: [{local: 169.254.22.9/32, remote: 169.254.22.10}],", 1)
	target, _ = mustMake(t, parse(t, text), Ledger{})
	if in := target.Tunnels[2].Inside[0]; in.Local.String() != "169.254.22.9/32" {
		t.Errorf("azure-1 has %v, and azure-0 169.254.22.9", in.Local)
	}
	// Addresses of the document win over those of a removed tunnel.
	text = strings.Replace(text, "name: azure-1, cloud", "name: azure-2, cloud", 1)
	text = strings.Replace(text, "tunnel: azure-1", "tunnel: azure-2", 1)
	target, _ = mustMake(t, parse(t, text), ledger)
	if in := target.Tunnels[2].Inside[0]; in.Local.String() != "169.254.22.9/32" {
		t.Errorf("azure-2 has %v, and azure-0 169.254.22.9", in.Local)
	}
}

func TestChangedCloudMovesWhatItReserves(t *testing.T) {
	ledger := Ledger{Tunnels: map[string]Entry{"a-1": {ID: FirstID, Interface: "t-a-1", Inside: netip.MustParsePrefix("169.254.100.4/30")}}}
	for cloud, want := range map[string]string{"": "169.254.100.6/30", "aws": "169.254.100.6/30", "oci": "169.254.64.2/30", "azure": "169.254.21.1/32"} {
		text := strings.Replace(document("a-1"), "name: a-1,", fmt.Sprintf("name: a-1, cloud: %q,", cloud), 1)
		text = strings.Replace(text, "asn: 65000", "asn: "+map[bool]string{true: "31898", false: "64512"}[cloud == "oci"], 1)
		target, _ := mustMake(t, parse(t, text), ledger)
		if got := target.Tunnels[0].Inside[0].Local.String(); got != want {
			t.Errorf("cloud %q: got %s, want %s", cloud, got, want)
		}
	}
}

func TestGivenAddressMovesAllocatedOne(t *testing.T) {
	first, ledger := mustMake(t, parse(t, document("a-1")), Ledger{})
	taken := first.Tunnels[0].Inside[0].Local
	text := document("a-1", "b-2")
	text = strings.Replace(text, "name: b-2,", fmt.Sprintf("name: b-2, inside: [{local: %s}],", taken), 1)
	target, _ := mustMake(t, parse(t, text), ledger)
	if got := target.Tunnels[0].Inside[0].Local; got.Masked() == taken.Masked() || target.Tunnels[1].Inside[0].Local != taken {
		t.Errorf("a-1 has %v, b-2 %v", got, target.Tunnels[1].Inside)
	}
}

func TestMultihopPeerGetsHostRoute(t *testing.T) {
	text := document("a-1")
	text = strings.Replace(text, "asn: 65000", "asn: 65000, address: 192.168.255.30", 1)
	target, _ := mustMake(t, parse(t, text), Ledger{})
	if len(target.Routes) != 1 || target.Routes[0].Key.String() != "192.168.255.30/32" || target.Routes[0].NextHops[0].Interface != target.Tunnels[0].Interface {
		t.Errorf("routes %+v", target.Routes)
	}
	if p := target.BGP.Peers[0]; p.TTL != 2 {
		t.Errorf("ttl %d", p.TTL)
	}
}

// TestOneSideOpens checks which end of a lane opens the session.
func TestOneSideOpens(t *testing.T) {
	for _, k := range []struct {
		inside, passive string
		want            bool
	}{
		{"169.254.80.0/31", "", false}, {"169.254.80.1/31", "", true}, {"169.254.80.0/31", ", passive: true", true}, {"169.254.80.1/31", ", passive: false", false},
	} {
		target, _ := mustMake(t, parse(t, fmt.Sprintf(`node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: lane, inside: [{local: %s}], wireguard: {privateKey: k, peerPublicKey: "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE=", endpoint: "192.0.2.7:51820", listenPort: 51820}}
peers: [{name: p, tunnel: lane, asn: 65000%s}]
`, k.inside, k.passive)), Ledger{})
		if got := target.BGP.Peers[0].Passive; got != k.want {
			t.Errorf("local %s%s: passive is %v", k.inside, k.passive, got)
		}
	}
}

func TestMissingCapability(t *testing.T) {
	_, _, problems := Make(parse(t, document("a-1")), Ledger{}, Machine{Can: func(c string) bool { return c != "esp" }})
	if len(problems) != 1 || problems[0].Path != "tunnels[0].ipsec" || !strings.Contains(problems[0].Rule, "esp") {
		t.Errorf("got %v", problems)
	}
}

// TestEmbeddedDevices checks that a document cannot add a tunnel beyond those that are possible on
// a kernel without WireGuard, and that one that was accepted before stays valid.
func TestEmbeddedDevices(t *testing.T) {
	lanes := func(n int) *spec.Spec {
		var b strings.Builder
		b.WriteString("node: {name: n, asn: 64620}\nunderlay: {interface: eth0, address: 10.9.0.4}\ntunnels:\n")
		b.WriteString("- {name: other, ipsec: {remoteAddress: 198.51.100.1, psk: k}}\n")
		for i := range n {
			fmt.Fprintf(&b, "- {name: lane-%d, wireguard: {privateKey: k, peerPublicKey: \"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA%cE=\", endpoint: \"192.0.2.7:51820\", listenPort: %d}}\n", i, 'A'+i, 51820+i)
		}
		return parse(t, b.String())
	}
	without := func(c string) bool { return c != "wireguard" }
	_, most, problems := Make(lanes(tunnel.MaxEmbedded), Ledger{}, Machine{Can: without})
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	_, _, problems = Make(lanes(tunnel.MaxEmbedded+2), most, Machine{Can: without})
	if len(problems) != 1 || problems[0].Path != "tunnels[18].wireguard" || problems[0].Value != "lane-17" ||
		!strings.Contains(problems[0].Rule, "18 WireGuard tunnels, and at most 16 ") || !strings.HasPrefix(problems[0].Remedy, "remove 2 ") {
		t.Errorf("two too many: %v", problems)
	}
	_, ledger, problems := Make(lanes(tunnel.MaxEmbedded+2), Ledger{}, Machine{Can: everything})
	if len(problems) > 0 {
		t.Errorf("the kernel has WireGuard: %v", problems)
	}
	if _, _, problems := Make(lanes(tunnel.MaxEmbedded+2), ledger, Machine{Can: without}); len(problems) > 0 {
		t.Errorf("accepted before: %v", problems)
	}
	// lane-17 is removed and added again.
	_, ledger, _ = Make(lanes(tunnel.MaxEmbedded+1), ledger, Machine{Can: everything})
	if _, _, problems := Make(lanes(tunnel.MaxEmbedded+2), ledger, Machine{Can: without}); len(problems) != 1 {
		t.Errorf("removed before: %v", problems)
	}
}

func TestFieldName(t *testing.T) {
	for name, want := range map[string]string{"ASN": "asn", "RouterID": "routerId", "ASOverride": "asOverride", "AllowOwnAS": "allowOwnAs", "MTU": "mtu", "PublicAddress": "publicAddress", "TTL": "ttl"} {
		if got := fieldName(name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
}

func TestDiff(t *testing.T) {
	base := document("a-1", "b-2") + "announce: [10.0.0.0/24]\nstaticRoutes: [{prefix: 10.1.0.0/16, tunnels: [a-1]}]\negress: {pools: [{name: p, addresses: [{address: 10.9.0.5}]}], policies: [{name: x, sources: [10.0.0.0/28], pool: p}]}\n"
	a, ledger := mustMake(t, parse(t, base), Ledger{})
	for _, test := range []struct{ name, from, to, want string }{
		{"nothing", "", "", "[]"},
		{"tunnel removed, with its peer", "- {name: b-2, ipsec: {remoteAddress: 198.51.100.3, psk: k}}\n", "", "[remove tunnel b-2 (the tunnel goes down for good)]"},
		{"mtu", "{name: a-1, ipsec", "{name: a-1, mtu: 1400, ipsec", "[change tunnel a-1]"},
		{"address", "198.51.100.2,", "198.51.100.9,", "[change tunnel a-1 (the IKE SA is negotiated again)]"},
		{"hold time", "tunnel: a-1, asn: 65000", "tunnel: a-1, holdTime: 90s, asn: 65000", "[change peer a-1 (the session is closed and opened again)]"},
		{"import", "tunnel: a-1, asn: 65000", "tunnel: a-1, import: {allow: [{prefix: 10.0.0.0/8}]}, asn: 65000", "[change peer a-1]"},
		{"announcement", "[10.0.0.0/24]", "[10.0.1.0/24]", "[add announcement 10.0.1.0/24 remove announcement 10.0.0.0/24 (it is withdrawn from every peer)]"},
		{"asn", "asn: 64620", "asn: 64621", "[change node n (every BGP session is closed and opened again)]"},
		{"pool", "10.9.0.5", "10.9.0.6", "[change pool p (flows from 10.9.0.5)]"},
		{"underlay", "address: 10.9.0.4}", "address: 10.9.0.7}", "[change node n (every BGP session is closed and opened again) change underlay eth0 (flows from 10.9.0.4) change tunnel a-1 (the IKE SA is negotiated again) change tunnel b-2 (the IKE SA is negotiated again)]"},
		{"mss", "{name: a-1, ipsec", "{name: a-1, mss: 1200, ipsec", "[change tunnel a-1]"},
		{"log", "egress: {", "egress: {log: {}, ", "[add log log]"},
		{"policy", "policies: [{name: x,", "policies: [{name: y,", "[add policy y remove policy x (other policies decide its new flows, and the guard drops those that none decides)]"},
	} {
		t.Run(test.name, func(t *testing.T) {
			text := strings.Replace(base, test.from, test.to, 1)
			if test.name == "tunnel removed, with its peer" {
				text = strings.Replace(text, "- {name: b-2, tunnel: b-2, asn: 65000}\n", "", 1)
				test.want = "[remove peer b-2 (the session is closed, and its routes are removed) remove tunnel b-2 (the tunnel goes down for good)]"
			}
			b, _ := mustMake(t, parse(t, text), ledger)
			var got []string
			for _, c := range Diff(a, b) {
				s := fmt.Sprintf("%s %s %s", c.Action, c.Kind, c.Name)
				if c.Interrupts != "" {
					s += " (" + c.Interrupts + ")"
				}
				for _, e := range c.Ends {
					s += " (flows " + e.Flows + ")"
				}
				got = append(got, s)
			}
			if s := fmt.Sprint(got); s != test.want {
				t.Errorf("got  %s\nwant %s", s, test.want)
			}
		})
	}
	if !slices.IsSortedFunc(a.Tunnels, func(x, y tunnel.Config) int { return strings.Compare(x.Name, y.Name) }) {
		t.Error("tunnels are not in the order of names")
	}
}

// TestProxyAtAnAddressOfTheNode checks that the proxy accepts queries by all tunnels and
// attachments, or by those that the document names, and by the underlay only from the sources of
// attachments there.
func TestProxyAtAnAddressOfTheNode(t *testing.T) {
	doc := `node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: b, inside: [{local: 169.254.21.1/32, remote: 169.254.21.2}], ipsec: {remoteAddress: 198.51.100.1, psk: k}}
- {name: a, ipsec: {remoteAddress: 198.51.100.2, psk: k}}
attachments:
- {name: lan, interface: eth1, sources: [10.8.0.0/24]}
- {name: vpc, interface: eth0, sources: [10.7.0.0/16]}
- {name: vpc2, interface: eth0, sources: [10.6.0.0/16]}
egress: {dnsProxy: {listen: [169.254.21.1, 10.9.0.4]}}
`
	for from, want := range map[string]string{
		"":                  "[{169.254.21.1 t-b} {10.9.0.4 eth0} {10.9.0.4 eth1} {10.9.0.4 t-a} {10.9.0.4 t-b}] [{t-b 169.254.21.1 []} {eth0 10.9.0.4 [10.6.0.0/16 10.7.0.0/16]} {eth1 10.9.0.4 []} {t-a 10.9.0.4 []} {t-b 10.9.0.4 []}]",
		", from: [a, vpc2]": "[{169.254.21.1 t-b} {10.9.0.4 eth0} {10.9.0.4 t-a}] [{t-b 169.254.21.1 []} {eth0 10.9.0.4 [10.6.0.0/16]} {t-a 10.9.0.4 []}]",
	} {
		target, _ := mustMake(t, parse(t, strings.Replace(doc, "10.9.0.4]}", "10.9.0.4]"+from+"}", 1)), Ledger{})
		if got := fmt.Sprint(target.Names.Proxy, target.NAT.DNS); got != want {
			t.Errorf("%q: %s, want %s", from, got, want)
		}
	}
}

// TestDiffOfFields checks that fields appear as in the document, and missing values as hyphens.
func TestDiffOfFields(t *testing.T) {
	base := document("a-1") + "egress: {log: {maxAge: 48h}, pools: [{name: p, addresses: [{address: 10.9.0.5}]}], policies: [{name: x, sources: [10.0.0.0/28], pool: p}]}\n"
	first, ledger := mustMake(t, parse(t, base), Ledger{})
	for _, test := range []struct{ from, to, want string }{
		{"", "", "node: asn: 64620; routerId: 10.9.0.4"},
		{"maxAge: 48h", "maxAge: 72h", "log: maxAge: 48h -> 72h"},
		{"log: {maxAge: 48h}, ", "", "remove log: "},
		{"{name: a-1, ipsec", "{name: a-1, mss: 1200, ipsec", "tunnel: mss: 1398, IPv6 1378 -> 1200, IPv6 1200"},
		{"10.9.0.5}]", "10.9.0.5}], blocks: {size: 1000, sources: [10.0.0.0/28]}", "pool: blocks: - -> 1000 ports from 1024 for [10.0.0.0/28]"},
		{"name: p,", "name: p, announce: [0.0.0.0/0],", "health: addresses: 10.9.0.5; announce: 0.0.0.0/0"},
		{"name: p,", "name: p, exhausted: drop,", "pool: exhausted: reject -> drop"},
		{"address: 10.9.0.5}", "address: 10.9.0.5, publicAddress: 203.0.113.5, weight: 3}", "pool: - addresses: 10.9.0.5; + addresses: 10.9.0.5 (203.0.113.5, weight 3)"},
		{"pool: p}", "pool: p, timeouts: {udp: 90s}}", "policy: timeouts.udp: - -> 1m30s"},
		{"pools:", "nameFloor: 90s, pools:", "names: nameFloor: 30s -> 1m30s"},
		{"pools:", "nameHold: 2h, pools:", "names: nameHold: - -> 2h"},
		{"sources: [10.0.0.0/28]", "sources: [10.0.0.0/28, 10.1.0.0/28]", "policy: + sources: 10.1.0.0/28"},
		{"a-1, ipsec", "a-1, inside: [{local: 169.254.65.2/30}], ipsec", "tunnel: - inside: 169.254.64.2/30 to 169.254.64.1; + inside: 169.254.65.2/30 to 169.254.65.1"},
		{"address: 10.9.0.4}", "address: 10.9.0.4, defaultRoute: tunnels}", "underlay: defaultRoute: underlay -> tunnels"},
		{"asn: 65000}", "asn: 65000, export: {med: 10}}", "peer: export.med: - -> 10"},
		{"asn: 65000}", "asn: 65000, import: {allow: [{prefix: 10.0.0.0/8, le: 24}]}}", "peer: + import.allow: 10.0.0.0/8 le 24"},
	} {
		a := first
		if test.from == "" {
			a = Target{}
		}
		b, _ := mustMake(t, parse(t, strings.Replace(base, test.from, test.to, 1)), ledger)
		c := Diff(a, b)[0]
		got := c.Kind + ": " + strings.Join(c.Fields, "; ")
		if len(c.Fields) == 0 {
			got = string(c.Action) + " " + got
		}
		if got != test.want {
			t.Errorf("%q: got %q, want %q", test.to, got, test.want)
		}
	}
}

func TestHealthAndNames(t *testing.T) {
	doc := `node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: b, inside: [{local: 169.254.21.1/32, remote: 169.254.21.2}], ipsec: {remoteAddress: 198.51.100.1, psk: k}}
- {name: a, inside: [{local: 169.254.21.1/32, remote: 169.254.21.3}], ipsec: {remoteAddress: 198.51.100.2, psk: k}}
- {name: c, inside: [{local: 169.254.64.2/30}], ipsec: {remoteAddress: 198.51.100.3, psk: k}}
egress:
  zones: [{name: z, sources: [172.16.0.0/16]}, {name: y, sources: [172.17.0.0/16]}]
  dnsProxy: {listen: [169.254.21.1]}
  pools:
  - {name: q, addresses: [{address: 10.9.0.6}], announce: [0.0.0.0/0]}
  - {name: p, addresses: [{address: 10.9.0.5}], probes: {targets: ["icmp://198.51.100.9"]}}
  - {name: o, addresses: [{address: 10.9.0.7}]}
`
	target, _ := mustMake(t, parse(t, doc), Ledger{})
	for what, pair := range map[string][2]string{
		// on both tunnels of the address, and no other
		"proxy": {fmt.Sprint(target.Names.Proxy), "[{169.254.21.1 t-a} {169.254.21.1 t-b}]"},
		"zones": {fmt.Sprint(target.NAT.Zones), "[{y [172.17.0.0/16]} {z [172.16.0.0/16]}]"},
		"pools": {fmt.Sprint(len(target.Health), " ", target.Health[0].Name, " ", target.Health[1].Name), "2 p q"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: %s, want %s", what, pair[0], pair[1])
		}
	}
	changed, _ := mustMake(t, parse(t, strings.NewReplacer("172.17.0.0", "172.18.0.0", ", announce: [0.0.0.0/0]", "", "icmp://198.51.100.9", "icmp://198.51.100.8", "dnsProxy", "nameFloor: 1m\n  dnsProxy").Replace(doc)), Ledger{})
	var got []string
	for _, c := range Diff(target, changed) {
		got = append(got, fmt.Sprint(c.Action, " ", c.Kind, " ", c.Name, " ", c.Interrupts))
	}
	want := []string{
		"change zone y ", "change health p ", "change names names ",
		"remove health q all addresses of the pool count as healthy, and its announcements are withdrawn",
	}
	if !slices.Equal(got, want) {
		t.Errorf("changes %q, want %q", got, want)
	}
	if c := Diff(Target{}, target); !slices.ContainsFunc(c, func(c Change) bool { return c.Kind == "names" }) {
		t.Errorf("the names of the first document are not reported: %v", c)
	}
}

// TestMapsAreRoutedAndAnnounced checks maps of two spokes with one prefix, one of them with two
// tunnels.
func TestMapsAreRoutedAndAnnounced(t *testing.T) {
	maps := `
egress: {maps: [{tunnels: [b-2, a-1], inside: 10.1.0.0/16, mapped: 100.65.0.0/16}, {tunnels: [c-3], inside: 10.1.0.0/16, mapped: 100.64.0.0/16}]}
announce: [100.65.0.0/16, 10.9.0.0/24]
`
	before, ledger := mustMake(t, parse(t, document("a-1", "b-2", "c-3")), Ledger{})
	target, _ := mustMake(t, parse(t, document("a-1", "b-2", "c-3")+maps), ledger)
	if got := fmt.Sprint(target.BGP.Announce); got != "[10.9.0.0/24 100.64.0.0/16 100.65.0.0/16]" {
		t.Errorf("announced: %s", got)
	}
	if got, want := fmt.Sprint(target.NAT.Maps), "[{[t-c-3] 10.1.0.0/16 100.64.0.0/16} {[t-a-1 t-b-2] 10.1.0.0/16 100.65.0.0/16}]"; got != want {
		t.Errorf("maps %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(target.Routes), "[{100.64.0.0/16 [{t-c-3 invalid IP}] false false false} {100.65.0.0/16 [{t-b-2 invalid IP} {t-a-1 invalid IP}] false false false}]"; got != want {
		t.Errorf("routes %s, want %s", got, want)
	}
	var changes []string
	for _, c := range Diff(target, before) {
		for _, e := range c.Ends {
			changes = append(changes, fmt.Sprintf("%s %s %s (flows %s)", c.Action, c.Kind, c.Name, e.Flows))
		}
	}
	if want := "remove map 100.64.0.0/16 (flows of 100.64.0.0/16)"; !slices.Contains(changes, want) {
		t.Errorf("%q, want %q", changes, want)
	}
}

// TestMetricsInlets checks by which interfaces metrics are read: never by the underlay's, and not
// by that of a disabled tunnel.
func TestMetricsInlets(t *testing.T) {
	const doc = `node: {name: n, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4}
tunnels:
- {name: b, inside: [{local: 169.254.21.1/32, remote: 169.254.21.2}], ipsec: {remoteAddress: 198.51.100.1, psk: k}}
- {name: a, ipsec: {remoteAddress: 198.51.100.2, psk: k}}
attachments:
- {name: lan, interface: eth1, sources: [10.8.0.0/24]}
- {name: vpc, interface: eth0, sources: [10.7.0.0/16]}
metrics: {listen: [169.254.21.1, 10.8.0.1], from: [10.8.0.0/24, 10.7.0.0/16]}
`
	target, ledger := mustMake(t, parse(t, doc), Ledger{})
	if got, want := fmt.Sprint(target.NAT.Metrics), "{9100 [10.7.0.0/16 10.8.0.0/24] [169.254.21.1 by t-b 10.8.0.1 by eth1 10.8.0.1 by t-a 10.8.0.1 by t-b]}"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	for _, k := range []struct{ from, to, want string }{
		{"{name: b,", "{name: b, disabled: true,", "listen: 169.254.21.1 by t-b"},
		{", from: [10.8.0.0/24, ", ", from: [", "Prometheus in 10.8.0.0/24 reads them no more"},
		{"metrics: {", "metrics: {port: 9200, ", "port: 9100 -> 9200"},
		{doc[strings.Index(doc, "metrics:"):], "", "Prometheus reads them no more over plain HTTP"},
	} {
		other, _ := mustMake(t, parse(t, strings.Replace(doc, k.from, k.to, 1)), ledger)
		var words []string
		for _, c := range Diff(target, other) {
			if c.Kind == "metrics" {
				words = append(append(words, c.Fields...), c.Interrupts)
			}
		}
		if !strings.Contains(strings.Join(words, "; "), k.want) {
			t.Errorf("%s: %q, want %q", k.to, words, k.want)
		}
	}
}

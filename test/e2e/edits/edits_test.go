// Package edits applies random edits of a document to a node under traffic, and compares what is
// interrupted with the plan. Of the kernel it needs only TUN. Ring: namespace; needs root.
package edits

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// seed makes the edits, and count is their number.
const seed, count = 12, 50

const hubDocument = `node: {name: hub, asn: 64600}
underlay: {interface: wan, address: 192.0.2.100}
access: {api: [192.0.2.0/24]}
tunnels:
- {name: lane, inside: [{local: 169.254.80.0/31}], wireguard: {privateKey: lane, peerPublicKey: SITE, endpoint: "198.51.100.101:51820", listenPort: 51820, keepalive: 5s}}
peers:
- {name: site, tunnel: lane, asn: 64601, holdTime: 9s, passive: false, import: {allow: [{prefix: 172.16.0.0/16, le: 24}]}, export: {allow: [{prefix: 203.0.113.0/24}, {prefix: 10.50.0.0/24}]}}
announce: [203.0.113.0/24, 10.50.0.0/24]
attachments: [{name: lan, interface: lan, sources: [10.50.0.0/24]}]
egress:
  zones: [{name: here, sources: [10.50.0.0/24]}]
  pools: [{name: partner, addresses: [{address: 192.0.2.110}]}]
  policies:
  - {name: spokes, sources: [172.16.0.0/16], pool: partner}
  - {name: lan, sources: [10.50.0.0/24], pool: partner}
`

const siteDocument = `node: {name: site, asn: 64601}
underlay: {interface: wan, address: 198.51.100.101}
tunnels:
- {name: lane, inside: [{local: 169.254.80.1/31}], wireguard: {privateKey: lane, peerPublicKey: HUB, listenPort: 51820}}
peers:
- {name: hub, tunnel: lane, asn: 64600, holdTime: 9s, passive: true, import: {allow: [{prefix: 203.0.113.0/24}, {prefix: 10.50.0.0/24}]}, export: {allow: [{prefix: 172.16.0.0/16, le: 24}]}}
announce: [172.16.1.0/24, 172.16.2.0/24]
attachments: [{name: lan, interface: lan, sources: [172.16.1.0/24]}]
`

// world is a node with a spoke behind a lane and one on a LAN, and a partner.
type world struct {
	*testing.T
	hub, site *daemon.Node
	flows     []*flow
	base      *isthmusv1.Spec
}

// flow is traffic from a host to a server that sends everything back.
type flow struct {
	name string
	from *lab.Node
	ends traffic.Ends
	*traffic.Stream
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func begin(t *testing.T) *world {
	w := &world{T: t}
	l, err := lab.New(lab.Options{})
	w.ok(err)
	t.Cleanup(func() {
		if t.Failed() && w.hub.Process != nil {
			log, _ := os.ReadFile(w.hub.Process.Log)
			t.Logf("%s", log)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	bin := daemon.Build(t, "../../..")
	network, lan, host := l.Node("net"), l.Node("lan"), l.Node("host")
	w.hub, w.site = daemon.New(l.Node("hub"), bin), daemon.New(l.Node("site"), bin)
	link := func(a *lab.Node, name, address string, b *lab.Node, other, peer string) {
		l.Link(lab.End{Node: a, Name: name, Addrs: daemon.Prefixes(address)}, lab.End{Node: b, Name: other, Addrs: daemon.Prefixes(peer)})
	}
	link(network, "hub", "192.0.2.1/24", w.hub.Node, "wan", "192.0.2.100/24")
	link(network, "site", "198.51.100.1/24", w.site.Node, "wan", "198.51.100.101/24")
	link(lan, "eth0", "10.50.0.2/24", w.hub.Node, "lan", "10.50.0.1/24")
	link(host, "eth0", "172.16.1.2/24", w.site.Node, "lan", "172.16.1.1/24")
	w.hub.IP("route add default via 192.0.2.1")
	w.site.IP("route add default via 198.51.100.1")
	lan.IP("route add default via 10.50.0.1")
	host.IP("route add default via 172.16.1.1")
	network.IP("addr add 203.0.113.1/32 dev lo")
	w.ok(l.Up(t.Context()))
	hubPrivate, hubPublic := daemon.Key(t)
	sitePrivate, sitePublic := daemon.Key(t)
	for n, private := range map[*daemon.Node]string{w.hub: hubPrivate, w.site: sitePrivate} {
		n.Start(t)
		_, err := n.CLI(t.Context(), private, "secret", "set", "lane")
		w.ok(err)
	}
	d, problems := spec.Decode([]byte(strings.Replace(hubDocument, "SITE", sitePublic, 1)))
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	w.base = d.Message
	w.apply(w.base)
	w.site.Apply(t, strings.Replace(siteDocument, "HUB", hubPublic, 1))

	const port = 7
	for _, server := range []struct {
		node    *lab.Node
		address string
	}{{network, "203.0.113.1:7"}, {lan, "10.50.0.2:7"}} {
		w.ok(server.node.Do(func() error { return traffic.Serve(t, netip.MustParseAddrPort(server.address)) }))
	}
	ends := func(from, to string) traffic.Ends {
		return func(int) (netip.AddrPort, netip.AddrPort) {
			return netip.AddrPortFrom(netip.MustParseAddr(from), 0), netip.AddrPortFrom(netip.MustParseAddr(to), port)
		}
	}
	w.flows = []*flow{
		{name: "from the spoke behind the lane to the partner", from: host, ends: ends("172.16.1.2", "203.0.113.1")},
		{name: "from the LAN to the partner", from: lan, ends: ends("10.50.0.2", "203.0.113.1")},
		{name: "from the spoke behind the lane to the LAN", from: host, ends: ends("172.16.1.2", "10.50.0.2")},
	}
	w.well()
	return w
}

func (w *world) text(m *isthmusv1.Spec) string {
	w.Helper()
	text, err := spec.Encode(m)
	w.ok(err)
	return text
}

func (w *world) apply(m *isthmusv1.Spec) {
	w.Helper()
	w.hub.Apply(w.T, w.text(m))
}

// plan returns the changes of a document, each as a line; those that interrupt something are in
// both lists. A document that is refused has no changes.
func (w *world) plan(m *isthmusv1.Spec) (all, interrupts []string) {
	w.Helper()
	// "plan" exits with 3 when there are changes.
	out, err := w.hub.CLI(w.Context(), w.text(m), "plan", "-f", "-", "-o", "json")
	if err != nil && strings.Contains(err.Error(), "document refused") {
		return nil, nil
	}
	r := &isthmusv1.PlanResponse{}
	if perr := protojson.Unmarshal([]byte(out), r); perr != nil {
		w.Fatal(err, perr)
	}
	for _, c := range r.Changes {
		line := fmt.Sprintf("%s %s %v", c.Kind, c.Name, c.Fields)
		if all = append(all, line); c.Interrupts != "" {
			interrupts = append(interrupts, line+": "+c.Interrupts)
		}
	}
	return all, interrupts
}

// well waits until the tunnel and the session are up, and until every flow passes.
func (w *world) well() {
	w.Helper()
	w.ok(lab.Until(w.Context(), time.Minute, func() error {
		if t, p := w.state(); !strings.HasPrefix(t, "up ") || !strings.HasPrefix(p, "established ") {
			return fmt.Errorf("tunnel %s, session %s", t, p)
		}
		return nil
	}))
	for _, f := range w.flows {
		w.ok(lab.Until(w.Context(), time.Minute, func() error {
			return f.from.Do(func() error {
				o, err := traffic.Ask(1, f.ends)
				if err == nil && o.Answered != 1 {
					err = fmt.Errorf("%s: %v", f.name, o)
				}
				return err
			})
		}))
	}
}

// state returns the states of the tunnel and the session, with the times of their last changes.
func (w *world) state() (tunnel, session string) {
	w.Helper()
	tunnels, peers := &isthmusv1.ListTunnelsResponse{}, &isthmusv1.ListPeersResponse{}
	w.ok(w.hub.Get(w.Context(), "tunnels", tunnels))
	w.ok(w.hub.Get(w.Context(), "peers", peers))
	for _, t := range tunnels.Tunnels {
		if t.Name == "lane" {
			tunnel = fmt.Sprint(t.State, " ", t.Since.AsTime())
		}
	}
	for _, p := range peers.Peers {
		if p.Name == "site" {
			session = fmt.Sprint(p.State, " ", p.Since.AsTime())
		}
	}
	return tunnel, session
}

// TestEdits checks that what an edit interrupts is in its plan.
func TestEdits(t *testing.T) {
	w := begin(t)
	r := rand.New(rand.NewPCG(seed, 0))
	interrupted, harmless, edited := 0, 0, false
	for i, tries := 0, 0; i < count && tries < 10*count; tries++ {
		what, next := []string{"taken back"}, proto.CloneOf(w.base)
		if edited = !edited; edited {
			what = nil
			for range 1 + r.IntN(2) {
				e := edits[r.IntN(len(edits))]
				what = append(what, e.what)
				e.make(r, next)
			}
		}
		name := fmt.Sprintf("edit %d: %s", i, strings.Join(what, ", and "))
		changes, said := w.plan(next)
		if len(changes) == 0 {
			edited = false // the second part of an edit undid the first, or both do not go together
			continue
		}
		seen := w.watch(func() { w.apply(next) })
		if len(seen) > 0 && len(said) == 0 {
			t.Errorf("%s\ninterrupted:\n  %s\nthe plan says that nothing is:\n  %s", name, strings.Join(seen, "\n  "), strings.Join(changes, "\n  "))
		}
		if len(said) == 0 {
			harmless++
		}
		if len(seen) > 0 {
			interrupted++
		}
		t.Logf("%s: interrupted %q, the plan says %q", name, seen, said)
		if !edited {
			w.well()
		}
		i++
	}
	t.Logf("%d edits interrupted something, the plan calls %d harmless", interrupted, harmless)
	if interrupted < 5 || harmless < 10 {
		t.Error("the edits are not a mixture")
	}
}

// watch runs f under traffic, and returns what was interrupted.
func (w *world) watch(f func()) (seen []string) {
	w.Helper()
	tunnel, session := w.state()
	var open []*flow
	for _, f := range w.flows {
		w.ok(f.from.Do(func() (err error) { f.Stream, err = traffic.Start(f.ends); return err }))
		// A flow that does not pass before the edit cannot be interrupted by it.
		if f.Passes(5 * time.Second) {
			open = append(open, f)
		} else {
			f.Stop()
		}
	}
	f()
	// What the daemon does a moment later, as closing a session, belongs to the edit.
	time.Sleep(time.Second)
	for _, f := range open {
		if lost := f.Stop(); lost > 0 {
			seen = append(seen, fmt.Sprintf("%s: %d packets lost", f.name, lost))
		}
	}
	if t, p := w.state(); strings.HasPrefix(tunnel, "up ") && t != tunnel {
		seen = append(seen, fmt.Sprintf("the tunnel was %q and is %q", tunnel, t))
	} else if strings.HasPrefix(session, "established ") && p != session {
		seen = append(seen, fmt.Sprintf("the session was %q and is %q", session, p))
	}
	return seen
}

// edit is what a user may change in a document.
type edit struct {
	what string
	make func(*rand.Rand, *isthmusv1.Spec)
}

func pick[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

// edits has changes that interrupt something, and such that must not.
var edits = []edit{
	{"another ASN of the node", func(r *rand.Rand, m *isthmusv1.Spec) { m.Node.Asn = pick[uint32](r, 64700, 64701) }},
	{"another router ID", func(r *rand.Rand, m *isthmusv1.Spec) { m.Node.RouterId = "192.0.2.200" }},
	{"another MTU of the underlay", func(r *rand.Rand, m *isthmusv1.Spec) { m.Underlay.Mtu = pick[uint32](r, 1400, 1450) }},
	{"another MTU of the tunnel", func(r *rand.Rand, m *isthmusv1.Spec) { m.Tunnels[0].Mtu = pick[uint32](r, 1300, 1400) }},
	{"another MSS", func(r *rand.Rand, m *isthmusv1.Spec) { m.Tunnels[0].Mss = pick[uint32](r, 1200, 1300) }},
	{"another keepalive", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Tunnels[0].GetWireguard().Keepalive = durationpb.New(pick(r, 6*time.Second, 7*time.Second))
	}},
	{"another port", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Tunnels[0].GetWireguard().ListenPort = pick[uint32](r, 51821, 51822)
	}},
	{"another key of the peer", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Tunnels[0].GetWireguard().PeerPublicKey = "uxKtjSR/HgPr5/2mKg3++n6zfPx6H2aGymuvit1Nxn8="
	}},
	{"sources of the tunnel", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Tunnels[0].Sources = pick(r, []string{"172.16.0.0/16"}, []string{"172.16.1.0/24"}, []string{"172.16.2.0/24"})
	}},
	{"no probe", func(r *rand.Rand, m *isthmusv1.Spec) { m.Tunnels[0].Probe = proto.Bool(r.IntN(2) == 0) }},
	{"the tunnel disabled", func(r *rand.Rand, m *isthmusv1.Spec) {
		for _, t := range m.Tunnels {
			t.Disabled = true
		}
	}},
	{"the peer disabled", peers(func(r *rand.Rand, p *isthmusv1.Peer) { p.Disabled = true })},
	{"no tunnel", func(r *rand.Rand, m *isthmusv1.Spec) { m.Tunnels, m.Peers = nil, nil }},
	{"a second tunnel", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Tunnels = append(m.Tunnels, &isthmusv1.Tunnel{Name: "second", Encryption: &isthmusv1.Tunnel_Wireguard{Wireguard: &isthmusv1.WireGuard{
			PrivateKey: "lane", PeerPublicKey: "uxKtjSR/HgPr5/2mKg3++n6zfPx6H2aGymuvit1Nxn8=", ListenPort: 51830}}})
	}},
	{"another hold time", func(r *rand.Rand, m *isthmusv1.Spec) {
		for _, p := range m.Peers {
			p.HoldTime = durationpb.New(pick(r, 12*time.Second, 15*time.Second))
		}
	}},
	{"another ASN of the peer", peers(func(r *rand.Rand, p *isthmusv1.Peer) { p.Asn = 64999 })},
	{"a limit of prefixes", peers(func(r *rand.Rand, p *isthmusv1.Peer) { p.MaxPrefixes = pick[uint32](r, 1, 5, 50) })},
	{"a smaller import", peers(func(r *rand.Rand, p *isthmusv1.Peer) {
		p.Import.Allow = []*isthmusv1.PrefixRule{{Prefix: pick(r, "172.16.1.0/24", "172.16.2.0/24")}}
	})},
	{"a larger import", peers(func(r *rand.Rand, p *isthmusv1.Peer) {
		p.Import.Allow = append(p.Import.Allow, &isthmusv1.PrefixRule{Prefix: "10.66.0.0/16", Le: 24})
	})},
	{"a local preference", peers(func(r *rand.Rand, p *isthmusv1.Peer) { p.Import.LocalPreference = pick[uint32](r, 90, 110) })},
	{"a smaller export", peers(func(r *rand.Rand, p *isthmusv1.Peer) { p.Export.Allow = p.Export.Allow[:1] })},
	{"no export", peers(func(r *rand.Rand, p *isthmusv1.Peer) { p.Export = nil })},
	{"a MED", peers(func(r *rand.Rand, p *isthmusv1.Peer) { p.Export.Med = proto.Uint32(pick[uint32](r, 0, 50)) })},
	{"no graceful restart", peers(func(r *rand.Rand, p *isthmusv1.Peer) { p.DisableGracefulRestart = true })},
	{"an announcement less", func(r *rand.Rand, m *isthmusv1.Spec) { m.Announce = m.Announce[:1] }},
	{"an announcement more", func(r *rand.Rand, m *isthmusv1.Spec) { m.Announce = append(m.Announce, "10.77.0.0/16") }},
	{"a static route elsewhere", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.StaticRoutes = append(m.StaticRoutes, &isthmusv1.StaticRoute{Prefix: "10.99.0.0/16", Blackhole: true})
	}},
	{"a black hole on the way", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.StaticRoutes = append(m.StaticRoutes, &isthmusv1.StaticRoute{Prefix: pick(r, "172.16.1.0/24", "172.16.1.2/32"), Blackhole: true})
	}},
	{"other sources of the LAN", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Attachments[0].Sources = pick(r, []string{"10.50.0.0/16"}, []string{"10.50.0.128/25"})
	}},
	{"no LAN", func(r *rand.Rand, m *isthmusv1.Spec) { m.Attachments = nil }},
	{"another address of the pool", func(r *rand.Rand, m *isthmusv1.Spec) { m.Egress.Pools[0].Addresses[0].Address = "192.0.2.111" }},
	{"a second address of the pool", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Egress.Pools[0].Addresses = append(m.Egress.Pools[0].Addresses, &isthmusv1.PoolAddress{Address: "192.0.2.112"})
	}},
	{"a zone of the address", func(r *rand.Rand, m *isthmusv1.Spec) { m.Egress.Pools[0].Addresses[0].Zone = "here" }},
	{"a second pool", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Egress.Pools = append(m.Egress.Pools, &isthmusv1.Pool{Name: "other", Addresses: []*isthmusv1.PoolAddress{{Address: "192.0.2.113"}}})
	}},
	{"a policy less", func(r *rand.Rand, m *isthmusv1.Spec) { m.Egress.Policies = slices.Delete(m.Egress.Policies, 0, 1) }},
	{"a policy that stops new flows", policy(&isthmusv1.EgressPolicy{Name: "stop", Action: "deny", Sources: []string{"172.16.0.0/16"}, Destinations: []string{"203.0.113.0/24"}})},
	{"a policy that stops flows", policy(&isthmusv1.EgressPolicy{Name: "stop", Action: "reject", Flows: "end", Sources: []string{"172.16.0.0/16"}, Destinations: []string{"203.0.113.0/24"}})},
	{"a policy for others", policy(&isthmusv1.EgressPolicy{Name: "others", Pool: "partner", Sources: []string{"10.88.0.0/16"}})},
	{"timeouts of a policy", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Egress.Policies[0].Timeouts = &isthmusv1.FlowTimeouts{UdpStream: durationpb.New(5 * time.Minute)}
	}},
	{"a log of translations", func(r *rand.Rand, m *isthmusv1.Spec) { m.Egress.Log = &isthmusv1.TranslationLog{} }},
	{"a map of the spoke", func(r *rand.Rand, m *isthmusv1.Spec) {
		m.Egress.Maps = []*isthmusv1.PrefixMap{{Tunnels: []string{"lane"}, Inside: pick(r, "172.16.1.0/24", "172.16.9.0/24"), Mapped: "10.44.1.0/24"}}
	}},
	{"other sources of the API", func(r *rand.Rand, m *isthmusv1.Spec) { m.Access.Api = []string{"192.0.2.0/25"} }},
	{"SSH", func(r *rand.Rand, m *isthmusv1.Spec) { m.Access.Ssh = []string{"192.0.2.0/25"} }},
	{"another name", func(r *rand.Rand, m *isthmusv1.Spec) { m.Node.Name = "hub-2" }},
}

// peers returns an edit of each peer.
func peers(f func(*rand.Rand, *isthmusv1.Peer)) func(*rand.Rand, *isthmusv1.Spec) {
	return func(r *rand.Rand, m *isthmusv1.Spec) {
		for _, p := range m.Peers {
			if p.Export == nil {
				p.Export = &isthmusv1.ExportPolicy{}
			}
			f(r, p)
		}
	}
}

// policy returns an edit that adds a policy.
func policy(p *isthmusv1.EgressPolicy) func(*rand.Rand, *isthmusv1.Spec) {
	return func(_ *rand.Rand, m *isthmusv1.Spec) {
		if !slices.ContainsFunc(m.Egress.Policies, func(o *isthmusv1.EgressPolicy) bool { return o.Name == p.Name }) {
			m.Egress.Policies = append(m.Egress.Policies, proto.CloneOf(p))
		}
	}
}

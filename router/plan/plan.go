// Package plan makes the complete target from a checked document, the ledger and the capabilities
// of the kernel. It has no clock and no I/O, and leaves no decision to the code that applies the
// target.
package plan

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/apipa"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// Target has all decisions for a node. Lists are in the order of names.
type Target struct {
	Node     spec.Node
	Underlay spec.Underlay
	Tunnels  []tunnel.Config
	BGP      bgp.Config
	// Routes are the static routes: those of the document, of its attachments and maps, and host
	// routes to peers.
	Routes []fib.Route
	NAT    nat.Config
	// Health has the pools with probes or announcements.
	Health []egress.ProbedPool
	// Proxies are the probed proxies, each as a pool of one address with the name of its policy.
	Proxies []egress.ProbedPool
	Names   egress.DNS
	// Takeover without paths takes over nothing.
	Takeover egress.Takeover
	Log      egress.Log
	// Reason is why the document was accepted, in the words of its author.
	Reason string
	// Links are the links to other nodes, by name. Their lanes are in Tunnels too.
	Links []Link
	// SSHKeys may log in by SSH.
	SSHKeys []string
	// Exports are the receivers of events, by name.
	Exports []spec.Export
	// PortlessTimeout is the conntrack timeout of flows without ports; 0: the machine's.
	PortlessTimeout time.Duration
	// Attachments are the plain interfaces of the document, and its tunnels with sources, by name.
	Attachments []Attachment
}

// Tunnel returns the index of a tunnel in Tunnels, and false when no tunnel has the name.
func (t *Target) Tunnel(name string) (int, bool) {
	return slices.BinarySearchFunc(t.Tunnels, name, func(c tunnel.Config, name string) int { return cmp.Compare(c.Name, name) })
}

// Link is a link to another node.
type Link struct {
	Name, Node string
	Lanes      []string // names of the tunnels, by number
	// Inside are the addresses of the link itself.
	Inside []tunnel.Inside
}

// Attachment is an interface that leads to a network, with its sources in the document.
type Attachment struct {
	Name, Interface string
	Sources         []netip.Prefix
}

// Machine has the facts of the machine that a document is planned for.
type Machine struct {
	// Can reports whether the kernel has a capability of router/host.
	Can func(capability string) bool
	// Drop makes "drop" the default of access.input; else it is "keep".
	Drop bool
	// API are sources that may reach the API in addition to those of a document. First are sources
	// that may reach it as long as the document names none.
	API, First []netip.Prefix
	// SSH is true when the machine's SSH server takes its keys from the document.
	SSH bool
}

// Nothing returns the target of a machine without a document, or with a document of access alone.
func Nothing(m Machine, a spec.Access) (t Target) {
	from := a.API
	if len(from) == 0 {
		from = m.First
	}
	t.NAT.API.From = slices.Compact(slices.SortedFunc(slices.Values(slices.Concat(from, m.API)), comparePrefix))
	t.NAT.Input = nat.Input{Drop: a.Input == "drop" || a.Input == "" && m.Drop, SSH: slices.SortedFunc(slices.Values(a.SSH), comparePrefix)}
	return t
}

// Make makes the target of a document. The returned ledger belongs to the target: both are accepted
// together or not at all.
func Make(s *spec.Spec, former Ledger, m Machine) (Target, Ledger, spec.Problems) {
	var problems spec.Problems
	t := Nothing(m, s.Access)
	t.Node, t.Underlay = s.Node, s.Underlay
	if t.SSHKeys = s.Access.SSHKeys; len(t.SSHKeys) > 0 && !m.SSH {
		problems = append(problems, spec.Problem{Path: "access.sshKeys", Value: strconv.Itoa(len(t.SSHKeys)), Line: s.Line("access.sshKeys"),
			Rule: "is for a node that was started from the image: the SSH server of this machine has keys of its own", Remedy: "remove it, and put the keys into that server's authorized_keys"})
	}

	present := map[string]bool{}
	// given has the document's inside addresses, and shared those of them that several tunnels may
	// have: this node's single link-local ones.
	var given, shared []netip.Prefix
	for _, tu := range s.Tunnels {
		present[tu.Name] = true
		for _, in := range tu.Inside {
			given = append(given, in.Local.Masked(), netip.PrefixFrom(in.Remote, in.Remote.BitLen()))
			if in.Local.IsSingleIP() && apipa.LinkLocal.Contains(in.Local.Addr()) {
				shared = append(shared, in.Local)
			}
		}
		if need := tu.Needs(); !slices.ContainsFunc(need, func(set []string) bool { return all(set, m.Can) }) {
			problems = append(problems, spec.Problem{
				Path:   tu.Path() + "." + string(tu.Kind()),
				Rule:   "needs features that this kernel does not have: " + strings.Join(need[0], ", "),
				Remedy: "run the node on the isthmus image, or on a kernel with these features",
			})
		}
	}
	problems = append(problems, embedded(s, former, m.Can)...)
	choose := newChooser(former, given, shared)
	choose.retire(present)

	tunnels := slices.Clone(s.Tunnels)
	slices.SortFunc(tunnels, func(a, b spec.Tunnel) int { return cmp.Compare(a.Name, b.Name) })
	interfaces := map[string]tunnel.Config{}
	for _, tu := range tunnels {
		e, known := choose.ledger.Tunnels[tu.Name]
		if !known {
			id, err := choose.freeID()
			if err != nil {
				problems = append(problems, spec.Problem{Path: "tunnels", Rule: "has too many tunnels: " + err.Error(), Remedy: "remove some, or use another node"})
				continue
			}
			e = Entry{ID: id, Interface: choose.freeInterface(tu.Name)}
		}
		if len(tu.Inside) == 0 {
			var err error
			if e, err = choose.inside(tu.Name, e, insideRule(tu)); err != nil {
				problems = append(problems, spec.Problem{Path: "tunnels", Rule: "cannot allocate inside addresses for " + tu.Name + ": " + err.Error(), Remedy: "give `inside` addresses"})
			} else {
				tu.Inside = []tunnel.Inside{e.pair()}
			}
		} else {
			e.Inside, e.Local = netip.Prefix{}, netip.Prefix{}
		}
		choose.put(tu.Name, e)
		c := tu.Config
		c.ID, c.Interface, c.Underlay = e.ID, e.Interface, s.Underlay.Interface
		if c.Interface == s.Underlay.Interface {
			problems = append(problems, spec.Problem{Path: "underlay.interface", Value: c.Interface, Rule: "is the name of the interface of tunnel " + tu.Name, Remedy: "rename the tunnel"})
		}
		t.Tunnels = append(t.Tunnels, c)
		interfaces[c.Name] = c
		t.NAT.Clamps = append(t.NAT.Clamps, clamp(c, tu.MSS))
		t.NAT.Tunnels = append(t.NAT.Tunnels, nat.Tunnel{Interface: c.Interface, Port: c.ListenPort()})
	}

	t.links(s, interfaces)
	t.routes(s, interfaces)
	t.BGP.Announce = slices.Clone(s.Announce)
	t.maps(s, interfaces)
	problems = append(problems, t.peers(s, interfaces)...)
	problems = append(problems, t.sides(s, interfaces)...)
	t.BGP.ASN, t.BGP.RouterID = s.Node.ASN, s.Node.RouterID
	slices.SortFunc(t.BGP.Announce, comparePrefix)

	t.Log, t.PortlessTimeout = s.Log, s.PortlessTimeout
	t.NAT.Underlay = s.Underlay.Interface
	t.NAT.Own = []netip.Addr{s.Underlay.Address}
	t.NAT.Pools = slices.SortedFunc(slices.Values(s.Pools), func(a, b nat.Pool) int { return cmp.Compare(a.Name, b.Name) })
	t.NAT.Policies = slices.SortedFunc(slices.Values(s.Policies), func(a, b nat.Policy) int { return cmp.Compare(a.Name, b.Name) })
	t.NAT.Zones = slices.SortedFunc(slices.Values(s.Zones), func(a, b nat.Zone) int { return cmp.Compare(a.Name, b.Name) })
	t.Health, t.Proxies = byName(s.Health), byName(s.Proxies)
	t.proxy(s)
	t.metrics(s)
	t.Exports = slices.SortedFunc(slices.Values(s.Exports), func(a, b spec.Export) int { return cmp.Compare(a.Name, b.Name) })
	t.Takeover = s.Takeover
	for i := range t.NAT.Pools {
		t.NAT.Pools[i].Shared = len(s.Takeover.Paths) > 0
	}
	t.Takeover.Paths = nil
	for _, w := range s.Takeover.Paths {
		if w.Interface != "" { // outside the tunnels
			t.Takeover.Paths = append(t.Takeover.Paths, w)
		}
		for _, c := range t.Tunnels {
			for _, in := range c.Inside {
				if in.Remote == w.To && !c.Disabled {
					t.Takeover.Paths = append(t.Takeover.Paths, egress.Path{Interface: c.Interface, From: in.Local.Addr(), To: w.To})
				}
			}
		}
	}
	return t, choose.ledger, problems
}

// Amend returns the target of a document that differs from that of t only in the policies of some
// names. The ledger stays.
func Amend(t Target, s *spec.Spec, names []string) Target {
	policies := make([]nat.Policy, len(t.NAT.Policies), len(t.NAT.Policies)+len(names))
	copy(policies, t.NAT.Policies)
	for _, name := range names {
		at, had := slices.BinarySearchFunc(policies, name, func(p nat.Policy, name string) int { return cmp.Compare(p.Name, name) })
		switch p := s.Policy(name); {
		case p == nil && had:
			policies = slices.Delete(policies, at, at+1)
		case p != nil && had:
			policies[at] = *p
		case p != nil:
			policies = slices.Insert(policies, at, *p)
		}
	}
	t.NAT.Policies, t.Proxies = policies, byName(s.Proxies)
	return t
}

func byName(pools []egress.ProbedPool) []egress.ProbedPool {
	return slices.SortedFunc(slices.Values(pools), func(a, b egress.ProbedPool) int { return cmp.Compare(a.Name, b.Name) })
}

// insideRule returns the rule for inside addresses of a tunnel.
func insideRule(t spec.Tunnel) apipa.Rule {
	if p, ok := cloud.Lookup(t.Cloud); ok {
		return p.Inside.Is
	}
	return apipa.Default
}

// embedded returns a problem when a document adds a WireGuard tunnel beyond those that are possible
// on a kernel without WireGuard. A document that adds none stays valid: the driver reports the
// tunnels that it did not make.
func embedded(s *spec.Spec, former Ledger, can func(string) bool) spec.Problems {
	n, added := 0, -1
	for i, tu := range s.Tunnels {
		if !tu.Embedded(can) {
			continue
		}
		n++
		if _, known := former.Tunnels[tu.Name]; !known || slices.Contains(former.Retired, tu.Name) {
			added = i
		}
	}
	if n <= tunnel.MaxEmbedded || added < 0 {
		return nil
	}
	path := s.Tunnels[added].Path() + "." + string(s.Tunnels[added].Kind())
	return spec.Problems{{
		Path:   path,
		Line:   s.Line(path),
		Value:  s.Tunnels[added].Name,
		Rule:   fmt.Sprintf("is too many for this kernel without WireGuard: the document has %d WireGuard tunnels, and at most %d embedded devices are possible", n, tunnel.MaxEmbedded),
		Remedy: fmt.Sprintf("remove %d of them, or run the node on the isthmus image, or on a kernel with WireGuard", n-tunnel.MaxEmbedded),
	}}
}

func all(set []string, can func(string) bool) bool {
	return !slices.ContainsFunc(set, func(c string) bool { return !can(c) })
}

// clamp returns the MSS limits of a tunnel: its MTU less the headers without options (RFC 9293
// section 3.7.1), or the limit of the document.
func clamp(c tunnel.Config, mss uint16) nat.Clamp {
	out := nat.Clamp{Interface: c.Interface, IPv4: uint16(c.MTU - 40), IPv6: uint16(c.MTU - 60)}
	if mss != 0 {
		out.IPv4, out.IPv6 = mss, min(mss, out.IPv6)
	}
	return out
}

// links adds the links, and the host routes to their other ends.
func (t *Target) links(s *spec.Spec, tunnels map[string]tunnel.Config) {
	for _, l := range s.Links {
		t.Links = append(t.Links, Link{Name: l.Name, Node: l.Node, Lanes: l.Lanes, Inside: l.Inside})
		var hops []fib.NextHop
		for _, iface := range laneInterfaces(l, tunnels) {
			hops = append(hops, fib.NextHop{Interface: iface})
		}
		for _, in := range l.Inside {
			t.Routes = append(t.Routes, fib.Route{Key: fib.Main(netip.PrefixFrom(in.Remote, in.Remote.BitLen())), NextHops: hops, Resilient: true, Own: true})
		}
	}
	slices.SortFunc(t.Links, func(a, b Link) int { return cmp.Compare(a.Name, b.Name) })
}

// laneInterfaces returns the interfaces of a link's lanes, by number.
func laneInterfaces(l spec.Link, tunnels map[string]tunnel.Config) (out []string) {
	for _, name := range l.Lanes {
		if c, ok := tunnels[name]; ok { // else it has no ID
			out = append(out, c.Interface)
		}
	}
	return out
}

func (t *Target) routes(s *spec.Spec, tunnels map[string]tunnel.Config) {
	for _, r := range s.Routes {
		route := fib.Route{Key: fib.Main(r.Prefix), Blackhole: r.Blackhole, Resilient: r.Resilient}
		for _, name := range r.Tunnels {
			route.NextHops = append(route.NextHops, fib.NextHop{Interface: tunnels[name].Interface})
		}
		t.Routes = append(t.Routes, route)
	}
}

// maps routes mapped prefixes into the tunnels of their spokes, and announces them.
func (t *Target) maps(s *spec.Spec, tunnels map[string]tunnel.Config) {
	announced := make(map[fib.Key]bool, len(t.BGP.Announce))
	for _, p := range t.BGP.Announce {
		announced[fib.Main(p)] = true
	}
	for _, m := range s.Maps {
		out := nat.Map{Inside: m.Inside, Mapped: m.Mapped}
		route := fib.Route{Key: fib.Main(m.Mapped)}
		for _, name := range m.Tunnels {
			out.Interfaces = append(out.Interfaces, tunnels[name].Interface)
			route.NextHops = append(route.NextHops, fib.NextHop{Interface: tunnels[name].Interface})
		}
		slices.Sort(out.Interfaces)
		t.NAT.Maps = append(t.NAT.Maps, out)
		t.Routes = append(t.Routes, route)
		if s.Node.ASN != 0 && !announced[route.Key] {
			announced[route.Key] = true
			t.BGP.Announce = append(t.BGP.Announce, m.Mapped)
		}
	}
	slices.SortFunc(t.NAT.Maps, func(a, b nat.Map) int { return comparePrefix(a.Mapped, b.Mapped) })
}

// peers adds the values that depend on allocated addresses, and a host route for each peer that is
// not at the other end of its tunnel: a learnt prefix that covers the peer's address must not carry
// the session itself.
func (t *Target) peers(s *spec.Spec, tunnels map[string]tunnel.Config) (problems spec.Problems) {
	links := make(map[string]spec.Link, len(s.Links))
	for _, l := range s.Links {
		links[l.Name] = l
	}
	at := map[netip.Addr]string{}
	routed := make(map[fib.Key]bool, len(t.Routes))
	for _, r := range t.Routes {
		routed[r.Key] = true
	}
	for _, p := range s.Peers {
		c := tunnels[p.Tunnel]
		link, linked := links[p.Tunnel]
		if linked {
			p.Lanes = laneInterfaces(link, tunnels)
			c = tunnel.Config{Inside: link.Inside, WireGuard: &tunnel.WireGuard{}}
		}
		p.Interface, p.Disabled = c.Interface, p.Disabled || c.Disabled
		for _, in := range c.Inside {
			if !p.Address.IsValid() {
				p.Address = in.Remote
			}
			if p.Address.Is4() == in.Local.Addr().Is4() {
				if !p.LocalAddress.IsValid() {
					p.LocalAddress = in.Local.Addr()
				}
				switch {
				case p.Address == in.Remote:
					p.TTL = max(p.TTL, 1)
				default:
					if p.TTL == 0 {
						p.TTL = 2
					}
					if linked {
						t.hostRoute(routed, p.Address, p.Lanes...)
					} else {
						t.hostRoute(routed, p.Address, c.Interface)
					}
				}
			}
		}
		// After the loss of a session, GoBGP refuses connections for five seconds, and then opens
		// one within two: two such speakers can keep refusing each other.
		if p.EitherOpens && c.Lane() {
			p.Passive = p.Address.Less(p.LocalAddress)
		}
		if other, ok := at[p.Address]; ok {
			problems = append(problems, spec.Problem{Path: p.Path() + ".address", Value: p.Address.String(), Rule: "is the address of peer " + other + " too", Remedy: "one session for one address"})
		}
		at[p.Address] = p.Name
		t.BGP.Peers = append(t.BGP.Peers, p.Peer)
	}
	slices.SortFunc(t.BGP.Peers, func(a, b bgp.Peer) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(t.Routes, func(a, b fib.Route) int { return a.Key.Compare(b.Key) })
	return problems
}

func (t *Target) hostRoute(routed map[fib.Key]bool, a netip.Addr, interfaces ...string) {
	k := fib.Main(netip.PrefixFrom(a, a.BitLen()))
	if routed[k] {
		return
	}
	routed[k] = true
	r := fib.Route{Key: k, Resilient: len(interfaces) > 1}
	for _, iface := range interfaces {
		r.NextHops = append(r.NextHops, fib.NextHop{Interface: iface})
	}
	t.Routes = append(t.Routes, r)
}

func comparePrefix(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return cmp.Compare(a.Bits(), b.Bits())
}

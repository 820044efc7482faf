package topology

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// WireGuardKey is the name of the secret with the node's private key.
const WireGuardKey = "wireguard"

const defaultRoute = "0.0.0.0/0"

// firstLane is the UDP port of the first lane of a node; the lanes of all its links follow, sorted
// by name.
const firstLane = 51820

// preferred and second are the LOCAL_PREF of a gateway's routes to its own spokes, and of another
// node's routes to them.
const (
	preferred = 100
	second    = 50
)

// Document writes the document of a node. The problems are unknown outside addresses.
func (t *Topology) Document(name string) (string, spec.Problems) {
	n := t.node(name)
	if n == nil {
		return "", spec.Problems{{Value: name, Rule: "is not a node of this topology", Remedy: "choose one of " + strings.Join(t.nodeNames(), ", ")}}
	}
	var problems spec.Problems
	m := t.document(*n, func(a Address) string {
		if !a.Addr.IsValid() {
			problems = append(problems, spec.Problem{Path: "addresses", Value: a.Name, Rule: "is not known yet", Remedy: "create the cloud's side, which prints it, and give it in `addresses` or with --set " + a.Name + "=ADDRESS"})
		}
		return a.String()
	})
	if len(problems) > 0 {
		return "", problems
	}
	text, err := spec.Encode(m)
	if err != nil {
		return "", spec.Problems{{Value: name, Rule: err.Error()}}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# Document of node %s, made from a topology by isthmus topology render. Change the topology, not this.\n", name)
	fmt.Fprintf(&b, "# What a tunnel with `cloud` leaves out comes from there: see isthmus cloud show.\n")
	for _, tu := range t.Tunnels {
		own, peer, ok := tu.seenFrom(name)
		if !ok || tu.Key == "" {
			continue
		}
		fmt.Fprintf(&b, "# %s: instance %d of %s, %s, at %s; inside %s here, %s there.\n", tu.Name, peer.Instance, peer.Name, peer.Outside.Name, peer.Outside, own.Inside, peer.Inside.Addr())
	}
	for _, k := range t.Keys {
		if slices.ContainsFunc(t.Tunnels, func(tu Tunnel) bool { _, _, ok := tu.seenFrom(name); return ok && tu.Key == k.Name }) {
			fmt.Fprintf(&b, "# Once: %s\n", k.store())
		}
	}
	if slices.ContainsFunc(m.Tunnels, func(tu *isthmusv1.Tunnel) bool { return tu.GetWireguard() != nil }) {
		fmt.Fprintf(&b, "# Once, before all this: isthmus secret set %s --generate wireguard; it prints the node's wireguardPublicKey.\n", WireGuardKey)
	}
	return b.String() + text, nil
}

// store returns the command that stores a key on a node.
func (k Key) store() string {
	if k.File != "" {
		return fmt.Sprintf("isthmus secret set %s --from-file %s", k.Name, k.File)
	}
	return fmt.Sprintf(`printf %%s "$%s" | isthmus secret set %s`, k.Environment, k.Name)
}

func (t *Topology) nodeNames() (out []string) {
	for _, n := range t.Nodes {
		out = append(out, n.Name)
	}
	return out
}

// seenFrom returns the ends of a tunnel, that of the given node or gateway first.
func (t Tunnel) seenFrom(name string) (own, peer End, ok bool) {
	switch name {
	case t.Ends[0].Name:
		return t.Ends[0], t.Ends[1], true
	case t.Ends[1].Name:
		return t.Ends[1], t.Ends[0], true
	}
	return own, peer, false
}

// document makes the document of a node. outside formats an outside address.
func (t *Topology) document(n Node, outside func(Address) string) *isthmusv1.Spec {
	m := &isthmusv1.Spec{
		Node:     &isthmusv1.Node{Name: n.Name, Asn: n.ASN, RouterId: n.message.GetRouterId()},
		Underlay: &isthmusv1.Underlay{Interface: n.message.GetInterface(), Address: n.message.GetAddress()},
		Egress:   n.message.GetEgress(),
		Access:   n.message.GetAccess(),
	}
	if public := n.Public.String(); m.Underlay.Address == "" {
		m.Underlay.Address = public
	} else if m.Underlay.Address != public {
		m.Underlay.PublicAddress = public
	}
	for _, tu := range t.Tunnels {
		own, peer, ok := tu.seenFrom(n.Name)
		if !ok {
			continue
		}
		out := &isthmusv1.Tunnel{Name: tu.Name, Cloud: peer.Cloud, Inside: []*isthmusv1.Inside{{Local: own.Inside.String(), Remote: peer.Inside.Addr().String()}}}
		session := &isthmusv1.Peer{Name: tu.Name, Tunnel: tu.Name, Asn: peer.ASN, Import: &isthmusv1.ImportPolicy{}, Export: &isthmusv1.ExportPolicy{}}
		if peer.Cloud != "" {
			out.Encryption = &isthmusv1.Tunnel_Ipsec{Ipsec: &isthmusv1.IPsec{RemoteAddress: outside(peer.Outside), Psk: tu.Key}}
			t.gatewayPolicy(n, *t.gateway(peer.Name), session)
		} else {
			other := t.node(peer.Name)
			out.Encryption = &isthmusv1.Tunnel_Wireguard{Wireguard: &isthmusv1.WireGuard{
				PrivateKey: WireGuardKey, PeerPublicKey: other.message.GetWireguardPublicKey(), ListenPort: t.lanePort(n.Name, tu.Name),
				Endpoint: netip.AddrPortFrom(other.Public, uint16(t.lanePort(other.Name, tu.Name))).String(),
			}}
			t.nodePolicy(session)
		}
		m.Tunnels = append(m.Tunnels, out)
		m.Peers = append(m.Peers, session)
	}
	// A pool announces it only while it is healthy.
	byPool := slices.ContainsFunc(m.GetEgress().GetPools(), func(p *isthmusv1.Pool) bool { return slices.Contains(p.GetAnnounce(), defaultRoute) })
	if !byPool && slices.ContainsFunc(t.Gateways, func(g Gateway) bool { return t.defaultFor(n, g) }) {
		m.Announce = []string{defaultRoute}
	}
	return m
}

// lanePort returns the UDP port of a lane at a node.
func (t *Topology) lanePort(node, lane string) uint32 {
	port := uint32(firstLane)
	for _, tu := range t.Tunnels {
		if tu.Name == lane {
			break
		}
		if _, _, ok := tu.seenFrom(node); ok && tu.Key == "" {
			port++
		}
	}
	return port
}

// defaultFor reports whether a node gives a gateway the default route.
func (t *Topology) defaultFor(n Node, g Gateway) bool {
	linked := slices.ContainsFunc(t.links, func(l link) bool { return l.a == g.Name && l.b == n.Name })
	return linked && usesEgress(n.message, g)
}

// gatewayPolicy accepts a gateway's own spokes, and announces to it those that they may reach.
func (t *Topology) gatewayPolicy(n Node, g Gateway, p *isthmusv1.Peer) {
	for _, s := range g.Spokes {
		p.Import.Allow = append(p.Import.Allow, rules(s)...)
	}
	p.Import.LocalPreference = preferred
	if g.Cloud == "aws" && transit(g) {
		p.Export.MaxPrefixes = cloud.TransitExportLimit.Is
	}
	if t.defaultFor(n, g) {
		p.Export.Allow = append(p.Export.Allow, &isthmusv1.PrefixRule{Prefix: defaultRoute})
	}
	for _, other := range t.Gateways {
		if other.Name == g.Name {
			continue
		}
		for _, s := range other.Spokes {
			if slices.ContainsFunc(g.Spokes, func(own Spoke) bool { return t.sharedReach(own, s) }) {
				p.Export.Allow = append(p.Export.Allow, rules(s)...)
				// The receiver would reject a path with its own ASN as a loop.
				p.AsOverride = p.AsOverride || other.ASN == g.ASN
			}
		}
	}
}

// nodePolicy carries every spoke that may reach another one, and prefers the routes of gateways.
func (t *Topology) nodePolicy(p *isthmusv1.Peer) {
	for _, g := range t.Gateways {
		for _, s := range g.Spokes {
			if len(t.reach[s.Name]) > 0 {
				p.Import.Allow = append(p.Import.Allow, rules(s)...)
				p.Export.Allow = append(p.Export.Allow, rules(s)...)
			}
		}
	}
	p.Import.LocalPreference = second
}

// rules match the prefixes of a spoke and more specific ones.
func rules(s Spoke) (out []*isthmusv1.PrefixRule) {
	for _, p := range s.Prefixes {
		r := &isthmusv1.PrefixRule{Prefix: p.String()}
		if p.Bits() < 32 {
			r.Le = 32
		}
		out = append(out, r)
	}
	return out
}

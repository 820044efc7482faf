package topology

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// clouds are those whose gateways can be rendered.
var clouds = []string{"aws", "azure", "gcp"}

type checker struct {
	*spec.Fields
	t      *Topology
	spokes map[string]spokeAt
}

// spokeAt is a spoke with its place in the document.
type spokeAt struct {
	Spoke
	gateway, path string
}

// The bounds of a topology. Each node gets a document, in which each gateway has two or four
// tunnels, and each pair of nodes is compared.
const (
	maxNodes    = 256
	maxGateways = 1000
	maxSpokes   = 4096
	maxLinks    = 1000
	maxGroups   = 1000
)

func (c *checker) check(m *isthmusv1.Topology, set map[string]netip.Addr) {
	for _, list := range []struct {
		path    string
		n, most int
	}{
		{"nodes", len(m.GetNodes()), maxNodes}, {"gateways", len(m.GetGateways()), maxGateways}, {"spokes", len(m.GetSpokes()), maxSpokes},
		{"links", len(m.GetLinks()), maxLinks}, {"groups", len(m.GetGroups()), maxGroups},
	} {
		if list.n > list.most {
			c.Problem(list.path, strconv.Itoa(list.n), fmt.Sprintf("is more than %d", list.most), "write several topologies")
			return
		}
	}
	for i, n := range m.GetNodes() {
		c.node(fmt.Sprintf("nodes[%d]", i), n)
	}
	for i, g := range m.GetGateways() {
		c.gateway(fmt.Sprintf("gateways[%d]", i), g)
	}
	slices.SortFunc(c.t.Nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(c.t.Gateways, func(a, b Gateway) int { return cmp.Compare(a.Name, b.Name) })
	c.spokes = map[string]spokeAt{}
	for i, s := range m.GetSpokes() {
		c.spoke(fmt.Sprintf("spokes[%d]", i), s)
	}
	for i, g := range m.GetGroups() {
		c.group(fmt.Sprintf("groups[%d]", i), g)
	}
	for i, l := range m.GetLinks() {
		c.link(fmt.Sprintf("links[%d]", i), l)
	}
	slices.SortFunc(c.t.links, func(a, b link) int { return cmp.Compare(a.name, b.name) })
	c.apart(m)
	c.pair()
	c.addresses(m.GetAddresses(), set)
	c.keys(m.GetKeys())
	c.documents()
}

func (c *checker) link(path string, l *isthmusv1.Link) {
	if len(l.GetBetween()) != 2 {
		c.Problem(path+".between", strings.Join(l.GetBetween(), ","), "must be exactly two", "write one link for each pair")
		return
	}
	type end struct {
		name, cloud string
		asn         uint32
	}
	var ends []end
	for i, name := range l.GetBetween() {
		switch g, n := c.t.gateway(name), c.t.node(name); {
		case g != nil && !slices.Contains(clouds, g.Cloud): // reported as a problem of the gateway
		case g != nil:
			ends = append(ends, end{name, g.Cloud, g.ASN})
		case n != nil:
			ends = append(ends, end{name, "", n.ASN})
		default:
			c.Problem(fmt.Sprintf("%s.between[%d]", path, i), name, "is not a node or gateway of this topology", "give the name of one of `nodes` or `gateways`")
		}
	}
	if len(ends) < 2 {
		return
	}
	// A gateway before a node, and clouds sorted by name.
	slices.SortFunc(ends, func(a, b end) int {
		if (a.cloud == "") != (b.cloud == "") {
			return cmp.Compare(b.cloud, a.cloud)
		}
		return cmp.Or(cmp.Compare(a.cloud, b.cloud), cmp.Compare(a.name, b.name))
	})
	a, b := ends[0], ends[1]
	out := link{name: a.name + "-" + b.name, a: a.name, b: b.name, lanes: int(c.Number(path+".lanes", l.GetLanes(), 1, 1, 16)), path: path}
	switch {
	case a.name == b.name:
		c.Problem(path+".between", a.name, "is linked with itself", "name two different ends")
		return
	case a.cloud != "" && a.cloud == b.cloud:
		c.Problem(path+".between", a.name+","+b.name, "are gateways of one cloud", "use the cloud's own peering, or a node between them")
		return
	case a.asn == b.asn && a.asn != 0:
		c.Problem(path+".between", a.name+","+b.name, fmt.Sprintf("have the same AS number, %d", a.asn), "give each side its own: sessions within one system (iBGP) are not made")
	case l.GetLanes() != 0 && a.cloud != "":
		c.Problem(path+".lanes", strconv.FormatUint(uint64(l.GetLanes()), 10), "is valid only between two nodes", "leave it out")
	}
	for i, e := range ends {
		p, _ := cloud.Lookup(e.cloud)
		// The check of the node's document reports a forbidden ASN of a node.
		if other := ends[1-i]; other.cloud != "" && p.RouterASN.Is.Has(other.asn) {
			c.Problem(c.t.gateway(other.name).path+".asn", strconv.FormatUint(uint64(other.asn), 10), fmt.Sprintf("is refused by %s's gateway, which is linked with it: %s", e.cloud, p.RouterASN.Why), "choose another")
		}
	}
	const longest = 63 - len("-1-1-dead")
	if len(out.name) > longest {
		c.Problem(path+".between", out.name, fmt.Sprintf("is longer than %d as the name of a link", longest), "choose shorter names")
	}
	if i := slices.IndexFunc(c.t.links, func(o link) bool { return o.name == out.name }); i >= 0 {
		c.Problem(path+".between", out.name, "is the name of "+c.t.links[i].path+" too", "write each pair once; where two pairs make the same name, choose others")
		return
	}
	if c.t.gateway(out.name) != nil || c.t.node(out.name) != nil {
		c.Problem(path+".between", out.name, "is the name of a node or gateway too", "choose another name for it")
	}
	for _, name := range []string{a.name, b.name} {
		if n := c.t.node(name); n != nil && a.cloud == "" && n.message.GetWireguardPublicKey() == "" {
			c.Missing(n.path+".wireguardPublicKey", "give what `isthmus secret set wireguard --generate wireguard` printed on "+name)
		}
	}
	c.t.links = append(c.t.links, out)
}

// apart reports spokes that share no group and would still reach each other.
func (c *checker) apart(m *isthmusv1.Topology) {
	for _, l := range c.t.links {
		a, b := c.t.gateway(l.a), c.t.gateway(l.b)
		if a == nil || b == nil {
			continue
		}
		for _, x := range a.Spokes {
			for _, y := range b.Spokes {
				if !c.t.sharedReach(x, y) {
					c.Problem(l.path+".between", l.name, fmt.Sprintf("are gateways that tell each other everything, but %s and %s share no group", x.Name, y.Name), "put them into one, or link the gateways through a node")
				}
			}
		}
	}
	for i, n := range m.GetNodes() {
		// A default route sends every destination to the node, which has routes to all spokes.
		for _, name := range slices.Sorted(maps.Keys(c.spokes)) {
			x := c.spokes[name]
			if g := c.t.gateway(x.gateway); !c.linked(n.GetName(), x.gateway) || !usesEgress(n, *g) {
				continue
			}
			for _, other := range slices.Sorted(maps.Keys(c.spokes)) {
				if y := c.spokes[other]; y.gateway != x.gateway && !c.t.sharedReach(x.Spoke, y.Spoke) {
					c.Problem(fmt.Sprintf("nodes[%d].egress", i), "", fmt.Sprintf("gives %s a default route to a node that also leads to %s, with which it shares no group", x.Name, y.Name), "put them into one group, or give the egress to a node of its own")
				}
			}
		}
	}
}

func (c *checker) linked(a, b string) bool {
	return slices.ContainsFunc(c.t.links, func(l link) bool { return l.a == a && l.b == b || l.a == b && l.b == a })
}

// usesEgress reports whether a policy lets a spoke of the gateway use a pool.
func usesEgress(n *isthmusv1.TopologyNode, g Gateway) bool {
	for _, p := range n.GetEgress().GetPolicies() {
		for _, text := range p.GetSources() {
			source, err := netip.ParsePrefix(text)
			if err != nil || p.GetAction() == "deny" {
				continue
			}
			for _, s := range g.Spokes {
				if slices.ContainsFunc(s.Prefixes, source.Overlaps) {
					return true
				}
			}
		}
	}
	return false
}

// addresses fills in the known outside addresses.
func (c *checker) addresses(given []*isthmusv1.OutsideAddress, set map[string]netip.Addr) {
	names := map[string]string{}
	var all []string
	for _, o := range c.t.Outside() {
		if other, ok := names[o.Name]; ok {
			c.Problem("gateways", o.Name, fmt.Sprintf("is the name of an outside address of both %s and %s", other, o.Gateway), "rename one of them")
		}
		names[o.Name] = o.Gateway
		all = append(all, o.Name)
	}
	remedy := "the topology has " + strings.Join(all, ", ")
	if len(all) == 0 {
		remedy = "leave it out"
	}
	for i, a := range given {
		at := fmt.Sprintf("addresses[%d]", i)
		if a.GetName() == "" {
			c.Missing(at+".name", remedy)
		} else if names[a.GetName()] == "" {
			c.Problem(at+".name", a.GetName(), "is not an outside address of this topology", remedy)
		} else if _, twice := c.t.known[a.GetName()]; twice {
			c.Problem(at+".name", a.GetName(), "is given twice", "keep one of them")
		}
		if a.GetAddress() == "" {
			c.Missing(at+".address", "give the address")
		} else {
			c.t.known[a.GetName()] = c.address4(at+".address", a.GetAddress())
		}
	}
	for _, name := range slices.Sorted(maps.Keys(set)) {
		if names[name] == "" {
			c.Problem("", name, "is set but no outside address of this topology", remedy)
		}
		c.t.known[name] = c.address4("", set[name].String())
	}
	for i := range c.t.Tunnels {
		for j := range c.t.Tunnels[i].Ends {
			if o := &c.t.Tunnels[i].Ends[j].Outside; o.Name != "" {
				o.Addr = c.t.known[o.Name]
			}
		}
	}
	owner := map[netip.Addr]string{}
	for _, n := range c.t.Nodes {
		owner[n.Public] = n.Name
	}
	for _, o := range c.t.Outside() {
		if !o.Addr.IsValid() {
			continue
		}
		if other, ok := owner[o.Addr]; ok {
			c.Problem("addresses", o.Addr.String(), fmt.Sprintf("is the address of both %s and %s", other, o.Name), "correct one of them")
		}
		owner[o.Addr] = o.Name
	}
}

// documents reports problems of the topology that the rules for the nodes' documents find: about a
// node, its egress, and its gateways.
func (c *checker) documents() {
	outside, former := c.t.Outside(), c.Problems()
	for _, n := range c.t.Nodes {
		if !n.Public.IsValid() {
			continue
		}
		m := c.t.document(n, func(a Address) string {
			if a.Addr.IsValid() {
				return a.Addr.String()
			}
			// Any unused address works: 198.18.0.0/15 is reserved for benchmarks (RFC 2544).
			i := 1 + slices.IndexFunc(outside, func(o OutsideAddress) bool { return o.Name == a.Name })
			return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}).String()
		})
		_, problems := spec.Check(spec.FromMessage(m), func(string) (secret.Ref, bool) { return secret.Ref{}, true })
		for _, p := range problems {
			path, rule := c.from(n, p)
			if !slices.ContainsFunc(former, func(o spec.Problem) bool { return o.Path == path && path != n.path }) {
				c.Problem(path, p.Value, rule, p.Remedy)
			}
		}
	}
}

// from returns the part of the topology that causes a problem of a node's document.
func (c *checker) from(n Node, p spec.Problem) (path, rule string) {
	for document, field := range map[string]string{
		"node.name": ".name", "node.asn": ".asn", "node.routerId": ".routerId",
		"underlay.interface": ".interface", "underlay.address": ".address", "underlay.publicAddress": ".publicAddress",
	} {
		if p.Path == document {
			return n.path + field, p.Rule
		}
	}
	if strings.HasPrefix(p.Path, "egress") {
		return n.path + "." + p.Path, p.Rule
	}
	if strings.HasSuffix(p.Path, ".wireguard.peerPublicKey") {
		for _, o := range c.t.Nodes {
			if o.message.GetWireguardPublicKey() == p.Value {
				return o.path + ".wireguardPublicKey", p.Rule
			}
		}
	}
	return n.path, fmt.Sprintf("yields a document that is refused at %s, since it %s", p.Path, p.Rule)
}

package topology

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel/apipa"
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

func (c *checker) node(path string, n *isthmusv1.TopologyNode) {
	if !c.Name("node or gateway", path+".name", n.GetName()) {
		return
	}
	out := Node{Name: n.GetName(), ASN: c.ASN(path+".asn", n.GetAsn()), message: n, path: path}
	if n.GetPublicAddress() == "" {
		c.Missing(path+".publicAddress", "give the address under which the gateways see the node")
	} else {
		out.Public = c.address4(path+".publicAddress", n.GetPublicAddress())
	}
	if i := slices.IndexFunc(c.t.Nodes, func(o Node) bool { return o.Public.IsValid() && o.Public == out.Public }); i >= 0 {
		c.Problem(path+".publicAddress", out.Public.String(), "is the address of "+c.t.Nodes[i].Name+" too", "a gateway knows a node by its address: give each its own")
	}
	c.t.Nodes = append(c.t.Nodes, out)
}

// address4 parses an IPv4 address: the gateways' objects have no other kind.
func (c *checker) address4(path, text string) netip.Addr {
	a, ok := c.Address(path, text)
	if ok && !a.Is4() {
		c.Problem(path, text, "is not an IPv4 address: tunnels have only IPv4 addresses outside", "give an IPv4 address")
	}
	return a
}

var (
	letterFirst = regexp.MustCompile(`^[a-z]`)
	awsGateway  = regexp.MustCompile(`^(tgw|vgw)-[0-9a-f]{8,17}$`)
	// Texts that are written into commands and Terraform without quoting.
	plain    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$`)
	variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)
	fileName = regexp.MustCompile(`^[A-Za-z0-9._/][A-Za-z0-9._/@+-]{0,254}$`)
)

func (c *checker) gateway(path string, g *isthmusv1.Gateway) {
	if !c.Name("node or gateway", path+".name", g.GetName()) {
		return
	}
	if !letterFirst.MatchString(g.GetName()) {
		c.Problem(path+".name", g.GetName(), "does not begin with a letter, which names of cloud objects do", "choose another")
	}
	out := Gateway{Name: g.GetName(), Cloud: g.GetCloud(), ASN: c.ASN(path+".asn", g.GetAsn()), Region: g.GetRegion(), Network: g.GetNetwork(), Group: g.GetResourceGroup(), path: path}
	if !slices.Contains(clouds, out.Cloud) {
		c.Problem(path+".cloud", out.Cloud, "is not a cloud whose gateways can be rendered", "give one of "+strings.Join(clouds, ", "))
	}
	preset, _ := cloud.Lookup(out.Cloud)
	if v := preset.GatewayASN; v.Why != "" && out.ASN != 0 && !v.Is.Has(out.ASN) {
		c.Problem(path+".asn", strconv.FormatUint(uint64(out.ASN), 10), fmt.Sprintf("cannot be the number of %s's gateway: %s", out.Cloud, v.Why), "give one of "+v.Is.String())
	}
	need := func(field, text, remedy string) {
		switch {
		case text == "":
			c.Missing(path+"."+field, remedy)
		case !plain.MatchString(text):
			c.Problem(path+"."+field, text, "has characters that are not allowed in such a name", "take letters, digits, dots, hyphens and underscores")
		}
	}
	need("region", out.Region, "give the cloud's name of the region")
	switch out.Cloud {
	case "aws":
		need("network", out.Network, "give the ID of the transit gateway or virtual private gateway")
		if out.Network != "" && !awsGateway.MatchString(out.Network) {
			c.Problem(path+".network", out.Network, "is not the ID of a gateway", "give tgw-... or vgw-..., as `aws ec2 describe-transit-gateways` and `describe-vpn-gateways` list them")
		}
	case "azure":
		need("network", out.Network, "give the name of the virtual network")
		need("resourceGroup", out.Group, "give the name of the resource group")
	default:
		need("network", out.Network, "give the name of the VPC network")
	}
	if out.Cloud != "azure" && out.Group != "" {
		c.Problem(path+".resourceGroup", out.Group, "is valid only with cloud azure", "leave it out")
	}
	c.t.Gateways = append(c.t.Gateways, out)
}

func (c *checker) spoke(path string, s *isthmusv1.Spoke) {
	ok := c.Name("spoke", path+".name", s.GetName())
	out := spokeAt{Spoke: Spoke{Name: s.GetName()}, gateway: s.GetGateway(), path: path}
	g := c.t.gateway(s.GetGateway())
	switch {
	case s.GetGateway() == "":
		c.Missing(path+".gateway", "give the name of a gateway")
	case g == nil:
		c.Problem(path+".gateway", s.GetGateway(), "is not a gateway of this topology", "give the name of one of `gateways`")
	}
	if len(s.GetPrefixes()) == 0 {
		c.Missing(path+".prefixes", "give at least one prefix")
	}
	for i, text := range s.GetPrefixes() {
		at := fmt.Sprintf("%s.prefixes[%d]", path, i)
		p, ok := c.Prefix(at, text)
		switch {
		case !ok:
			continue
		case !p.Addr().Is4():
			c.Problem(at, text, "is not an IPv4 prefix: tunnels carry only IPv4", "leave it out")
		case p.Bits() == 0 || p.Overlaps(apipa.LinkLocal):
			c.Problem(at, text, "holds the inside addresses of tunnels, "+apipa.LinkLocal.String(), "give the prefixes that the spoke really has")
		}
		for _, name := range slices.Sorted(maps.Keys(c.spokes)) {
			for _, q := range c.spokes[name].Prefixes {
				if q.Overlaps(p) {
					c.Problem(at, text, fmt.Sprintf("overlaps %s of %s", q, name), "a packet can go to one of them only")
				}
			}
		}
		out.Prefixes = append(out.Prefixes, p)
	}
	slices.SortFunc(out.Prefixes, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	if ok && g != nil {
		c.spokes[out.Name] = out
		g.Spokes = append(g.Spokes, out.Spoke)
		slices.SortFunc(g.Spokes, func(a, b Spoke) int { return cmp.Compare(a.Name, b.Name) })
	}
}

func (c *checker) group(path string, g *isthmusv1.Group) {
	c.Name("group", path+".name", g.GetName())
	if len(g.GetSpokes()) < 2 {
		c.Problem(path+".spokes", strings.Join(g.GetSpokes(), ","), "must be at least two", "name the spokes that may reach each other")
	}
	for i, a := range g.GetSpokes() {
		if _, ok := c.spokes[a]; !ok {
			c.Problem(fmt.Sprintf("%s.spokes[%d]", path, i), a, "is not a spoke of this topology", "give the name of one of `spokes`")
			continue
		}
		if slices.Contains(g.GetSpokes()[:i], a) {
			c.Problem(fmt.Sprintf("%s.spokes[%d]", path, i), a, "is named twice", "keep one of them")
		}
		if c.t.reach[a] == nil {
			c.t.reach[a] = map[string]bool{}
		}
		for _, b := range g.GetSpokes() {
			c.t.reach[a][b] = true
		}
	}
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

// keys sets the source of each key.
func (c *checker) keys(given []*isthmusv1.KeySource) {
	var all []string
	for _, tu := range c.t.Tunnels {
		if tu.Key != "" && !slices.Contains(all, tu.Key) {
			all = append(all, tu.Key)
		}
	}
	slices.Sort(all)
	sources := map[string]Key{}
	for i, k := range given {
		at := fmt.Sprintf("keys[%d]", i)
		if _, twice := sources[k.GetName()]; twice {
			c.Problem(at+".name", k.GetName(), "is given twice", "keep one of them")
		}
		switch {
		case k.GetName() == "":
			c.Missing(at+".name", "the topology has "+strings.Join(all, ", "))
		case !slices.Contains(all, k.GetName()):
			c.Problem(at+".name", k.GetName(), "is not a key of this topology", "the topology has "+strings.Join(all, ", "))
		}
		switch {
		case k.GetEnvironment() != "" && k.GetFile() != "":
			c.Problem(at+".file", k.GetFile(), "excludes `environment`", "keep one of them")
		case k.GetEnvironment() == "" && k.GetFile() == "":
			c.Missing(at+".environment", "give it or `file`, or leave the whole entry out")
		case k.GetEnvironment() != "" && !variable.MatchString(k.GetEnvironment()):
			// The text may be the key itself by mistake, so do not repeat it.
			c.Problem(at+".environment", "", "is not a valid name of a variable", "give its name, as PSK_AWS_0, not its value")
		case k.GetFile() != "" && !fileName.MatchString(k.GetFile()):
			c.Problem(at+".file", "", "has characters that are not written into commands here", "take letters, digits, and ._/@+-")
		}
		sources[k.GetName()] = Key{Name: k.GetName(), Environment: k.GetEnvironment(), File: k.GetFile()}
	}
	taken := map[string]string{}
	for _, name := range all {
		k := sources[name]
		k.Name = name
		if k.Environment == "" {
			k.Environment = "PSK_" + upper(name)
		}
		if other, ok := taken[k.Environment]; ok {
			c.Problem("keys", k.Environment, fmt.Sprintf("holds the keys of both %s and %s", other, name), "a key of its own for each keeps one that is lost from opening the other")
		}
		taken[k.Environment] = name
		c.t.Keys = append(c.t.Keys, k)
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

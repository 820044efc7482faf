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
	"github.com/isthmus-net/isthmus/tunnel/apipa"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

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

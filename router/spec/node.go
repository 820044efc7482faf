package spec

import (
	"net/netip"
	"regexp"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func (c *checker) node(m *isthmusv1.Spec) {
	n := m.GetNode()
	if n == nil {
		c.Missing("node", "name the node, as `node: {name: hub-1, asn: 64620}`")
		return
	}
	c.Name("node", "node.name", n.GetName())
	c.s.Node.Name = n.GetName()
	if n.GetAsn() != 0 || len(m.GetPeers()) > 0 {
		c.s.Node.ASN = c.ASN("node.asn", n.GetAsn())
	}
	if text := n.GetRouterId(); text != "" {
		if a, ok := c.Address("node.routerId", text); ok {
			if !a.Is4() {
				c.Problem("node.routerId", text, "is not an IPv4 address", "give an IPv4 address; it need not exist (RFC 6286)")
			}
			c.s.Node.RouterID = a
		}
	}
}

var interfaceRule = regexp.MustCompile(`^[^\s/:]{1,15}$`)

func (c *checker) underlay(u *isthmusv1.Underlay) {
	if u == nil {
		c.Missing("underlay", "describe it, as `underlay: {interface: eth0, address: 10.0.0.4, publicAddress: 203.0.113.9}`")
		return
	}
	s := &c.s.Underlay
	s.Interface = u.GetInterface()
	switch {
	case s.Interface == "":
		c.Missing("underlay.interface", "give the name of the interface toward the Internet, such as eth0")
	case !interfaceRule.MatchString(s.Interface) || s.Interface == "." || s.Interface == ".." || s.Interface == "lo":
		c.Problem("underlay.interface", s.Interface, "is not the name of an interface toward the Internet", "`ip link` shows the names")
	}
	if u.GetAddress() == "" {
		c.Missing("underlay.address", "give the address that the interface has; `ip address` shows it")
	} else if a, ok := c.underlayAddress(u); ok {
		s.Address, s.PublicAddress = a, a
		if !c.s.Node.RouterID.IsValid() && a.Is4() {
			c.s.Node.RouterID = a
		}
	}
	if u.GetPublicAddress() == Auto {
		s.PublicAddress, _ = c.autoPublic("underlay.publicAddress", s.Address)
	} else if u.GetPublicAddress() != "" {
		if a, ok := c.Address("underlay.publicAddress", u.GetPublicAddress()); ok {
			s.PublicAddress = a
			if s.Address.IsValid() && s.Address.Is4() != a.Is4() {
				c.Problem("underlay.publicAddress", a.String(), "is of another address family than underlay.address", "give both in the same family")
			}
		}
	}
	seen := 0
	if c.mtu != nil && s.Interface != "" {
		seen = c.mtu(s.Interface)
	}
	s.MTU = int(c.Number("underlay.mtu", u.GetMtu(), uint32(DefaultMTU(seen)), leastMTU, 9216))
	c.s.DerivedMTU = u.GetMtu() == 0
	switch u.GetDefaultRoute() {
	case "", "underlay":
	case "tunnels":
		s.Transit = true
	default:
		c.Problem("underlay.defaultRoute", u.GetDefaultRoute(), "is not a valid value", `give "underlay" or "tunnels", or leave it out`)
	}
}

func (c *checker) underlayAddress(u *isthmusv1.Underlay) (netip.Addr, bool) {
	if u.GetAddress() == Auto {
		return c.autoAddress("underlay.address", u.GetInterface())
	}
	return c.Address("underlay.address", u.GetAddress())
}

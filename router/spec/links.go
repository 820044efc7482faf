package spec

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel"
)

const (
	// MaxLanes bounds the lanes of a link.
	MaxLanes = 16
	// linkBlock is the number of host bits of a link's block of inside addresses: a pair for the
	// link and one for each of MaxLanes lanes, in a power of two.
	linkBlock = 6
	// maxLinkName leaves room for the numbers of lanes in names of 63 characters.
	maxLinkName = 60
)

// LaneName returns the name of the tunnel that is a lane of a link.
func LaneName(link string, lane int) string { return fmt.Sprintf("%s-%d", link, lane) }

// link checks a link, and adds its lanes to the tunnels.
func (c *checker) link(path string, l *isthmusv1.NodeLink) {
	name := l.GetName()
	named := c.Name("tunnel", path+".name", name)
	if len(name) > maxLinkName {
		c.Problem(path+".name", name, fmt.Sprintf("has more than %d characters, and its lanes need three more", maxLinkName), "give a shorter one")
	}
	switch node := l.GetNode(); {
	case node == "":
		c.Missing(path+".node", "give the `node.name` of the other node")
	case !nameRule.MatchString(node):
		c.Problem(path+".node", node, "is not a valid name", "give the `node.name` of the other node")
	case node == c.s.Node.Name:
		c.Problem(path+".node", node, "is this node", "give the `node.name` of the other node")
	}
	lanes := int(c.Number(path+".lanes", l.GetLanes(), uint32(min(max(c.processors, 1), MaxLanes)), 1, MaxLanes))
	out := Link{Name: name, Node: l.GetNode()}
	if l.GetWireguard() == nil {
		c.Missing(path+".wireguard", "give the keys, the endpoint and the port of the lanes")
		return
	}
	first := *c.wireguard(path+".wireguard", l.GetWireguard())
	ports := first.ListenPort != 0
	for _, port := range []struct {
		path string
		n    uint16
	}{{".wireguard.listenPort", first.ListenPort}, {".wireguard.endpoint", first.Endpoint.Port()}} {
		if int(port.n)+lanes-1 > math.MaxUint16 {
			c.Problem(path+port.path, strconv.Itoa(int(port.n)), fmt.Sprintf("leaves no port for each of %d lanes", lanes), "give a smaller port")
			ports = false
		}
	}
	if !ports {
		return
	}
	blocks := c.linkBlocks(path+".inside", l.GetInside())
	upper := c.s.Node.Name > out.Node
	out.Inside = pairs(blocks, 0, upper)
	own := make([]netip.Addr, 0, len(blocks))
	for _, in := range out.Inside {
		own = append(own, in.Local.Addr())
	}
	base := Tunnel{Config: tunnel.Config{Link: name, Own: own, Probe: tunnel.ProbeAuto}, path: path}
	base.Sources = c.sourceList(path+".sources", l.GetSources())
	least := uint32(576)
	if slices.ContainsFunc(blocks, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		least = 1280 // RFC 8200 section 5
	}
	base.MTU = int(c.Number(path+".mtu", l.GetMtu(), 0, least, 9216))
	for lane := 1; lane <= lanes; lane++ {
		t, w := base, first
		t.Name, t.Number, t.WireGuard = LaneName(name, lane), lane, &w
		w.ListenPort = first.ListenPort + uint16(lane-1)
		if first.Endpoint.IsValid() {
			w.Endpoint = netip.AddrPortFrom(first.Endpoint.Addr(), first.Endpoint.Port()+uint16(lane-1))
		}
		if lane > 1 {
			if at, taken := c.ports[w.ListenPort]; taken {
				c.Problem(path+".wireguard.listenPort", strconv.Itoa(int(first.ListenPort)), fmt.Sprintf("gives lane %d the port %d, which is the port of %s", lane, w.ListenPort, at), fmt.Sprintf("give the first of %d free ports", lanes))
			}
			c.ports[w.ListenPort] = path + ".wireguard"
		}
		t.Inside = pairs(blocks, lane, upper)
		if t.MTU == 0 {
			t.MTU = t.LargestMTU(c.s.Underlay.MTU)
		}
		if at, taken := c.names["tunnel"][t.Name]; taken && named {
			c.Problem(path+".name", name, fmt.Sprintf("gives lane %d the name of %s", lane, at), "rename one of them")
			continue
		}
		out.Lanes = append(out.Lanes, t.Name)
		c.s.Tunnels = append(c.s.Tunnels, t)
		c.tunnels[t.Name] = t
	}
	if named {
		c.links[name] = out
		c.s.Links = append(c.s.Links, out)
	}
}

// linkBlocks checks the blocks of inside addresses of a link.
func (c *checker) linkBlocks(path string, texts []string) (blocks []netip.Prefix) {
	if len(texts) == 0 {
		c.Missing(path, "give a block for both ends, such as 169.254.96.0/26")
	}
	for i, text := range texts[:c.limited(path, len(texts), 2)] {
		at := fmt.Sprintf("%s[%d]", path, i)
		p, ok := c.Prefix(at, text)
		if !ok {
			continue
		}
		want := p.Addr().BitLen() - linkBlock
		switch {
		case p.Bits() != want:
			c.Problem(at, text, fmt.Sprintf("is not a block of %d addresses", 1<<linkBlock), fmt.Sprintf("give a /%d, such as %v/%d", want, p.Addr(), want))
		case p.Contains(metadata):
			c.Problem(at, text, "takes the address of the cloud's metadata service, 169.254.169.254", "choose another block")
		case slices.ContainsFunc(blocks, func(o netip.Prefix) bool { return o.Addr().Is4() == p.Addr().Is4() }):
			c.Problem(at, text, "is a second block of the same address family", "keep one block of each family")
		default:
			c.place(at, p)
			blocks = append(blocks, p)
		}
	}
	slices.SortFunc(blocks, func(a, b netip.Prefix) int { return a.Addr().BitLen() - b.Addr().BitLen() })
	return blocks
}

// pairs returns the addresses of one pair of a link's blocks: pair 0 is the link's, pair N that of
// lane N. The pair of the link has single addresses, because routes lead there by all lanes.
func pairs(blocks []netip.Prefix, number int, upper bool) (out []tunnel.Inside) {
	for _, p := range blocks {
		even := p.Addr()
		for range 2 * number {
			even = even.Next()
		}
		local, remote := even, even.Next()
		if upper {
			local, remote = remote, local
		}
		bits := local.BitLen()
		if number > 0 {
			bits--
		}
		out = append(out, tunnel.Inside{Local: netip.PrefixFrom(local, bits), Remote: remote})
	}
	return out
}

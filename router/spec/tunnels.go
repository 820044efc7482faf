package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel"
)

func (c *checker) tunnel(path string, t *isthmusv1.Tunnel) {
	ok := c.Name("tunnel", path+".name", t.GetName())
	preset := c.cloud(path+".cloud", t)
	out := Tunnel{Config: tunnel.Config{Name: t.GetName(), Disabled: t.GetDisabled()}, Cloud: preset.Name, path: path}
	for i, in := range t.GetInside() {
		c.insidePair(fmt.Sprintf("%s.inside[%d]", path, i), in, &out)
	}
	v6 := slices.ContainsFunc(out.Inside, func(in tunnel.Inside) bool { return in.Local.Addr().Is6() })
	least := uint32(576)
	if v6 {
		least = 1280 // RFC 8200 section 5
	}
	out.MTU = int(c.Number(path+".mtu", t.GetMtu(), 0, least, 9216))
	out.MSS = uint16(c.Number(path+".mss", t.GetMss(), uint32(preset.MSS.Is), 536, 9176))
	switch e := t.GetEncryption().(type) {
	case *isthmusv1.Tunnel_Ipsec:
		out.IPsec = c.ipsec(path+".ipsec", e.Ipsec, preset)
	case *isthmusv1.Tunnel_Wireguard:
		out.WireGuard = c.wireguard(path+".wireguard", e.Wireguard)
	default:
		c.Missing(path+".ipsec", "say how it is encrypted, with `ipsec` or `wireguard`")
	}
	if out.MTU == 0 {
		out.MTU = out.LargestMTU(c.s.Underlay.MTU)
		if preset.MTU.Is != 0 {
			out.MTU = min(out.MTU, preset.MTU.Is)
		}
	}
	c.cloudTunnel(path, t, out, preset)
	if t.GetMss() == 0 {
		out.MSS = min(out.MSS, uint16(out.MTU-40))
	}
	if int(out.MSS) > out.MTU-40 {
		c.Problem(path+".mss", strconv.Itoa(int(out.MSS)), fmt.Sprintf("does not fit the MTU of %d", out.MTU), fmt.Sprintf("give at most %d, or leave it out", out.MTU-40))
	}
	switch {
	case t.Probe == nil && !preset.Silent.Is:
		out.Probe = tunnel.ProbeAuto
	case t.GetProbe():
		out.Probe = tunnel.ProbeStrict
	}
	out.Sources = c.sourceList(path+".sources", t.GetSources())
	c.s.Tunnels = append(c.s.Tunnels, out)
	if ok {
		c.tunnels[out.Name] = out
	}
}

// metadata is the address of the metadata service in every cloud.
var metadata = netip.MustParseAddr("169.254.169.254")

func (c *checker) insidePair(path string, in *isthmusv1.Inside, t *Tunnel) {
	if in.GetLocal() == "" {
		c.Missing(path+".local", `give this node's address with its length, such as "169.254.64.2/30"`)
		return
	}
	local, err := netip.ParsePrefix(in.GetLocal())
	if err != nil {
		c.Problem(path+".local", in.GetLocal(), "is not an address with a prefix length", `write it as "169.254.64.2/30"`)
		return
	}
	if _, ok := c.Address(path+".local", local.Addr().String()); !ok {
		return
	}
	short := local.Addr().BitLen() - local.Bits() // host bits
	if short > 2 {
		c.Problem(path+".local", in.GetLocal(), "is not a block for two ends", "use /30, /31 or /32 (IPv4), /126, /127 or /128 (IPv6)")
		return
	}
	var remote netip.Addr
	if text := in.GetRemote(); text != "" {
		a, ok := c.Address(path+".remote", text)
		if !ok {
			return
		}
		remote = a
	} else if short == 0 {
		c.Missing(path+".remote", "give the address of the peer, because a single address does not imply it")
		return
	} else {
		remote = otherEnd(local)
	}
	hosts := func(a netip.Addr) bool { // not the network's own or the broadcast address
		return short != 2 || a.Is6() || (a != local.Masked().Addr() && local.Contains(a.Next()))
	}
	switch {
	case !hosts(local.Addr()):
		c.Problem(path+".local", in.GetLocal(), "is the network or broadcast address of its /30", "take one of the two addresses between them")
	case remote.Is4() != local.Addr().Is4():
		c.Problem(path+".remote", remote.String(), "is of another address family than local", "give both in the same family")
	case remote == local.Addr():
		c.Problem(path+".remote", remote.String(), "is this node's own address", "give the address of the peer")
	case short > 0 && !local.Contains(remote):
		c.Problem(path+".remote", remote.String(), "is not in the block of local", "use a /32 (or /128) when the two ends share no block")
	case !hosts(remote):
		c.Problem(path+".remote", remote.String(), "is the network or broadcast address of the /30", "take one of the two addresses between them")
	case local.Addr() == metadata || remote == metadata || (short > 0 && local.Contains(metadata)):
		c.Problem(path, in.GetLocal(), "takes the address of the cloud's metadata service, 169.254.169.254", "choose another block")
	case slices.ContainsFunc(t.Inside, func(o tunnel.Inside) bool { return o.Local.Addr().Is4() == local.Addr().Is4() }):
		c.Problem(path, in.GetLocal(), "is a second pair of the same address family", "keep one pair of each family")
	default:
		c.place(path+".local", local.Masked())
		if short == 0 {
			c.place(path+".remote", netip.PrefixFrom(remote, remote.BitLen()))
		}
		t.Inside = append(t.Inside, tunnel.Inside{Local: local, Remote: remote})
	}
}

// place claims inside addresses. They must be unique among all tunnels of the node, because they
// alone identify a session and a connected route. Several tunnels may share this node's own single
// address.
func (c *checker) place(path string, p netip.Prefix) {
	if a := c.s.Underlay.Address; a.IsValid() && p.Contains(a) {
		c.Problem(path, p.String(), "holds the underlay address", "choose another block")
	}
	c.inside = append(c.inside, placed{p, path})
}

// insideOverlaps finds inside addresses of one tunnel within those of another.
func (c *checker) insideOverlaps() {
	shared := func(p placed) bool { return p.prefix.IsSingleIP() && strings.HasSuffix(p.path, ".local") }
	overlaps(c.inside, shared, func(i, j int) {
		p, q := c.inside[i], c.inside[j]
		c.Problem(p.path, p.prefix.String(), "overlaps "+q.prefix.String()+" of "+q.path, "give each tunnel addresses of its own")
	})
}

// insideOf returns the inside prefix that contains an address, with its path.
func (c *checker) insideOf(a netip.Addr) (placed, bool) {
	if c.insideAt == nil {
		c.insideAt = make(map[netip.Prefix]string, len(c.inside))
		for _, in := range c.inside {
			if _, ok := c.insideAt[in.prefix]; !ok {
				c.insideAt[in.prefix] = in.path
			}
		}
	}
	for bits := a.BitLen() - 2; bits <= a.BitLen(); bits++ { // see insidePair
		p, err := a.Prefix(bits)
		if path, ok := c.insideAt[p]; err == nil && ok {
			return placed{p, path}, true
		}
	}
	return placed{}, false
}

// outside finds inside prefixes that contain the outside address of a peer: packets encrypted for
// it would enter a tunnel again.
func (c *checker) outside() {
	type peer struct {
		addr   netip.Addr
		tunnel string
	}
	byAddr := func(a, b peer) int { return a.addr.Compare(b.addr) }
	var peers []peer
	for _, t := range c.s.Tunnels {
		if a := t.Outside().Addr(); a.IsValid() {
			peers = append(peers, peer{a, t.Name})
		}
	}
	slices.SortStableFunc(peers, byAddr)
	for _, q := range c.inside {
		if !c.spend(1) {
			return
		}
		i, _ := slices.BinarySearchFunc(peers, peer{addr: q.prefix.Masked().Addr()}, byAddr)
		for ; i < len(peers) && q.prefix.Contains(peers[i].addr) && c.spend(1); i++ {
			c.Problem(q.path, q.prefix.String(), fmt.Sprintf("holds %s, where the peer of tunnel %s is reached", peers[i].addr, peers[i].tunnel), "choose another block")
		}
	}
}

// otherEnd returns the other host address of a block of two or four addresses.
func otherEnd(p netip.Prefix) netip.Addr {
	first := p.Masked().Addr()
	if p.Addr().BitLen()-p.Bits() == 2 {
		first = first.Next()
	}
	if p.Addr() == first {
		return first.Next()
	}
	return first
}

// carrierRef returns the tunnel or the link of a name; of a link, its addresses and no lane.
func (c *checker) carrierRef(path, name string) (Tunnel, bool) {
	if l, ok := c.links[name]; ok {
		return Tunnel{Config: tunnel.Config{Name: name, Link: name, Inside: l.Inside}}, true
	}
	return c.tunnelRef(path, name)
}

func (c *checker) tunnelRef(path, name string) (Tunnel, bool) {
	if name == "" {
		c.Missing(path, "give the name of a tunnel")
		return Tunnel{}, false
	}
	t, ok := c.tunnels[name]
	if !ok {
		c.Reference(path, name, "tunnels", "tunnel")
	}
	return t, ok
}

package spec

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

func (c *checker) peer(path string, p *isthmusv1.Peer) {
	c.Name("peer", path+".name", p.GetName())
	t, known := c.carrierRef(path+".tunnel", p.GetTunnel())
	preset, _ := cloud.Lookup(t.Cloud)
	ttl := uint32(0)
	if preset.TTL.Is > 1 {
		ttl = uint32(preset.TTL.Is)
	}
	out := Peer{path: path, EitherOpens: p.Passive == nil, Peer: bgp.Peer{
		Name:        p.GetName(),
		Tunnel:      p.GetTunnel(),
		ASN:         c.ASN(path+".asn", p.GetAsn()),
		HoldTime:    c.duration(path+".holdTime", p.GetHoldTime(), or(preset.HoldTime, 30*time.Second), 3*time.Second, 65535*time.Second),
		TTL:         uint8(c.Number(path+".ttl", p.GetTtl(), ttl, 1, 255)),
		Passive:     p.GetPassive(),
		MaxPrefixes: c.Number(path+".maxPrefixes", p.GetMaxPrefixes(), or(preset.MaxPrefixes, 1000), 1, 1_000_000),
		ASOverride:  p.GetAsOverride(),
		Disabled:    p.GetDisabled(),
		AllowOwnAS:  uint8(c.Number(path+".allowOwnAs", p.GetAllowOwnAs(), 0, 0, 10)),
	}}
	third := out.HoldTime / 3 / time.Second * time.Second
	out.Keepalive = c.duration(path+".keepalive", p.GetKeepalive(), min(third, or(preset.Keepalive, third)), time.Second, out.HoldTime/3)
	if !p.GetDisableGracefulRestart() {
		out.GracefulRestart = gracefulRestart
	}
	if c.s.Node.ASN != 0 && out.ASN == c.s.Node.ASN {
		c.Problem(path+".asn", strconv.FormatUint(uint64(out.ASN), 10), "is this node's own number", "sessions between nodes with one number (iBGP) are not supported; give each side its own")
	}
	if p.GetPassword() != "" {
		out.Password = c.secret(path+".password", p.GetPassword())
	}
	if text := p.GetAddress(); text != "" {
		out.Address, _ = c.Address(path+".address", text)
	} else if len(t.Inside) > 0 {
		out.Address = t.Inside[0].Remote
	}
	if text := p.GetLocalAddress(); text != "" {
		out.LocalAddress, _ = c.Address(path+".localAddress", text)
	}
	if known && out.Address.IsValid() {
		var inside *tunnel.Inside
		for i := range t.Inside {
			if t.Inside[i].Local.Addr().Is4() == out.Address.Is4() {
				inside = &t.Inside[i]
			}
		}
		switch {
		case inside == nil && len(t.Inside) > 0:
			c.Problem(path+".address", out.Address.String(), "is of a family without an inside address of the tunnel", "give the tunnel a pair of that family")
		case inside != nil:
			if !out.LocalAddress.IsValid() && p.GetLocalAddress() == "" {
				out.LocalAddress = inside.Local.Addr()
			} else if out.LocalAddress.IsValid() && out.LocalAddress != inside.Local.Addr() {
				c.Problem(path+".localAddress", out.LocalAddress.String(), "is not this node's inside address of the tunnel, "+inside.Local.Addr().String(), "leave it out")
			}
			if out.TTL == 0 && out.Address == inside.Remote {
				out.TTL = 1
			} else if out.TTL == 0 {
				out.TTL = 2
			}
			if out.Address == inside.Local.Addr() {
				c.Problem(path+".address", out.Address.String(), "is this node's own address", "give the address of the peer")
			}
		}
	}
	if out.Address.IsValid() {
		if at, ok := c.peerings[out.Address]; ok {
			c.Problem(path+".address", out.Address.String(), "is the address of "+at+" too", "one session for one address")
		}
		c.peerings[out.Address] = path
	}
	c.cloudPeer(path, p, out, preset)
	out.Import = bgp.Import{
		Allow:           c.rules(path+".import.allow", p.GetImport().GetAllow()),
		LocalPreference: 100,
	}
	if v := p.GetImport().GetLocalPreference(); v != 0 {
		out.Import.LocalPreference = v
	}
	out.Export = bgp.Export{
		Allow:       c.rules(path+".export.allow", p.GetExport().GetAllow()),
		Prepend:     uint8(c.Number(path+".export.prepend", p.GetExport().GetPrepend(), 0, 0, 10)),
		MaxPrefixes: c.Number(path+".export.maxPrefixes", p.GetExport().GetMaxPrefixes(), preset.ExportLimit.Is, 1, 1_000_000),
	}
	if v := preset.MostAnnounced; v.Why != "" && out.Export.MaxPrefixes > v.Is {
		c.Problem(path+".export.maxPrefixes", strconv.FormatUint(uint64(out.Export.MaxPrefixes), 10), fmt.Sprintf("is more than %s's gateway accepts: %s", preset.Name, v.Why), fmt.Sprintf("give less than %d, or leave it out", v.Is))
	}
	if e := p.GetExport(); e != nil && e.Med != nil {
		med := e.GetMed()
		out.Export.MED = &med
	}
	c.s.Peers = append(c.s.Peers, out)
}

// otherFamilies has the IPv4 sessions carry IPv6 too that have rules of IPv6, and a tunnel with a
// pair of each family but without an IPv6 session of its own. A session without such rules offers
// one family, since a change of what it offers closes it.
func (c *checker) otherFamilies() {
	own := map[string]bool{} // tunnels with an IPv6 session
	for _, p := range c.s.Peers {
		own[p.Tunnel] = own[p.Tunnel] || p.Address.Is6()
	}
	for i := range c.s.Peers {
		p := &c.s.Peers[i]
		six := func(r bgp.Rule) bool { return r.Prefix.Addr().Is6() }
		if !p.Address.Is4() || own[p.Tunnel] || !slices.ContainsFunc(p.Import.Allow, six) && !slices.ContainsFunc(p.Export.Allow, six) {
			continue
		}
		inside := c.tunnels[p.Tunnel].Inside
		if l, ok := c.links[p.Tunnel]; ok {
			inside = l.Inside
		}
		for _, in := range inside {
			if in.Local.Addr().Is6() {
				p.OtherLocal = in.Local.Addr()
			}
		}
	}
}

// gracefulRestart is the Restart Time (RFC 4724) that peers receive: a restart of the daemon takes
// about a second, and one of the machine about a minute.
const gracefulRestart = 120 * time.Second

func (c *checker) rules(path string, list []*isthmusv1.PrefixRule) []bgp.Rule {
	var out []bgp.Rule
	for i, r := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		if r.GetPrefix() == "" {
			c.Missing(at+".prefix", "give the enclosing prefix")
			continue
		}
		p, ok := c.Prefix(at+".prefix", r.GetPrefix())
		if !ok {
			continue
		}
		bits, most := uint32(p.Bits()), uint32(p.Addr().BitLen())
		low, high := bits, bits
		if r.GetGe() != 0 {
			low = c.Number(at+".ge", r.GetGe(), bits, bits, most)
			high = low
		}
		if r.GetLe() != 0 {
			high = c.Number(at+".le", r.GetLe(), high, low, most)
		}
		out = append(out, bgp.Rule{Prefix: p, Min: uint8(low), Max: uint8(high)})
	}
	return out
}

// announced finds peers for which the document's own prefixes alone exceed the export limit.
func (c *checker) announced() {
	announced := slices.Clone(c.s.Announce)
	for _, m := range c.s.Maps {
		announced = append(announced, m.Mapped)
	}
	for _, p := range c.s.Peers {
		most := p.Export.MaxPrefixes
		if most == 0 || len(announced) <= int(most) {
			continue
		}
		n := 0
		for _, prefix := range announced {
			if !c.spend(1 + len(p.Export.Allow)) {
				return
			}
			if slices.ContainsFunc(p.Export.Allow, func(r bgp.Rule) bool { return r.Match(prefix) }) {
				n++
			}
		}
		if n > int(most) {
			c.Problem(p.path+".export", strconv.Itoa(n), fmt.Sprintf("prefixes of `announce` are more than export.maxPrefixes, %d", most), "announce fewer and larger prefixes, or raise export.maxPrefixes")
		}
	}
}

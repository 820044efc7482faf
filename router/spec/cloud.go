package spec

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel/apipa"
	"github.com/isthmus-net/isthmus/tunnel/cloud"
)

// or returns the value of a preset, and the default when the preset has none.
func or[T any](v cloud.Value[T], def T) T {
	if v.Why == "" {
		return def
	}
	return v.Is
}

// cloud returns the preset of a tunnel, the empty one when it has none.
func (c *checker) cloud(path string, t *isthmusv1.Tunnel) cloud.Preset {
	if t.GetCloud() == "" {
		return cloud.Preset{}
	}
	p, ok := cloud.Lookup(t.GetCloud())
	switch {
	case !ok:
		c.Problem(path, t.GetCloud(), "is not a known cloud", "give one of "+strings.Join(cloud.Names(), ", ")+", or leave it out")
	case t.GetIpsec() == nil && t.GetEncryption() != nil:
		c.Problem(path, t.GetCloud(), "needs `ipsec`, the only kind that the clouds' gateways support", "leave it out, or use `ipsec`")
		return cloud.Preset{}
	}
	return p
}

// cloudTunnel checks a tunnel against the rules of its cloud. See proposals for its proposals.
func (c *checker) cloudTunnel(path string, t *isthmusv1.Tunnel, out Tunnel, preset cloud.Preset) {
	if preset.Name == "" {
		return
	}
	if i := out.IPsec; i != nil {
		late := func(field string, ours time.Duration, theirs cloud.Value[time.Duration]) {
			if theirs.Why != "" && ours >= theirs.Is {
				c.Problem(path+".ipsec."+field, ours.String(), fmt.Sprintf("is not before %s's gateway ends the SA by itself, after %v at most", preset.Name, theirs.Is), "choose a shorter time, or leave it out")
			}
		}
		late("ikeRekey", i.IKERekey, preset.IKELifetime)
		late("childRekey", i.ChildRekey, preset.ChildLifetime)
		if _, err := netip.ParseAddr(i.LocalIdentity); preset.AddressIdentity.Is && err != nil && i.LocalIdentity != "" {
			c.Problem(path+".ipsec.localIdentity", i.LocalIdentity, fmt.Sprintf("is refused by %s's gateway: %s", preset.Name, preset.AddressIdentity.Why), "leave it out")
		}
	}
	if most := preset.MaxMTU.Is; most != 0 && out.MTU > most {
		c.Problem(path+".mtu", strconv.Itoa(out.MTU), fmt.Sprintf("is more than %s's gateway passes, %d", preset.Name, most), "leave it out")
	}
	for _, in := range out.Inside {
		if !in.Local.Addr().Is4() {
			continue
		}
		if rule, remedy := preset.Inside.Is.Check(in.Local, in.Remote); rule != "" {
			at := slices.IndexFunc(t.GetInside(), func(m *isthmusv1.Inside) bool { return m.GetLocal() == in.Local.String() })
			c.Problem(fmt.Sprintf("%s.inside[%d]", path, max(at, 0)), in.Local.String(), "is refused by "+preset.Name+"'s gateway: "+rule, remedy)
		}
	}
}

// cloudPeer checks a peer and this node's ASN against the rules of the cloud at the other end.
func (c *checker) cloudPeer(path string, p *isthmusv1.Peer, out Peer, preset cloud.Preset) {
	if preset.Name == "" {
		return
	}
	if v := preset.FixedHoldTime; v.Why != "" && out.HoldTime != v.Is {
		c.Problem(path+".holdTime", out.HoldTime.String(), fmt.Sprintf("is refused: %s's gateway has %v and cannot be changed", preset.Name, v.Is), "leave it out")
	}
	if preset.NeverOpensBGP.Is && out.Passive && (!out.Address.IsValid() || apipa.LinkLocal.Contains(out.Address)) {
		c.Problem(path+".passive", "true", fmt.Sprintf("is refused: %s's gateway never opens a session from a link-local address, so that neither end would", preset.Name), "leave it out")
	}
	if v := preset.GatewayASN; v.Why != "" && out.ASN != 0 && !v.Is.Has(out.ASN) {
		c.Problem(path+".asn", strconv.FormatUint(uint64(out.ASN), 10), fmt.Sprintf("cannot be the number of %s's gateway: %s", preset.Name, v.Why), "give the gateway's number, one of "+v.Is.String())
	}
	if v := preset.RouterASN; v.Is.Has(c.s.Node.ASN) {
		rule := fmt.Sprintf("is refused by %s's gateway: %s", preset.Name, v.Why)
		if !slices.ContainsFunc(c.problems.found, func(p Problem) bool { return p.Path == "node.asn" && p.Rule == rule }) {
			c.Problem("node.asn", strconv.FormatUint(uint64(c.s.Node.ASN), 10), rule, "choose another, such as 64620")
		}
	}
}

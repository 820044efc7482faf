package plan

import (
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Effective returns a document that was checked as s and planned as t, with the values that it
// leaves out: defaults, presets, allocated inside addresses, and addresses of the platform.
// Applying the result changes nothing. Values that follow other fields stay out, as the sources of
// tunnels and quorums, and those that the machine has at each moment: resolvers, and timeouts of
// the kernel.
func Effective(m *isthmusv1.Spec, s *spec.Spec, t Target) *isthmusv1.Spec {
	m = proto.CloneOf(m)
	if m.Node != nil && t.Node.RouterID.IsValid() {
		m.Node.RouterId = t.Node.RouterID.String()
	}
	if u := m.Underlay; u != nil {
		u.Address, u.PublicAddress, u.Mtu = t.Underlay.Address.String(), t.Underlay.PublicAddress.String(), uint32(t.Underlay.MTU)
		u.DefaultRoute = words["defaultRoute"][0]
		if t.Underlay.Transit {
			u.DefaultRoute = words["defaultRoute"][1]
		}
	}
	if m.Access == nil {
		m.Access = &isthmusv1.Access{}
	}
	m.Access.Input = "keep"
	if t.NAT.Input.Drop {
		m.Access.Input = "drop"
	}
	if m.Metrics != nil {
		m.Metrics.Port = uint32(t.NAT.Metrics.Port)
	}
	for _, e := range m.GetEvents().GetExport() {
		if i := slices.IndexFunc(t.Exports, func(o spec.Export) bool { return o.Name == e.Name }); i >= 0 {
			e.Protocol, e.MinSeverity = t.Exports[i].Protocol, t.Exports[i].MinSeverity
		}
	}
	for _, tu := range m.Tunnels {
		if i, ok := t.Tunnel(tu.Name); ok {
			effectiveTunnel(tu, t.Tunnels[i], t.NAT)
		}
	}
	for _, l := range m.Links {
		if i := slices.IndexFunc(t.Links, func(o Link) bool { return o.Name == l.Name }); i >= 0 {
			l.Lanes = uint32(len(t.Links[i].Lanes))
			if j, ok := t.Tunnel(t.Links[i].Lanes[0]); ok {
				l.Mtu = uint32(t.Tunnels[j].MTU)
				effectiveWireGuard(l.GetWireguard(), t.Tunnels[j].WireGuard)
			}
		}
	}
	for _, p := range m.Peers {
		if i := slices.IndexFunc(t.BGP.Peers, func(o bgp.Peer) bool { return o.Name == p.Name }); i >= 0 {
			effectivePeer(p, t.BGP.Peers[i])
		}
	}
	for _, a := range m.Attachments {
		if i := slices.IndexFunc(t.Attachments, func(o Attachment) bool { return o.Name == a.Name }); i >= 0 {
			a.Sources = texts(t.Attachments[i].Sources)
		}
	}
	if m.Egress != nil {
		effectiveEgress(m.Egress, s, t)
	}
	return m
}

func texts[T fmt.Stringer](list []T) (out []string) {
	for _, v := range list {
		out = append(out, v.String())
	}
	return out
}

func duration(d time.Duration) *durationpb.Duration { return durationpb.New(d) }

func effectiveTunnel(m *isthmusv1.Tunnel, c tunnel.Config, n nat.Config) {
	m.Inside = nil
	for _, in := range c.Inside {
		m.Inside = append(m.Inside, &isthmusv1.Inside{Local: in.Local.String(), Remote: in.Remote.String()})
	}
	m.Mtu = uint32(c.MTU)
	for _, k := range n.Clamps {
		if k.Interface == c.Interface {
			m.Mss = uint32(k.IPv4)
		}
	}
	switch c.Probe {
	case tunnel.ProbeOff:
		m.Probe = proto.Bool(false)
	case tunnel.ProbeStrict:
		m.Probe = proto.Bool(true)
	}
	if i, c := m.GetIpsec(), c.IPsec; i != nil && c != nil {
		i.RemoteIdentity, i.LocalIdentity = c.RemoteIdentity, c.LocalIdentity
		i.IkeProposals, i.EspProposals = c.IKEProposals, c.ESPProposals
		i.IkeRekey, i.ChildRekey, i.ChildRekeyBytes = duration(c.IKERekey), duration(c.ChildRekey), c.ChildRekeyBytes
		i.DpdDelay, i.ReplayWindow = duration(c.DPDDelay), c.ReplayWindow
		i.UdpEncapsulation = "auto"
		if c.ForceUDP {
			i.UdpEncapsulation = "always"
		}
	}
	effectiveWireGuard(m.GetWireguard(), c.WireGuard)
}

func effectiveWireGuard(m *isthmusv1.WireGuard, c *tunnel.WireGuard) {
	if m != nil && c != nil && c.Keepalive > 0 {
		m.Keepalive = duration(c.Keepalive)
	}
}

func effectivePeer(m *isthmusv1.Peer, p bgp.Peer) {
	m.Address, m.LocalAddress, m.Ttl, m.Passive = p.Address.String(), p.LocalAddress.String(), uint32(p.TTL), proto.Bool(p.Passive)
	m.HoldTime, m.Keepalive, m.MaxPrefixes = duration(p.HoldTime), duration(p.Keepalive), p.MaxPrefixes
	if m.Import == nil {
		m.Import = &isthmusv1.ImportPolicy{}
	}
	m.Import.LocalPreference = p.Import.LocalPreference
	effectiveRules(m.Import.Allow, p.Import.Allow)
	if m.Export == nil {
		m.Export = &isthmusv1.ExportPolicy{}
	}
	m.Export.MaxPrefixes = p.Export.MaxPrefixes
	effectiveRules(m.Export.Allow, p.Export.Allow)
}

func effectiveRules(all []*isthmusv1.PrefixRule, rules []bgp.Rule) {
	for i, r := range rules[:min(len(rules), len(all))] {
		all[i].Ge, all[i].Le = uint32(r.Min), uint32(r.Max)
	}
}

func effectiveEgress(m *isthmusv1.Egress, s *spec.Spec, t Target) {
	m.NameFloor, m.NameGrace = duration(t.Names.Floor), duration(t.Names.Grace)
	if l := m.Log; l != nil {
		l.MaxAge, l.MaxBytes = duration(t.Log.MaxAge), uint64(t.Log.MaxBytes)
	}
	if o := m.Takeover; o != nil {
		o.Interval, o.Fall = duration(t.Takeover.Interval), uint32(t.Takeover.Fall)
	}
	probes := map[string]egress.Probes{}
	for _, p := range s.Health {
		probes[p.Name] = p.Probes
	}
	for i, p := range m.Pools {
		checked := s.Pools[i]
		p.Exhausted = "reject"
		if checked.Silent {
			p.Exhausted = "drop"
		}
		if p.Blocks != nil && checked.Blocks != nil {
			p.Blocks.FirstPort = uint32(checked.Blocks.FirstPort)
		}
		for j, a := range p.Addresses {
			a.PublicAddress, a.Weight = checked.Addresses[j].Public.String(), checked.Addresses[j].Weight
		}
		effectiveProbes(p.Probes, probes[p.Name])
	}
	proxies := map[string]egress.Probes{}
	for _, p := range s.Proxies {
		proxies[p.Name] = p.Probes
	}
	for _, p := range m.Policies {
		checked := s.Policy(p.Name)
		if checked == nil {
			continue
		}
		p.Action = string(checked.Action)
		switch checked.Action {
		case nat.Deny, nat.Reject:
			p.Flows = choose(checked.Ends, "end", "keep")
		case nat.Redirect:
			p.WhenDown = choose(checked.Bypass, "bypass", "block")
			effectiveProbes(p.Probes, proxies[p.Name])
		}
	}
}

func choose(is bool, yes, no string) string {
	if is {
		return yes
	}
	return no
}

func effectiveProbes(m *isthmusv1.Probes, p egress.Probes) {
	if m == nil || len(p.Targets) == 0 {
		return
	}
	m.Interval, m.Timeout, m.HoldDown = duration(p.Interval), duration(p.Timeout), duration(p.HoldDown)
	m.Rise, m.Fall, m.Targets = uint32(p.Rise), uint32(p.Fall), texts(p.Targets)
}

package plan

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// sides adds the attachments with their sources and routes, and the BGP sessions, to the target.
func (t *Target) sides(s *spec.Spec, tunnels map[string]tunnel.Config) (problems spec.Problems) {
	for _, p := range t.BGP.Peers {
		for _, lane := range p.Lanes {
			t.NAT.Sessions = append(t.NAT.Sessions, nat.Session{Interface: lane, Address: p.Address})
		}
		if len(p.Lanes) == 0 {
			t.NAT.Sessions = append(t.NAT.Sessions, nat.Session{Interface: p.Interface, Address: p.Address})
		}
	}
	for _, c := range t.Tunnels {
		if c.Link != "" && !c.Disabled {
			t.NAT.Lanes = append(t.NAT.Lanes, nat.Session{Interface: c.Interface, Address: c.Inside[0].Remote})
		}
	}
	owners := map[string]string{} // interface -> tunnel
	for _, tu := range s.Tunnels {
		c, ok := tunnels[tu.Name]
		if !ok {
			continue // it has no ID
		}
		owners[c.Interface] = tu.Name
		a := nat.Attachment{Interface: c.Interface, Sources: t.tunnelSources(s, tu, c)}
		t.NAT.Attachments = append(t.NAT.Attachments, a)
		if len(tu.Sources) > 0 {
			t.Attachments = append(t.Attachments, Attachment{tu.Name, c.Interface, slices.SortedFunc(slices.Values(tu.Sources), comparePrefix)})
		}
	}
	for _, a := range s.Attachments {
		if other, ok := owners[a.Interface]; ok {
			problems = append(problems, spec.Problem{Path: a.Path() + ".interface", Value: a.Interface, Rule: "is the interface of tunnel " + other, Remedy: "give the tunnel's `sources` in the tunnel", Line: s.Line(a.Path() + ".interface")})
		}
		sources := slices.SortedFunc(slices.Values(a.Sources), comparePrefix)
		t.Attachments = append(t.Attachments, Attachment{a.Name, a.Interface, sources})
		t.NAT.Attachments = append(t.NAT.Attachments, nat.Attachment{Interface: a.Interface, Sources: sources})
		for _, r := range a.Routes {
			t.Routes = append(t.Routes, fib.Route{Key: fib.Main(r.Prefix), NextHops: []fib.NextHop{{Interface: a.Interface, Gateway: r.Via}}})
		}
	}
	slices.SortFunc(t.Routes, func(a, b fib.Route) int { return a.Key.Compare(b.Key) })
	slices.SortFunc(t.Attachments, func(a, b Attachment) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortStableFunc(t.NAT.Attachments, func(a, b nat.Attachment) int { return cmp.Compare(a.Interface, b.Interface) })
	return problems
}

// proxy adds the interfaces and sources that may query each address of the DNS proxy. An inside
// address accepts queries from its own tunnels. Any other one accepts them from the tunnels and
// attachments that the document names, or from all.
func (t *Target) proxy(s *spec.Spec) {
	t.Names = s.Names
	t.Names.Proxy = nil
	may := func(name string) bool { return len(s.ProxyFrom) == 0 || slices.Contains(s.ProxyFrom, name) }
	for _, l := range s.Names.Proxy {
		inside := false
		for _, c := range t.Tunnels {
			if !slices.ContainsFunc(c.Inside, func(in tunnel.Inside) bool { return in.Local.Addr() == l.Address }) {
				continue
			}
			if inside = true; !c.Disabled { // a disabled tunnel has no interface to listen on
				t.Names.Proxy = append(t.Names.Proxy, egress.Listener{Address: l.Address, Interface: c.Interface})
				t.NAT.DNS = append(t.NAT.DNS, nat.Door{Interface: c.Interface, Address: l.Address})
			}
		}
		if inside {
			continue
		}
		doors := map[string]nat.Door{}
		for _, c := range t.Tunnels {
			if may(c.Name) && !c.Disabled {
				doors[c.Interface] = nat.Door{Interface: c.Interface, Address: l.Address}
			}
		}
		for _, a := range s.Attachments {
			if !may(a.Name) {
				continue
			}
			d := doors[a.Interface]
			d.Interface, d.Address = a.Interface, l.Address
			if a.Interface == t.Underlay.Interface {
				d.From = append(d.From, a.Sources...)
				slices.SortFunc(d.From, comparePrefix)
			}
			doors[a.Interface] = d
		}
		for _, iface := range slices.Sorted(maps.Keys(doors)) {
			if d := doors[iface]; iface != t.Underlay.Interface || len(d.From) > 0 {
				t.NAT.DNS = append(t.NAT.DNS, d)
				t.Names.Proxy = append(t.Names.Proxy, egress.Listener{Address: l.Address, Interface: iface})
			}
		}
	}
}

// metrics adds the interfaces by which the metrics can be read at each address: the tunnels of an
// inside address, and for any other one all tunnels and attachments. Strangers are behind the
// underlay's interface, so that it has none.
func (t *Target) metrics(s *spec.Spec) {
	if s.Metrics.Port == 0 {
		return
	}
	m := nat.Metrics{Port: s.Metrics.Port, From: slices.SortedFunc(slices.Values(s.Metrics.From), comparePrefix)}
	for _, a := range s.Metrics.Listen {
		var own, all []string // interfaces
		inside := false
		for _, c := range t.Tunnels {
			has := slices.ContainsFunc(c.Inside, func(in tunnel.Inside) bool { return in.Local.Addr() == a })
			inside = inside || has
			if c.Disabled {
				continue
			}
			all = append(all, c.Interface)
			if has {
				own = append(own, c.Interface)
			}
		}
		for _, x := range s.Attachments {
			if x.Interface != t.Underlay.Interface {
				all = append(all, x.Interface)
			}
		}
		if inside {
			all = own
		}
		slices.Sort(all)
		for _, iface := range slices.Compact(all) {
			m.Inlets = append(m.Inlets, nat.Inlet{Interface: iface, Address: a})
		}
	}
	t.NAT.Metrics = m
}

// tunnelSources returns the allowed sources of packets from a tunnel: those of the document, or
// else the prefixes that its peers may announce and that static routes lead to, because answers go
// there (RFC 8704). The other end's own addresses and mapped prefixes are always allowed.
func (t *Target) tunnelSources(s *spec.Spec, tu spec.Tunnel, c tunnel.Config) (sources []netip.Prefix) {
	one := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
	for _, in := range c.Inside {
		sources = append(sources, one(in.Remote))
	}
	for _, l := range t.Links {
		if l.Name == tu.Link {
			for _, in := range l.Inside {
				sources = append(sources, one(in.Remote))
			}
		}
	}
	for _, p := range t.BGP.Peers {
		if p.Tunnel != tu.Name && p.Tunnel != tu.Link {
			continue
		}
		sources = append(sources, one(p.Address))
		if len(tu.Sources) == 0 {
			for _, r := range p.Import.Allow {
				sources = append(sources, r.Prefix.Masked())
			}
		}
	}
	for _, m := range s.Maps {
		if slices.Contains(m.Tunnels, tu.Name) {
			sources = append(sources, m.Mapped)
		}
	}
	for _, r := range s.Routes {
		if len(tu.Sources) == 0 && slices.Contains(r.Tunnels, tu.Name) {
			sources = append(sources, r.Prefix)
		}
	}
	sources = append(sources, tu.Sources...)
	slices.SortFunc(sources, comparePrefix)
	return slices.Compact(sources)
}

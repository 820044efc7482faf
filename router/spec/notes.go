package spec

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/tunnel/apipa"
)

// Notes returns effects of a valid document that its author may not expect: packets that its sides
// drop, or routes and clients that they admit.
func (s *Spec) Notes() (out Problems) {
	note := func(path, value, rule, remedy string) {
		out = append(out, Problem{Path: path, Value: value, Rule: rule, Remedy: remedy, Line: s.Line(path)})
	}
	if len(s.Access.API) == 0 {
		note("access.api", "", "is not given: no other machine reaches the API, but for sources that the daemon was started with",
			"name the prefixes of your operators, such as `access: {api: [198.51.100.0/28]}`")
	}
	for _, t := range s.Tunnels {
		if t.Number > 1 {
			continue // as lane 1
		}
		if most := t.LargestMTU(s.Underlay.MTU); t.MTU > most {
			note(t.Path()+".mtu", strconv.Itoa(t.MTU), fmt.Sprintf("is more than the underlay's MTU of %d leaves, %d: larger packets are fragmented, and many networks drop fragments", s.Underlay.MTU, most),
				"leave it out, or raise `underlay.mtu` where the path to the peer allows it")
		}
		routed := slices.ContainsFunc(s.Routes, func(r StaticRoute) bool { return slices.Contains(r.Tunnels, t.Name) }) ||
			slices.ContainsFunc(s.Maps, func(m PrefixMap) bool { return slices.Contains(m.Tunnels, t.Name) })
		accepts := slices.ContainsFunc(s.Peers, func(p Peer) bool { return (p.Tunnel == t.Name || p.Tunnel == t.Link) && len(p.Import.Allow) > 0 })
		if len(t.Sources) == 0 && !routed && !accepts {
			note(t.Path()+".sources", cmp.Or(t.Link, t.Name), "lets in only packets of its peer itself, because neither a peer's import nor a static route names a prefix behind it",
				"give `sources`, such as [172.16.0.0/16]")
		}
	}
	for _, p := range s.Peers {
		for j, r := range p.Import.Allow {
			if !withholds(r) {
				continue
			}
			at := fmt.Sprintf("%s.import.allow[%d]", p.Path(), j)
			note(at, r.String(), "also allows prefixes that are never installed: addresses of the node, its underlay, the cloud's platform, and "+Unroutable[0].String()+", 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 or their like",
				"allow the prefixes of the spoke alone")
		}
	}
	for _, p := range s.OtherFamily() {
		note(p.Path, p.Value, p.Rule, p.Remedy)
	}
	return out
}

// OtherFamily returns the rules that no route of their session can match, because it does not carry
// their address family. A new document with one is refused. Documents of former versions have such
// rules, and stay usable.
func (s *Spec) OtherFamily() (out Problems) {
	family := map[bool]string{true: "IPv4", false: "IPv6"}
	remedy := map[bool]string{
		true:  "remove the rule, move it to the tunnel's peer with an IPv6 address, or give the tunnel an IPv6 pair in `inside`: then this session carries both",
		false: "remove the rule, or move it to a peer of the same tunnel with an IPv4 address: a session of IPv4 can carry both",
	}
	for _, p := range s.Peers {
		if p.OtherLocal.IsValid() {
			continue
		}
		ours, address := p.Address.Is4(), p.Address.String()
		if !p.Address.IsValid() {
			ours, address = true, "from "+apipa.LinkLocal.String()
		}
		for _, policy := range []struct {
			field string
			rules []bgp.Rule
		}{{"import", p.Import.Allow}, {"export", p.Export.Allow}} {
			for j, r := range policy.rules {
				if r.Prefix.Addr().Is4() != ours {
					at := fmt.Sprintf("%s.%s.allow[%d]", p.Path(), policy.field, j)
					out = append(out, Problem{Path: at, Value: r.String(), Line: s.Line(at),
						Rule:   fmt.Sprintf("has no effect: the session carries only %s, the family of its address %s", family[ours], address),
						Remedy: remedy[ours]})
				}
			}
		}
	}
	return out
}

// withholds reports whether an import rule allows routes into Unroutable prefixes.
func withholds(r bgp.Rule) bool {
	return slices.ContainsFunc(Unroutable, func(u netip.Prefix) bool { return u.Overlaps(r.Prefix) && int(r.Max) >= u.Bits() })
}

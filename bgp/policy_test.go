package bgp

import (
	"net/netip"
	"strings"
	"testing"
)

// TestDecider has a node with the number 64620 and these peers: x and y external, i and j internal,
// s external with six.
func TestDecider(t *testing.T) {
	const asn = 64620
	rules := func(list ...string) (all []Rule) {
		for _, s := range list {
			p := netip.MustParsePrefix(s)
			all = append(all, Rule{Prefix: p, Min: uint8(p.Bits()), Max: uint8(p.Addr().BitLen())})
		}
		return all
	}
	med := uint32(7)
	peer := func(name, address string, number uint32) *Peer {
		return &Peer{Name: name, Address: netip.MustParseAddr(address), ASN: number,
			Import: Import{Allow: rules("10.0.0.0/8", "2001:db8::/32")}, Export: Export{Allow: rules("10.0.0.0/8", "2001:db8::/32"), MED: &med, Prepend: 2}}
	}
	x, y, i, j, s := peer("x", "169.254.0.11", 65001), peer("y", "169.254.0.12", 65002), peer("i", "169.254.0.13", asn), peer("j", "169.254.0.14", asn), peer("s", "fd00::1", 65001)
	with := func(p *Peer, change func(*Peer)) *Peer {
		q := *p
		change(&q)
		return &q
	}
	allow := func(n uint8) func(*Peer) { return func(p *Peer) { p.AllowOwnAS = n } }
	both := func(p *Peer) { p.OtherLocal = netip.MustParseAddr("fd00::9") }
	prefer := func(n uint32) func(*Peer) { return func(p *Peer) { p.Import.LocalPreference = n } }
	route := func(prefix string, path ...uint32) Route {
		return Route{Prefix: netip.MustParsePrefix(prefix), ASPath: path}
	}
	kept := Route{Prefix: netip.MustParsePrefix("10.1.0.0/16"), ASPath: []uint32{65001}, Kept: true}
	for _, k := range []struct {
		what  string
		from  *Peer
		r     Route
		want  bool
		local uint32
	}{
		{"allowed", x, route("10.1.0.0/16", 65001), true, 100},
		{"not allowed", x, route("192.168.0.0/16", 65001), false, 0},
		{"no rules", with(x, func(p *Peer) { p.Import.Allow = nil }), route("10.1.0.0/16", 65001), false, 0},
		{"another family", x, route("2001:db8::/48", 65001), false, 0},
		{"both families", with(x, both), route("2001:db8::/48", 65001), true, 100},
		{"that family", s, route("2001:db8::/48", 65001), true, 100},
		{"not exported", x, kept, true, 100},
		{"a preference", with(x, prefer(300)), route("10.1.0.0/16", 65001), true, 300},
		{"an internal peer's preference stays", i, route("10.1.0.0/16"), true, 0},
		{"but for another", with(i, prefer(300)), route("10.1.0.0/16"), true, 300},
		{"our number", x, route("10.1.0.0/16", 65001, asn), false, 0},
		{"our number from an internal peer", i, route("10.1.0.0/16", asn), false, 0},
		{"our number once, allowed", with(x, allow(1)), route("10.1.0.0/16", 65001, asn), true, 100},
		{"our number twice, allowed once", with(x, allow(1)), route("10.1.0.0/16", asn, 65001, asn), false, 0},
	} {
		d := k.from.Decider(asn)
		if c, ok := d.Accept(k.r); ok != k.want || c != (Changes{LocalPreference: k.local}) {
			t.Errorf("from %s, %s: %v, %+v", k.from.Name, k.what, ok, c)
		}
	}
	for _, k := range []struct {
		what     string
		from, to *Peer
		r        Route
		want     bool
	}{
		{"our own", nil, x, route("10.1.0.0/16"), true},
		{"our own, inside", nil, i, route("10.1.0.0/16"), true},
		{"our own, not allowed", nil, x, route("192.168.0.0/16"), false},
		{"our own of another family", nil, s, route("10.1.0.0/16"), false},
		{"our own of that family", nil, s, route("2001:db8::/48"), true},
		{"no rules", x, with(y, func(p *Peer) { p.Export.Allow = nil }), route("10.1.0.0/16", 65001), false},
		{"passed on", x, y, route("10.1.0.0/16", 65001), true},
		{"passed on inside", x, i, route("10.1.0.0/16", 65001), true},
		{"passed on from inside", i, x, route("10.1.0.0/16", 65100), true},
		{"from inside to inside", i, j, route("10.1.0.0/16", 65100), false},
		{"back", x, x, route("10.1.0.0/16", 65100), false},
		{"kept from outside", x, y, kept, false},
		{"not from inside", x, i, kept, true},
		{"with the peer's number", x, y, route("10.1.0.0/16", 65001, 65002), false},
		{"with our number, inside", with(x, allow(1)), i, route("10.1.0.0/16", 65001, asn), false},
		{"with the peer's number replaced", x, with(y, func(p *Peer) { p.ASOverride = true }), route("10.1.0.0/16", 65001, 65002), true},
		{"of a peer that has gone", nil, y, route("10.1.0.0/16", 65001), true},
	} {
		d := k.to.Decider(asn)
		c, ok := d.Announce(k.from, k.r)
		want := Changes{}
		if k.want {
			want = Changes{MED: &med, Prepend: 2, NextHopSelf: k.to.ASN == asn}
		}
		if ok != k.want || c != want {
			t.Errorf("to %s, %s: %v, %+v", k.to.Name, k.what, ok, c)
		}
	}
}

// TestExplainExport has a reason, and words, for each path that is not announced.
func TestExplainExport(t *testing.T) {
	rule := func(p string, most uint8) Rule {
		x := netip.MustParsePrefix(p)
		return Rule{Prefix: x, Min: uint8(x.Bits()), Max: most}
	}
	peer := func(name string, asn uint32, allow ...Rule) *Peer {
		return &Peer{Name: name, Address: netip.MustParseAddr("169.254.0.1"), ASN: asn, Export: Export{Allow: allow, MaxPrefixes: 9}}
	}
	to := peer("to", 65001, rule("10.0.0.0/8", 16), rule("172.16.0.0/16", 24))
	for _, k := range []struct {
		from *Peer
		to   *Peer
		r    Route
		want Reason
		text string
	}{
		{nil, to, Route{Prefix: netip.MustParsePrefix("10.1.0.0/16")}, "", ""},
		{nil, to, Route{Prefix: netip.MustParsePrefix("192.168.0.0/16")}, NotAllowed, `no rule of export.allow contains it: 10.0.0.0/8 le 16, 172.16.0.0/16 le 24`},
		{nil, to, Route{Prefix: netip.MustParsePrefix("10.1.1.0/24")}, MoreSpecific, `too long for the rule "10.0.0.0/8 le 16" of export.allow`},
		{nil, peer("none", 65001), Route{Prefix: netip.MustParsePrefix("10.1.0.0/16")}, NoRules, "export.allow is empty"},
		{nil, to, Route{Prefix: netip.MustParsePrefix("2001:db8::/32")}, OtherFamily, "carries only IPv4"},
		{to, to, Route{Prefix: netip.MustParsePrefix("10.1.0.0/16")}, FromThere, "the peer itself"},
		{nil, to, Route{Prefix: netip.MustParsePrefix("10.1.0.0/16"), ASPath: []uint32{65002, 65001}}, PeerLoop, "AS 65001 of the peer"},
		{nil, to, Route{Prefix: netip.MustParsePrefix("10.1.0.0/16"), Kept: true}, NotExported, "NO_EXPORT"},
		{peer("i", 64620), peer("j", 64620, rule("10.0.0.0/8", 16)), Route{Prefix: netip.MustParsePrefix("10.1.0.0/16")}, BetweenInternal, "internal peers"},
	} {
		d := k.to.Decider(64620)
		why := d.ExplainExport(k.from, k.r)
		if text := d.ExportText(k.r, why); why != k.want || !strings.Contains(text, k.text) || (why == "") != (text == "") {
			t.Errorf("%v to %s: %q, %q", k.r.Prefix, k.to.Name, why, text)
		}
	}
}

// TestFirstTermDecides: the first term whose conditions are all met, and nothing else.
func TestFirstTermDecides(t *testing.T) {
	some := []Rule{{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Min: 8, Max: 32}}
	p := Policy{
		{OwnAS: true, Kept: true, Reject: true},
		{OwnAS: true, Prefixes: some, Changes: Changes{Prepend: 1}},
		{Kept: true, Prefixes: some, Reject: true},
		{Prefixes: some, Changes: Changes{Prepend: 2}},
		{Kept: true, Changes: Changes{Prepend: 3}},
	}
	for _, k := range []struct {
		prefix    string
		own, kept bool
		want      uint8 // 0: refused
	}{
		{"10.1.0.0/16", true, true, 0}, {"10.1.0.0/16", true, false, 1}, {"10.1.0.0/16", false, true, 0}, {"10.1.0.0/16", false, false, 2},
		{"11.0.0.0/16", true, true, 0}, {"11.0.0.0/16", true, false, 0}, {"11.0.0.0/16", false, true, 3}, {"11.0.0.0/16", false, false, 0},
	} {
		r := Route{Prefix: netip.MustParsePrefix(k.prefix), Kept: k.kept, ASPath: []uint32{1, 2}}
		if k.own {
			r.ASPath[1] = 9
		}
		if c, ok := p.Decide(9, r); ok != (k.want > 0) || c.Prepend != k.want {
			t.Errorf("%+v: %v, %d", k, ok, c.Prepend)
		}
	}
}

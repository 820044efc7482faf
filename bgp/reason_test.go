package bgp

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func testRule(s string, least, most uint8) Rule {
	return Rule{Prefix: netip.MustParsePrefix(s), Min: least, Max: most}
}

func TestImportReasons(t *testing.T) {
	const asn = 64620
	peer := func(change func(*Peer)) *Peer {
		p := &Peer{Name: "x", Address: netip.MustParseAddr("169.254.0.11"), ASN: 65001,
			Import: Import{Allow: []Rule{testRule("10.0.0.0/8", 16, 24), testRule("10.9.0.0/16", 16, 16), testRule("172.16.0.0/12", 12, 12)}}}
		if change != nil {
			change(p)
		}
		return p
	}
	for _, k := range []struct {
		what, prefix string
		path         []uint32
		peer         *Peer
		why          Reason
		text         string
	}{
		{"accepted", "10.1.0.0/16", []uint32{65001}, peer(nil), "", ""},
		{"not allowed", "192.168.0.0/16", nil, peer(nil), NotAllowed, `no rule of import.allow contains it: 10.0.0.0/8 ge 16 le 24, 10.9.0.0/16, 172.16.0.0/12`},
		{"too short", "10.0.0.0/15", nil, peer(nil), LessSpecific, `too short for the rule "10.0.0.0/8 ge 16 le 24" of import.allow: a prefix must have at least /16`},
		{"too long", "10.1.1.0/25", nil, peer(nil), MoreSpecific, `too long for the rule "10.0.0.0/8 ge 16 le 24" of import.allow: a prefix may have at most /24`},
		{"too long for the nearest rule", "10.9.1.0/26", nil, peer(nil), MoreSpecific, `too long for the rule "10.9.0.0/16" of import.allow: a prefix may have at most /16`},
		{"longer than allowed elsewhere, and not here", "172.16.1.0/24", nil, peer(nil), MoreSpecific, `too long for the rule "172.16.0.0/12" of import.allow: a prefix may have at most /12`},
		{"no rules", "10.1.0.0/16", nil, peer(func(p *Peer) { p.Import.Allow = nil }), NoRules, "import.allow is empty, so that nothing is accepted"},
		{"another family", "2001:db8::/48", nil, peer(nil), OtherFamily, "the session carries only IPv4, the family of its addresses"},
		{"the other family", "10.1.0.0/16", nil, peer(func(p *Peer) { p.Address = netip.MustParseAddr("fd00::1") }), OtherFamily, "the session carries only IPv6, the family of its addresses"},
		{"a loop", "10.1.0.0/16", []uint32{65001, asn, 65002}, peer(nil), Loop, "loop: AS 64620 of this node is in the AS path, and allowOwnAs is 0"},
		{"our own prefix", "10.1.0.0/16", []uint32{65001, asn}, peer(nil), OwnOrigin, "loop: the path begins in AS 64620, that of this node, and allowOwnAs is 0"},
		{"too often", "10.1.0.0/16", []uint32{asn, 65001, asn}, peer(func(p *Peer) { p.AllowOwnAS = 1 }), OwnOrigin, "loop: the path begins in AS 64620, that of this node, and allowOwnAs is 1"},
		{"loop before rules", "192.168.0.0/16", []uint32{asn, 65001}, peer(nil), Loop, "loop: AS 64620 of this node is in the AS path, and allowOwnAs is 0"},
		{"many rules", "192.168.0.0/16", nil, peer(func(p *Peer) {
			for i := range 9 {
				p.Import.Allow = append(p.Import.Allow, testRule(fmt.Sprintf("11.%d.0.0/16", i), 16, 16))
			}
		}), NotAllowed, "no rule of import.allow contains it: 10.0.0.0/8 ge 16 le 24, 10.9.0.0/16, 172.16.0.0/12, 11.0.0.0/16, and 8 more"},
	} {
		d := k.peer.Decider(asn)
		r := Route{Prefix: netip.MustParsePrefix(k.prefix), ASPath: k.path}
		_, why := d.ExplainImport(r)
		if text := d.ImportText(r, why); why != k.why || text != k.text {
			t.Errorf("%s: %q, %q", k.what, why, text)
		}
	}
}

// TestReasonsAgree: a path is accepted exactly if it has no reason, and each reason has a text.
func TestReasonsAgree(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	seen := map[Reason]int{}
	for range 20_000 {
		p := &Peer{Name: "x", Address: netip.MustParseAddr([]string{"169.254.0.1", "fd00::1"}[r.IntN(8)/7]), ASN: 65001, AllowOwnAS: uint8(r.IntN(2))}
		for range r.IntN(3) {
			bits := 8 + r.IntN(8)
			low := bits + r.IntN(6)
			p.Import.Allow = append(p.Import.Allow, Rule{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(r.IntN(4)) << 6}), bits).Masked(), Min: uint8(low), Max: uint8(low + r.IntN(6))})
		}
		d := p.Decider(64620)
		route := Route{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(r.IntN(256)), byte(r.IntN(256))}), 8+r.IntN(16)).Masked()}
		for range r.IntN(4) {
			route.ASPath = append(route.ASPath, []uint32{65001, 65002, 64620}[r.IntN(3)])
		}
		_, why := d.ExplainImport(route)
		_, ok := d.Accept(route)
		text := d.ImportText(route, why)
		if ok != (why == "") || ok != (text == "") || text == string(why) && !ok {
			t.Fatalf("%+v, %+v: accepted %v, reason %q, text %q", p, route, ok, why, text)
		}
		// The reason is of the stage that refuses.
		if own := slices.Contains(route.ASPath, 64620); (why == Loop || why == OwnOrigin) && !own || (why == LessSpecific || why == MoreSpecific) && Matches(p.Import.Allow, route.Prefix) {
			t.Fatalf("%+v, %+v: reason %q", p, route, why)
		}
		seen[why]++
	}
	for _, why := range []Reason{"", OtherFamily, Loop, OwnOrigin, NoRules, NotAllowed, LessSpecific, MoreSpecific} {
		if seen[why] < 20 {
			t.Errorf("%d times %q: too few to be significant", seen[why], why)
		}
	}
}

func TestJudge(t *testing.T) {
	base := func(peer string, change func(*Attributes)) Entry {
		a := Attributes{Peer: peer, ASLength: 2, FirstAS: 65001, RouterID: netip.MustParseAddr("1.1.1.1"), Address: netip.MustParseAddr("169.254.0.11"), At: time.Unix(100, 0)}
		if change != nil {
			change(&a)
		}
		return Entry{Attributes: a}
	}
	number := func(n uint32) *uint32 { return &n }
	for _, k := range []struct {
		why    Reason
		change func(*Attributes) // of the path that loses
		text   string
	}{
		{"", func(a *Attributes) { a.FirstAS, a.At = 65002, time.Unix(101, 0) }, ""},
		{ByLocalPreference, func(a *Attributes) { a.LocalPreference = number(50) }, "LOCAL_PREF 50 is lower than 100 of the path of peer a"},
		{ByASPath, func(a *Attributes) { a.ASLength = 3 }, "the AS path has length 3, and the path of peer a has 2"},
		{ByOrigin, func(a *Attributes) { a.Origin = 2 }, "ORIGIN INCOMPLETE is worse than IGP of the path of peer a"},
		{ByMED, func(a *Attributes) { a.MED = number(5) }, "MED 5 is higher than 0 of the path of peer a"},
		{ByInternal, func(a *Attributes) { a.Internal = true }, "the peer is internal, and the path of peer a is external"},
		{ByAge, func(a *Attributes) { a.MED, a.FirstAS, a.At = number(5), 65002, time.Unix(101, 0) }, "the path of peer a came first; they are not used together, since MED is 5 and 0, which is not compared between different neighbouring ASes"},
		{ByAddress, func(a *Attributes) {
			a.MED, a.FirstAS, a.Address = number(5), 65002, netip.MustParseAddr("169.254.0.12")
		}, "the peer's address 169.254.0.12 is higher than 169.254.0.11 of the path of peer a; they are not used together, since MED is 5 and 0, which is not compared between different neighbouring ASes"},
		{Changing, func(a *Attributes) { a.LocalPreference = number(200) }, "the tables changed while they were read; ask again"},
	} {
		paths := []Entry{base("a", nil), base("b", k.change)}
		Judge(paths)
		if b := paths[1]; !paths[0].Used || b.Used != (k.why == "") || b.Reason != k.why || b.Text != k.text || (b.Winner == "a") != (k.why != "" && k.why != Changing) {
			t.Errorf("%q: %+v", k.why, b)
		}
	}
	internal := func(peer string, med, first uint32, id string) Entry {
		return base(peer, func(a *Attributes) {
			a.Internal, a.MED, a.FirstAS, a.RouterID = true, number(med), first, netip.MustParseAddr(id)
		})
	}
	paths := []Entry{internal("a", 3, 65001, "1.1.1.1"), internal("b", 1, 65002, "1.1.1.2")}
	if Judge(paths); paths[1].Reason != ByRouterID || !strings.HasPrefix(paths[1].Text, "router ID 1.1.1.2 is higher than 1.1.1.1") {
		t.Errorf("internal: %+v", paths[1])
	}
	own := []Entry{base("a", nil), {Attributes: Attributes{LocalPreference: number(100), At: time.Unix(1, 0)}}}
	own[0].Peer, own[1].Peer = "", "b"
	if Judge(own); own[1].Used || own[1].Reason != ByOwn || own[1].Text != "this node announces the prefix itself" {
		t.Errorf("our own: %+v", own[1])
	}
	// MED is not compared between a and c, so that only b beats c.
	ring := []Entry{base("a", func(a *Attributes) { a.FirstAS, a.MED = 65002, number(9) }), base("b", func(a *Attributes) { a.At = time.Unix(101, 0) }), base("c", func(a *Attributes) { a.MED, a.At = number(5), time.Unix(99, 0) })}
	if Judge(ring); ring[2].Reason != ByMED || ring[2].Winner != "b" {
		t.Errorf("in a ring: %+v", ring[2])
	}
	Judge(nil)
}

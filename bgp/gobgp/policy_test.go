package gobgp

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// said holds the attributes with which a speaker announces a prefix.
type said struct {
	path       []uint32
	med, local uint32 // 0: not sent
	kept       bool   // NO_EXPORT or NO_ADVERTISE
	community  uint32 // 0: none
}

// updates returns the messages for a speaker's announcements.
func updates(from netip.Addr, says map[netip.Prefix]said) (out [][]byte) {
	for p, s := range says {
		var more []byte
		number := func(flags, kind byte, n uint32) {
			if n != 0 {
				more = append(more, attr(flags, kind, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))...)
			}
		}
		number(0x80, 4, s.med)
		number(0x40, 5, s.local)
		number(0xc0, 8, s.community)
		out = append(out, announcement(from, s.path, more, p))
	}
	return append(out, endOfRIB)
}

// TestGoBGPAgreesWithDecider makes random peers send random paths to a node whose export policies
// change. It compares with bgp.Decider which paths GoBGP accepts, and what it announces to each
// peer with which attributes, also for peers with a limit. Only one peer sends a path for a
// prefix, and no path is withdrawn while the node runs: when a path is replaced, GoBGP v3.37 does
// not withdraw it from a peer whose number is in the new path or, with as-override, in the old
// one. The result would then depend on earlier announcements.
func TestGoBGPAgreesWithDecider(t *testing.T) {
	needConfined(t)
	seen := map[string]int{}
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { agree(t, rand.New(rand.NewPCG(seed, 7)), seen) })
	}
	t.Log(seen)
	for _, what := range []string{"accepted", "refused", "announced", "our own", "kept", "kept, internal", "limited", "internal, not passed on", "the peer's number replaced", "the peer's number in the path",
		"prepended", "med", "local preference", "our number twice, allowed once"} {
		if seen[what] < 5 {
			t.Errorf("%d times %q: too few to be significant", seen[what], what)
		}
	}
}

func agree(t *testing.T, r *rand.Rand, seen map[string]int) {
	numbers := []uint32{65001, 65002, 65001, 65003, nodeASN, nodeASN}
	says := randomPaths(r, numbers)
	c := config()
	c.Announce = append(c.Announce, prefix("10.200.0.0/16"))
	var speakers []*speaker
	for i, asn := range numbers {
		address := fmt.Sprintf("169.254.0.%d", 21+i)
		p := loPeer(string(rune('a'+i)), address, asn)
		p.ASOverride, p.AllowOwnAS = asn != nodeASN && r.IntN(2) == 0, uint8(r.IntN(2))
		p.Import = bgp.Import{Allow: randomRules(r), LocalPreference: uint32(r.IntN(2) * 150)}
		c.Peers = append(c.Peers, p)
		messages := updates(p.Address, says[i])
		speakers = append(speakers, newSpeaker(t, address, asn, func(k *speakerSession) { k.send(messages...) }))
	}
	var n *node
	for round := range 5 {
		c.Peers = slices.Clone(c.Peers) // the driver keeps the former slice
		for i := range c.Peers {
			e := &c.Peers[i].Export
			*e = bgp.Export{Allow: randomRules(r), Prepend: uint8(r.IntN(3))}
			if r.IntN(2) == 0 {
				e.MED = new(uint32(r.IntN(100)))
			}
			if r.IntN(2) == 0 {
				e.MaxPrefixes = uint32(1 + r.IntN(9))
			}
		}
		if n == nil {
			n = startNode(t, Options{}, c)
		} else if err := n.Apply(t.Context(), c); err != nil {
			t.Fatal(err)
		}
		// Correct for a while: a wrong route may still be in transit.
		wrong, began := "", time.Now()
		for right := began; time.Since(right) < 300*time.Millisecond && time.Since(began) < 20*time.Second; time.Sleep(10 * time.Millisecond) {
			if wrong = compare(n, c, speakers, says, nil); wrong != "" {
				right = time.Now()
			}
		}
		if wrong != "" {
			t.Fatalf("round %d: %s", round, wrong)
		}
		compare(n, c, speakers, says, seen)
	}
}

func randomRules(r *rand.Rand) (all []bgp.Rule) {
	for range r.IntN(4) {
		q := randomPrefix(r)
		low := q.Bits() + r.IntN(3)
		all = append(all, bgp.Rule{Prefix: q, Min: uint8(low), Max: uint8(min(32, low+r.IntN(20)))})
	}
	if r.IntN(4) > 0 {
		low := uint8(8 + r.IntN(9))
		all = append(all, rule("10.0.0.0/8", low, low+uint8(r.IntN(17))))
	}
	return all
}

func randomPrefix(r *rand.Rand) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(r.IntN(8)), byte(r.IntN(32)) << 3, 0}), 16+4*r.IntN(3)).Masked()
}

// randomPaths returns the announcements of each speaker.
func randomPaths(r *rand.Rand, numbers []uint32) []map[netip.Prefix]said {
	says := make([]map[netip.Prefix]said, len(numbers))
	taken := map[netip.Prefix]bool{}
	for i, asn := range numbers {
		says[i] = map[netip.Prefix]said{}
		for range 14 {
			s := said{path: []uint32{asn}}
			if asn == nodeASN {
				s.path[0] = 65100
				s.local = uint32(50 + r.IntN(200))
			}
			for range r.IntN(4) {
				s.path = append(s.path, []uint32{65001, 65002, 65003, 65100, 65101, nodeASN, nodeASN}[r.IntN(7)])
			}
			if r.IntN(3) == 0 {
				s.med = uint32(1 + r.IntN(50))
			}
			switch r.IntN(6) {
			case 0:
				s.community, s.kept = 0xffffff01, true // NO_EXPORT
			case 1:
				s.community, s.kept = 0xffffff02, true // NO_ADVERTISE
			case 2:
				s.community = 65001<<16 | 7
			}
			if p := randomPrefix(r); !taken[p] {
				taken[p], says[i][p] = true, s
			}
		}
	}
	return says
}

// compare returns the first difference between the node and the decider, and counts the cases that
// occurred.
func compare(n *node, c bgp.Config, speakers []*speaker, says []map[netip.Prefix]said, seen map[string]int) string {
	note := func(what string) {
		if seen != nil {
			seen[what]++
		}
	}
	deciders := map[string]bgp.Decider{}
	all := map[netip.Prefix]bool{}
	for i := range c.Peers {
		deciders[c.Peers[i].Name] = c.Peers[i].Decider(c.ASN)
		for p := range says[i] {
			all[p] = true
		}
	}
	for _, p := range c.Announce {
		all[p] = true
	}
	prefixes := make([]netip.Prefix, 0, len(all))
	for p := range all {
		prefixes = append(prefixes, p)
	}
	slices.SortFunc(prefixes, netip.Prefix.Compare)

	told := make([]map[netip.Prefix]string, len(c.Peers)) // attributes
	for i := range told {
		told[i] = map[netip.Prefix]string{}
	}
	for _, p := range prefixes {
		var used []bgp.Path
		n.get(func() { used = n.routes[p] })
		// Accepted or refused?
		accepted := map[string]bgp.Changes{}
		for i := range c.Peers {
			s, ok := says[i][p]
			if !ok {
				continue
			}
			d := deciders[c.Peers[i].Name]
			if changes, ok := d.Accept(bgp.Route{Prefix: p, ASPath: s.path, Kept: s.kept}); ok {
				accepted[c.Peers[i].Name] = changes
				note("accepted")
			} else {
				note("refused")
				if loops := strings.Count(fmt.Sprint(s.path), fmt.Sprint(c.ASN)); loops > 1 && c.Peers[i].AllowOwnAS == 1 && bgp.Matches(c.Peers[i].Import.Allow, p) {
					note("our number twice, allowed once")
				}
			}
		}
		if (len(used) > 0) != (len(accepted) > 0) {
			var from []string
			for i := range c.Peers {
				if s, ok := says[i][p]; ok {
					from = append(from, fmt.Sprintf("%s (AS %d, %d times our own) says %+v", c.Peers[i].Name, c.Peers[i].ASN, c.Peers[i].AllowOwnAS, s))
				}
			}
			return fmt.Sprintf("%v: used are %+v, accepted %v of %q", p, used, accepted, from)
		}
		route, s, local := bgp.Route{Prefix: p}, said{}, uint32(0)
		var from *bgp.Peer
		for at, path := range used {
			changes, ok := accepted[path.Peer]
			i := slices.IndexFunc(c.Peers, func(q bgp.Peer) bool { return q.Name == path.Peer })
			if !ok || !slices.Equal(path.ASPath, says[i][p].path) || path.Kept != says[i][p].kept {
				return fmt.Sprintf("%v: used is %+v, said is %+v, accepted %v", p, path, says[i][p], accepted)
			}
			if at == 0 {
				from, s = &c.Peers[i], says[i][p]
				route.ASPath, route.Kept = s.path, s.kept
				local = cmp.Or(changes.LocalPreference, s.local)
			}
		}
		if len(used) == 0 && !slices.Contains(c.Announce, p) {
			continue
		}
		// To which peers is it announced, and how?
		for i := range c.Peers {
			to := &c.Peers[i]
			d := deciders[to.Name]
			changes, ok := d.Announce(from, route)
			switch internal := to.ASN == c.ASN; {
			case ok && from == nil:
				note("our own")
			case ok && internal && s.kept:
				note("kept, internal")
			case ok:
				note("announced")
			case from == to:
			case internal && from != nil && from.ASN == c.ASN:
				note("internal, not passed on")
			case s.kept:
				note("kept")
			case slices.Contains(s.path, to.ASN):
				note("the peer's number in the path")
			}
			if ok {
				told[i][p] = attributes(c.ASN, to, from, changes, s, local, note)
			}
		}
	}
	for i, v := range speakers {
		want, decided := told[i], len(told[i])
		if limit := int(c.Peers[i].Export.MaxPrefixes); limit > 0 && len(want) > limit {
			note("limited")
			order := slices.SortedFunc(maps.Keys(want), func(a, b netip.Prefix) int {
				if a, b := slices.Contains(c.Announce, a), slices.Contains(c.Announce, b); a != b && a {
					return -1
				} else if a != b {
					return 1
				}
				return cmp.Or(cmp.Compare(a.Bits(), b.Bits()), a.Addr().Compare(b.Addr()))
			})
			for _, p := range order[limit:] {
				delete(want, p)
			}
		}
		if s := n.state(c.Peers[i].Name); int(s.Announced) != len(want) || int(s.HeldBack) != decided-len(want) {
			return fmt.Sprintf("peer %s: counted as announced are %d, as held back %d; decided are %d and %d", c.Peers[i].Name, s.Announced, s.HeldBack, len(want), decided-len(want))
		}
		got := map[netip.Prefix]string{}
		v.mu.Lock()
		routes := slices.Collect(maps.Keys(v.routes))
		v.mu.Unlock()
		for _, p := range routes {
			got[p] = received(v, p)
		}
		if !reflect.DeepEqual(got, want) {
			var why []string
			for p := range all {
				if got[p] != want[p] {
					n.get(func() { why = append(why, fmt.Sprintf("%v: used %+v", p, n.routes[p])) })
				}
			}
			return fmt.Sprintf("peer %s with %+v received\n%v, want\n%v\n%q", c.Peers[i].Name, c.Peers[i].Export, got, want, why)
		}
	}
	return ""
}

// attributes describes the attributes with which a path is announced.
func attributes(asn uint32, to, from *bgp.Peer, changes bgp.Changes, s said, local uint32, note func(string)) string {
	path := slices.Clone(s.path)
	med := s.med
	words := []string{}
	if to.ASN == asn {
		words = append(words, fmt.Sprintf("local %d", local))
		note("local preference")
	} else {
		med = 0 // MED is only for the neighbouring AS (RFC 4271 section 5.1.4)
		for i, a := range path {
			if a == to.ASN && to.ASOverride {
				path[i] = asn
				note("the peer's number replaced")
			}
		}
		path = append([]uint32{asn}, path...)
	}
	if changes.Prepend > 0 {
		path = append(slices.Repeat([]uint32{asn}, int(changes.Prepend)), path...)
		note("prepended")
	}
	if changes.MED != nil {
		med = *changes.MED
		note("med")
	}
	if changes.MED != nil || med > 0 {
		words = append(words, fmt.Sprintf("med %d", med))
	}
	return strings.Join(append(words, fmt.Sprintf("path %v", path)), ", ")
}

// received describes the attributes with which the speaker received a prefix.
func received(v *speaker, p netip.Prefix) string {
	number := func(b []byte) (n uint32) {
		for _, x := range b {
			n = n<<8 | uint32(x)
		}
		return n
	}
	words := []string{}
	if b := v.attribute(p.String(), 5); b != nil {
		words = append(words, fmt.Sprintf("local %d", number(b)))
	}
	if b := v.attribute(p.String(), 4); b != nil {
		words = append(words, fmt.Sprintf("med %d", number(b)))
	}
	path := []uint32{}
	if b := v.attribute(p.String(), 2); len(b) > 2 {
		for b = b[2:]; len(b) >= 4; b = b[4:] {
			path = append(path, number(b[:4]))
		}
	}
	if hop := v.attribute(p.String(), 3); !slices.Equal(hop, []byte{169, 254, 0, 1}) {
		words = append(words, fmt.Sprintf("next hop %v", hop))
	}
	return strings.Join(append(words, fmt.Sprintf("path %v", path)), ", ")
}

// TestEveryFieldOfATermIsCompiled sets each field of a term by itself: if the statement did not
// change, the field would be ignored.
func TestEveryFieldOfATermIsCompiled(t *testing.T) {
	compiled := func(term bgp.Term) string {
		b := policyBuilder{asn: nodeASN}
		ss := b.statements([]string{"169.254.0.11/32"}, term)
		return fmt.Sprint(ss, b.sets)
	}
	none := compiled(bgp.Term{})
	var fields func(at reflect.Type, index []int)
	fields = func(at reflect.Type, index []int) {
		for i := range at.NumField() {
			f, here := at.Field(i), append(slices.Clone(index), i)
			if f.Type.Kind() == reflect.Struct {
				fields(f.Type, here)
				continue
			}
			var term bgp.Term
			switch v := reflect.ValueOf(&term).Elem().FieldByIndex(here); v.Interface().(type) {
			case bool:
				v.SetBool(true)
			case uint8, uint32:
				v.SetUint(1)
			case *uint32:
				v.Set(reflect.ValueOf(new(uint32)))
			case []bgp.Rule:
				v.Set(reflect.ValueOf([]bgp.Rule{rule("10.0.0.0/8")}))
			default:
				t.Fatalf("%s is of a type that this test does not handle", f.Name)
			}
			if compiled(term) == none {
				t.Errorf("%s is not compiled", f.Name)
			}
		}
	}
	fields(reflect.TypeFor[bgp.Term](), nil)
}

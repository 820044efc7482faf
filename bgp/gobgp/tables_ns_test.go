package gobgp

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// listed returns all pages of a view, with this many paths a page.
func (n *node) listed(t *testing.T, peer string, v bgp.View, limit int) (all []bgp.Entry) {
	t.Helper()
	q := bgp.Query{Peer: peer, View: v, Limit: limit}
	for {
		page, err := n.List(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if len(page.Entries) > limit || page.More && len(page.Entries) == 0 {
			t.Fatalf("a page of %d paths, more: %v", len(page.Entries), page.More)
		}
		all = append(all, page.Entries...)
		if !page.More {
			return all
		}
		q.After, q.Start = page.Entries[len(page.Entries)-1].Prefix, page.Start
	}
}

// words returns a line for each entry.
func words(all []bgp.Entry) (out []string) {
	for _, e := range all {
		s := fmt.Sprintf("%v %s", e.Prefix, e.Peer)
		if e.Used {
			s += " used"
		}
		if e.Reason != "" {
			s += " " + string(e.Reason)
		}
		if e.Winner != "" {
			s += " " + e.Winner
		}
		out = append(out, s)
	}
	return out
}

func equal(t *testing.T, what string, got []bgp.Entry, want ...string) {
	t.Helper()
	if !slices.Equal(words(got), want) {
		t.Errorf("%s: %q, want %q", what, words(got), want)
	}
}

// TestTables lists what two external peers send and receive, in pages of every size.
func TestTables(t *testing.T) {
	more := slices.Concat(attr(0x80, 4, 0, 0, 0, 9), attr(0xc0, 8, 0xfd, 0xe9, 0, 7), attr(0xc0, 32, 0, 0, 0xfd, 0xe9, 0, 0, 0, 1, 0, 0, 0, 2))
	hop, hop2 := addr("169.254.0.21"), addr("169.254.0.22")
	newSpeaker(t, "169.254.0.21", 65001, func(k *speakerSession) {
		k.send(announcement(hop, []uint32{65001}, more, prefix("10.1.0.0/16")),
			announcement(hop, []uint32{65001, 65100, 65100}, nil, prefix("10.2.0.0/16")),
			announcement(hop, []uint32{65001, nodeASN, 65100}, nil, prefix("10.3.0.0/16")),
			announcement(hop, []uint32{65001, nodeASN}, nil, prefix("10.4.0.0/16")),
			announcement(hop, []uint32{65001}, nil, prefix("10.5.0.0/25"), prefix("10.7.0.0/16"), prefix("10.0.0.0/8"), prefix("192.168.0.0/16")), endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.22", 65002, func(k *speakerSession) {
		k.send(announcement(hop2, []uint32{65002}, nil, prefix("10.2.0.0/16"), prefix("10.1.0.0/16"), prefix("10.6.0.0/16")), endOfRIB)
	})
	c := config(loPeer("a", "169.254.0.21", 65001), loPeer("b", "169.254.0.22", 65002))
	c.Peers[0].Import = bgp.Import{Allow: []bgp.Rule{rule("10.0.0.0/8", 16, 24)}, LocalPreference: 0}
	c.Peers[1].Import.LocalPreference = 200
	c.Peers[1].Export = bgp.Export{Allow: []bgp.Rule{rule("10.0.0.0/8", 8, 32), rule("172.16.0.0/16")}, MaxPrefixes: 1}
	n := startNode(t, Options{}, c)
	eventually(t, 20*time.Second, "routes", func() bool { return len(n.prefixes()) == 4 && b.has("172.16.0.0/16") })
	refused := []string{"10.0.0.0/8 a less-specific", "10.3.0.0/16 a as-loop", "10.4.0.0/16 a own-origin", "10.5.0.0/25 a more-specific", "192.168.0.0/16 a not-allowed"}
	accepted := []string{"10.1.0.0/16 a local-pref b", "10.2.0.0/16 a local-pref b", "10.7.0.0/16 a used"}
	for _, limit := range []int{1, 2, 3, 100} {
		all := slices.Concat(refused, accepted)
		slices.SortFunc(all, func(a, b string) int {
			return prefix(strings.Fields(a)[0]).Compare(prefix(strings.Fields(b)[0]))
		})
		equal(t, "received", n.listed(t, "a", bgp.Received, limit), all...)
		equal(t, "rejected", n.listed(t, "a", bgp.Rejected, limit), refused...)
		equal(t, "accepted", n.listed(t, "a", bgp.Accepted, limit), accepted...)
		equal(t, "accepted", n.listed(t, "b", bgp.Accepted, limit), "10.1.0.0/16 b used", "10.2.0.0/16 b used", "10.6.0.0/16 b used")
		equal(t, "advertised", n.listed(t, "b", bgp.Advertised, limit), "10.7.0.0/16  export-limit", "172.16.0.0/16 ")
		equal(t, "advertised", n.listed(t, "a", bgp.Advertised, limit), "10.1.0.0/16 b", "10.2.0.0/16 b", "10.6.0.0/16 b", "172.16.0.0/16 ")
	}
	sent := n.listed(t, "a", bgp.Received, 100)[1]
	if sent.NextHop != hop || !slices.Equal(sent.ASPath, []uint32{65001}) || sent.Origin != 0 || *sent.MED != 9 || sent.LocalPreference != nil ||
		!slices.Equal(sent.Communities, []uint32{65001<<16 | 7}) || !slices.Equal(sent.Large, [][3]uint32{{65001, 1, 2}}) || time.Since(sent.At) > time.Hour {
		t.Errorf("attributes %+v", sent)
	}
	if e := n.listed(t, "a", bgp.Accepted, 1)[0]; *e.LocalPreference != 100 || e.Text != "LOCAL_PREF 100 is lower than 200 of the path of peer b" {
		t.Errorf("accepted %+v", e)
	}
	if e := n.listed(t, "a", bgp.Advertised, 1)[0]; e.NextHop != addr("169.254.0.1") || !slices.Equal(e.ASPath, []uint32{nodeASN, 65002}) {
		t.Errorf("advertised %+v", e)
	}
	for p, want := range map[string][]string{
		"10.1.0.0/16": {"10.1.0.0/16 b used", "10.1.0.0/16 a local-pref b"}, "10.3.0.0/16": {refused[1]}, "172.16.0.0/16": {"172.16.0.0/16  used"}, "10.9.0.0/16": nil,
		"2001:db8::/32": nil,
	} {
		page, err := n.LookUp(t.Context(), prefix(p))
		if err != nil || page.More {
			t.Errorf("%s: %v, more: %v", p, err, page.More)
		}
		equal(t, p, page.Entries, want...)
	}

	// A listing does not go on over a restart of BGP.
	first, err := n.List(t.Context(), bgp.Query{Peer: "a", View: bgp.Received, Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	n.process().kill()
	eventually(t, 20*time.Second, "back", func() bool { return n.Starts() == 2 && n.state("a").State == bgp.Established })
	if _, err := n.List(t.Context(), bgp.Query{Peer: "a", View: bgp.Received, Limit: 1, After: first.Entries[0].Prefix, Start: first.Start}); !errors.Is(err, bgp.ErrRestarted) {
		t.Errorf("over a restart: %v", err)
	}
	if _, err := n.List(t.Context(), bgp.Query{Peer: "x", View: bgp.Received, Limit: 1}); !errors.Is(err, bgp.ErrNotFound) {
		t.Errorf("an unknown peer: %v", err)
	}
	n.stop()
	if _, err := n.List(t.Context(), bgp.Query{Peer: "a", View: bgp.Received, Limit: 1}); !errors.Is(err, bgp.ErrNotRunning) {
		t.Errorf("without a process: %v", err)
	}
}

// TestSelectionAgrees has six peers send random paths to the same prefixes, and compares which of
// them GoBGP uses, and in which order it has them, with bgp.Judge.
func TestSelectionAgrees(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	numbers := []uint32{65001, 65001, 65002, nodeASN, nodeASN, nodeASN}
	c := config()
	var prefixes []netip.Prefix
	for i := range 120 {
		prefixes = append(prefixes, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}), 16))
	}
	for i, asn := range numbers {
		address := fmt.Sprintf("169.254.0.%d", 25-i) // the order of names is not that of addresses
		p := loPeer(string(rune('a'+i)), address, asn)
		p.Export = bgp.Export{}
		c.Peers = append(c.Peers, p)
		var messages [][]byte
		for _, q := range prefixes {
			if r.IntN(2) == 0 {
				continue
			}
			path := []uint32{65100 + uint32(r.IntN(2))}
			if asn != nodeASN {
				path = append([]uint32{asn}, path[:r.IntN(2)]...)
			}
			local := byte(100 - r.IntN(8)/7)
			more := slices.Concat(attr(0x80, 4, 0, 0, 0, byte(r.IntN(3))), attr(0x40, 5, 0, 0, 0, local))
			messages = append(messages, announcement(addr(address), path, more, q))
		}
		messages = append(messages, endOfRIB)
		newSpeaker(t, address, asn, func(k *speakerSession) { k.send(messages...) })
	}
	n := startNode(t, Options{}, c)
	eventually(t, 30*time.Second, "all paths", func() bool {
		for _, s := range n.Peers() {
			if s.State != bgp.Established || s.Received == 0 {
				return false
			}
		}
		return n.recorder.count() > 0
	})
	seen := map[bgp.Reason]int{}
	for _, q := range prefixes {
		var page bgp.Page
		var used, got []string
		// A report of the child may still be under way.
		eventually(t, 20*time.Second, "agreement about "+q.String(), func() bool {
			var err error
			if page, err = n.LookUp(t.Context(), q); err != nil {
				t.Fatal(err)
			}
			used, got = nil, nil
			n.get(func() {
				for _, p := range n.routes[q] {
					used = append(used, p.Peer)
				}
			})
			for _, e := range page.Entries {
				if e.Used {
					got = append(got, e.Peer)
				}
			}
			return slices.Equal(used, got)
		})
		for _, e := range page.Entries {
			if seen[e.Reason]++; e.Reason == bgp.Changing {
				t.Errorf("%v of %s loses against nothing: %+v", q, e.Peer, page.Entries)
			}
		}
	}
	t.Log(seen)
	for _, why := range []bgp.Reason{"", bgp.ByLocalPreference, bgp.ByASPath, bgp.ByMED, bgp.ByInternal, bgp.ByRouterID} {
		if seen[why] < 3 {
			t.Errorf("%d times %q: too few to be significant", seen[why], why)
		}
	}
	for _, p := range c.Peers {
		for _, e := range n.listed(t, p.Name, bgp.Accepted, 7) {
			page, err := n.LookUp(t.Context(), e.Prefix)
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(page.Entries, func(x bgp.Entry) bool { return x.Peer == p.Name })
			if i < 0 || page.Entries[i].Used != e.Used || page.Entries[i].Text != e.Text || *page.Entries[i].LocalPreference != *e.LocalPreference {
				t.Errorf("listed %+v, looked up %+v", e, page.Entries)
			}
		}
	}
}

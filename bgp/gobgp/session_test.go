package gobgp

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

func TestSession(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.11"), []uint32{65001, 65100}, nil, prefix("10.1.0.0/16"), prefix("192.168.0.0/16")), endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.12", 65002, nil)
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002)))
	eventually(t, 10*time.Second, "sessions", func() bool {
		return n.state("a").State == bgp.Established && n.state("b").State == bgp.Established
	})
	eventually(t, 5*time.Second, "announcements to b", func() bool { return b.has("10.1.0.0/16", "172.16.0.0/16") })
	eventually(t, 5*time.Second, "announcements to a", func() bool { return a.has("172.16.0.0/16") })
	eventually(t, 5*time.Second, "routes", func() bool { return slices.Equal(n.prefixes(), []string{"10.1.0.0/16"}) })
	n.get(func() {
		p := n.routes[prefix("10.1.0.0/16")]
		if len(p) != 1 || p[0].Peer != "a" || p[0].NextHop != addr("169.254.0.11") || !slices.Equal(p[0].ASPath, []uint32{65001, 65100}) {
			t.Errorf("path %+v", p)
		}
	})
	eventually(t, 7*time.Second, "counters", func() bool {
		s := n.state("a")
		return s.Received == 2 && s.Accepted == 1 && s.Announced == 1 && s.GracefulRestart &&
			s.HoldTime == 9*time.Second && s.RouterID == addr("169.254.0.11") && s.MessagesIn > 2
	})
	t.Logf("%+v", n.state("a"))
}

// TestPolicy changes policies while sessions are established.
func TestPolicy(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(
			announcement(addr("169.254.0.11"), []uint32{65001}, attr(0x80, 4, 0, 0, 0, 9), prefix("10.1.0.0/16"), prefix("10.1.2.0/24")),
			announcement(addr("169.254.0.11"), []uint32{65001, nodeASN}, nil, prefix("10.9.0.0/16")),
			announcement(addr("169.254.0.11"), []uint32{65001}, nil, prefix("0.0.0.0/0")),
			announcement(addr("169.254.0.11"), []uint32{65001}, attr(0xc0, 8, 0xff, 0xff, 0xff, 0x01), prefix("10.8.0.0/16")),
			endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.12", 65002, nil)
	pa, pb := loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002)
	n := startNode(t, Options{}, config(pa, pb))
	eventually(t, 5*time.Second, "routes", func() bool { return b.has("10.1.0.0/16", "10.1.2.0/24", "172.16.0.0/16") })
	routes := func(want ...string) {
		t.Helper()
		eventually(t, 5*time.Second, "routes", func() bool { return slices.Equal(n.prefixes(), want) })
	}
	// neither paths with our ASN nor the default route; NO_EXPORT paths are accepted
	routes("10.1.0.0/16", "10.1.2.0/24", "10.8.0.0/16")
	apply := func(p ...bgp.Peer) uint64 {
		t.Helper()
		w := n.Writes()
		if err := n.Apply(t.Context(), config(p...)); err != nil {
			t.Fatal(err)
		}
		return n.Writes() - w
	}
	if w := apply(pa, pb); w != 0 {
		t.Errorf("the same configuration again: %d writes", w)
	}

	med := uint32(70)
	pb.Export = bgp.Export{Allow: []bgp.Rule{rule("10.0.0.0/8", 8, 16)}, MED: &med, Prepend: 2}
	apply(pa, pb)
	eventually(t, 5*time.Second, "a tightened export policy withdraws", func() bool { return b.has("10.1.0.0/16") })
	eventually(t, 5*time.Second, "prepended", func() bool {
		return slices.Equal(b.attribute("10.1.0.0/16", 2), asSequence(nodeASN, nodeASN, nodeASN, 65001))
	})
	if got := b.attribute("10.1.0.0/16", 4); !slices.Equal(got, []byte{0, 0, 0, 70}) {
		t.Errorf("MED %v", got)
	}
	if got := b.attribute("10.1.0.0/16", 8); got != nil {
		t.Errorf("communities %v", got)
	}
	if got := b.attribute("10.1.0.0/16", 3); !slices.Equal(got, []byte{169, 254, 0, 1}) {
		t.Errorf("next hop %v", got)
	}

	// The wider rule also applies to prefixes within the narrower one.
	pa.Import.Allow = []bgp.Rule{rule("10.0.0.0/8", 8, 24), rule("10.1.0.0/16")}
	apply(pa, pb)
	routes("10.1.0.0/16", "10.1.2.0/24", "10.8.0.0/16")
	pa.Import.Allow = []bgp.Rule{rule("10.1.2.0/24"), rule("0.0.0.0/0")}
	apply(pa, pb)
	routes("0.0.0.0/0", "10.1.2.0/24")
	eventually(t, 5*time.Second, "withdrawn from b", func() bool { return b.has() })

	pb.Export.Allow = []bgp.Rule{rule("10.1.2.0/24"), rule("0.0.0.0/0")}
	apply(pa, pb)
	eventually(t, 5*time.Second, "a loosened export policy announces", func() bool { return b.has("10.1.2.0/24", "0.0.0.0/0") })

	// A path through our own AS replaces the previous one.
	a.say(announcement(addr("169.254.0.11"), []uint32{65001, nodeASN, 65001}, nil, prefix("10.1.2.0/24")))
	routes("0.0.0.0/0")
	eventually(t, 5*time.Second, "withdrawn from b", func() bool { return b.has("0.0.0.0/0") })
	a.say(withdrawal(prefix("0.0.0.0/0")))
	routes()

	if a.count() != 1 || b.count() != 1 || n.Starts() != 1 {
		t.Errorf("%d and %d sessions, %d starts", a.count(), b.count(), n.Starts())
	}
	// A changed hold time ends one session and leaves the other alone.
	pb.HoldTime = 12 * time.Second
	apply(pa, pb)
	eventually(t, 5*time.Second, "a new session", func() bool { return b.count() == 2 && n.state("b").State == bgp.Established })
	if a.count() != 1 {
		t.Errorf("%d sessions of a", a.count())
	}
	// A removed peer has no state.
	apply(pa)
	eventually(t, 5*time.Second, "a notification", func() bool { b.mu.Lock(); defer b.mu.Unlock(); return len(b.notes) == 2 })
	if len(n.Peers()) != 1 || a.count() != 1 {
		t.Errorf("%v, %d sessions of a", n.Peers(), a.count())
	}
	// A peer that shuts down says why.
	a.say(message(msgNotification, 6, 2, 7, 'u', 'p', 'g', 'r', 'a', 'd', 'e'))
	eventually(t, 5*time.Second, "the peer's reason", func() bool {
		return strings.Contains(n.state("a").LastError, `NOTIFICATION 6/2`) && strings.HasSuffix(n.state("a").LastError, `reason "upgrade"`)
	})
}

// TestSameNumberAtTwoSites has two sites with one AS number reach each other, by this node's
// as-override or because the second site's session allows its own number in paths.
func TestSameNumberAtTwoSites(t *testing.T) {
	newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.11"), []uint32{65001, 65100, 65001}, nil, prefix("10.1.0.0/16")),
			announcement(addr("169.254.0.11"), []uint32{65001, nodeASN, 65100}, nil, prefix("10.2.0.0/16")),
			announcement(addr("169.254.0.11"), []uint32{65001, nodeASN, nodeASN}, nil, prefix("10.3.0.0/16")), endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.12", 65001, nil)
	pa, pb := loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65001)
	n := startNode(t, Options{}, config(pa, pb))
	eventually(t, 10*time.Second, "sessions", func() bool {
		return n.state("a").State == bgp.Established && n.state("b").State == bgp.Established
	})
	eventually(t, 5*time.Second, "routes", func() bool { return slices.Equal(n.prefixes(), []string{"10.1.0.0/16"}) })
	time.Sleep(time.Second)
	if !b.has("172.16.0.0/16") {
		t.Error("without as-override b must not receive paths with its own number")
	}

	pb.ASOverride = true
	if err := n.Apply(t.Context(), config(pa, pb)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "announcement to b, with our number in place of its own", func() bool {
		return b.has("10.1.0.0/16", "172.16.0.0/16") && slices.Equal(b.attribute("10.1.0.0/16", 2), asSequence(nodeASN, nodeASN, 65100, nodeASN))
	})

	pa.AllowOwnAS = 1
	if err := n.Apply(t.Context(), config(pa, pb)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "our number once, not twice", func() bool {
		return slices.Equal(n.prefixes(), []string{"10.1.0.0/16", "10.2.0.0/16"})
	})
}

func TestMultipath(t *testing.T) {
	say := func(from string, asn uint32, path ...uint32) func(*speakerSession) {
		return func(k *speakerSession) {
			k.send(announcement(addr(from), append([]uint32{asn}, path...), attr(0x40, 5, 0, 0, 1, 44), prefix("10.1.0.0/16")), endOfRIB)
		}
	}
	newSpeaker(t, "169.254.0.11", 65001, say("169.254.0.11", 65001, 65100))
	b := newSpeaker(t, "169.254.0.12", 65002, say("169.254.0.12", 65002, 65100))
	c := newSpeaker(t, "169.254.0.13", 65003, say("169.254.0.13", 65003, 65200, 65100))
	pc := loPeer("c", "169.254.0.13", 65003)
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002), pc))
	paths := func(want ...string) {
		t.Helper()
		eventually(t, 5*time.Second, "paths", func() bool {
			var got []string
			n.get(func() {
				for _, p := range n.routes[prefix("10.1.0.0/16")] {
					got = append(got, p.Peer)
				}
			})
			slices.Sort(got)
			return slices.Equal(got, want)
		})
	}
	paths("a", "b") // the LOCAL_PREF of 300 in their paths is ignored, the AS path counts
	b.say(withdrawal(prefix("10.1.0.0/16")))
	paths("a")
	pc.Import.LocalPreference = 200
	if err := n.Apply(t.Context(), config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002), pc)); err != nil {
		t.Fatal(err)
	}
	paths("c")
	// Our own announcement of the same prefix does not get in the way.
	cfg := config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002), pc)
	cfg.Announce = append(cfg.Announce, prefix("10.1.0.0/16"))
	if err := n.Apply(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "announced", func() bool {
		return slices.Equal(b.attribute("10.1.0.0/16", 2), asSequence(nodeASN, 65003, 65200, 65100))
	})
	paths("c")
	c.say(withdrawal(prefix("10.1.0.0/16")))
	paths("a")
}

func TestPrefixLimit(t *testing.T) {
	flood := func(k *speakerSession) {
		for i := range 50 {
			var ps []netip.Prefix
			for j := range 200 {
				ps = append(ps, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), byte(j), 0}), 24))
			}
			if k.send(announcement(addr("169.254.0.11"), []uint32{65001}, nil, ps...)) != nil {
				return
			}
		}
	}
	a := newSpeaker(t, "169.254.0.11", 65001, flood)
	b := newSpeaker(t, "169.254.0.12", 65002, func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.12"), []uint32{65002}, nil, prefix("10.200.0.0/16")), endOfRIB)
	})
	pa := loPeer("a", "169.254.0.11", 65001)
	pa.MaxPrefixes = 1000
	n := startNode(t, Options{}, config(pa, loPeer("b", "169.254.0.12", 65002)))
	eventually(t, 5*time.Second, "limit", func() bool { return n.state("a").State == bgp.PrefixLimit })
	eventually(t, 5*time.Second, "routes", func() bool { return slices.Equal(n.prefixes(), []string{"10.200.0.0/16"}) })
	s := n.state("a")
	if d := time.Until(s.NextTry); d < 50*time.Second || d > time.Minute {
		t.Errorf("next try in %v", d)
	}
	a.mu.Lock()
	if !slices.Equal(a.notes, [][2]byte{{6, 1}}) {
		t.Errorf("notifications %v", a.notes)
	}
	a.mu.Unlock()
	// With room for all prefixes, a reset admits the peer.
	pa.MaxPrefixes = 10000
	if err := n.Apply(t.Context(), config(pa, loPeer("b", "169.254.0.12", 65002))); err != nil {
		t.Fatal(err)
	}
	if s := n.state("a").State; s != bgp.PrefixLimit {
		t.Errorf("state %v", s)
	}
	if err := n.Reset(t.Context(), "a", false); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "all routes", func() bool { return len(n.prefixes()) == 10001 })
	// The limit also applies to an established session, and b is not affected.
	pa.MaxPrefixes = 20000
	if err := n.Apply(t.Context(), config(pa, loPeer("b", "169.254.0.12", 65002))); err != nil {
		t.Fatal(err)
	}
	if a.count() != 2 || b.count() != 1 || n.Starts() != 1 {
		t.Errorf("%d and %d sessions, %d starts", a.count(), b.count(), n.Starts())
	}
	pa.MaxPrefixes = 5000
	if err := n.Apply(t.Context(), config(pa, loPeer("b", "169.254.0.12", 65002))); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "limit", func() bool { return n.state("a").State == bgp.PrefixLimit && len(n.prefixes()) == 1 })
}

// TestLargePrefixLimit uses a limit above those that GoBGP enforces.
func TestLargePrefixLimit(t *testing.T) {
	newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		for i := range 110 {
			var ps []netip.Prefix
			for j := range 200 {
				ps = append(ps, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), byte(j), 0}), 24))
			}
			if k.send(announcement(addr("169.254.0.11"), []uint32{65001}, nil, ps...)) != nil {
				return
			}
		}
	})
	p := loPeer("a", "169.254.0.11", 65001)
	p.MaxPrefixes = exactLimit + 1
	n := startNode(t, Options{}, config(p))
	eventually(t, 3*counterInterval, "limit", func() bool { return n.state("a").State == bgp.PrefixLimit })
	eventually(t, 5*time.Second, "no routes", func() bool { return len(n.prefixes()) == 0 })
}

func TestGarbage(t *testing.T) {
	g := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) { k.send([]byte("GET / HTTP/1.1\r\nHost: router\r\n\r\n")) })
	b := newSpeaker(t, "169.254.0.12", 65002, nil)
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002)))
	eventually(t, 15*time.Second, "several sessions", func() bool { return g.count() >= 2 })
	if b.count() != 1 || n.Starts() != 1 || n.state("b").State != bgp.Established {
		t.Errorf("%d sessions of b, %d starts", b.count(), n.Starts())
	}
	if s := n.state("a"); s.LastError == "" {
		t.Errorf("no last error: %+v", s)
	} else {
		t.Log(s.LastError)
	}
}

// TestAdopt stops the daemon and starts another one, as an upgrade does.
func TestAdopt(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.11"), []uint32{65001}, nil, prefix("10.1.0.0/16")), endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.12", 65002, func(k *speakerSession) { time.Sleep(time.Second); k.send(endOfRIB) })
	c := config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002))
	n := startNode(t, Options{}, c)
	eventually(t, 5*time.Second, "routes", func() bool { return b.has("10.1.0.0/16", "172.16.0.0/16") && a.has("172.16.0.0/16") })
	eventually(t, 5*time.Second, "synced", func() bool { return n.recorder.count() == 1 })
	n.stop()
	a.mu.Lock()
	restart := a.restart
	a.mu.Unlock()
	if restart {
		t.Error("the first start claimed to be a restart")
	}
	n = startNode(t, Options{Adopting: func() bool { return true }}, c)
	eventually(t, 5*time.Second, "back", func() bool { return a.count() == 2 && b.count() == 2 })
	if n.recorder.count() != 0 {
		t.Error("synced before the End-of-RIBs")
	}
	eventually(t, 5*time.Second, "synced", func() bool { return n.recorder.count() == 1 })
	eventually(t, 5*time.Second, "our End-of-RIB", func() bool { return a.ends() == 2 && b.ends() == 2 })
	for _, s := range []*speaker{a, b} {
		s.mu.Lock()
		if s.taken != 0 || !s.restart || len(s.notes) != 0 {
			t.Errorf("%v: %d withdrawals, restart bit %v, notifications %v", s.address, s.taken, s.restart, s.notes)
		}
		s.mu.Unlock()
	}
}

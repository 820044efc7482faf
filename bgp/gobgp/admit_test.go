package gobgp

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// TestExportLimit checks that a peer never has more prefixes than its limit: neither when a table
// arrives at once, nor when its prefixes have to make room for better ones.
func TestExportLimit(t *testing.T) {
	var many []netip.Prefix
	for i := range 200 {
		many = append(many, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i), 0}), 24))
	}
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.11"), []uint32{65001}, nil, many...), endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.12", 65002, nil)
	c := newSpeaker(t, "169.254.0.13", 65003, nil)
	narrow := loPeer("b", "169.254.0.12", 65002)
	narrow.Export.MaxPrefixes = 10
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001), narrow, loPeer("c", "169.254.0.13", 65003)))
	// Our own prefixes first, then the lowest.
	want := []string{"172.16.0.0/16"}
	for i := range 9 {
		want = append(want, fmt.Sprintf("10.1.%d.0/24", i))
	}
	eventually(t, 10*time.Second, "ten", func() bool { return b.has(want...) })
	eventually(t, 10*time.Second, "no limit elsewhere", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return len(c.routes) == 201 })
	if s := n.state("b"); s.Announced != 10 || s.HeldBack != 191 {
		t.Errorf("%d announced, %d held back", s.Announced, s.HeldBack)
	}
	if s := n.state("c"); s.Announced != 201 || s.HeldBack != 0 {
		t.Errorf("without a limit %d announced, %d held back", s.Announced, s.HeldBack)
	}
	// Shorter prefixes displace three others. The limit holds meanwhile.
	a.say(announcement(addr("169.254.0.11"), []uint32{65001}, nil, prefix("10.64.0.0/16"), prefix("10.65.0.0/16"), prefix("10.66.0.0/16")))
	want = append(want[:7], "10.64.0.0/16", "10.65.0.0/16", "10.66.0.0/16")
	eventually(t, 10*time.Second, "the shorter ones", func() bool { return b.has(want...) })
	// Withdrawn prefixes make room.
	a.say(withdrawal(append(many[:100:100], prefix("10.65.0.0/16"))...))
	want = []string{"172.16.0.0/16", "10.64.0.0/16", "10.66.0.0/16"}
	for i := range 7 {
		want = append(want, fmt.Sprintf("10.1.%d.0/24", 100+i))
	}
	eventually(t, 10*time.Second, "the next ones", func() bool { return b.has(want...) })
	b.mu.Lock()
	if b.most != 10 {
		t.Errorf("it had up to %d prefixes", b.most)
	}
	b.mu.Unlock()
	// A higher limit, and then none, without a new session.
	for _, limit := range []uint32{50, 0} {
		narrow.Export.MaxPrefixes = limit
		if err := n.Apply(t.Context(), config(loPeer("a", "169.254.0.11", 65001), narrow, loPeer("c", "169.254.0.13", 65003))); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "more", func() bool {
			b.mu.Lock()
			defer b.mu.Unlock()
			return len(b.routes) == 50 || limit == 0 && len(b.routes) == 103
		})
	}
	if a.count() != 1 || b.count() != 1 || c.count() != 1 {
		t.Errorf("%d, %d and %d sessions", a.count(), b.count(), c.count())
	}
}

// TestExportLimitRestart checks that after a restart a limited peer gets the same prefixes again,
// before the End-of-RIB.
func TestExportLimitRestart(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.11"), []uint32{65001}, nil, prefix("10.1.0.0/16"), prefix("10.2.0.0/16"), prefix("10.3.0.0/16")), endOfRIB)
	})
	a.late = time.Second
	b := newSpeaker(t, "169.254.0.12", 65002, nil)
	narrow := loPeer("b", "169.254.0.12", 65002)
	narrow.Export.MaxPrefixes = 3
	conf := config(loPeer("a", "169.254.0.11", 65001), narrow)
	n := startNode(t, Options{}, conf)
	eventually(t, 10*time.Second, "three", func() bool { return b.has("172.16.0.0/16", "10.1.0.0/16", "10.2.0.0/16") })
	n.stop()
	ends := b.ends() // also one after each soft reset
	startNode(t, Options{Adopting: func() bool { return true }}, conf)
	eventually(t, 20*time.Second, "our End-of-RIB", func() bool { return b.count() == 2 && b.ends() > ends })
	if b.mu.Lock(); b.taken != 0 || b.most != 3 {
		t.Errorf("%d withdrawals, up to %d prefixes", b.taken, b.most)
	}
	b.mu.Unlock()
}

// TestLeaveFirst checks the configurations that the BGP process gets. A path may be evaluated by
// either of two consecutive ones, so both together must not let too many prefixes pass.
func TestLeaveFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New(Options{Log: slog.New(slog.DiscardHandler)})
		start, started := fakes()
		d.start = start
		p := loPeer("b", "169.254.0.12", 65002)
		p.Export.MaxPrefixes = 3
		if err := d.Apply(t.Context(), config(loPeer("a", "169.254.0.11", 65001), p)); err != nil {
			t.Fatal(err)
		}
		go d.Run(t.Context(), newRecorder())
		f := <-started
		for _, s := range []string{"10.1.1.0/24", "10.1.2.0/24", "10.1.3.0/24", "10.2.0.0/16", "10.3.0.0/16"} {
			if err := writeFrame(f.conn, framePaths, appendUpdate(nil, update{prefix: prefix(s), paths: []path{{peer: 1}}})); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		var last []bgp.Rule
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, m := range f.messages {
			now := m.Peers[1].Peer.Export.Allow
			all := slices.Clone(last)
			for _, r := range now {
				if !slices.Contains(all, r) {
					all = append(all, r)
				}
			}
			if len(all) > 3 {
				t.Errorf("from %v to %v in one step", last, now)
			}
			last = now
		}
		if got := fmt.Sprint(last); got != "[172.16.0.0/16 10.2.0.0/16 10.3.0.0/16]" {
			t.Errorf("in the end %s", got)
		}
	})
}

// TestKeptPaths checks that paths with NO_EXPORT are not announced, and do not count towards the
// limit.
func TestKeptPaths(t *testing.T) {
	newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(
			announcement(addr("169.254.0.11"), []uint32{65001}, attr(0xc0, 8, 0xff, 0xff, 0xff, 0x01), prefix("10.1.0.0/24"), prefix("10.2.0.0/24")),
			announcement(addr("169.254.0.11"), []uint32{65001}, nil, prefix("10.3.0.0/24")),
			endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.12", 65002, nil)
	p := loPeer("b", "169.254.0.12", 65002)
	p.Export.MaxPrefixes = 2
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001), p))
	eventually(t, 10*time.Second, "what is passed on", func() bool { return b.has("172.16.0.0/16", "10.3.0.0/24") })
	if s := n.state("b"); s.Announced != 2 || s.HeldBack != 0 {
		t.Errorf("%d announced, %d held back", s.Announced, s.HeldBack)
	}
}

func TestAdmit(t *testing.T) {
	p := loPeer("b", "169.254.0.12", 65002)
	p.Export.MaxPrefixes = 2
	r := newRIB()
	r.configure(config(p))
	path := []bgp.Path{{Peer: "a"}}
	for _, s := range []string{"10.9.0.0/16", "10.2.0.0/24", "10.1.0.0/24", "192.168.0.0/16"} {
		r.paths[prefix(s)] = path
		r.count(prefix(s), path, 1)
	}
	if got := r.admit()["b"]; !slices.Equal(got, []netip.Prefix{prefix("172.16.0.0/16"), prefix("10.9.0.0/16")}) {
		t.Errorf("%v", got)
	}
	if r.readmit {
		t.Error("readmit has not been reset")
	}
	p.Export.Allow = exactly([]netip.Prefix{prefix("10.9.0.0/16"), prefix("10.1.0.0/24")})
	if limited(p.Export) {
		t.Error("two rules of one prefix each are more than two prefixes")
	}
	d := &Driver{rib: r, admitted: map[string][]netip.Prefix{"b": {prefix("172.16.0.0/16"), prefix("10.1.0.0/24")}}}
	if !d.shrinkLocked() || !slices.Equal(d.admitted["b"], []netip.Prefix{prefix("172.16.0.0/16")}) {
		t.Errorf("%v", d.admitted)
	}
	if d.shrinkLocked() {
		t.Error("a prefix that has left leaves again")
	}
}

package gobgp

import (
	"context"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// TestKiller makes one peer send, in each of its sessions but the first, the UPDATE that makes
// GoBGP v3.37.0 panic. The peer must connect to GoBGP directly, because the filter of the relay
// stops such messages; this test is about the second line of defence.
func TestKiller(t *testing.T) {
	bad := newSpeaker(t, "169.254.0.13", 65003, nil)
	say := func(k *speakerSession, a string, asn uint32, p string) {
		k.send(announcement(addr(a), []uint32{asn}, nil, prefix(p)))
		// a slow End-of-RIB: the other peer must not lose anything meanwhile
		time.Sleep(300 * time.Millisecond)
		k.send(endOfRIB)
	}
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) { say(k, "169.254.0.11", 65001, "10.1.0.0/16") })
	b := newSpeaker(t, "169.254.0.12", 65002, func(k *speakerSession) { say(k, "169.254.0.12", 65002, "10.2.0.0/16") })
	b.late = time.Second // a must not lose the paths of b, although a is back long before b
	start := time.Now()
	n := startNode(t, Options{}, config(
		loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002), loPeer("bad", "169.254.0.13", 65003)))
	eventually(t, 20*time.Second, "all sessions and their routes", func() bool {
		return bad.count() == 1 && n.state("bad").State == bgp.Established && a.has("10.2.0.0/16", "172.16.0.0/16") && b.has("10.1.0.0/16", "172.16.0.0/16")
	})
	// The next session of the bad peer bypasses the relay and kills GoBGP.
	bad.mu.Lock()
	bad.around = func(ctx context.Context) (net.Conn, error) {
		p := n.process()
		if p == nil {
			return nil, errEnded
		}
		return p.dial(ctx, addr("169.254.0.13"), addr("169.254.0.1"))
	}
	bad.up = func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.13"), []uint32{65003}, killer, prefix("10.3.0.0/16")))
	}
	first := bad.sessions[0]
	bad.mu.Unlock()
	first.conn.Close()

	eventually(t, 30*time.Second, "quarantine", func() bool { return n.state("bad").State == bgp.Quarantined })
	t.Logf("quarantined %v after the start", time.Since(start).Round(time.Millisecond))
	s := n.state("bad")
	if d := time.Until(s.NextTry); d < 50*time.Second || d > time.Minute || !strings.Contains(s.QuarantineReason, "panic") {
		t.Errorf("state %+v", s)
	}
	down := time.Now()
	eventually(t, 10*time.Second, "the others are back", func() bool {
		return n.state("a").State == bgp.Established && n.state("b").State == bgp.Established && n.state("a").TimesUp == 2
	})
	t.Logf("the others were back after %v", time.Since(down).Round(time.Millisecond))
	eventually(t, 5*time.Second, "our End-of-RIB", func() bool { return a.ends() == 2 && b.ends() == 2 })
	t.Logf("End-of-RIB was sent after %v", time.Since(down).Round(time.Millisecond))
	if !a.has("10.2.0.0/16", "172.16.0.0/16") || !b.has("10.1.0.0/16", "172.16.0.0/16") {
		t.Errorf("announced %v and %v", a.routes, b.routes)
	}
	n.get(func() {
		if n.restarted != 2 {
			t.Errorf("restarted %d times", n.restarted)
		}
		for _, h := range n.history {
			if (h.Name == "a" || h.Name == "b") && h.TimesUp > 0 && h.State != bgp.Established && !h.Restarting {
				t.Errorf("a report that drops paths: %+v", h)
			}
		}
	})
	for _, s := range []*speaker{a, b} {
		s.mu.Lock()
		if s.taken != 0 || !s.restart || len(s.notes) != 0 {
			t.Errorf("%v: %d withdrawals, restart bit %v, notifications %v", s.address, s.taken, s.restart, s.notes)
		}
		s.mu.Unlock()
	}
	// The bad peer keeps connecting.
	time.Sleep(2 * time.Second)
	if n.Starts() != 2 || bad.count() != 2 {
		t.Errorf("%d starts, %d sessions of the quarantined peer", n.Starts(), bad.count())
	}
	// Synced waits for the restart time of the bad peer.
	n.get(func() {
		if n.recorder.synced != 1 {
			t.Errorf("synced %d times", n.recorder.synced)
		}
	})
	// A reset admits the peer again: it connects first through the relay and then directly. This
	// second quarantine lasts two minutes.
	bad.mu.Lock()
	bad.up, bad.around = func(k *speakerSession) { k.send(endOfRIB) }, nil
	bad.mu.Unlock()
	if err := n.Reset(t.Context(), "bad", false); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the session is back", func() bool { return n.state("bad").State == bgp.Established })
	if n.Starts() != 2 {
		t.Errorf("%d starts", n.Starts())
	}
}

// TestKillersFiltered sends, in established sessions, all messages that make GoBGP v3.37.0 panic.
// GoBGP and the session of another peer must survive.
func TestKillersFiltered(t *testing.T) {
	var messages [][]byte
	for _, b := range panics(t) {
		messages = append(messages, message(msgUpdate, b...))
	}
	messages = append(messages,
		announcement(addr("169.254.0.13"), []uint32{65003}, killer, prefix("10.3.0.0/16")),
		message(9),
		message(msgOpen, 4, 0xfd, 0xeb, 0, 90, 1, 2, 3, 4, 0))
	bad := newSpeaker(t, "169.254.0.13", 65003, nil)
	good := newSpeaker(t, "169.254.0.11", 65001, nil)
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001), loPeer("bad", "169.254.0.13", 65003)))
	eventually(t, 20*time.Second, "sessions", func() bool {
		return n.state("a").State == bgp.Established && n.state("bad").State == bgp.Established
	})
	sum := func() uint64 {
		f := n.state("bad").Filtered
		s := f.Withdrawn + f.Resets
		for _, d := range f.Discarded {
			s += d.Count
		}
		return s
	}
	for i, m := range messages {
		before, sessions := n.state("bad").Filtered, bad.count()
		was := sum()
		bad.say(m)
		eventually(t, 20*time.Second, "message "+strconv.Itoa(i)+" is counted", func() bool { return sum() > was })
		if n.state("bad").Filtered.Resets > before.Resets {
			eventually(t, 20*time.Second, "the next session", func() bool { return bad.count() > sessions })
		}
	}
	if s := n.state("bad"); n.Starts() != 1 || s.State == bgp.Quarantined || s.Filtered.Resets == 0 || len(s.Filtered.Discarded) == 0 {
		t.Errorf("%d starts, %+v", n.Starts(), s)
	}
	good.mu.Lock()
	defer good.mu.Unlock()
	if len(good.sessions) != 1 || len(good.notes) != 0 {
		t.Errorf("the other has had %d sessions, notifications %v", len(good.sessions), good.notes)
	}
	// The peer's last error is the relay's reason, not GoBGP's.
	if s := n.state("bad"); !strings.Contains(s.LastError, "NOTIFICATION 5/3") {
		t.Errorf("last error %q", s.LastError)
	}
}

// TestChangeInRestart changes export policies while GoBGP defers its announcements because b owes
// an End-of-RIB.
func TestChangeInRestart(t *testing.T) {
	gate := make(chan struct{}, 2)
	gate <- struct{}{}
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) { k.send(endOfRIB) })
	newSpeaker(t, "169.254.0.12", 65002, func(k *speakerSession) {
		<-gate
		k.send(endOfRIB)
	})
	t.Cleanup(func() { close(gate) })
	c := config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002))
	c.Announce = append(c.Announce, prefix("10.9.0.0/16"))
	n := startNode(t, Options{}, c)
	eventually(t, 30*time.Second, "announcements", func() bool { return a.ends() == 1 && a.has("172.16.0.0/16", "10.9.0.0/16") })
	eventually(t, 30*time.Second, "synced", func() bool { return n.recorder.count() == 1 })
	n.process().kill()
	eventually(t, 30*time.Second, "back", func() bool {
		return n.Starts() == 2 && n.state("a").State == bgp.Established && n.state("b").State == bgp.Established
	})

	c.Peers[0].Export.Allow = []bgp.Rule{rule("172.16.0.0/16")}
	if err := n.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if err := n.Reset(t.Context(), "a", true); err != nil {
		t.Fatal(err)
	}
	c.Announce = c.Announce[1:]
	if err := n.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	time.Sleep(barrierWait) // a restart may take long
	gate <- struct{}{}
	// GoBGP's own deferral timer would end it after ten seconds.
	eventually(t, 5*time.Second, "End-of-RIB and nothing else", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.eors >= 2 && len(a.routes) == 0
	})
}

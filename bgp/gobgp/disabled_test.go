package gobgp

import (
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

// TestDisabled shuts one session down and takes it back, and has the BGP process and the daemon
// begin again meanwhile. Another session must not notice.
func TestDisabled(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.11"), []uint32{65001}, nil, prefix("10.1.0.0/16")), endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.12", 65002, func(k *speakerSession) { k.send(endOfRIB) })
	pa, pb := loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002)
	n := startNode(t, Options{}, config(pa, pb))
	apply := func(reason string, p ...bgp.Peer) {
		t.Helper()
		c := config(p...)
		c.Reason = reason
		if err := n.Apply(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 5*time.Second, "routes", func() bool { return b.has("10.1.0.0/16", "172.16.0.0/16") && a.has("172.16.0.0/16") })
	writes := n.Writes()

	off := pa
	off.Disabled = true
	apply("NET-1", off, pb)
	eventually(t, 5*time.Second, "NOTIFICATION", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return slices.Contains(a.notes, [2]byte{6, 2})
	})
	eventually(t, 5*time.Second, "withdrawal", func() bool { return b.has("172.16.0.0/16") && len(n.prefixes()) == 0 })
	eventually(t, 5*time.Second, "report", func() (ok bool) {
		n.get(func() { ok = n.recorder.peers["a"].State == bgp.Disabled })
		return ok
	})
	s := n.state("a")
	if s.State != bgp.Disabled || s.Since.IsZero() || s.LastError != "" || s.Restarting || s.Received != 0 || s.TimesUp != 1 {
		t.Errorf("state %+v", s)
	}
	if n.Writes() == writes {
		t.Error("nothing was written")
	}
	writes = n.Writes()
	apply("another", off, pb)
	if n.Writes() != writes || !n.state("a").Since.Equal(s.Since) {
		t.Errorf("another reason wrote %d times, state %+v", n.Writes()-writes, n.state("a"))
	}
	tries, sessions := a.count(), b.count()

	// After a restart of the daemon, Synced does not wait for the End-of-RIB of the peer.
	n.stop()
	start := time.Now()
	n = startNode(t, Options{Adopting: func() bool { return true }}, config(off, pb))
	eventually(t, 5*time.Second, "synced", func() bool { return n.recorder.count() == 1 })
	if took := time.Since(start); took > restartTime/2 {
		t.Errorf("synced after %v", took)
	}
	if a.count() != tries || b.count() != sessions+1 || n.state("a").State != bgp.Disabled {
		t.Errorf("%d sessions of a after %d, %d of b after %d, state %+v", a.count(), tries, b.count(), sessions, n.state("a"))
	}

	apply("", pa, pb)
	eventually(t, 5*time.Second, "routes", func() bool { return n.state("a").State == bgp.Established && b.has("10.1.0.0/16", "172.16.0.0/16") })
	if b.count() != sessions+1 || len(b.notes) > 0 {
		t.Errorf("b has had %d sessions and notifications %v", b.count(), b.notes)
	}
}

// TestDisabledThoughWrong checks that a peer is shut down although its configuration is wrong.
func TestDisabledThoughWrong(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, nil)
	p := loPeer("a", "169.254.0.11", 65001)
	n := startNode(t, Options{}, config(p))
	eventually(t, 5*time.Second, "session", func() bool { return a.has("172.16.0.0/16") })
	p.Disabled, p.Password.Name = true, "missing"
	if err := n.Apply(t.Context(), config(p)); err != nil {
		t.Error(err)
	}
	if s := n.state("a"); s.State != bgp.Disabled {
		t.Errorf("state %+v", s)
	}
}

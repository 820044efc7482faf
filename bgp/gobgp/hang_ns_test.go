package gobgp

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/bgp"
)

// TestHangs stops the BGP process. Its sessions must not seem to be established for longer than the
// daemon needs to find it out: the process is started again.
func TestHangs(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *speakerSession) {
		k.send(announcement(addr("169.254.0.11"), []uint32{65001}, nil, prefix("10.1.0.0/16")))
		k.send(endOfRIB)
	})
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001)))
	eventually(t, 20*time.Second, "the session", func() bool { return n.state("a").State == bgp.Established && n.process().beats.Load() })
	first := n.process()
	if err := unix.Kill(first.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	eventually(t, time.Minute, "another process", func() bool { return n.Starts() == 2 })
	t.Logf("started again after %v", time.Since(start).Round(time.Second))
	eventually(t, time.Minute, "the session is back", func() bool { s := n.state("a"); return s.State == bgp.Established && s.TimesUp == 2 })
	if a.taken != 0 {
		t.Errorf("%d prefixes were withdrawn", a.taken)
	}
	// A process that runs is left alone.
	time.Sleep((mostSilent + 3) * time.Second)
	if n.Starts() != 2 {
		t.Errorf("%d starts", n.Starts())
	}
}

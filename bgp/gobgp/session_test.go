package gobgp

import (
	"slices"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
)

func TestSession(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, func(k *talk) {
		k.send(announcement(addr("169.254.0.11"), []uint32{65001, 65100}, nil, prefix("10.1.0.0/16"), prefix("192.168.0.0/16")), endOfRIB)
	})
	b := newSpeaker(t, "169.254.0.12", 65002, nil)
	n := startNode(t, Options{}, config(loPeer("a", "169.254.0.11", 65001), loPeer("b", "169.254.0.12", 65002)))
	eventually(t, 10*time.Second, "sessions", func() bool {
		return n.state("a").State == bgp.Established && n.state("b").State == bgp.Established
	})
	eventually(t, 5*time.Second, "b is told", func() bool { return b.has("10.1.0.0/16", "172.16.0.0/16") })
	eventually(t, 5*time.Second, "a is told", func() bool { return a.has("172.16.0.0/16") })
	if got := n.prefixes(); !slices.Equal(got, []string{"10.1.0.0/16"}) {
		t.Errorf("routes %v", got)
	}
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

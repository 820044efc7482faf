package placement

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// TestPortlessWishes bounds what is remembered of those who try, and forgets them when they have given up.
func TestPortlessWishes(t *testing.T) {
	w := newWorld(t, 2)
	for i := range uint32(2 * maxPlacements) {
		source := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, 10<<24+i)))
		w.book.want(nat.Use{Pool: "p", Source: source, Service: nat.Service{Destination: web.Destination, Protocol: 50}}, 1, w.now)
	}
	if n := len(w.book.wants); n != maxPlacements {
		t.Errorf("%d wishes, want %d", n, maxPlacements)
	}
	w.book.Place(w.now)
	if n := len(w.book.placed); n > 2 {
		t.Errorf("%d sources are placed under two addresses", n)
	}
	w.book.Census(Census{}, w.now.Add(wanted+time.Second))
	if n := len(w.book.wants); n != 0 {
		t.Errorf("%d wishes after nothing came for %v", n, wanted)
	}
}

package placement

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// TestPortlessWishes checks that the record of sources that try is bounded, and that they are
// dropped when they have stopped trying.
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
		t.Errorf("%d wishes after no packet for %v", n, wanted)
	}
}

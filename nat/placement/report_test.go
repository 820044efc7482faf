package placement

import (
	"testing"
	"time"
)

// TestForecastEndsWithTheGrowth checks that a burst that has ended no longer predicts the
// exhaustion of ports.
func TestForecastEndsWithTheGrowth(t *testing.T) {
	w := newWorld(t, 1)
	at, from := w.config.Pools[0].Addresses[0].Address, addr("10.0.0.1")
	for i, n := range []uint32{10, 500, 500, 600, 550} {
		w.now = w.now.Add(10 * time.Second)
		w.book.Census(Census{Flows: map[Holding]uint32{{at, from, web}: n}}, w.now)
		u := w.book.Report(10).Uses[0]
		if grows := i == 1 || i == 3; grows != (u.ExhaustedIn > 0) || u.Growth <= 0 && i > 0 {
			t.Errorf("%d flows at census %d: exhausted in %v, growth %v", n, i, u.ExhaustedIn, u.Growth)
		}
	}
}

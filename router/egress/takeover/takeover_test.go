package takeover

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

var addresses = []egress.SharedAddress{{Address: netip.MustParseAddr("10.0.0.5"), Public: netip.MustParseAddr("203.0.113.5")}}

// world is another node that answers or does not, and a platform.
type world struct {
	mu      sync.Mutex
	answers map[string]bool
	fail    int // attempts that fail before one succeeds
	taken   []time.Duration
	start   time.Time
}

func (w *world) echo(ctx context.Context, way egress.Path) error {
	w.mu.Lock()
	ok := w.answers[way.To.String()]
	w.mu.Unlock()
	if ok {
		time.Sleep(time.Millisecond)
		return nil
	}
	<-ctx.Done()
	return ctx.Err()
}

func (w *world) Take(context.Context, []egress.SharedAddress) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fail > 0 {
		w.fail--
		return errors.New("the platform is busy")
	}
	w.taken = append(w.taken, time.Since(w.start))
	return nil
}

func (w *world) set(address string, answers bool) {
	w.mu.Lock()
	w.answers[address] = answers
	w.mu.Unlock()
}

func TestWatcher(t *testing.T) {
	config := egress.Takeover{
		Paths:    []egress.Path{{To: netip.MustParseAddr("169.254.80.1")}, {To: netip.MustParseAddr("169.254.81.1")}},
		Interval: 250 * time.Millisecond, Fall: 4, Addresses: addresses,
	}
	for name, k := range map[string]struct {
		script func(w *world)
		want   []time.Duration // when the addresses are taken, or up to an interval earlier
	}{
		"alive":           {func(w *world) { time.Sleep(time.Hour) }, nil},
		"one way is dead": {func(w *world) { w.set("169.254.80.1", false); time.Sleep(time.Hour) }, nil},
		"a short silence": {func(w *world) {
			time.Sleep(time.Minute)
			w.die()
			time.Sleep(600 * time.Millisecond)
			w.live()
			time.Sleep(time.Hour)
		}, nil},
		"it dies":            {func(w *world) { time.Sleep(time.Minute); w.die(); time.Sleep(time.Hour) }, []time.Duration{time.Minute + 1250*time.Millisecond}},
		"it dies early":      {func(w *world) { time.Sleep(2 * time.Second); w.die(); time.Sleep(time.Hour) }, []time.Duration{3250 * time.Millisecond}},
		"it was never there": {func(w *world) { w.die(); time.Sleep(time.Hour) }, []time.Duration{Grace + 250*time.Millisecond}},
		"it dies twice": {func(w *world) {
			time.Sleep(time.Minute)
			w.die()
			time.Sleep(time.Minute)
			w.live()
			time.Sleep(time.Minute)
			w.die()
			time.Sleep(time.Hour)
		}, []time.Duration{time.Minute + 1250*time.Millisecond, 3*time.Minute + 1250*time.Millisecond}},
		"the platform is busy": {func(w *world) { w.fail = 2; time.Sleep(time.Minute); w.die(); time.Sleep(time.Hour) },
			[]time.Duration{time.Minute + 1250*time.Millisecond + 3*time.Second}},
		"it is back before the platform works": {func(w *world) {
			w.fail = 5
			time.Sleep(time.Minute)
			w.die()
			time.Sleep(5 * time.Second)
			w.live()
			time.Sleep(time.Hour)
			w.die()
			time.Sleep(time.Hour)
		}, []time.Duration{time.Hour + time.Minute + 5*time.Second + 1250*time.Millisecond + 3*time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := &world{answers: map[string]bool{"169.254.80.1": true, "169.254.81.1": true}, start: time.Now()}
				ctx, cancel := context.WithCancel(t.Context())
				var failed, spared, saw int
				done := make(chan struct{})
				go func() {
					defer close(done)
					watcher := Watcher{Echo: w.echo, Mover: w, Log: slog.New(slog.DiscardHandler), Took: func(err error) {
						if err != nil {
							failed++
						}
					}, Spared: func() { spared++ }, Saw: func() { saw++ }}
					watcher.Run(ctx, config, false)
				}()
				k.script(w)
				cancel()
				<-done
				if want := strings.Count(name, "before the platform works"); spared != want {
					t.Errorf("spared %d times, want %d", spared, want)
				}
				// The other node is seen once in each of its lives, if it is seen.
				if want := map[string]int{"it was never there": 0, "it dies twice": 2}[name]; saw != want && (want != 0 || saw != 1 || name == "it was never there") {
					t.Errorf("seen %d times", saw)
				}
				if len(w.taken) != len(k.want) {
					t.Fatalf("taken at %v, want %v", w.taken, k.want)
				}
				for i, at := range w.taken {
					if at > k.want[i] || at < k.want[i]-config.Interval-10*time.Millisecond {
						t.Errorf("taken at %v, want %v or an interval before", at, k.want[i])
					}
				}
			})
		})
	}
}

func (w *world) die()  { w.set("169.254.80.1", false); w.set("169.254.81.1", false) }
func (w *world) live() { w.set("169.254.81.1", true) }

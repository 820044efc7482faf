package router

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/tunnel"
)

// TestEventsOverRestarts: a node records its documents and tunnels. After a restart the sequence
// goes on, and a tunnel that was up before and still is has no event.
func TestEventsOverRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir := newMachine(t), t.TempDir()
		run := func(work func(r *Router)) []event.Event {
			log, err := event.Open(filepath.Join(dir, "events.log"), time.Now)
			if err != nil {
				t.Fatal(err)
			}
			m.events = log
			from := log.Newest()
			r, stop := m.boot(dir)
			if work != nil {
				work(r)
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			stop()
			if err := log.Close(); err != nil {
				t.Fatal(err)
			}
			got, _, whole := log.After(from, 1000, func(event.Event) bool { return true })
			if !whole {
				t.Errorf("the events after %d are not whole: %v", from, got)
			}
			return got
		}
		names := func(all []event.Event) string {
			var out []string
			for _, e := range all {
				if !strings.HasPrefix(e.Type, "Condition") && !strings.HasPrefix(e.Type, "Session") {
					out = append(out, e.Type+" "+e.Object)
				}
			}
			slices.Sort(out[1 : len(out)-1]) // of the middle, the order does not matter
			return strings.Join(out, ", ")
		}
		up := func(name string, is bool) {
			state := tunnel.State{Name: name, Kind: tunnel.KindIPsec, Status: tunnel.Down, LastError: "no answer"}
			if is {
				state.Status, state.TimesUp = tunnel.Up, 1
			}
			synctest.Wait() // the driver runs
			m.mu.Lock()
			report := m.report[tunnel.KindIPsec]
			m.mu.Unlock()
			report(state)
		}
		first := run(func(r *Router) {
			accept(t, r, base)
			up("a", true)
			up("b", true)
		})
		if got, want := names(first), "NodeStarted node, Applied node, DocumentAccepted node, TunnelUp tunnel/a, TunnelUp tunnel/b, NodeStopped node"; got != want {
			t.Errorf("the first run: %s, want %s", got, want)
		}
		second := run(func(*Router) {
			up("a", true)
			up("b", false) // and up when the node looks at it again
		})
		if got, want := names(second), "NodeStarted node, TunnelDown tunnel/b, TunnelUp tunnel/b, NodeStopped node"; got != want {
			t.Errorf("the second run: %s, want %s", got, want)
		}
		if want := first[len(first)-1].Seq + 1; second[0].Seq != want {
			t.Errorf("the second run begins with %d, want %d", second[0].Seq, want)
		}
		third := run(func(r *Router) {
			accept(t, r, strings.Replace(base, "{name: b, tunnel: b, asn: 65002}", "{name: c, tunnel: b, asn: 65002}", 1))
		})
		if got := names(third); !strings.Contains(got, "DocumentAccepted node") || !strings.Contains(got, "Applied node") {
			t.Errorf("the third run: %s", got)
		}
	})
}

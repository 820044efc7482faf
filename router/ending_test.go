package router

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/test/crowd"
)

// TestFlowsEndWithTheirAddress checks that flows end at once when a document is applied without a
// confirmation, and otherwise only when it is confirmed, because it may be rolled back.
func TestFlowsEndWithTheirAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, dir, table := newMachine(t), t.TempDir(), &crowd.Table{}
		m.flows = table
		r, stop := m.boot(dir)
		defer func() { stop() }()
		flow := func(as string) conntrack.Flow {
			partner := netip.MustParseAddrPort("198.51.100.7:443")
			return conntrack.Flow{
				Original: conntrack.Tuple{Source: netip.MustParseAddrPort("10.7.0.1:1000"), Destination: partner},
				Reply:    conntrack.Tuple{Source: partner, Destination: netip.MustParseAddrPort(as + ":1000")},
			}
		}
		table.Flows = []conntrack.Flow{flow("10.9.0.5"), flow("10.9.0.6")}
		both := strings.Replace(base, "{address: 10.9.0.5}", "{address: 10.9.0.5}, {address: 10.9.0.6}", 1)
		left := func(what string, want int) {
			t.Helper()
			synctest.Wait()
			table.Lock()
			defer table.Unlock()
			if len(table.Flows) != want {
				t.Fatalf("%s: %d flows are left, want %d", what, len(table.Flows), want)
			}
		}
		probation := func(doc string) uint64 {
			g, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, text(doc))
			if err != nil {
				t.Fatal(err)
			}
			return g
		}
		accept(t, r, both)
		left("at first", 2)
		probation(base)
		left("not yet confirmed", 2)
		time.Sleep(2 * time.Minute)
		left("rolled back", 2)
		g := probation(base)
		left("not yet confirmed again", 2)
		if err := r.documents.Confirm(g); err != nil {
			t.Fatal(err)
		}
		left("confirmed", 1)
		probation(strings.Replace(base, "10.9.0.5", "10.9.0.7", 1))
		left("another address on trial", 1)
		time.Sleep(2 * time.Minute)
		left("rolled back again", 1)

		other := strings.Replace(base, "10.9.0.5", "10.9.0.6", 1)
		probation(other)
		left("another address on trial", 1)
		table.Lock()
		table.Flows = append(table.Flows, flow("10.9.0.6"))
		table.Unlock()
		stop()
		time.Sleep(2 * time.Minute)
		r, stop = m.boot(dir)
		left("rolled back at start", 1)
		g = probation(other)
		left("another address on trial again", 1)
		stop()
		r, stop = m.boot(dir)
		left("another address on trial, and a restart", 1)
		if err := r.documents.Confirm(g); err != nil {
			t.Fatal(err)
		}
		left("confirmed after a restart", 0)
		table.Lock()
		table.Flows = append(table.Flows, flow("10.9.0.6"))
		table.Unlock()
		accept(t, r, strings.Replace(base, "10.9.0.5", "10.9.0.8", 1))
		left("another address for good", 0)
	})
}

// TestFlowsEndThoughDocumentsCome checks that flows of addresses that an earlier document removed
// end also when another document is applied instead.
func TestFlowsEndThoughDocumentsCome(t *testing.T) {
	changed := strings.Replace(base, "10.9.0.5", "10.9.0.6", 1)
	for name, change := range map[string]func(m *machine, r *Router){
		"the same pools for good": func(_ *machine, r *Router) {
			if _, _, err := r.documents.Apply(context.Background(), document.Change{Author: "tester", Confirm: time.Minute}, text(changed)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			accept(t, r, strings.Replace(changed, "{name: b, ipsec", "{name: b, mtu: 1400, ipsec", 1))
		},
		"not applied": func(m *machine, r *Router) {
			m.mu.Lock()
			m.unruly = errors.New("no")
			m.mu.Unlock()
			accept(t, r, changed)
			accept(t, r, strings.Replace(base, "10.9.0.5", "10.9.0.7", 1))
			m.mu.Lock()
			m.unruly = nil
			m.mu.Unlock()
			time.Sleep(2 * lastRetry)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, table := newMachine(t), &crowd.Table{}
				m.flows = table
				r, stop := m.boot(t.TempDir())
				defer stop()
				accept(t, r, base)
				partner := netip.MustParseAddrPort("198.51.100.7:443")
				table.Lock()
				table.Flows = []conntrack.Flow{{
					Original: conntrack.Tuple{Source: netip.MustParseAddrPort("10.7.0.1:1000"), Destination: partner},
					Reply:    conntrack.Tuple{Source: partner, Destination: netip.MustParseAddrPort("10.9.0.5:1000")},
				}}
				table.Unlock()
				change(m, r)
				synctest.Wait()
				table.Lock()
				defer table.Unlock()
				if len(table.Flows) > 0 {
					t.Error("a flow is left with an address that is in no pool")
				}
			})
		})
	}
}

package router

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/test/crowd"
)

// TestFlowsBeginAgain checks that a document with another server ends flows without a connection
// end that go to the former one, also when a document between the two was never applied, and also
// before it is confirmed.
func TestFlowsBeginAgain(t *testing.T) {
	forward := func(to string) string {
		return strings.Replace(base, "policies: [", `policies: [{name: dns, action: dnat, pool: p, sources: [198.51.100.0/24], protocol: udp, ports: ["53"], to: "`+to+`"}, `, 1)
	}
	synctest.Test(t, func(t *testing.T) {
		m, table := newMachine(t), &crowd.Table{}
		m.flows = table
		r, stop := m.boot(t.TempDir())
		defer stop()
		accept(t, r, forward("172.16.1.8:53"))
		synctest.Wait()
		for _, protocol := range []uint8{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			client, server := netip.MustParseAddrPort("198.51.100.7:1000"), netip.MustParseAddrPort("172.16.1.8:53")
			table.Flows = append(table.Flows, conntrack.Flow{Protocol: protocol,
				Original: conntrack.Tuple{Source: client, Destination: netip.MustParseAddrPort("10.9.0.5:53")}, Reply: conntrack.Tuple{Source: server, Destination: client}})
		}
		m.mu.Lock()
		m.unruly = errors.New("no")
		m.mu.Unlock()
		accept(t, r, strings.Replace(forward("172.16.1.8:53"), "10.7.0.0", "10.8.0.0", 1))
		next := forward("172.16.1.9:53")
		_, changes, _, err := r.documents.Preview(t.Context(), netip.Addr{}, text(next))
		if err != nil {
			t.Fatal(err)
		}
		if i := slices.IndexFunc(changes, func(c plan.Change) bool { return c.Kind == "policy" && c.Name == "dns" }); i < 0 || changes[i].Interrupts != "1 flow to 172.16.1.8:53 ends" {
			t.Errorf("the plan has %+v", changes)
		}
		if _, _, err := r.documents.Apply(t.Context(), document.Change{Author: "tester", Confirm: time.Hour}, text(next)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(table.Flows) != 2 {
			t.Fatalf("%d flows before the document is applied, want 2", len(table.Flows))
		}
		m.mu.Lock()
		m.unruly = nil
		m.mu.Unlock()
		time.Sleep(2 * lastRetry)
		synctest.Wait()
		table.Lock()
		defer table.Unlock()
		if len(table.Flows) != 1 || table.Flows[0].Protocol != unix.IPPROTO_TCP {
			t.Errorf("flows that are left: %+v, want the one of TCP", table.Flows)
		}
	})
}

package router

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/test/root"
)

// TestSnapshot checks that metrics see every object of a large document: 2,000 tunnels, each with a
// peer, and 10,000 policies. It logs the time that a snapshot takes.
func TestSnapshot(t *testing.T) {
	root.NeedTime(t)
	m := newMachine(t)
	r, stop := m.boot(t.TempDir())
	defer stop()
	var tunnels, peers, policies strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&tunnels, "- {name: t%d, ipsec: {remoteAddress: 203.%d.%d.1, psk: k}}\n", i, 1+i/250, i%250)
		fmt.Fprintf(&peers, "- {name: t%d, tunnel: t%[1]d, asn: 65001, maxPrefixes: %d}\n", i, 100+i)
	}
	for i := range 10_000 {
		fmt.Fprintf(&policies, "  - {name: p%d, sources: [10.%d.%d.0/24], pool: p}\n", i, i/250, i%250)
	}
	_, _, err := r.documents.Apply(t.Context(), document.Change{Author: "test"}, text("node: {name: n, asn: 64620}\nunderlay: {interface: eth0, address: 10.9.0.4}\ntunnels:\n"+
		tunnels.String()+"peers:\n"+peers.String()+"egress:\n  pools: [{name: p, addresses: [{address: 10.9.0.5}, {address: 10.9.0.6}]}]\n  policies:\n"+policies.String()))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); !r.applier.Settled(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the document is not applied")
		}
	}
	began := time.Now()
	s := r.Snapshot()
	t.Logf("a snapshot takes %v", time.Since(began))
	if len(s.Tunnels) != 2000 || len(s.Peers) != 2000 || len(s.Limits) != 2000 || len(s.Policies) != 10_000 || s.Limits["t7"] != 107 {
		t.Errorf("%d tunnels, %d peers, %d limits, %d policies", len(s.Tunnels), len(s.Peers), len(s.Limits), len(s.Policies))
	}
	if s.Status.Generation != 1 || len(s.Pools) != 1 || len(s.Pools[0].Members) != 2 || len(s.Drops) == 0 || s.Ports == nil {
		t.Errorf("status %v, pools %v, drops %v, ports %v", s.Status, s.Pools, s.Drops, s.Ports)
	}
	for i, p := range s.Pools[0].Members {
		if p.Address != []string{"10.9.0.5", "10.9.0.6"}[i] {
			t.Errorf("address %d of the pool is %s", i, p.Address)
		}
	}
	if names := []string{s.Tunnels[0].Name, s.Peers[0].Name}; !slices.Equal(names, []string{"t0", "t0"}) {
		t.Errorf("the first ones are %q", names)
	}
}

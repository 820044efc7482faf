package report

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/bell"
	"github.com/isthmus-net/isthmus/router/capability"
	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/router/egress/dns"
	"github.com/isthmus-net/isthmus/router/egress/health"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/test/crowd"
)

// TestUseOfNames: an address of a name stays while a flow of a source of the policy goes to it, and
// then goes with a note in `get names` and in the log of what the guard drops.
func TestUseOfNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		at := func(d time.Duration) string { return begin.Add(d).UTC().Format(time.RFC3339Nano) }
		file := filepath.Join(t.TempDir(), "names.json")
		known := fmt.Sprintf(`{"*.a.example": {"198.51.100.1": %q, "198.51.100.2": %[1]q, "198.51.100.3": %[1]q}, "*.b.example": {"198.51.100.1": %[1]q}}`, at(time.Minute))
		if err := os.WriteFile(file, []byte(known), 0o600); err != nil {
			t.Fatal(err)
		}
		to := func(source, destination string) conntrack.Flow {
			return conntrack.Flow{Protocol: 6, Original: conntrack.Tuple{Source: netip.MustParseAddrPort(source), Destination: netip.MustParseAddrPort(destination)}}
		}
		table := &crowd.Table{Flows: []conntrack.Flow{to("10.1.0.1:1000", "198.51.100.1:443"), to("10.2.0.1:1000", "198.51.100.2:443"), to("198.51.100.3:443", "10.1.0.1:1000")}}
		var log bytes.Buffer
		prefixes := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
		const usePace = 10 * time.Second // in which router/observe reads the table
		hold := 5 * time.Minute
		target := plan.Target{Names: egress.DNS{Floor: time.Second, Hold: hold}, NAT: nat.Config{Policies: []nat.Policy{
			{Name: "a", Action: nat.SNAT, Sources: prefixes("10.1.0.0/16"), Names: []string{"*.a.example"}},
			{Name: "b", Action: nat.SNAT, Sources: prefixes("10.2.0.0/16"), Names: []string{"*.b.example"}},
		}}}
		names := dns.New(dns.Options{File: file, Changed: func(bool) {}, Log: slog.New(slog.DiscardHandler)})
		names.Set(target.Names, live.Of(&target, live.Facts{}).Names, nil)
		logger := slog.New(slog.NewTextHandler(&log, nil))
		o := observe.New(observe.Options{Machine: machine{}, Flows: table, Health: health.New(health.Options{}), Proxies: health.New(health.Options{}), Names: names, Bell: &bell.Bell{}, Log: logger})
		o.Use(nil, target)
		applier := apply.New(apply.Options{Facts: o.Facts, Log: logger})
		applier.Set(apply.Wanted{Mode: apply.Carry, Target: target})
		domains := capability.Names{Resolver: names, Observed: o}
		r := New(Options{Observed: o, Applied: applier, Log: logger})
		ctx, cancel := context.WithCancel(t.Context())
		defer func() { cancel(); synctest.Wait() }()
		go names.Run(ctx)
		go o.WatchUse(ctx)
		want := func(a, b string) {
			t.Helper()
			synctest.Wait()
			if got := fmt.Sprint(names.Addresses("*.a.example"), names.Addresses("*.b.example")); got != a+" "+b {
				t.Errorf("after %v: %s, want %s %s", time.Since(begin), got, a, b)
			}
		}
		want("[198.51.100.1 198.51.100.2 198.51.100.3]", "[198.51.100.1]")
		time.Sleep(time.Hour)
		// what is used by others, for another name, or by answers, does not count
		want("[198.51.100.1]", "[]")

		// The file knows it, too: a new daemon has it.
		data, err := os.ReadFile(file)
		var kept map[string]map[string]time.Time
		if err := errors.Join(err, json.Unmarshal(data, &kept)); err != nil || kept["*.a.example"]["198.51.100.1"].Before(time.Now()) {
			t.Errorf("after an hour the file has %s, %v", data, err)
		}

		table.Lock()
		table.Flows = nil
		table.Unlock()
		time.Sleep(hold - usePace - time.Second)
		want("[198.51.100.1]", "[]")
		time.Sleep(usePace + time.Second)
		want("[]", "[]")

		f := nat.Flow{Source: netip.MustParseAddr("10.1.0.1"), Destination: netip.MustParseAddr("198.51.100.1"), Protocol: 6, Port: 443}
		r.dropped(nat.DropGuard, f)
		if text := log.String(); !strings.Contains(text, "198.51.100.1 was an address of *.a.example until") || !strings.Contains(text, "nameHold") || strings.Contains(text, "b.example") {
			t.Errorf("the log says %s", text)
		}
		log.Reset()
		f.Destination = netip.MustParseAddr("198.51.100.9")
		r.dropped(nat.DropGuard, f)
		if strings.Contains(log.String(), "was an address") {
			t.Errorf("of another address the log says %s", log.String())
		}
		got := map[string]string{}
		for _, n := range domains.List() {
			for _, g := range n.Gone {
				got[n.Name] += g.Address + " "
			}
		}
		if got["*.a.example"] != "198.51.100.1 " { // the others went an hour ago and more
			t.Errorf("just gone: %v", got)
		}
	})
}

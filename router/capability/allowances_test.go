package capability

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// TestAllowances follows the counters of two interfaces: when a condition begins, goes on and ends.
func TestAllowances(t *testing.T) {
	target := plan.Target{
		Underlay:    spec.Underlay{Interface: "eth0"},
		Tunnels:     []tunnel.Config{{Name: "site", Interface: "t-site"}},
		Attachments: []plan.Attachment{{Name: "lan", Interface: "eth1"}, {Name: "same", Interface: "eth0"}, {Name: "site", Interface: "t-site"}},
	}
	counters := map[string]map[string]uint64{"eth0": {"bw_out": 7, "pps": 0, "conntrack": 5, "new_kind": 9}}
	var failure error
	var reads []string
	rings := 0
	a := NewAllowances(AllowanceOptions{
		Target: func() plan.Target { return target }, Changed: func() { rings++ }, Log: slog.New(slog.DiscardHandler),
		Read: func(iface string) (map[string]uint64, error) {
			reads = append(reads, iface)
			out := map[string]uint64{}
			for k, n := range counters[iface] {
				out[k] = n
			}
			return out, failure
		},
	})
	start := time.Unix(1_700_000_000, 0)
	now := start
	look := func(after time.Duration) string {
		t.Helper()
		now = now.Add(after)
		a.look(now)
		var all []string
		for _, c := range a.conditions(now) {
			all = append(all, c.Type+": "+c.Message)
		}
		return strings.Join(all, "\n")
	}
	// Counters that grew before the start are not news.
	if got := look(0); got != "" {
		t.Errorf("the first look reports %s", got)
	}
	if want := []string{"eth0", "eth1"}; !slices.Equal(reads, want) {
		t.Errorf("read %v, want %v", reads, want)
	}
	want := []AllowanceCounter{{"eth0", "bw_out", 7}, {"eth0", "pps", 0}, {"eth0", "conntrack", 5}}
	if got := a.Counters(); !slices.Equal(got, want) {
		t.Errorf("counters %v, want %v", got, want)
	}
	counters["eth0"]["bw_out"], counters["eth0"]["pps"] = 10, 2
	if got := look(allowancePace); !strings.Contains(got, "NICAllowance: interface eth0: the cloud held back or dropped packets beyond its allowance bw_out (3 packets), pps (2 packets): choose a larger instance type") {
		t.Errorf("after growth: %s", got)
	}
	counters["eth0"]["pps"] = 4
	counters["eth1"] = map[string]uint64{"linklocal": 1000}
	if got := look(allowanceTold - time.Second); !strings.Contains(got, "bw_out (3 packets), pps (4 packets)") || strings.Contains(got, "eth1") {
		t.Errorf("after more: %s", got)
	}
	if since := a.conditions(now)[0].Since.AsTime(); !since.Equal(start.Add(allowancePace)) {
		t.Errorf("since %v", since)
	}
	failure = errors.New("no")
	if got := look(2 * time.Second); strings.Contains(got, "bw_out") || !strings.Contains(got, "pps (4 packets)") {
		t.Errorf("bw_out did not grow for %v: %s", allowanceTold, got)
	}
	if got := a.Counters(); len(got) != 4 {
		t.Errorf("a failed read changed the counters to %v", got)
	}
	failure = nil
	if got := look(allowanceTold); got != "" {
		t.Errorf("the condition did not end: %s", got)
	}
	counters["eth0"] = map[string]uint64{"pps": 1} // another machine's adapter
	if got := look(allowancePace); got != "" {
		t.Errorf("a smaller counter: %s", got)
	}
	counters["eth0"]["pps"]++
	if got := look(allowancePace); !strings.Contains(got, "pps (1 packets)") {
		t.Errorf("after growth from 1: %s", got)
	}
	target.Underlay.Interface, target.Attachments = "", nil
	if got := look(allowancePace); got != "" || len(a.Counters()) != 0 {
		t.Errorf("without a document: %s, %v", got, a.Counters())
	}
	if rings != 5 { // begin, bw_out ends, pps ends, begin, document removed
		t.Errorf("%d changes were reported", rings)
	}
}

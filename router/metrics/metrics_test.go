package metrics

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/report"
	"github.com/isthmus-net/isthmus/test/golden"
)

// fake is a node in a fixed state. Nil: reading it panics.
type fake struct{ state *report.Snapshot }

func (f *fake) Snapshot() report.Snapshot { return *f.state }

func at(s int64) *timestamppb.Timestamp { return &timestamppb.Timestamp{Seconds: 1_700_000_000 + s} }

// small is a node with something of everything.
func small() *report.Snapshot {
	return &report.Snapshot{
		Status: &isthmusv1.SystemStatus{
			Generation: 7, AppliedGeneration: 6, Started: at(0),
			Conditions: []*isthmusv1.Condition{condition.NotApplied.Error(time.Time{}, "x"), condition.PoolDegraded.Warning(time.Time{}, "x")},
		},
		Tunnels: []*isthmusv1.TunnelStatus{
			{Name: "aws-1", State: "up", RxBytes: 1 << 40, TxBytes: 2, RxPackets: 3, TxPackets: 4, Keyed: at(5), TimesUp: 6, Algorithms: "AES_GCM_16_256"},
			{Name: "site", State: "down", RemoteAddress: "203.0.113.9", LastError: "no answer"},
		},
		Peers: []*isthmusv1.PeerStatus{
			{Name: "aws-1", State: "established", TimesUp: 1, PrefixesReceived: 9, PrefixesAccepted: 8, PrefixesAnnounced: 3, PrefixesHeldBack: 1,
				Conditions: []*isthmusv1.Condition{condition.PrefixesHeldBack.Warning(time.Time{}, "x")}},
			{Name: "site", State: "quarantined"},
		},
		Limits: map[string]uint32{"aws-1": 100},
		IPv4:   report.RouteCount{Installed: 8, Missing: 1, Withheld: 1}, IPv6: report.RouteCount{Installed: 2},
		Policies:   []*isthmusv1.PolicyStatus{{Name: "all", Flows: 12, Bytes: 720, Sources: []string{"10.0.0.0/8"}}},
		Drops:      []*isthmusv1.Drop{{Reason: "guard", Packets: 2}, {Reason: "input", Packets: 5}},
		Allowances: []report.Allowance{{Interface: "eth0", Kind: "bw_out", Packets: 12}, {Interface: "eth0", Kind: "conntrack"}},
		Exports:    []report.Export{exported("siem", 7, 2)},
		Pools:      []*isthmusv1.PoolStatus{{Name: "partner", Members: []*isthmusv1.PoolMember{{Health: "healthy"}, {Health: "down"}, {Health: "healthy"}}}},
		Ports: &isthmusv1.ListPortsResponse{
			Ports: []*isthmusv1.PortUse{
				{Pool: "partner", Address: "192.0.2.10", Destination: "198.51.100.7", Percent: 12.5}, {Pool: "partner", Address: "192.0.2.10", Destination: "198.51.100.8", Percent: 50},
			},
			Addresses: []*isthmusv1.AddressUse{{Pool: "partner", Address: "192.0.2.10", Flows: 40_000}, {Pool: "partner", Address: "192.0.2.11"}},
			Table:     &isthmusv1.ConnectionTable{Entries: 40_100, Limit: 262_144, InsertFailed: 3},
		},
	}
}

func options(s *report.Snapshot) Options {
	return Options{Source: &fake{s}, Log: slog.New(slog.DiscardHandler), Version: "v1", Revision: "abc", Go: "go1", Expiries: func() map[string]time.Time {
		return map[string]time.Time{"authority": time.Unix(2_000_000_000, 0), "client": time.Unix(1_800_000_000, 0)}
	}}
}

// scrape returns the answer of a handler in the text format of Prometheus.
func scrape(t testing.TB, h http.Handler) string {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != http.StatusOK || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Fatalf("status %d, %v: %s", w.Code, w.Header(), w.Body)
	}
	return w.Body.String()
}

// seriesOf returns the series of a scrape with their values.
func seriesOf(text string) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "} "); ok {
			out[name+"}"] = value
		} else if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			out[name] = value
		}
	}
	return out
}

func TestExposition(t *testing.T) {
	golden.Check(t, "testdata/exposition.txt", scrape(t, NewHandler(options(small()))))
}

// TestOpenMetrics checks that a client that asks for OpenMetrics gets it to its end.
func TestOpenMetrics(t *testing.T) {
	r := httptest.NewRequest("GET", "/metrics", nil)
	r.Header.Set("Accept", "application/openmetrics-text;version=1.0.0")
	w := httptest.NewRecorder()
	NewHandler(options(small())).ServeHTTP(w, r)
	if !strings.HasSuffix(w.Body.String(), "# EOF\n") || !strings.Contains(w.Body.String(), "\n# TYPE isthmus_tunnel_receive_bytes counter\n") {
		t.Errorf("%s", w.Body)
	}
}

// TestPromtool has Prometheus judge names and texts.
func TestPromtool(t *testing.T) {
	c := exec.Command(promtool(t), "check", "metrics")
	c.Stdin = strings.NewReader(scrape(t, NewHandler(options(small()))))
	if out, err := c.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v: %s", err, out)
	}
}

func promtool(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed: run test/setup")
	}
	return path
}

// TestEveryMetricIsThere checks that each metric of the table has a series, and each series a
// metric.
func TestEveryMetricIsThere(t *testing.T) {
	seen := map[string]bool{}
	for s := range seriesOf(scrape(t, NewHandler(options(small())))) {
		name, _, _ := strings.Cut(s, "{")
		seen[name] = true
	}
	for _, m := range All {
		if !seen[m.Name] {
			t.Errorf("%s has no series", m.Name)
		}
		delete(seen, m.Name)
	}
	if len(seen) > 0 {
		t.Errorf("not in the table: %v", seen)
	}
}

// TestLabelsAreBounded checks that the labels of all series have one of their possible values, or a
// name of the document.
func TestLabelsAreBounded(t *testing.T) {
	named := []string{"aws-1", "site", "all", "partner", "192.0.2.10", "192.0.2.11", "eth0", "siem", "v1", "abc", "go1"}
	for s := range seriesOf(scrape(t, NewHandler(options(small())))) {
		name, labels, _ := strings.Cut(strings.TrimSuffix(s, "}"), "{")
		m := lookup(name)
		for part := range strings.SplitSeq(labels, `",`) {
			if part == "" {
				continue
			}
			label, value, _ := strings.Cut(strings.TrimSuffix(part, `"`), `="`)
			i := slices.IndexFunc(m.Labels, func(l Label) bool { return l.Name == label })
			if values := m.Labels[i].Values; values == nil && !slices.Contains(named, value) || values != nil && !slices.Contains(values, value) {
				t.Errorf("%s: %q is not a possible value of %s", s, value, label)
			}
		}
	}
}

func lookup(name string) *Metric {
	if i := slices.IndexFunc(All, func(m *Metric) bool { return m.Name == name }); i >= 0 {
		return All[i]
	}
	return nil
}

// TestOneState checks that each tunnel and each peer is in one state, whichever that is.
func TestOneState(t *testing.T) {
	sums := func(s *report.Snapshot) map[string]int {
		out := map[string]int{}
		for one, value := range seriesOf(scrape(t, NewHandler(options(s)))) {
			name, state, ok := strings.Cut(one, `",state="`)
			if !ok || !strings.HasPrefix(name, "isthmus_tunnel_state") && !strings.HasPrefix(name, "isthmus_bgp_peer_state") {
				continue
			}
			if value == "1" {
				out[name+" "+strings.TrimSuffix(state, `"}`)]++
			} else if value != "0" {
				t.Errorf("%s is %s", one, value)
			}
		}
		return out
	}
	for _, state := range report.TunnelStates() {
		s := small()
		s.Tunnels, s.Peers = []*isthmusv1.TunnelStatus{{Name: "x", State: state}}, nil
		if got := sums(s); len(got) != 1 || got[`isthmus_tunnel_state{tunnel="x`+" "+state] != 1 {
			t.Errorf("tunnel %s: %v", state, got)
		}
	}
	for _, state := range report.PeerStates() {
		s := small()
		s.Tunnels, s.Peers = nil, []*isthmusv1.PeerStatus{{Name: "x", State: state}}
		if got := sums(s); len(got) != 1 || got[`isthmus_bgp_peer_state{peer="x`+" "+state] != 1 {
			t.Errorf("peer %s: %v", state, got)
		}
	}
}

// TestRekey checks that new keys, another address of the peer and other states add no series.
func TestRekey(t *testing.T) {
	s := small()
	h := NewHandler(options(s))
	before := seriesOf(scrape(t, h))
	s.Tunnels[0] = &isthmusv1.TunnelStatus{
		Name: "aws-1", State: "connecting", RxBytes: 1<<40 + 1, Keyed: at(4000), Established: at(3000), TimesUp: 7, RemoteAddress: "203.0.113.77:4500", Algorithms: "AES_CBC_256", Interface: "t-other", Id: 490002,
	}
	s.Peers[0] = &isthmusv1.PeerStatus{Name: "aws-1", State: "idle", RouterId: "192.0.2.77", LastError: "x"}
	s.Status.Conditions = nil
	after := seriesOf(scrape(t, h))
	for one := range after {
		if _, ok := before[one]; !ok {
			t.Errorf("a new series: %s", one)
		}
	}
	if len(before) != len(after) {
		t.Errorf("%d series, before %d", len(after), len(before))
	}
}

// TestSeriesOfAnObject checks the bounds of docs/metrics.md.
func TestSeriesOfAnObject(t *testing.T) {
	count := func(s *report.Snapshot) int { return len(seriesOf(scrape(t, NewHandler(options(s))))) }
	base := count(small())
	for what, c := range map[string]struct {
		bound int
		add   func(*report.Snapshot)
	}{
		"tunnel": {maxTunnelSeries, func(s *report.Snapshot) {
			s.Tunnels = append(s.Tunnels, &isthmusv1.TunnelStatus{Name: "more", Keyed: at(0)})
		}},
		"peer": {maxPeerSeries, func(s *report.Snapshot) {
			s.Peers, s.Limits["more"] = append(s.Peers, &isthmusv1.PeerStatus{Name: "more"}), 1
		}},
		"policy": {maxPolicySeries, func(s *report.Snapshot) { s.Policies = append(s.Policies, &isthmusv1.PolicyStatus{Name: "more"}) }},
		"address": {maxAddressSeries, func(s *report.Snapshot) {
			s.Pools = append(s.Pools, &isthmusv1.PoolStatus{Name: "more"})
			s.Ports.Addresses = append(s.Ports.Addresses, &isthmusv1.AddressUse{Pool: "more", Address: "x"})
		}},
	} {
		s := small()
		c.add(s)
		if n := count(s) - base; n < 1 || n > c.bound {
			t.Errorf("a %s has %d series, the bound is %d", what, n, c.bound)
		}
	}
}

// TestPanic checks that a fault in reading the state fails a scrape and not the daemon.
func TestPanic(t *testing.T) {
	o := options(nil)
	w := httptest.NewRecorder()
	NewHandler(o).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != http.StatusInternalServerError || !strings.Contains(w.Body.String(), "panic") {
		t.Errorf("status %d: %s", w.Code, w.Body)
	}
}

// TestBadName checks that a name that cannot be a label does not cost the scrape.
func TestBadName(t *testing.T) {
	s := small()
	s.Tunnels[1].Name = "\xff"
	if got := scrape(t, NewHandler(options(s))); !strings.Contains(got, `isthmus_tunnel_state{tunnel="?",state="down"} 1`) {
		t.Errorf("%s", got)
	}
}

// large is the node of the figure in docs/benchmarks.md: 2,000 tunnels with a peer each, and 10,000
// policies.
func large() *report.Snapshot {
	s := small()
	s.Tunnels, s.Peers, s.Policies = nil, nil, nil
	for i := range 2000 {
		name := fmt.Sprintf("tunnel-%04d", i)
		s.Tunnels = append(s.Tunnels, &isthmusv1.TunnelStatus{Name: name, State: "up", RxBytes: uint64(i) << 30, TxBytes: uint64(i) << 29, RxPackets: uint64(i) << 20, TxPackets: uint64(i) << 19, Keyed: at(int64(i)), TimesUp: 1})
		s.Peers = append(s.Peers, &isthmusv1.PeerStatus{Name: name, State: "established", PrefixesReceived: 5, PrefixesAccepted: 5, PrefixesAnnounced: 9})
		s.Limits[name] = 100
	}
	for i := range 10_000 {
		s.Policies = append(s.Policies, &isthmusv1.PolicyStatus{Name: fmt.Sprintf("policy-%05d", i), Flows: uint64(i), Bytes: uint64(i) * 60})
	}
	return s
}

// BenchmarkScrape is a scrape of large, with and without compression.
func BenchmarkScrape(b *testing.B) {
	h := NewHandler(options(large()))
	for _, encoding := range []string{"", "gzip"} {
		b.Run("encoding="+encoding, func(b *testing.B) {
			r := httptest.NewRequest("GET", "/metrics", nil)
			r.Header.Set("Accept-Encoding", encoding)
			size := 0
			for b.Loop() {
				w := &counting{header: http.Header{}}
				h.ServeHTTP(w, r)
				size = w.bytes
			}
			b.ReportMetric(float64(size), "B/scrape")
		})
	}
}

type counting struct {
	header http.Header
	bytes  int
}

func (w *counting) Header() http.Header         { return w.header }
func (w *counting) WriteHeader(int)             {}
func (w *counting) Write(b []byte) (int, error) { w.bytes += len(b); return len(b), nil }

func exported(name string, delivered, failed uint64) report.Export {
	e := report.Export{Delivered: delivered, Failed: failed, Gaps: 1}
	e.Name = name
	return e
}

package metrics

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/test/golden"
)

const (
	pageFile      = "../../docs/metrics.md"
	alertsFile    = "../../docs/metrics/alerts.yaml"
	dashboardFile = "../../docs/metrics/dashboard.json"
)

// TestDocs keeps docs/metrics.md, docs/metrics/alerts.yaml and docs/metrics/dashboard.json what the
// table says. With -update it writes them.
func TestDocs(t *testing.T) {
	golden.Check(t, pageFile, page())
	golden.Check(t, alertsFile, alerts())
	golden.Check(t, dashboardFile, dashboard(t))
}

// TestTable checks each metric of the table against the conventions of Prometheus, and each rule
// and panel against the table.
func TestTable(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range All {
		fail := func(format string, args ...any) { t.Errorf("%s: %s", m.Name, fmt.Sprintf(format, args...)) }
		if seen[m.Name] {
			fail("is there twice")
		}
		seen[m.Name] = true
		if !regexp.MustCompile(`^isthmus_[a-z]+(_[a-z]+)*$`).MatchString(m.Name) {
			fail("is not a valid name")
		}
		if m.Type != Counter && m.Type != Gauge || m.read == nil {
			fail("has no type or no values")
		}
		if strings.HasSuffix(m.Name, "_total") != (m.Type == Counter) {
			fail("a counter ends in _total, and nothing else does")
		}
		if unit := strings.TrimSuffix(m.Name, "_total"); m.Unit != "" && !strings.HasSuffix(unit, "_"+m.Unit) {
			fail("does not end in its unit, %s", m.Unit)
		}
		if m.Unit == "seconds" && !strings.HasSuffix(m.Name, "_timestamp_seconds") {
			fail("a time ends in _timestamp_seconds")
		}
		sentences := []string{m.Help, m.Trap}
		if m.Help == "" || len(m.Labels) > len(series{}.labels) {
			fail("has no help, or more labels than there is room for")
		}
		for _, l := range m.Labels {
			if l.Name == "" || l.Help == "" {
				fail("label %q has no help", l.Name)
			}
		}
		for _, r := range m.Rules {
			sentences = append(sentences, r.Description)
			checkExpr(t, r.Alert, r.Expr)
			checkTemplates(t, r)
			if !strings.Contains(r.Expr, m.Name) {
				fail("alert %s is about another metric", r.Alert)
			}
			if r.Severity != "critical" && r.Severity != "warning" || r.Summary == "" || r.See == "" {
				fail("alert %s has no severity, no summary or no command", r.Alert)
			}
			if kind, ok := strings.CutPrefix(r.See, "isthmus describe condition "); ok && !strings.HasPrefix(kind, "{{") {
				if _, known := condition.Lookup(kind); !known {
					fail("alert %s names the condition %s, which does not exist", r.Alert, kind)
				}
			}
		}
		for _, p := range m.Panels {
			sentences = append(sentences, p.Help)
			if p.Title == "" || len(p.Queries) == 0 || !slices.Contains([]string{"timeseries", "stat", "state-timeline"}, p.Kind) {
				fail("panel %q has no title, no query or no kind", p.Title)
			}
			for _, q := range p.Queries {
				checkExpr(t, p.Title, q.Expr)
				if !strings.Contains(q.Expr, `{job=~"$job",instance=~"$instance"`) {
					fail("panel %q does not select job and instance", p.Title)
				}
			}
		}
		for _, s := range sentences {
			if s != "" && !strings.HasSuffix(s, ".") {
				fail("is not a sentence: %q", s)
			}
		}
	}
}

var (
	named    = regexp.MustCompile(`isthmus_[a-z_]+`)
	matchers = regexp.MustCompile(`(isthmus_[a-z_]+)\{([^}]*)\}`)
	matcher  = regexp.MustCompile(`(\w+)(=~|!~|!=|=)"([^"]*)"`)
	grouping = regexp.MustCompile(`\b(?:by|without|on|ignoring) \(([^)]*)\)`)
	template = regexp.MustCompile(`\$labels\.(\w+)`)
)

// labelOf returns the label of a metric, or the one that Prometheus adds.
func labelOf(metrics []string, name string) (Label, bool) {
	if name == "job" || name == "instance" {
		return Label{Name: name}, true
	}
	for _, of := range metrics {
		if m := lookup(of); m != nil {
			if i := slices.IndexFunc(m.Labels, func(l Label) bool { return l.Name == name }); i >= 0 {
				return m.Labels[i], true
			}
		}
	}
	return Label{}, false
}

// checkExpr checks that an expression names only metrics of the table, their labels, and values
// that these can have.
func checkExpr(t *testing.T, what, expr string) {
	t.Helper()
	metrics := named.FindAllString(expr, -1)
	for _, name := range metrics {
		if lookup(name) == nil {
			t.Errorf("%s: %s is not in the table", what, name)
		}
	}
	if len(metrics) == 0 {
		t.Errorf("%s: has no metric of the table", what)
	}
	for _, one := range matchers.FindAllStringSubmatch(expr, -1) {
		for _, m := range matcher.FindAllStringSubmatch(one[2], -1) {
			l, ok := labelOf(one[1:2], m[1])
			if !ok {
				t.Errorf("%s: %s has no label %s", what, one[1], m[1])
			}
			for value := range strings.SplitSeq(m[3], "|") {
				if l.Values != nil && !slices.Contains(l.Values, value) {
					t.Errorf("%s: %s is never %q", what, m[1], value)
				}
			}
		}
	}
	for _, one := range grouping.FindAllStringSubmatch(expr, -1) {
		for name := range strings.SplitSeq(one[1], ",") {
			if _, ok := labelOf(metrics, strings.TrimSpace(name)); !ok {
				t.Errorf("%s: no metric has the label %s", what, name)
			}
		}
	}
}

// checkTemplates checks that the texts of a rule use only labels that its expression keeps.
func checkTemplates(t *testing.T, r Rule) {
	t.Helper()
	gone := regexp.MustCompile(`(?:without|ignoring) \((\w+)\)`).FindStringSubmatch(r.Expr)
	for _, text := range []string{r.Summary, r.Description, r.See} {
		for _, m := range template.FindAllStringSubmatch(text, -1) {
			if _, ok := labelOf(named.FindAllString(r.Expr, -1), m[1]); !ok || gone != nil && gone[1] == m[1] {
				t.Errorf("%s: the result has no label %s", r.Alert, m[1])
			}
		}
	}
}

// TestCertificateKinds checks that the table has the kinds of router/auth.
func TestCertificateKinds(t *testing.T) {
	if want := []string{auth.AuthorityExpiry, auth.ServerExpiry, auth.AdminExpiry, auth.ClientExpiry}; !slices.Equal(certificateKinds, want) {
		t.Errorf("%q, want %q", certificateKinds, want)
	}
}

// TestAlertsAreRules has Prometheus judge the rules, and two of them on made-up series.
func TestAlertsAreRules(t *testing.T) {
	tool := promtool(t)
	rules, err := filepath.Abs(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, "check", "rules", rules).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	cases, err := os.ReadFile("testdata/alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// promtool takes paths relative to the file of the cases.
	file := filepath.Join(t.TempDir(), "cases.yaml")
	if err := os.WriteFile(file, bytes.ReplaceAll(cases, []byte("alerts.yaml"), []byte(rules)), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool, "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// TestAlertsAreYAML checks that a YAML reader gets the texts of the table back.
func TestAlertsAreYAML(t *testing.T) {
	var read struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.Unmarshal([]byte(alerts()), &read); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, g := range read.Groups {
		for _, r := range g.Rules {
			got[r.Alert] = r.Expr + r.For + r.Labels["severity"] + r.Annotations["summary"] + r.Annotations["description"]
		}
	}
	n := 0
	for _, m := range All {
		for _, r := range m.Rules {
			n++
			if got[r.Alert] != r.Expr+r.For+r.Severity+r.Summary+described(r) {
				t.Errorf("%s: %s", r.Alert, got[r.Alert])
			}
		}
	}
	if n != len(got) {
		t.Errorf("%d rules, want %d: two have one name", len(got), n)
	}
}

func page() string {
	var b strings.Builder
	b.WriteString(`# Metrics

A node serves its metrics to Prometheus at ` + "`/metrics`" + ` of the API's port, over mutual TLS, to clients of every role. This page, the
[alert rules](metrics/alerts.yaml) and the [dashboard for Grafana](metrics/dashboard.json) are made from the table of router/metrics by
` + "`go test ./router/metrics -run TestDocs -update`" + `.

## Setting it up

1. Name the address of Prometheus in ` + "`access.api`" + ` of the document.
2. Issue a certificate: ` + "`isthmus client issue prometheus --role reader -o prometheus.yaml`" + `. The fields ` + "`authority`, `certificate` and `key`" + ` of
   that file are the three files below.
3. Add the job, and the rules:

` + "```yaml" + `
rule_files: [alerts.yaml]
scrape_configs:
- job_name: isthmus
  scheme: https
  tls_config:
    ca_file: authority.pem
    cert_file: prometheus.pem
    key_file: prometheus.key
    server_name: isthmusd
  static_configs:
  - targets: ["192.0.2.10:7443"]
` + "```" + `

4. Import ` + "`docs/metrics/dashboard.json`" + ` into Grafana, and choose the data source, the jobs and the instances.

## Without certificates

A Prometheus behind a tunnel or an attachment can read them over plain HTTP, when the document has an address and the sources:

` + "```yaml" + `
metrics: {listen: [169.254.80.1], from: [10.20.0.0/24]}
` + "```" + `

The target is then ` + "`169.254.80.1:9100`" + `, without ` + "`scheme` and `tls_config`" + `. Everyone at these sources can read the names of tunnels, peers, policies
and pools. The port is closed to all others, and to the underlay, by the rules and by the socket. A page is made once for all clients, and
kept for a second, or for nine times as long as it took; there are 16 connections at a time, 4 of one host. The condition MetricsDown
reports an address that is not served. OpenMetrics is only at the port of the API.

## Rules of all metrics

- Labels are names and addresses of the document. None changes while its object exists: a rekey, another address of a peer or a restart
  makes no new series.
- A state is one series for each possible state, 1 for the present one and 0 for the others, and never a number.
- A scrape shows the state that the lists of the API show. It asks charon nothing.
` + fmt.Sprintf("- A tunnel has at most %d series, a peer %d, a policy %d, an address of a pool %d.", maxTunnelSeries, maxPeerSeries, maxPolicySeries, maxAddressSeries) + `
- A client has to offer HTTP/1.1 in TLS (ALPN), as Prometheus does: one that offers HTTP/2 alone is a client of gRPC, and one that
  offers nothing is refused. One client may have 2 scrapes at a time, and all clients together 4; others get status 503.
`)
	for _, g := range Groups {
		fmt.Fprintf(&b, "\n## %s\n", g.Title)
		for _, m := range g.Metrics {
			fmt.Fprintf(&b, "\n### %s\n\n%s%s. %s\n", m.Name, strings.ToUpper(string(m.Type[:1])), m.Type[1:], m.Help)
			if m.Unit != "" && m.Type == Gauge && m.Unit != "seconds" {
				fmt.Fprintf(&b, "Unit: %s.\n", m.Unit)
			}
			if len(m.Labels) > 0 || m.Trap != "" || len(m.Rules) > 0 {
				b.WriteString("\n")
			}
			for _, l := range m.Labels {
				fmt.Fprintf(&b, "- `%s`: %s\n", l.Name, l.Help)
			}
			if m.Trap != "" {
				fmt.Fprintf(&b, "- Note: %s\n", m.Trap)
			}
			for _, r := range m.Rules {
				fmt.Fprintf(&b, "- Alert `%s`: `%s`", r.Alert, r.Expr)
				if r.For != "" {
					fmt.Fprintf(&b, " for %s", r.For)
				}
				fmt.Fprintf(&b, " (%s)\n", r.Severity)
			}
		}
	}
	return b.String()
}

// described returns the description of an alert with its command.
func described(r Rule) string { return r.Description + " See: `" + r.See + "`." }

// text is a string of YAML, which has those of JSON.
func text(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		panic(err)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func alerts() string {
	var b strings.Builder
	b.WriteString("# Alert rules for Prometheus. Made from the table of router/metrics by `make golden`; see docs/metrics.md.\ngroups:\n")
	for _, g := range Groups {
		fmt.Fprintf(&b, "- name: %s\n  rules:\n", text("isthmus: "+g.Title))
		for _, m := range g.Metrics {
			for _, r := range m.Rules {
				fmt.Fprintf(&b, "  - alert: %s\n    expr: %s\n", r.Alert, text(r.Expr))
				if r.For != "" {
					fmt.Fprintf(&b, "    for: %s\n", r.For)
				}
				fmt.Fprintf(&b, "    labels: {severity: %s}\n    annotations:\n      summary: %s\n      description: %s\n", r.Severity, text(r.Summary), text(described(r)))
			}
		}
	}
	return b.String()
}

type object = map[string]any

// dashboard has a row for each group, and two panels side by side in it.
func dashboard(t *testing.T) string {
	t.Helper()
	source := object{"type": "prometheus", "uid": "${datasource}"}
	variable := func(name, label, query string) object {
		return object{
			"name": name, "label": label, "type": "query", "datasource": source, "query": object{"query": query, "refId": name}, "refresh": 2, "sort": 1,
			"multi": true, "includeAll": true, "current": object{"text": "All", "value": "$__all"},
		}
	}
	panels, y, id := []any{}, 0, 0
	for _, g := range Groups {
		id++
		panels = append(panels, object{"id": id, "type": "row", "title": g.Title, "collapsed": false, "panels": []any{}, "gridPos": object{"x": 0, "y": y, "w": 24, "h": 1}})
		y++
		x := 0
		for _, m := range g.Metrics {
			for _, p := range m.Panels {
				id++
				unit := p.Unit
				if unit == "" {
					unit = "short"
				}
				var targets []any
				for i, q := range p.Queries {
					targets = append(targets, object{"refId": string(rune('A' + i)), "datasource": source, "expr": q.Expr, "legendFormat": q.Legend})
				}
				panels = append(panels, object{
					"id": id, "type": p.Kind, "title": p.Title, "description": p.Help, "datasource": source, "targets": targets,
					"gridPos": object{"x": x, "y": y, "w": 12, "h": 8}, "fieldConfig": object{"defaults": object{"unit": unit}, "overrides": []any{}},
				})
				if x == 12 {
					y += 8
				}
				x = 12 - x
			}
		}
		if x == 12 {
			y += 8
		}
	}
	out := object{
		"title": "isthmus", "uid": "isthmus", "tags": []string{"isthmus"}, "schemaVersion": 39, "editable": true, "refresh": "30s", "timezone": "utc",
		"description": "Made from the table of router/metrics; see docs/metrics.md.", "time": object{"from": "now-3h", "to": "now"}, "panels": panels,
		"templating": object{"list": []any{
			object{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
			variable("job", "Job", "label_values(isthmus_build_info, job)"),
			variable("instance", "Instance", `label_values(isthmus_build_info{job=~"$job"}, instance)`),
		}},
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(out); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

package metrics

import (
	"slices"
	"strings"
)

// The most series that an object has.
const (
	maxTunnelSeries  = 40
	maxPeerSeries    = 20
	maxPolicySeries  = 2
	maxAddressSeries = 15 // of a pool, with those of the pool itself
)

// Type is the type of a metric.
type Type string

// The types. A counter only grows, and starts again from 0 with the daemon or with its object.
const (
	Counter Type = "counter"
	Gauge   Type = "gauge"
)

// Metric is one line of the table.
type Metric struct {
	Name string
	Type Type
	Unit string // base unit; empty: a number without one
	// Help is a sentence. Trap says what to watch out for when it is used; empty: nothing.
	Help, Trap string
	Labels     []Label
	Rules      []Rule
	Panels     []Panel
	// read gives the values, with the labels in the order of Labels.
	read func(*view, func(value float64, labels ...string))
}

// Label is a label of a metric. Its value never changes while its object exists.
type Label struct {
	Name, Help string
	// Values are all possible values. Nil: names that the document or the program decides.
	Values []string
}

// Rule is an alert rule of Prometheus.
type Rule struct {
	Alert    string
	Expr     string
	For      string // how long Expr holds before the alert fires
	Severity string // "critical" or "warning"
	Summary  string
	// Description says what to do. It may use the labels of the metric.
	Description string
	// See is the command that says more.
	See string
}

// Panel is a panel of the dashboard.
type Panel struct {
	Title   string
	Help    string
	Unit    string // of Grafana; empty: a short number
	Kind    string // "timeseries", "stat" or "state-timeline"
	Queries []Query
}

// Query is one query of a panel. $job and $instance are the variables of the dashboard.
type Query struct{ Expr, Legend string }

// Group is a part of the table, of the page and of the dashboard.
type Group struct {
	Title   string
	Metrics []*Metric
}

// Groups are the metrics, in the order of the page and of the dashboard.
var Groups = []Group{
	{"The node", node}, {"Tunnels", tunnels}, {"BGP", peers}, {"Routes", routes}, {"Egress", egress},
}

// All lists every metric.
var All = func() (all []*Metric) {
	for _, g := range Groups {
		all = append(all, g.Metrics...)
	}
	return all
}()

// quoted lists words for a sentence.
func quoted(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = "`" + w + "`"
	}
	if n := len(out); n > 1 {
		return strings.Join(out[:n-1], ", ") + " or " + out[n-1]
	}
	return strings.Join(out, "")
}

// states gives a value for each state that an object can have: 1 for the present one.
func states(all []string, present string, emit func(float64, ...string), labels ...string) {
	for _, s := range all {
		emit(truth(s == present), append(slices.Clone(labels), s)...)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Package metrics shows the state of a node to Prometheus. One table has every metric, with the
// alert rules and the panels of the dashboard that are made from it.
package metrics

import (
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"

	"github.com/isthmus-net/isthmus/router/report"
)

// Source has the state of a node.
type Source interface {
	// Snapshot returns the state. It is called once for each scrape, by one goroutine at a time.
	Snapshot() report.Snapshot
}

// Options are the dependencies of a Handler.
type Options struct {
	Source Source
	// Expiries returns the ends of the node's certificates, by kind. Nil: they are not shown.
	Expiries func() map[string]time.Time
	// Version, Revision and Go describe the program.
	Version, Revision, Go string
	// Log receives what is wrong with a scrape. Nil: slog.Default.
	Log *slog.Logger
}

// view is what one scrape shows.
type view struct {
	report.Snapshot
	expiries map[string]time.Time
	options  *Options
}

// NewHandler returns the handler that answers a scrape in the text format of Prometheus or in that
// of OpenMetrics, as the client asks. Bounding the number of scrapes is up to the server.
func NewHandler(o Options) http.Handler {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return promhttp.HandlerFor(&gatherer{options: &o}, promhttp.HandlerOpts{EnableOpenMetrics: true, ErrorLog: errorLog{o.Log}})
}

type errorLog struct{ log *slog.Logger }

func (l errorLog) Println(v ...any) { l.log.Warn("metrics", "err", fmt.Sprint(v...)) }

// gatherer reads the table. It makes the messages itself: with the library's registry, a scrape of
// 2,000 tunnels takes five times as long.
type gatherer struct {
	options *Options
	turn    sync.Mutex // scrapes take turns, and so take at most one processor
}

// Gather implements prometheus.Gatherer.
func (g *gatherer) Gather() (out []*dto.MetricFamily, err error) {
	g.turn.Lock()
	defer g.turn.Unlock()
	defer func() {
		if p := recover(); p != nil {
			g.options.Log.Error("a scrape caused a panic; please report it", "panic", p, "stack", string(debug.Stack()))
			out, err = nil, fmt.Errorf("reading the state of the node caused a panic: %v", p)
		}
	}()
	v := &view{Snapshot: g.options.Source.Snapshot(), options: g.options}
	if g.options.Expiries != nil {
		v.expiries = g.options.Expiries()
	}
	for _, m := range All {
		if f := m.gather(v); len(f.Metric) > 0 {
			out = append(out, f)
		}
	}
	return out, nil
}

// series has the parts of one message, so that they are allocated together.
type series struct {
	metric  dto.Metric
	labels  [3]dto.LabelPair
	pairs   [3]*dto.LabelPair
	values  [3]string
	value   float64
	counter dto.Counter
	gauge   dto.Gauge
}

func (m *Metric) gather(v *view) *dto.MetricFamily {
	f := &dto.MetricFamily{Name: &m.Name, Help: &m.Help, Type: dto.MetricType_GAUGE.Enum()}
	if m.Type == Counter {
		f.Type = dto.MetricType_COUNTER.Enum()
	}
	m.read(v, func(value float64, labels ...string) {
		s := &series{value: value}
		for i := range m.Labels {
			// A name that is not valid UTF-8 would make Prometheus refuse the whole answer.
			s.values[i] = strings.ToValidUTF8(labels[i], "?")
			s.labels[i].Name, s.labels[i].Value = &m.Labels[i].Name, &s.values[i]
			s.pairs[i] = &s.labels[i]
		}
		s.metric.Label = s.pairs[:len(m.Labels)]
		if m.Type == Counter {
			s.counter.Value = &s.value
			s.metric.Counter = &s.counter
		} else {
			s.gauge.Value = &s.value
			s.metric.Gauge = &s.gauge
		}
		f.Metric = append(f.Metric, &s.metric)
	})
	return f
}

package capability

import (
	"context"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/apply"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/event/export"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
)

// Export sends the events of the node to receivers.
func Export(x *export.Exporter) Capability {
	type part struct {
		node    string
		exports []spec.Export
	}
	return Capability{
		Name: "export of events", Section: "events", Run: x.Run,
		Jobs: []apply.Job{{
			// Receivers may be behind tunnels and routes.
			Key: "events", Stage: apply.StageRoutes, Part: func(t *plan.Target) any { return part{t.Node.Name, t.Exports} },
			Do: func(_ context.Context, t *plan.Target) error {
				var all []export.Target
				for _, e := range t.Exports {
					all = append(all, export.Target{Name: e.Name, Syslog: e.Syslog, UDP: e.Protocol == "udp", Webhook: e.Webhook, Secret: e.Secret, Severity: event.Severity(e.MinSeverity)})
				}
				x.Set(t.Node.Name, all)
				return nil
			},
		}},
		Kinds:      []*condition.Kind{condition.EventExportFailing},
		Conditions: func() []*isthmusv1.Condition { return failing(x.States()) },
	}
}

// failing reports the receivers that do not take events. A single failure may be a restart of the
// receiver.
func failing(all []export.State) (out []*isthmusv1.Condition) {
	for _, s := range all {
		if s.Failures > 1 {
			c := condition.EventExportFailing.Warning(s.Since, "events do not reach %s of `events.export`: %s; they are kept and sent when it is back", s.Name, s.Error)
			c.Object = "export " + s.Name
			out = append(out, c)
		}
	}
	return out
}

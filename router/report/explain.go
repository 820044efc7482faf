package report

import (
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/document"
	"github.com/isthmus-net/isthmus/router/observe"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/explain"
)

// dead is the state of a tunnel that can never be up, for a reason that the document shows.
const dead = "dead"

// TunnelStates lists the states that a tunnel is reported in.
func TunnelStates() []string {
	var out []string
	for _, s := range tunnel.Statuses {
		out = append(out, string(s))
	}
	return append(out, dead)
}

// explained adds the explanation to the status of tunnel i of a document.
func explained(t *isthmusv1.TunnelStatus, s *spec.Spec, d explain.Document, i int, seen tunnel.State) {
	e, ok := d.Tunnel(i, seen)
	if !ok {
		return
	}
	if p, never := d.Dead(i, seen); never {
		t.State = dead
		e.Cause, e.Remedy = p.Why, p.Remedy
	}
	t.Explanation = &isthmusv1.Explanation{
		Reason: string(e.Reason), Since: stamp(e.Since), What: e.What, Cause: e.Cause, Remedy: e.Remedy,
		Field: e.Field, Value: e.Value, There: e.There,
	}
	if e.Field != "" {
		t.Explanation.Line = uint32(s.Line(e.Field))
	}
}

// strays returns the tunnels that are not in the document.
func (r *Report) strays() (out []*isthmusv1.StrayTunnel) {
	var callers []tunnel.Caller
	if r.Callers != nil {
		callers = r.Callers()
	}
	var strays []explain.Stray
	r.Observed.Read(func(seen *observe.State) {
		doc := document.Explanation(seen.Spec)
		strays = doc.Strays(seen.Tunnels, callers)
	})
	for _, s := range strays {
		m := &isthmusv1.StrayTunnel{
			State: "refused", Since: stamp(s.First), Last: stamp(s.Last), Attempts: s.Attempts,
			Reason: s.Code, Cloud: s.Cloud, Beside: s.Beside, Why: s.Why, Remedy: s.Remedy, Source: s.Source,
		}
		if s.ByDesign {
			m.State = dead
		}
		if s.Address.IsValid() {
			m.Address = s.Address.String()
		}
		out = append(out, m)
	}
	return out
}

package router

import (
	"fmt"
	"slices"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/explain"
)

// explanation returns what of a document is needed to explain its tunnels. A nil one has none.
func explanation(s *spec.Spec) explain.Document {
	if s == nil {
		return explain.Document{}
	}
	d := explain.Document{Public: s.Underlay.PublicAddress}
	asn := map[string]uint32{}
	for _, p := range s.Peers {
		asn[p.Tunnel] = p.ASN
	}
	for _, t := range s.Tunnels {
		d.Tunnels = append(d.Tunnels, explain.Tunnel{Config: t.Config, Cloud: t.Cloud, ASN: asn[t.Name]})
	}
	return d
}

// notes returns what is not wrong with a document and yet worth knowing.
func notes(s *spec.Spec) (out spec.Problems) {
	if s == nil {
		return nil
	}
	out = s.Notes()
	d := explanation(s)
	for _, p := range d.Notes() {
		i := slices.IndexFunc(d.Tunnels, func(t explain.Tunnel) bool { return t.Name == p.Beside })
		path := fmt.Sprintf("tunnels[%d]", i)
		if p.Own {
			path += ".ipsec.respondOnly"
		}
		out = append(out, spec.Problem{Path: path, Value: p.Beside, Rule: p.Why, Remedy: p.Remedy, Line: s.Line(path)})
	}
	return spec.Join(out)
}

// noted returns what is worth knowing of a document on this machine.
func (r *Router) noted(s *spec.Spec, t plan.Target) spec.Problems {
	if s == nil {
		return nil
	}
	out := append(notes(s), surprises(s, t, r.around.get())...)
	if len(t.NAT.Input.SSH) > 0 && !t.NAT.Input.Drop {
		const path = "access.ssh"
		out = append(out, spec.Problem{Path: path, Value: t.NAT.Input.SSH[0].String(), Line: s.Line(path), Rule: "changes nothing while access.input is keep: SSH is reached as the machine has it",
			Remedy: "give `input: drop` in access"})
	}
	return out
}

// notes returns those of the present document.
func (r *Router) notes() spec.Problems {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.noted(r.spec, r.target)
}

// explained adds to the status of tunnel i of a document why it is as it is.
func explained(t *isthmusv1.TunnelStatus, s *spec.Spec, d explain.Document, i int, seen tunnel.State) {
	e, ok := d.Tunnel(i, seen)
	if !ok {
		return
	}
	if p, dead := d.Dead(i, seen); dead {
		t.State = "dead"
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
func (r *Router) strays() (out []*isthmusv1.StrayTunnel) {
	var callers []tunnel.Caller
	if r.Callers != nil {
		callers = r.Callers()
	}
	r.state.mu.Lock()
	defer r.state.mu.Unlock()
	for _, s := range r.state.doc.Strays(r.state.seen, callers) {
		m := &isthmusv1.StrayTunnel{
			State: "refused", Since: stamp(s.First), Last: stamp(s.Last), Attempts: s.Attempts,
			Reason: s.Code, Cloud: s.Cloud, Beside: s.Beside, Why: s.Why, Remedy: s.Remedy, Source: s.Source,
		}
		if s.ByDesign {
			m.State = "dead"
		}
		if s.Address.IsValid() {
			m.Address = s.Address.String()
		}
		out = append(out, m)
	}
	return out
}

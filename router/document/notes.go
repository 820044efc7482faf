package document

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel/explain"
)

// Explanation returns what of a document is needed to explain its tunnels; of nil, nothing.
func Explanation(s *spec.Spec) explain.Document {
	if s == nil {
		return explain.Document{}
	}
	d := explain.Document{Public: s.Underlay.PublicAddress}
	asn := map[string]uint32{}
	for _, p := range s.Peers {
		asn[p.Tunnel] = p.ASN
	}
	for _, t := range s.Tunnels {
		d.Tunnels = append(d.Tunnels, explain.Tunnel{Config: t.Config, Cloud: t.Cloud, ASN: asn[cmp.Or(t.Link, t.Name)]})
	}
	return d
}

// notes returns what is not wrong with a document and yet worth knowing.
func notes(s *spec.Spec) (out spec.Problems) {
	if s == nil {
		return nil
	}
	out = s.Notes()
	d := Explanation(s)
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
func (m *Manager) noted(s *spec.Spec, t plan.Target) spec.Problems {
	if s == nil {
		return nil
	}
	out := append(notes(s), surprises(s, t, m.Machine.Surroundings())...)
	if len(t.NAT.Input.SSH) > 0 && !t.NAT.Input.Drop {
		const path = "access.ssh"
		out = append(out, spec.Problem{Path: path, Value: t.NAT.Input.SSH[0].String(), Line: s.Line(path), Rule: "changes nothing while access.input is keep: SSH is reached as the machine has it",
			Remedy: "give `input: drop` in access"})
	}
	return out
}

// Notes returns what is worth knowing of the present document on this machine.
func (m *Manager) Notes() spec.Problems {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.noted(m.spec, m.target)
}

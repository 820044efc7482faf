package report

import (
	"strings"

	"github.com/isthmus-net/isthmus/router/condition"
)

// Generation implements api.Router.
func (r *Report) Generation() uint64 { return r.Documents.Status().Present.Generation }

// Health implements api.Router. A service does not serve while it has a condition with the severity
// error. A tunnel or peer that the document disables does not serve either: its service says
// whether it carries traffic. The node serves, because that is intended.
func (r *Report) Health() map[string]bool {
	target := r.Observed.Target()
	out := map[string]bool{"": true, "node": true}
	for _, t := range target.Tunnels {
		out["tunnel/"+t.Name] = !t.Disabled
	}
	for _, p := range target.BGP.Peers {
		out["peer/"+p.Name] = !p.Disabled
	}
	for _, p := range target.NAT.Pools {
		out["pool/"+p.Name] = true
	}
	for _, c := range r.allConditions() {
		bad := c.Severity == string(condition.Error)
		kind := "condition/" + c.Type
		if serves, known := out[kind]; !known || serves {
			out[kind] = !bad
		}
		if !bad {
			continue
		}
		out[""] = false
		service := strings.Replace(c.Object, " ", "/", 1)
		if _, known := out[service]; known && service != "" {
			out[service] = false
		} else {
			out["node"] = false
		}
	}
	return out
}

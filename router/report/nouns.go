package report

import (
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
)

// Nouns implements api.Router: the node's own objects, and those of its capabilities.
func (r *Report) Nouns() []api.Noun {
	all := []api.Noun{
		api.Tunnels.FromCounted(r.tunnels, nil, func(request, response proto.Message) {
			if request.(*isthmusv1.ListTunnelsRequest).PageToken == "" {
				response.(*isthmusv1.ListTunnelsResponse).Strays = r.strays()
			}
		}),
		api.Peers.From(r.peers),
		api.Routes.From(r.routes),
		api.Policies.FromCounted(r.Policies, nil, func(_, response proto.Message) {
			out := response.(*isthmusv1.ListPoliciesResponse)
			out.Drops = drops(r.Observed.Rules())
			for _, d := range out.Drops {
				if d.Reason == string(nat.DropGuard) {
					out.GuardPackets, out.GuardBytes = d.Packets, d.Bytes
				}
			}
		}),
		api.Secrets.From(r.Secrets),
		api.Revisions.From(r.revisions),
	}
	for _, c := range r.Capabilities {
		all = append(all, c.Nouns...)
	}
	return all
}

// Changed implements api.Router.
func (r *Report) Changed() <-chan struct{} { return r.Bell.Wait() }

// Policies returns the egress policies. If the kernel cannot be read, it returns the last state as
// not installed.
func (r *Report) Policies() []*isthmusv1.PolicyStatus {
	return r.policies(r.Observed.Rules())
}

// Secrets returns the secrets by name, without their values.
func (r *Report) Secrets() (out []*isthmusv1.SecretInfo) {
	for _, s := range r.Documents.Secrets() {
		out = append(out, secretMessage(s))
	}
	return out
}

// revisions returns the accepted documents, newest first.
func (r *Report) revisions() (out []*isthmusv1.Revision) {
	for _, h := range r.Store.History() {
		out = append(out, &isthmusv1.Revision{Generation: h.Generation, Time: stamp(h.Time), Author: h.Author, Reason: h.Reason, Changes: h.Changes, Message: h.Message})
	}
	return out
}

package apitest

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
)

// Paths implements api.Router.
func (r *Router) Paths(_ context.Context, q bgp.Query) (*isthmusv1.ListPathsResponse, bgp.Query, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	start := q.Start
	q.Start = 0
	switch {
	case r.starts == 0:
		return nil, q, bgp.ErrNotRunning
	case start != 0 && start != r.starts:
		return nil, q, bgp.ErrRestarted
	case !slices.ContainsFunc(r.peers, func(p *isthmusv1.PeerStatus) bool { return p.Name == q.Peer }):
		return nil, q, fmt.Errorf("listing the paths of peer %s: %w", q.Peer, bgp.ErrNotFound)
	}
	out := &isthmusv1.ListPathsResponse{}
	if !q.After.IsValid() {
		out.Notes = []string{"2 UPDATE messages of the peer were malformed"}
	}
	for _, p := range r.paths {
		sent := p.State == "sent" || p.State == "held back"
		prefix := netip.MustParsePrefix(p.Prefix)
		switch {
		case q.After.IsValid() && prefix.Compare(q.After) <= 0:
		case sent != (q.View == bgp.Advertised) || !sent && p.Peer != q.Peer:
		case q.View == bgp.Accepted && p.State == "refused" || q.View == bgp.Rejected && p.State != "refused":
		case len(out.Paths) == q.Limit:
			q.Start, q.After = r.starts, netip.MustParsePrefix(out.Paths[q.Limit-1].Prefix)
			return out, q, nil
		default:
			out.Paths = append(out.Paths, p)
		}
	}
	return out, q, nil
}

// LookUp implements api.Router.
func (r *Router) LookUp(_ context.Context, destination netip.Prefix) (*isthmusv1.ListPathsResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := &isthmusv1.ListPathsResponse{}
	for _, route := range r.routes {
		p := netip.MustParsePrefix(route.Prefix)
		if p == destination || destination.IsSingleIP() && p.Contains(destination.Addr()) {
			out.Route = route
		}
	}
	if out.Route != nil {
		destination = netip.MustParsePrefix(out.Route.Prefix)
	}
	for _, p := range r.paths {
		if p.Prefix == destination.String() && p.State != "sent" && p.State != "held back" {
			out.Paths = append(out.Paths, p)
		}
	}
	for _, p := range r.peers {
		o := &isthmusv1.PathOffer{Peer: p.Name, Announced: true}
		if len(out.Paths) > 0 && out.Paths[0].Peer == p.Name {
			o = &isthmusv1.PathOffer{Peer: p.Name, Reason: "from-there", Why: "the peer itself brings the best path"}
		}
		out.Offers = append(out.Offers, o)
	}
	if out.Route == nil && len(out.Paths) == 0 {
		return nil, fmt.Errorf("%w: this node has neither a route nor a BGP path to %v", api.ErrNotFound, destination)
	}
	return out, nil
}

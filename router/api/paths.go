package api

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Paths has the pages of ListPaths. Not all peers have a path to the same prefix, so that the token
// has the prefix after which the next page begins.
var Paths = Kind[*isthmusv1.Path]{name: "path", size: 1000, maxSize: 10000}

var views = map[isthmusv1.PathView]bgp.View{
	isthmusv1.PathView_PATH_VIEW_RECEIVED:   bgp.Received,
	isthmusv1.PathView_PATH_VIEW_ACCEPTED:   bgp.Accepted,
	isthmusv1.PathView_PATH_VIEW_REJECTED:   bgp.Rejected,
	isthmusv1.PathView_PATH_VIEW_ADVERTISED: bgp.Advertised,
}

// ListPaths reads the tables of BGP: one call at a time, since each may cost a second of the BGP
// process.
func (s *services) ListPaths(ctx context.Context, r *isthmusv1.ListPathsRequest) (*isthmusv1.ListPathsResponse, error) {
	q, destination, err := pathQuery(r)
	if err != nil {
		return nil, err
	}
	leave, err := s.listing.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer leave()
	if r.Destination != "" {
		out, err := s.router.LookUp(ctx, destination)
		return out, statusOf(err)
	}
	out, more, err := s.router.Paths(ctx, q)
	if err != nil {
		return nil, statusOf(err)
	}
	if n := len(out.Paths); n > 0 && more.Start != 0 {
		out.NextPageToken = Paths.token(fmt.Sprintf("%d %v", more.Start, more.After), pathFilter(r))
	}
	return out, nil
}

func pathFilter(r *isthmusv1.ListPathsRequest) string { return r.Peer + " " + r.View.String() }

// pathQuery checks a request. The destination is a prefix, or an address as the longest one.
func pathQuery(r *isthmusv1.ListPathsRequest) (q bgp.Query, destination netip.Prefix, err error) {
	view, known := views[r.View]
	refuse := func(format string, args ...any) (bgp.Query, netip.Prefix, error) {
		return q, destination, reason.RequestInvalid.Errorf(format, args...)
	}
	switch {
	case r.Destination != "" && (r.Peer != "" || r.View != 0 || r.PageToken != ""):
		return refuse("destination: cannot be used together with peer, view and page_token")
	case r.Destination != "":
		if destination, err = parseDestination(r.Destination); err != nil {
			return refuse("destination %q: must be a prefix or an address, such as 10.0.0.0/8 or 10.1.2.3", r.Destination)
		}
		return q, destination, nil
	case r.Peer == "":
		return refuse("peer: give a peer and a view, or a destination")
	case !known:
		return refuse("view %v: must be received, accepted, rejected or advertised", r.View)
	case r.PageSize > Paths.maxSize:
		return refuse("page_size %d: must be 1 to %d", r.PageSize, Paths.maxSize)
	}
	q = bgp.Query{Peer: r.Peer, View: view, Limit: int(r.PageSize)}
	if q.Limit == 0 {
		q.Limit = int(Paths.size)
	}
	if r.PageToken != "" {
		after, ok := Paths.readToken(r.PageToken, pathFilter(r))
		start, prefix, _ := strings.Cut(after, " ")
		_, serr := fmt.Sscan(start, &q.Start)
		q.After, err = netip.ParsePrefix(prefix)
		if !ok || serr != nil || err != nil {
			return q, destination, reason.PageToken.Errorf("page_token: belongs to another list or filter; start again without it")
		}
	}
	return q, destination, nil
}

// parseDestination reads a prefix, or an address as the prefix of only it.
func parseDestination(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err
}

package report

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/bgp"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/observe"
)

// Reasons why the kernel does not use the best path, besides those of package bgp.
const (
	reasonDead         = "dead"
	reasonWithheld     = "withheld"
	reasonStatic       = "static"
	reasonOutranked    = "outranked"
	reasonNotInstalled = "not-installed"
)

// Paths implements api.Router.
func (r *Report) Paths(ctx context.Context, q bgp.Query) (*isthmusv1.ListPathsResponse, bgp.Query, error) {
	if r.Tables == nil {
		return nil, q, bgp.ErrNotRunning
	}
	page, err := r.Tables.List(ctx, q)
	if err != nil {
		return nil, q, err
	}
	out := &isthmusv1.ListPathsResponse{Paths: r.pathMessages(page.Entries, q.View)}
	if !q.After.IsValid() {
		out.Notes = r.pathNotes(q)
	}
	q.Start = 0
	if page.More && len(page.Entries) > 0 {
		q.Start, q.After = page.Start, page.Entries[len(page.Entries)-1].Prefix
	}
	return out, q, nil
}

// LookUp implements api.Router.
func (r *Report) LookUp(ctx context.Context, destination netip.Prefix) (*isthmusv1.ListPathsResponse, error) {
	out := &isthmusv1.ListPathsResponse{}
	out.Route, out.Notes = match(r.routes(), destination)
	prefix := destination
	if out.Route != nil {
		prefix = netip.MustParsePrefix(out.Route.Prefix)
	}
	var page bgp.Page
	err := bgp.ErrNotRunning
	if r.Tables != nil {
		page, err = r.Tables.LookUp(ctx, prefix)
	}
	switch {
	case err != nil && (out.Route == nil || !errors.Is(err, bgp.ErrNotRunning)):
		return nil, err
	case err != nil:
		out.Notes = append(out.Notes, "BGP paths are unknown: "+err.Error())
	case out.Route == nil && len(page.Entries) == 0:
		return nil, fmt.Errorf("%w: this node has neither a route nor a BGP path to %s", api.ErrNotFound, shown(destination))
	case page.More:
		out.Notes = append(out.Notes, "not all paths are shown: there are too many")
	}
	out.Paths = r.pathMessages(page.Entries, bgp.Received)
	for _, o := range page.Offers {
		out.Offers = append(out.Offers, &isthmusv1.PathOffer{Peer: o.Peer, Announced: o.Reason == "", Reason: string(o.Reason), Why: o.Text})
	}
	return out, nil
}

// match returns the route to a prefix, or for a single address the longest match that the kernel
// has, or else the longest one. It notes the longer ones that the kernel has not. routes are
// ordered.
func match(routes []*isthmusv1.Route, destination netip.Prefix) (best *isthmusv1.Route, notes []string) {
	for _, route := range routes { // a longer match comes later
		p, err := netip.ParsePrefix(route.Prefix)
		switch {
		case err != nil || p != destination && !(destination.IsSingleIP() && p.Contains(destination.Addr())):
		case best == nil || route.Installed || !best.Installed:
			best, notes = route, nil
		default:
			notes = append(notes, fmt.Sprintf("the route to %s is a longer match, and the kernel does not have it", route.Prefix))
		}
	}
	return best, notes
}

// pathNotes returns what a reader of a list of paths must know about the session.
func (r *Report) pathNotes(q bgp.Query) (notes []string) {
	for _, s := range r.BGP.Peers() {
		if s.Name != q.Peer {
			continue
		}
		switch {
		case s.State == bgp.Established:
		case s.Restarting:
			notes = append(notes, fmt.Sprintf("the session is %s; the paths are kept while the peer restarts gracefully", s.State))
		default:
			notes = append(notes, fmt.Sprintf("the session is %s, so that no paths are exchanged; see isthmus describe peer %s", s.State, q.Peer))
		}
		if f := s.Filtered; q.View != bgp.Advertised && f.Withdrawn > 0 {
			note := fmt.Sprintf("%d UPDATE messages of the peer were malformed and taken as withdrawals (RFC 7606), since the daemon was started", f.Withdrawn)
			if f.Note != "" {
				note += "; the last one: " + f.Note
			}
			notes = append(notes, note)
		}
	}
	return notes
}

// pathMessages returns the messages of paths. It adds to the decisions of BGP what the kernel does.
func (r *Report) pathMessages(entries []bgp.Entry, view bgp.View) []*isthmusv1.Path {
	states := map[netip.Prefix]fib.RouteState{}
	for _, e := range entries {
		if e.Used && e.Peer != "" {
			states[e.Prefix] = fib.RouteState{}
		}
	}
	if len(states) > 0 {
		for _, s := range r.FIB.Routes() {
			if _, ok := states[s.Key.Prefix]; ok && s.Key == fib.Main(s.Key.Prefix) {
				states[s.Key.Prefix] = s
			}
		}
	}
	machine := r.Observed.Machine()
	outranking := machine.Outranking()
	peers := map[string]bgp.Peer{}
	r.Observed.Read(func(seen *observe.State) {
		for _, p := range seen.Target.BGP.Peers {
			peers[p.Name] = p
		}
	})
	out := make([]*isthmusv1.Path, 0, len(entries))
	for i := range entries {
		e := &entries[i]
		p := pathMessage(e, view)
		if p.State == "used" && e.Peer != "" {
			_, outranked := outranking[e.Prefix]
			outranked = outranked && !transits(states[e.Prefix], machine)
			if reason, why := kernelUse(states[e.Prefix], observe.NextHops(peers[e.Peer], e.Prefix), outranked); reason != "" {
				p.State, p.Reason, p.Why = "unused", reason, why
			}
		}
		out = append(out, p)
	}
	return out
}

// kernelUse returns why the kernel does not forward by a path that BGP uses; empty: it does. hops
// are the next hops of the path.
func kernelUse(s fib.RouteState, hops []fib.NextHop, outranked bool) (reason, why string) {
	switch {
	case s.Source == fib.Static:
		return reasonStatic, "a static route to the prefix comes first"
	case s.Takes != nil:
		return reasonWithheld, fmt.Sprintf("%s: the prefix takes %s, %s", condition.Withheld.Name, shown(s.Takes.Key.Prefix), s.Takes.Why)
	case slices.ContainsFunc(hops, func(h fib.NextHop) bool { return !slices.Contains(s.NextHops, h) }):
		return string(bgp.Changing), "the route is not among the wanted ones yet; ask again"
	case !slices.ContainsFunc(hops, func(h fib.NextHop) bool { return slices.Contains(s.Alive, h) }):
		return reasonDead, "its tunnel or its session is down, and routes do not use it"
	case !s.Installed:
		return reasonNotInstalled, "the kernel does not have the route; see isthmus get status"
	case outranked:
		return reasonOutranked, "a route of the machine to the same prefix has a smaller metric"
	}
	return "", ""
}

func pathMessage(e *bgp.Entry, view bgp.View) *isthmusv1.Path {
	p := &isthmusv1.Path{
		Prefix: e.Prefix.String(), Peer: e.Peer, Reason: string(e.Reason), Why: e.Text, Winner: e.Winner,
		AsPath: asPath(e.ASPath), Med: e.MED, LocalPreference: e.LocalPreference, Stale: e.Stale,
	}
	switch {
	case e.Reason == bgp.HeldBack:
		p.State = "held back"
		return p // it has no path to this peer
	case view == bgp.Advertised:
		p.State = "sent"
	case e.Refused:
		p.State = "refused"
	case e.Used:
		p.State = "used"
	default:
		p.State = "unused"
	}
	p.Origin = bgp.OriginName(e.Origin)
	if e.NextHop.IsValid() && !e.NextHop.IsUnspecified() {
		p.NextHop = e.NextHop.String()
	}
	if e.RouterID.IsValid() {
		p.RouterId = e.RouterID.String()
	}
	if e.At.After(time.Unix(0, 0)) {
		p.Since = stamp(e.At)
	}
	for _, c := range e.Communities {
		p.Communities = append(p.Communities, bgp.CommunityName(c))
	}
	for _, l := range e.Large {
		p.LargeCommunities = append(p.LargeCommunities, strings.ReplaceAll(strings.Trim(fmt.Sprint(l), "[]"), " ", ":"))
	}
	return p
}

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func optional(n *uint32) string {
	if n == nil {
		return ""
	}
	return count(uint64(*n))
}

// offerColumns are of the peers to which a prefix is announced, or not.
var offerColumns = []column[*isthmusv1.PathOffer]{
	{header: "TO", value: func(_ *app, o *isthmusv1.PathOffer) string { return o.Peer }},
	{header: "ANNOUNCED", value: func(_ *app, o *isthmusv1.PathOffer) string {
		if o.Announced {
			return "yes"
		}
		return "no"
	}},
	{header: "WHY", value: func(_ *app, o *isthmusv1.PathOffer) string { return o.Why }},
}

var pathColumns = []column[*isthmusv1.Path]{
	{header: "PREFIX", value: func(_ *app, p *isthmusv1.Path) string { return p.Prefix }},
	{header: "PEER", value: func(_ *app, p *isthmusv1.Path) string {
		if p.Peer == "" && p.State != "held back" {
			return "(this node)"
		}
		return p.Peer
	}},
	{header: "STATE", style: state, value: func(_ *app, p *isthmusv1.Path) string { return p.State }},
	{header: "NEXT-HOP", value: func(_ *app, p *isthmusv1.Path) string { return p.NextHop }},
	{header: "LOCAL-PREF", style: number, value: func(_ *app, p *isthmusv1.Path) string { return optional(p.LocalPreference) }},
	{header: "AS-PATH", value: func(_ *app, p *isthmusv1.Path) string { return p.AsPath }, brief: func(p *isthmusv1.Path) string {
		return many(len(strings.Fields(p.AsPath)), "ASes")
	}},
	{header: "ORIGIN", value: func(_ *app, p *isthmusv1.Path) string { return p.Origin }},
	{header: "MED", style: number, value: func(_ *app, p *isthmusv1.Path) string { return optional(p.Med) }},
	{header: "SINCE", style: age, value: func(a *app, p *isthmusv1.Path) string { return a.since(p.Since) }},
	{header: "COMMUNITIES", wide: true, value: func(_ *app, p *isthmusv1.Path) string {
		return strings.Join(append(append([]string(nil), p.Communities...), p.LargeCommunities...), " ")
	}},
	{header: "ROUTER-ID", wide: true, value: func(_ *app, p *isthmusv1.Path) string { return p.RouterId }},
	{header: "WHY", value: func(_ *app, p *isthmusv1.Path) string {
		if p.Stale && p.Why == "" {
			return "kept while the peer restarts gracefully"
		}
		return p.Why
	}},
}

// pathViews are the flags of "get routes" that list the paths of a peer.
var pathViews = []struct {
	flag, usage string
	view        isthmusv1.PathView
}{
	{"received", "peer whose routes are listed as it sent them, before the import policy", isthmusv1.PathView_PATH_VIEW_RECEIVED},
	{"accepted", "peer of whose routes those that the import policy accepts are listed", isthmusv1.PathView_PATH_VIEW_ACCEPTED},
	{"rejected", "peer of whose routes those that the import policy refuses are listed, with the reasons", isthmusv1.PathView_PATH_VIEW_REJECTED},
	{"advertised", "peer to which the listed routes are sent, with those that its export limit holds back", isthmusv1.PathView_PATH_VIEW_ADVERTISED},
}

// addPaths adds to "get routes" the paths of a peer, and those to one destination.
func (a *app) addPaths(routes *cobra.Command) {
	peers := make([]string, len(pathViews))
	others := []string{"within", "peer", "watch", "all-nodes"}
	for i, v := range pathViews {
		routes.Flags().StringVar(&peers[i], v.flag, "", v.usage)
		completeFlag(routes, v.flag, names(a, false, named((*isthmusv1.PeerStatus).GetName)))
		for _, other := range others {
			routes.MarkFlagsMutuallyExclusive(v.flag, other)
		}
		others = append(others, v.flag)
	}
	list := routes.RunE
	routes.RunE = func(cmd *cobra.Command, args []string) error {
		for i, v := range pathViews {
			switch {
			case !cmd.Flags().Changed(v.flag):
			case peers[i] == "":
				return usageError{fmt.Errorf("--%s is empty: give the name of a peer", v.flag)}
			case len(args) > 0:
				return usageError{fmt.Errorf("--%s cannot be used together with a prefix or an address: give one of them", v.flag)}
			default:
				return a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
					return a.peerPaths(ctx, conn, peers[i], v.view)
				})(cmd, args)
			}
		}
		plain := true
		for _, f := range others[:4] {
			plain = plain && !cmd.Flags().Changed(f)
		}
		if len(args) == 1 && plain && a.tables() {
			return a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
				return a.lookUp(ctx, conn, args[0])
			})(cmd, args)
		}
		return list(cmd, args)
	}
}

// peerPaths prints the paths of a peer.
func (a *app) peerPaths(ctx context.Context, conn *grpc.ClientConn, peer string, view isthmusv1.PathView) error {
	all, items, err := listAll[*isthmusv1.Path](ctx, conn, &isthmusv1.ListPathsRequest{PageSize: 10000, Peer: peer, View: view})
	if status.Code(err) == codes.NotFound {
		_, peers, perr := listAll[*isthmusv1.PeerStatus](ctx, conn, nil)
		if perr != nil {
			return err
		}
		var known []string
		for _, p := range peers {
			known = append(known, p.Name)
		}
		return fmt.Errorf("peer %q: not found%s", peer, didYouMean(similar(peer, known)))
	}
	if err != nil {
		return err
	}
	return a.printPaths(items, all, all.(*isthmusv1.ListPathsResponse).Notes)
}

func (a *app) printPaths(items []*isthmusv1.Path, all proto.Message, notes []string) error {
	heads, rows := rowsOf(a, pathColumns, items)
	if err := a.print(a.newTable(heads...).fitting(), rows, all); err != nil || !a.tables() {
		return err
	}
	return a.printFacts(notes)
}

func (a *app) printFacts(notes []string) error {
	for _, n := range notes {
		if _, err := fmt.Fprintf(a.stdout, "note: %s\n", clean(n)); err != nil {
			return err
		}
	}
	return nil
}

// lookUp prints the route to a destination, and all paths to its prefix.
func (a *app) lookUp(ctx context.Context, conn *grpc.ClientConn, destination string) error {
	out, err := destinationPaths(ctx, conn, destination)
	if err != nil {
		return err
	}
	if out.Route != nil {
		heads, rows := rowsOf(a, routeColumns, []*isthmusv1.Route{out.Route})
		if err := a.print(a.newTable(heads...).fitting(), rows, out); err != nil {
			return err
		}
		if len(out.Paths) > 0 {
			fmt.Fprintln(a.stdout)
		}
	}
	if len(out.Paths) > 0 {
		if err := a.printPaths(out.Paths, out, nil); err != nil {
			return err
		}
	}
	if len(out.Offers) > 0 {
		fmt.Fprintln(a.stdout)
		heads, rows := rowsOf(a, offerColumns, out.Offers)
		if err := a.print(a.newTable(heads...).fitting(), rows, out); err != nil {
			return err
		}
	}
	return a.printFacts(out.Notes)
}

// destinationPaths returns the route and the paths to a prefix or an address.
func destinationPaths(ctx context.Context, conn *grpc.ClientConn, destination string) (*isthmusv1.ListPathsResponse, error) {
	if _, err := netip.ParseAddr(destination); err != nil {
		if _, err := netip.ParsePrefix(destination); err != nil {
			return nil, usageError{fmt.Errorf("%q is not a valid prefix or address: give one such as 10.0.0.0/8 or 10.1.2.3", destination)}
		}
	}
	out, err := isthmusv1.NewRouteServiceClient(conn).ListPaths(ctx, &isthmusv1.ListPathsRequest{Destination: destination})
	if status.Code(err) != codes.NotFound {
		return out, err
	}
	_, all, lerr := listAll[*isthmusv1.Route](ctx, conn, &isthmusv1.ListRoutesRequest{PageSize: 10000})
	if lerr != nil {
		return nil, lerr
	}
	var known []string
	for _, r := range all {
		known = append(known, r.Prefix)
	}
	return nil, fmt.Errorf("route %q: not found%s", destination, didYouMean(similar(destination, known)))
}

// describeRoutes returns what "describe route" shows.
func describeRoutes(ctx context.Context, conn *grpc.ClientConn, names []string) (out []proto.Message, all error) {
	for _, name := range names {
		m, err := destinationPaths(ctx, conn, name)
		if err != nil {
			all = errors.Join(all, err)
			continue
		}
		out = append(out, m)
	}
	return out, all
}

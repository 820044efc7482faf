package main

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

func perHop(r *isthmusv1.Route, f func(*isthmusv1.NextHop) string) string {
	var out []string
	for _, n := range r.NextHops {
		s := f(n)
		if n.Dead {
			s += " (dead)"
		}
		out = append(out, s)
	}
	return strings.Join(out, ",")
}

var routeColumns = []column[*isthmusv1.Route]{
	{header: "PREFIX", value: func(_ *app, r *isthmusv1.Route) string { return r.Prefix }},
	{header: "SOURCE", value: func(_ *app, r *isthmusv1.Route) string { return r.Source }},
	{header: "TUNNELS", value: func(_ *app, r *isthmusv1.Route) string {
		if r.Blackhole {
			return "blackhole"
		}
		return perHop(r, (*isthmusv1.NextHop).GetTunnel)
	}},
	{header: "AS-PATH", value: func(_ *app, r *isthmusv1.Route) string { return r.AsPath }},
	{header: "INSTALLED", value: func(_ *app, r *isthmusv1.Route) string {
		if r.Installed {
			return "yes"
		}
		return "no"
	}},
	{header: "SINCE", value: func(a *app, r *isthmusv1.Route) string { return a.since(r.Since) }},
	{header: "GATEWAYS", wide: true, value: func(_ *app, r *isthmusv1.Route) string { return perHop(r, (*isthmusv1.NextHop).GetGateway) }},
	{header: "PEERS", wide: true, value: func(_ *app, r *isthmusv1.Route) string { return perHop(r, (*isthmusv1.NextHop).GetPeer) }},
}

func (a *app) addRoutes(_, get, describe, watch *cobra.Command) {
	request := &isthmusv1.ListRoutesRequest{PageSize: 10000}
	routes := nounCommands[*isthmusv1.Route]{
		plural: "routes", columns: routeColumns, request: request,
		list:  "List the kernel routes that isthmus owns",
		watch: "Follow the routes",
	}.add(a, get, describe, watch)
	routes.Flags().StringVar(&request.Within, "within", "", "only routes inside this prefix")
	routes.Flags().StringVar(&request.Peer, "peer", "", "only routes from this peer")
	describe.AddCommand(describeCommand(a, "route PREFIX", "Show everything about one route",
		func(ctx context.Context, conn *grpc.ClientConn, prefix string) (proto.Message, error) {
			p, err := netip.ParsePrefix(prefix)
			if err != nil {
				return nil, usageError{fmt.Errorf("%q is not a valid prefix: give one such as 10.0.0.0/8", prefix)}
			}
			// Routes are ordered by prefix, so the enclosing prefix comes first.
			r, err := isthmusv1.NewRouteServiceClient(conn).ListRoutes(ctx, &isthmusv1.ListRoutesRequest{Within: p.Masked().String(), PageSize: 1})
			if err != nil {
				return nil, err
			}
			if len(r.Routes) == 0 || r.Routes[0].Prefix != p.Masked().String() {
				return nil, fmt.Errorf("route %q: not found", prefix)
			}
			return r.Routes[0], nil
		}))
}

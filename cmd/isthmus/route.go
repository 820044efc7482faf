package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
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
	}, brief: func(r *isthmusv1.Route) string { return many(len(r.NextHops), "next hops") }},
	{header: "AS-PATH", value: func(_ *app, r *isthmusv1.Route) string { return r.AsPath }},
	{header: "INSTALLED", style: state, value: func(_ *app, r *isthmusv1.Route) string {
		switch {
		case !r.Installed:
			return "no"
		case slices.ContainsFunc(r.Conditions, func(c *isthmusv1.Condition) bool { return c.Type == condition.Outranked.Name }):
			return "outranked"
		}
		return "yes"
	}},
	{header: "SINCE", style: age, value: func(a *app, r *isthmusv1.Route) string { return a.since(r.Since) }},
	{header: "GATEWAYS", wide: true, value: func(_ *app, r *isthmusv1.Route) string { return perHop(r, (*isthmusv1.NextHop).GetGateway) }, brief: func(r *isthmusv1.Route) string { return many(len(r.NextHops), "next hops") }},
	{header: "PEERS", wide: true, value: func(_ *app, r *isthmusv1.Route) string { return perHop(r, (*isthmusv1.NextHop).GetPeer) }, brief: func(r *isthmusv1.Route) string { return many(len(r.NextHops), "next hops") }},
	{header: "WHY", value: func(_ *app, r *isthmusv1.Route) string { return why(r.Conditions, len(r.Conditions) == 0, "") }},
}

func (a *app) addRoutes(_, get, describe, watch *cobra.Command) {
	request := &isthmusv1.ListRoutesRequest{PageSize: 10000}
	routes := nounCommands[*isthmusv1.Route]{
		singular: "route", plural: "routes", columns: routeColumns, request: request,
		what:     "PREFIX|ADDRESS",
		samples:  [2]string{"10.1.0.0/16", "10.2.3.4"},
		list:     "List the kernel routes that isthmus owns",
		describe: "Show everything about routes, with all BGP paths to them",
		tell:     describeRoutes,
		watch:    "Follow the routes",
		names:    func(r *isthmusv1.Route) []string { return []string{r.Prefix} },
		match: func(r *isthmusv1.Route, name string) bool {
			p, _ := netip.ParsePrefix(r.Prefix)
			address, err := netip.ParseAddr(name)
			return err == nil && p.Contains(address.Unmap()) || err != nil && r.Prefix == name
		},
		find: func(ctx context.Context, conn *grpc.ClientConn, name string) ([]*isthmusv1.Route, error) {
			if request.Within != "" || request.Peer != "" {
				return nil, usageError{errors.New("--within and --peer cannot be used together with a prefix or an address: give one of them")}
			}
			return findRoute(ctx, conn, name)
		},
	}.add(a, get, describe, watch)
	routes.Long = `List the kernel routes that isthmus owns: all of them, those of some prefixes, or for an address the one that its packets take
(the longest match). For a single prefix or address, the BGP paths to it follow, with the reason why each one is not used.

With --received, --accepted, --rejected or --advertised, list the BGP paths of a peer instead, as BGP has them now.`
	routes.Example += "\n" + indented("isthmus get routes --within 10.0.0.0/8 --peer aws-0\nisthmus get routes --rejected aws-0\nisthmus get routes 10.2.3.4")
	routes.Flags().StringVar(&request.Within, "within", "", "only routes inside this prefix")
	routes.Flags().StringVar(&request.Peer, "peer", "", "only routes from this peer")
	routes.MarkFlagsMutuallyExclusive("watch", "within")
	routes.MarkFlagsMutuallyExclusive("watch", "peer")
	completeFlag(routes, "peer", names(a, false, named((*isthmusv1.PeerStatus).GetName)))
	a.addPaths(routes)
}

// findRoute returns the route of a prefix, or the longest match of an address.
func findRoute(ctx context.Context, conn *grpc.ClientConn, name string) ([]*isthmusv1.Route, error) {
	if address, err := netip.ParseAddr(name); err == nil {
		_, all, err := listAll[*isthmusv1.Route](ctx, conn, &isthmusv1.ListRoutesRequest{PageSize: 10000})
		if err != nil {
			return nil, err
		}
		var best []*isthmusv1.Route
		longest := -1
		for _, r := range all {
			if p, err := netip.ParsePrefix(r.Prefix); err == nil && p.Bits() > longest && p.Contains(address.Unmap()) {
				best, longest = []*isthmusv1.Route{r}, p.Bits()
			}
		}
		return best, nil
	}
	p, err := netip.ParsePrefix(name)
	if err != nil {
		return nil, usageError{fmt.Errorf("%q is not a valid prefix or address: give one such as 10.0.0.0/8 or 10.1.2.3", name)}
	}
	// Routes are ordered by prefix, so the enclosing prefix comes first.
	r, err := isthmusv1.NewRouteServiceClient(conn).ListRoutes(ctx, &isthmusv1.ListRoutesRequest{Within: p.Masked().String(), PageSize: 1})
	if err != nil || len(r.Routes) == 0 || r.Routes[0].Prefix != p.Masked().String() {
		return nil, err
	}
	return r.Routes, nil
}

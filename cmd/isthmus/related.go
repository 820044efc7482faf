package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// maxRelated bounds the rows of each table below a description.
const maxRelated = 10

// section prints a table of related objects below a description, and nothing without objects. all
// is the command that lists all of them.
func section[T any](a *app, title, all string, columns []column[T], items []T) error {
	if len(items) == 0 {
		return nil
	}
	fmt.Fprintf(a.stdout, "\n%s:\n", title)
	heads, rows := rowsOf(a, columns, items[:min(len(items), maxRelated)])
	t := a.newTable(heads...).fitting()
	for _, row := range rows {
		t.add(row...)
	}
	if err := t.flush(); err != nil {
		return err
	}
	if more := len(items) - maxRelated; more > 0 {
		fmt.Fprintf(a.stdout, "and %d more: %s\n", more, clean(all))
	}
	return nil
}

// having returns the objects of one kind that a function accepts.
func having[T proto.Message](ctx context.Context, conn *grpc.ClientConn, request proto.Message, accept func(T) bool) ([]T, error) {
	_, all, err := listAll[T](ctx, conn, request)
	return slices.DeleteFunc(all, func(o T) bool { return !accept(o) }), err
}

// showRelated prints what is related to an object: where it is used, and its last events.
func (a *app) showRelated(ctx context.Context, conn *grpc.ClientConn, object proto.Message) error {
	switch o := object.(type) {
	case *isthmusv1.TunnelStatus:
		peers, err := having(ctx, conn, nil, func(p *isthmusv1.PeerStatus) bool { return p.Tunnel == o.Name })
		return errors.Join(err, section(a, "peers", "isthmus get peers", peerColumns, peers),
			a.showRoutes(ctx, conn, "", func(n *isthmusv1.NextHop) bool { return n.Tunnel == o.Name }), a.showEvents(ctx, conn, "tunnel", o.Name))
	case *isthmusv1.PeerStatus:
		tunnels, err := having(ctx, conn, nil, func(t *isthmusv1.TunnelStatus) bool { return t.Name == o.Tunnel })
		return errors.Join(err, section(a, "tunnel", "", tunnelColumns, tunnels),
			a.showRoutes(ctx, conn, o.Name, func(n *isthmusv1.NextHop) bool { return n.Peer == o.Name }), a.showEvents(ctx, conn, "peer", o.Name))
	case *isthmusv1.PoolStatus:
		policies, err := having(ctx, conn, &isthmusv1.ListPoliciesRequest{PageSize: 10000}, func(p *isthmusv1.PolicyStatus) bool { return p.Pool == o.Name })
		ports, perr := having(ctx, conn, nil, func(p *isthmusv1.PortUse) bool { return p.Pool == o.Name })
		return errors.Join(err, perr, section(a, "policies", "isthmus get policies", policyColumns, policies),
			section(a, "ports in use", "isthmus get ports "+o.Name, portColumns, ports), a.showEvents(ctx, conn, "pool", o.Name))
	case *isthmusv1.PolicyStatus:
		pools, err := having(ctx, conn, nil, func(p *isthmusv1.PoolStatus) bool { return p.Name == o.Pool })
		names, nerr := having(ctx, conn, nil, func(n *isthmusv1.NameStatus) bool { return slices.Contains(n.Policies, o.Name) })
		var members []member
		for _, p := range pools {
			for _, m := range p.Members {
				members = append(members, member{m, p})
			}
		}
		return errors.Join(err, nerr, section(a, "addresses", "isthmus get pools "+o.Pool, memberColumns, members),
			section(a, "domain names", "isthmus get names", nameColumns, names))
	}
	return nil
}

// showRoutes prints the routes with a next hop that a function accepts. It reads one page: a node
// may have a hundred thousand routes.
func (a *app) showRoutes(ctx context.Context, conn *grpc.ClientConn, peer string, accept func(*isthmusv1.NextHop) bool) error {
	page, err := isthmusv1.NewRouteServiceClient(conn).ListRoutes(ctx, &isthmusv1.ListRoutesRequest{PageSize: 10000, Peer: peer})
	if err != nil {
		return fmt.Errorf("reading the routes: %w", err)
	}
	title, all := "routes", "isthmus get routes"
	if page.NextPageToken != "" {
		title = fmt.Sprintf("routes among the first %d", len(page.Routes))
	}
	if peer != "" {
		all += " --peer " + peer
	}
	return section(a, title, all, routeColumns, slices.DeleteFunc(page.Routes, func(r *isthmusv1.Route) bool { return !slices.ContainsFunc(r.NextHops, accept) }))
}

// showEvents prints the last events of an object. A node of an older version has none.
func (a *app) showEvents(ctx context.Context, conn *grpc.ClientConn, kind, name string) error {
	events, err := lastEvents(ctx, conn, &isthmusv1.EventFilter{Objects: []string{kind + "/" + name}}, maxRelated+1)
	if err != nil {
		if status.Code(err) == codes.Unimplemented {
			return nil
		}
		return fmt.Errorf("reading the events: %w", err)
	}
	title := "events"
	if len(events) > maxRelated {
		title, events = fmt.Sprintf("last %d events (isthmus get events --%s %s has more)", maxRelated, kind, name), events[1:]
	}
	return section(a, title, "", eventColumns, events)
}

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// member is an address together with its pool.
type member struct {
	*isthmusv1.PoolMember
	pool *isthmusv1.PoolStatus
}

var memberColumns = []column[member]{
	{header: "POOL", value: func(_ *app, m member) string { return m.pool.Name }},
	{header: "ADDRESS", value: func(_ *app, m member) string { return m.Address }},
	{header: "SEEN-AS", value: func(_ *app, m member) string { return m.PublicAddress }},
	{header: "ZONE", value: func(_ *app, m member) string { return m.Zone }},
	{header: "WEIGHT", value: func(_ *app, m member) string { return count(uint64(m.Weight)) }},
	{header: "HEALTH", value: func(_ *app, m member) string { return m.Health }},
	{header: "SINCE", value: func(a *app, m member) string { return a.since(m.Since) }},
	{header: "WHY", value: func(_ *app, m member) string { return m.Reason }},
	{header: "ANNOUNCES", wide: true, value: func(_ *app, m member) string { return announces(m.pool) }},
}

// poolColumns are the columns of events: an event is about a whole pool.
var poolColumns = []column[*isthmusv1.PoolStatus]{
	{header: "POOL", value: func(_ *app, p *isthmusv1.PoolStatus) string { return p.Name }},
	{header: "HEALTHY", value: func(_ *app, p *isthmusv1.PoolStatus) string { return fmt.Sprintf("%d/%d", p.Healthy, len(p.Members)) }},
	{header: "ANNOUNCES", value: func(_ *app, p *isthmusv1.PoolStatus) string { return announces(p) }},
	{header: "MEMBERS", value: func(_ *app, p *isthmusv1.PoolStatus) string {
		var list []string
		for _, m := range p.Members {
			list = append(list, m.Address+" "+m.Health)
		}
		return strings.Join(list, ", ")
	}},
}

func announces(p *isthmusv1.PoolStatus) string {
	list := strings.Join(p.Announce, ",")
	if list != "" && !p.Announced {
		return list + " (withdrawn)"
	}
	return list
}

func (a *app) addPools(_, get, describe, watch *cobra.Command) {
	get.AddCommand(getCommand(a, "pools", "List the source addresses of the pools, with their health", memberColumns,
		func(ctx context.Context, conn *grpc.ClientConn) ([]member, proto.Message, error) {
			all := &isthmusv1.ListPoolsResponse{}
			client := isthmusv1.NewPoolServiceClient(conn)
			err := pages(func(token string) (*isthmusv1.ListPoolsResponse, error) {
				return client.ListPools(ctx, &isthmusv1.ListPoolsRequest{PageToken: token})
			}, func(r *isthmusv1.ListPoolsResponse) string {
				all.Pools = append(all.Pools, r.Pools...)
				return r.NextPageToken
			})
			var rows []member
			for _, p := range all.Pools {
				for _, m := range p.Members {
					rows = append(rows, member{m, p})
				}
			}
			return rows, all, err
		}))
	describe.AddCommand(describeCommand(a, "pool NAME", "Show everything about one pool, with the probes of each address",
		func(ctx context.Context, conn *grpc.ClientConn, name string) (proto.Message, error) {
			return isthmusv1.NewPoolServiceClient(conn).GetPool(ctx, &isthmusv1.GetPoolRequest{Name: name})
		}))
	watch.AddCommand(watchCommand(a, "pools", "Follow the pools", poolColumns, (*isthmusv1.PoolEvent).GetPool,
		func(ctx context.Context, conn *grpc.ClientConn) (interface {
			Recv() (*isthmusv1.PoolEvent, error)
		}, error) {
			return isthmusv1.NewPoolServiceClient(conn).WatchPools(ctx, &isthmusv1.WatchPoolsRequest{})
		}))
}

var nameColumns = []column[*isthmusv1.NameStatus]{
	{header: "NAME", value: func(_ *app, n *isthmusv1.NameStatus) string { return n.Name }},
	{header: "POLICIES", value: func(_ *app, n *isthmusv1.NameStatus) string { return strings.Join(n.Policies, ",") }},
	{header: "ADDRESSES", value: func(a *app, n *isthmusv1.NameStatus) string {
		if some := 4; len(n.Addresses) > some && a.output != "wide" {
			return fmt.Sprintf("%s and %d more", strings.Join(n.Addresses[:some], ","), len(n.Addresses)-some)
		}
		return strings.Join(n.Addresses, ",")
	}},
	{header: "JUST-GONE", value: func(a *app, n *isthmusv1.NameStatus) string {
		var out []string
		for i, g := range slices.Backward(n.Gone) {
			if len(out) == 2 && a.output != "wide" {
				return fmt.Sprintf("%s and %d more", strings.Join(out, ","), i+1)
			}
			out = append(out, fmt.Sprintf("%s (%s)", g.Address, a.since(g.Since)))
		}
		return strings.Join(out, ",")
	}},
	{header: "NEXT", value: func(a *app, n *isthmusv1.NameStatus) string { return a.until(n.Next) }},
	{header: "ERROR", value: func(_ *app, n *isthmusv1.NameStatus) string { return n.LastError }},
	{header: "FAILING", wide: true, value: func(a *app, n *isthmusv1.NameStatus) string { return a.since(n.Failing) }},
}

func (a *app) addNames(_, get, _, watch *cobra.Command) {
	get.AddCommand(getCommand(a, "names", "List the domain names of the egress policies and their addresses", nameColumns,
		func(ctx context.Context, conn *grpc.ClientConn) ([]*isthmusv1.NameStatus, proto.Message, error) {
			all := &isthmusv1.ListNamesResponse{}
			client := isthmusv1.NewNameServiceClient(conn)
			err := pages(func(token string) (*isthmusv1.ListNamesResponse, error) {
				return client.ListNames(ctx, &isthmusv1.ListNamesRequest{PageToken: token})
			}, func(r *isthmusv1.ListNamesResponse) string {
				all.Names = append(all.Names, r.Names...)
				return r.NextPageToken
			})
			return all.Names, all, err
		}))
	watch.AddCommand(watchCommand(a, "names", "Follow the domain names", nameColumns, (*isthmusv1.NameEvent).GetName,
		func(ctx context.Context, conn *grpc.ClientConn) (interface {
			Recv() (*isthmusv1.NameEvent, error)
		}, error) {
			return isthmusv1.NewNameServiceClient(conn).WatchNames(ctx, &isthmusv1.WatchNamesRequest{})
		}))
}

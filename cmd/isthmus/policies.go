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

var policyColumns = []column[*isthmusv1.PolicyStatus]{
	{header: "POLICY", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return p.Name }},
	{header: "ACTION", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return p.Action }},
	{header: "SOURCES", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return strings.Join(p.Sources, ",") }},
	{header: "DESTINATIONS", value: func(_ *app, p *isthmusv1.PolicyStatus) string {
		if to := slices.Concat(p.Destinations, p.Names); len(to) > 0 {
			return strings.Join(to, ",")
		}
		return "any"
	}},
	{header: "SERVICE", value: func(_ *app, p *isthmusv1.PolicyStatus) string {
		switch {
		case p.Protocol == "":
			return "any"
		case len(p.Ports) == 0:
			return p.Protocol
		}
		return p.Protocol + "/" + strings.Join(p.Ports, ",")
	}},
	{header: "SEEN-AS", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return strings.Join(p.PublicAddresses, ",") }},
	{header: "FLOWS", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return count(p.Flows) }},
	{header: "TO", wide: true, value: func(_ *app, p *isthmusv1.PolicyStatus) string {
		if p.Down {
			return p.To + " (down)"
		}
		return p.To
	}},
	{header: "POOL", wide: true, value: func(_ *app, p *isthmusv1.PolicyStatus) string { return p.Pool }},
	{header: "BYTES", wide: true, value: func(_ *app, p *isthmusv1.PolicyStatus) string { return size(p.Bytes) }},
	{header: "INSTALLED", wide: true, value: func(_ *app, p *isthmusv1.PolicyStatus) string { return fmt.Sprint(p.Installed) }},
}

func (a *app) addPolicies(_, get, _, watch *cobra.Command) {
	all := &isthmusv1.ListPoliciesResponse{}
	policies := getCommand(a, "policies", "List the egress policies with their counters, and the dropped packets by reason", policyColumns,
		func(ctx context.Context, conn *grpc.ClientConn) ([]*isthmusv1.PolicyStatus, proto.Message, error) {
			client := isthmusv1.NewNATServiceClient(conn)
			err := pages(func(token string) (*isthmusv1.ListPoliciesResponse, error) {
				return client.ListPolicies(ctx, &isthmusv1.ListPoliciesRequest{PageToken: token, PageSize: 10000})
			}, func(r *isthmusv1.ListPoliciesResponse) string {
				all.Policies = append(all.Policies, r.Policies...)
				all.GuardPackets, all.GuardBytes, all.Drops = r.GuardPackets, r.GuardBytes, r.Drops
				return r.NextPageToken
			})
			return all.Policies, all, err
		})
	policies.Aliases = []string{"nat"} // its former name
	table := policies.RunE
	policies.RunE = func(cmd *cobra.Command, args []string) error {
		if err := table(cmd, args); err != nil || a.output == "json" || a.output == "yaml" {
			return err
		}
		_, err := fmt.Fprintf(a.stdout, "\nThe guard kept %d packets (%s) from leaving with an inside source.\n", all.GuardPackets, size(all.GuardBytes))
		for _, d := range all.Drops {
			if err == nil && d.Packets > 0 && d.Reason != "guard" {
				_, err = fmt.Fprintf(a.stdout, "Dropped %d packets (%s): %s.\n", d.Packets, size(d.Bytes), d.Description)
			}
		}
		return err
	}
	get.AddCommand(policies)
	follow := watchCommand(a, "policies", "Follow the egress policies", policyColumns, (*isthmusv1.PolicyEvent).GetPolicy,
		func(ctx context.Context, conn *grpc.ClientConn) (interface {
			Recv() (*isthmusv1.PolicyEvent, error)
		}, error) {
			return isthmusv1.NewNATServiceClient(conn).WatchPolicies(ctx, &isthmusv1.WatchPoliciesRequest{})
		})
	follow.Aliases = []string{"nat"}
	watch.AddCommand(follow)
}

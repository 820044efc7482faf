package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

var policyColumns = []column[*isthmusv1.PolicyStatus]{
	{header: "POLICY", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return p.Name }},
	{header: "ACTION", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return p.Action }},
	{header: "SOURCES", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return strings.Join(p.Sources, ",") }, brief: func(p *isthmusv1.PolicyStatus) string { return many(len(p.Sources), "prefixes") }},
	{header: "DESTINATIONS", value: func(_ *app, p *isthmusv1.PolicyStatus) string {
		if to := slices.Concat(p.Destinations, p.Names); len(to) > 0 {
			return strings.Join(to, ",")
		}
		return "any"
	}, brief: func(p *isthmusv1.PolicyStatus) string { return many(len(p.Destinations)+len(p.Names), "destinations") }},
	{header: "SERVICE", value: func(_ *app, p *isthmusv1.PolicyStatus) string {
		switch {
		case p.Protocol == "":
			return "any"
		case len(p.Ports) == 0:
			return p.Protocol
		}
		return p.Protocol + "/" + strings.Join(p.Ports, ",")
	}},
	{header: "SEEN-AS", value: func(_ *app, p *isthmusv1.PolicyStatus) string { return strings.Join(p.PublicAddresses, ",") }, brief: func(p *isthmusv1.PolicyStatus) string { return many(len(p.PublicAddresses), "addresses") }},
	{header: "FLOWS", style: number, value: func(_ *app, p *isthmusv1.PolicyStatus) string { return count(p.Flows) }},
	{header: "TO", wide: true, value: func(_ *app, p *isthmusv1.PolicyStatus) string {
		if p.Down {
			return p.To + " (down)"
		}
		return p.To
	}},
	{header: "POOL", wide: true, value: func(_ *app, p *isthmusv1.PolicyStatus) string { return p.Pool }},
	{header: "BYTES", style: size, wide: true, value: func(_ *app, p *isthmusv1.PolicyStatus) string { return bytesText(p.Bytes) }},
	{header: "INSTALLED", style: state, wide: true, value: func(_ *app, p *isthmusv1.PolicyStatus) string { return fmt.Sprint(p.Installed) }},
}

func (a *app) addPolicies(_, get, describe, watch *cobra.Command) {
	nounCommands[*isthmusv1.PolicyStatus]{
		singular: "policy", plural: "policies", aliases: []string{"nat"}, columns: policyColumns,
		samples:  [2]string{"partner", "web"},
		list:     "List the egress policies with their counters, and the dropped packets by reason",
		describe: "Show everything about egress policies",
		watch:    "Follow the egress policies",
		request:  &isthmusv1.ListPoliciesRequest{PageSize: 10000},
		more: func(message proto.Message) error {
			all := message.(*isthmusv1.ListPoliciesResponse)
			_, err := fmt.Fprintf(a.stdout, "\nThe guard kept %d packets (%s) from leaving with an inside source.\n", all.GuardPackets, bytesText(all.GuardBytes))
			for _, d := range all.Drops {
				if err == nil && d.Packets > 0 && d.Reason != "guard" {
					_, err = fmt.Fprintf(a.stdout, "Dropped %d packets (%s): %s.\n", d.Packets, bytesText(d.Bytes), d.Description)
				}
			}
			return err
		},
	}.add(a, get, describe, watch)
}

package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

var portColumns = []column[*isthmusv1.PortUse]{
	{header: "POOL", value: func(_ *app, p *isthmusv1.PortUse) string { return p.Pool }},
	{header: "SEEN-AS", value: func(_ *app, p *isthmusv1.PortUse) string { return p.PublicAddress }},
	{header: "DESTINATION", value: func(_ *app, p *isthmusv1.PortUse) string { return p.Destination }},
	{header: "SERVICE", value: func(_ *app, p *isthmusv1.PortUse) string { return service(p.Protocol, p.Port) }},
	{header: "USED", style: number, value: func(_ *app, p *isthmusv1.PortUse) string { return fmt.Sprint(p.Used) }},
	{header: "FREE", style: number, value: func(_ *app, p *isthmusv1.PortUse) string { return fmt.Sprint(p.Free) }},
	{header: "PERCENT", style: number, value: func(_ *app, p *isthmusv1.PortUse) string { return fmt.Sprintf("%.1f", p.Percent) }},
	{header: "EXHAUSTED-IN", style: number, value: func(_ *app, p *isthmusv1.PortUse) string {
		if p.ExhaustedIn == nil {
			return ""
		}
		return short(p.ExhaustedIn.AsDuration())
	}},
	{header: "REFUSED", style: number, value: func(_ *app, p *isthmusv1.PortUse) string { return count(p.Refused) }},
	{header: "STATE", style: state, value: func(_ *app, p *isthmusv1.PortUse) string { return p.State }},
	{header: "ADDRESS", wide: true, value: func(_ *app, p *isthmusv1.PortUse) string { return p.Address }},
	{header: "GROWTH", style: number, wide: true, value: func(_ *app, p *isthmusv1.PortUse) string { return fmt.Sprintf("%.1f/s", p.Growth) }},
}

// service returns a protocol with its port, or alone when it has none.
func service(protocol string, port uint32) string {
	if port == 0 {
		return protocol
	}
	return fmt.Sprintf("%s/%d", protocol, port)
}

var addressColumns = []column[*isthmusv1.AddressUse]{
	{header: "POOL", value: func(_ *app, u *isthmusv1.AddressUse) string { return u.Pool }},
	{header: "SEEN-AS", value: func(_ *app, u *isthmusv1.AddressUse) string { return u.PublicAddress }},
	{header: "FLOWS", style: number, value: func(_ *app, u *isthmusv1.AddressUse) string { return fmt.Sprint(u.Flows) }},
	{header: "SERVICES", style: number, value: func(_ *app, u *isthmusv1.AddressUse) string { return fmt.Sprint(u.Services) }},
	{header: "ADDRESS", wide: true, value: func(_ *app, u *isthmusv1.AddressUse) string { return u.Address }},
}

func (a *app) addPorts(_, get, describe, watch *cobra.Command) {
	nounCommands[*isthmusv1.PortUse]{
		singular: "port", plural: "ports", aliases: []string{"egress"}, columns: portColumns,
		what:     "POOL|ADDRESS",
		samples:  [2]string{"main", "203.0.113.9"},
		list:     "List the ports in use and free of the pools' addresses, and the use of the connection table",
		describe: "Show everything about the ports in use of pools or addresses",
		watch:    "Follow the ports in use",
		names: func(p *isthmusv1.PortUse) []string {
			return []string{p.PublicAddress, p.Address, p.Pool, p.Destination}
		},
		key: func(p *isthmusv1.PortUse) string {
			return fmt.Sprint(p.Pool, " ", p.Address, " ", p.Destination, " ", p.Protocol, " ", p.Port)
		},
		more: func(message proto.Message) error {
			all := message.(*isthmusv1.ListPortsResponse)
			fmt.Fprintln(a.stdout)
			if err := show(a, addressColumns, all.Addresses, nil); err != nil {
				return err
			}
			if all.Counted == nil {
				a.note("the flows have not been counted yet")
			}
			t := all.GetTable()
			_, err := fmt.Fprintf(a.stdout, "\nConnection table: %d of %d flows, %d refused because it was full, %d lost without a port, %d without room. Placed sources: %d.\n",
				t.GetEntries(), t.GetLimit(), t.GetRefused(), t.GetInsertFailed(), t.GetDropped(), all.Placements)
			return err
		},
	}.add(a, get, describe, watch)
}

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

var tunnelColumns = []column[*isthmusv1.TunnelStatus]{
	{header: "TUNNEL", value: func(_ *app, t *isthmusv1.TunnelStatus) string { return t.Name }},
	{header: "KIND", value: func(_ *app, t *isthmusv1.TunnelStatus) string { return t.Kind }},
	{header: "STATE", style: state, value: func(_ *app, t *isthmusv1.TunnelStatus) string { return t.State }},
	{header: "SINCE", style: age, value: func(a *app, t *isthmusv1.TunnelStatus) string { return a.since(t.Since) }},
	{header: "PEER", value: func(_ *app, t *isthmusv1.TunnelStatus) string { return t.RemoteAddress }},
	{header: "INSIDE", value: func(_ *app, t *isthmusv1.TunnelStatus) string {
		var out []string
		for _, i := range t.Inside {
			out = append(out, i.Local)
		}
		return strings.Join(out, ",")
	}, brief: func(t *isthmusv1.TunnelStatus) string { return many(len(t.Inside), "addresses") }},
	{header: "RX", style: size, value: func(_ *app, t *isthmusv1.TunnelStatus) string { return bytesText(t.RxBytes) }},
	{header: "TX", style: size, value: func(_ *app, t *isthmusv1.TunnelStatus) string { return bytesText(t.TxBytes) }},
	{header: "INTERFACE", wide: true, value: func(_ *app, t *isthmusv1.TunnelStatus) string { return t.Interface }},
	{header: "MTU", style: number, wide: true, value: func(_ *app, t *isthmusv1.TunnelStatus) string { return count(uint64(t.Mtu)) }},
	{header: "KEYED", style: age, wide: true, value: func(a *app, t *isthmusv1.TunnelStatus) string { return a.since(t.Keyed) }},
	{header: "ALGORITHMS", wide: true, value: func(_ *app, t *isthmusv1.TunnelStatus) string { return t.Algorithms }},
	{header: "NEXT-TRY", style: age, wide: true, value: func(a *app, t *isthmusv1.TunnelStatus) string { return a.until(t.NextTry) }},
	{header: "CONDITIONS", wide: true, value: func(_ *app, t *isthmusv1.TunnelStatus) string { return conditions(t.Conditions) }},
	{header: "WHY", value: func(_ *app, t *isthmusv1.TunnelStatus) string {
		return why(t.Conditions, t.State == "up", t.LastError)
	}},
}

// why returns the reason why an object is not as it should be: its first condition, or its last
// error while it is not up. The last error of an object that is up is past, and not shown.
func why(conditions []*isthmusv1.Condition, up bool, lastError string) string {
	switch {
	case len(conditions) > 0:
		return conditions[0].Message
	case up:
		return ""
	}
	return lastError
}

var strayColumns = []column[*isthmusv1.StrayTunnel]{
	{header: "STRAY-ADDRESS", value: func(_ *app, s *isthmusv1.StrayTunnel) string { return s.Address }},
	{header: "STATE", style: state, value: func(_ *app, s *isthmusv1.StrayTunnel) string { return s.State }},
	{header: "SINCE", style: age, value: func(a *app, s *isthmusv1.StrayTunnel) string { return a.since(s.Since) }},
	{header: "LAST", style: age, value: func(a *app, s *isthmusv1.StrayTunnel) string { return a.since(s.Last) }},
	{header: "ATTEMPTS", style: number, value: func(_ *app, s *isthmusv1.StrayTunnel) string { return count(s.Attempts) }},
	{header: "NEXT-TO", value: func(_ *app, s *isthmusv1.StrayTunnel) string { return s.Beside }},
	{header: "REASON", value: func(_ *app, s *isthmusv1.StrayTunnel) string { return s.Reason }},
	{header: "REMEDY", wide: true, value: func(_ *app, s *isthmusv1.StrayTunnel) string { return s.Remedy }},
	{header: "SOURCE", wide: true, value: func(_ *app, s *isthmusv1.StrayTunnel) string { return s.Source }},
	{header: "WHY", value: func(_ *app, s *isthmusv1.StrayTunnel) string { return s.Why }},
}

func (a *app) addTunnels(_, get, describe, watch *cobra.Command) {
	nounCommands[*isthmusv1.TunnelStatus]{
		singular: "tunnel", plural: "tunnels", columns: tunnelColumns,
		samples:  [2]string{"aws-0", "azure-1"},
		list:     "List the tunnels",
		describe: "Show everything about tunnels, with the reason if they are not up",
		watch:    "Follow the tunnels",
		more: func(all proto.Message) error {
			strays := all.(*isthmusv1.ListTunnelsResponse).Strays
			if len(strays) == 0 {
				return nil
			}
			fmt.Fprintln(a.stdout)
			return show(a, strayColumns, strays, all)
		},
	}.add(a, get, describe, watch).Long = `List the tunnels, and in a second table stray ones that are not in the document: further tunnels of a cloud's gateway, and
other callers. A dead tunnel is down by design: it cannot come up with the present document and gateway.`
}

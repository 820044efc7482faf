package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// lane is a lane together with its link.
type lane struct {
	*isthmusv1.LaneStatus
	link *isthmusv1.LinkStatus
}

var laneColumns = []column[lane]{
	{header: "LINK", value: func(_ *app, l lane) string { return l.link.Name }},
	{header: "NODE", value: func(_ *app, l lane) string { return l.link.Node }},
	{header: "LANE", value: func(_ *app, l lane) string { return l.Tunnel }},
	{header: "OUT", style: state, value: func(_ *app, l lane) string { return l.GetOut().GetStatus() }},
	{header: "IN", style: state, value: func(_ *app, l lane) string { return l.GetIn().GetStatus() }},
	{header: "USED", style: state, value: func(_ *app, l lane) string { return used(l.LaneStatus) }},
	{header: "SINCE", style: age, value: func(a *app, l lane) string { return a.since(worse(l.LaneStatus).GetSince()) }},
	{header: "LOSS", value: func(_ *app, l lane) string { return loss(l.Out) + "/" + loss(l.In) }},
	{header: "RTT", style: number, value: func(_ *app, l lane) string { return trip(l.RttP50) }},
	{header: "MTU", style: number, value: func(_ *app, l lane) string { return orDash(l.PathMtu) }},
	{header: "SHARE", style: number, value: func(_ *app, l lane) string { return share(l) }},
	{header: "RTT-P99", style: number, wide: true, value: func(_ *app, l lane) string { return trip(l.RttP99) }},
	{header: "IN-PACKETS", style: number, wide: true, value: func(_ *app, l lane) string { return count(l.RxPackets) }},
	{header: "OUT-PACKETS", style: number, wide: true, value: func(_ *app, l lane) string { return count(l.TxPackets) }},
	{header: "HEALS", style: number, wide: true, value: func(_ *app, l lane) string { return count(uint64(l.Heals)) }},
	{header: "WHY", value: func(_ *app, l lane) string { return laneWhy(l) }},
}

// linkColumns are the columns of events: an event is about a whole link.
var linkColumns = []column[*isthmusv1.LinkStatus]{
	{header: "LINK", value: func(_ *app, l *isthmusv1.LinkStatus) string { return l.Name }},
	{header: "NODE", value: func(_ *app, l *isthmusv1.LinkStatus) string { return l.Node }},
	{header: "USED", value: func(_ *app, l *isthmusv1.LinkStatus) string { return fmt.Sprintf("%d/%d", l.Usable, len(l.Lanes)) }},
	{header: "LANES", value: func(_ *app, l *isthmusv1.LinkStatus) string {
		var list []string
		for _, one := range l.Lanes {
			list = append(list, fmt.Sprintf("%s out %s in %s", one.Tunnel, one.GetOut().GetStatus(), one.GetIn().GetStatus()))
		}
		return strings.Join(list, ", ")
	}, brief: func(l *isthmusv1.LinkStatus) string { return many(len(l.Lanes), "lanes") }},
}

func used(l *isthmusv1.LaneStatus) string {
	if l.Usable {
		return "yes"
	}
	return "no"
}

// worse returns the direction that is not ok, or else the one that changed last.
func worse(l *isthmusv1.LaneStatus) *isthmusv1.LaneDirection {
	out, in := l.GetOut(), l.GetIn()
	switch {
	case out.GetStatus() != "ok" && in.GetStatus() == "ok":
		return out
	case in.GetStatus() != "ok" && out.GetStatus() == "ok":
		return in
	case out.GetSince().AsTime().After(in.GetSince().AsTime()):
		return out
	}
	return in
}

func loss(d *isthmusv1.LaneDirection) string {
	if d == nil || d.Loss == nil {
		return "?"
	}
	return fmt.Sprintf("%.1f%%", 100**d.Loss)
}

func trip(d *durationpb.Duration) string {
	if d == nil {
		return "-"
	}
	return d.AsDuration().Round(10 * time.Microsecond).String()
}

func orDash(n uint32) string {
	if n == 0 {
		return "-"
	}
	return count(uint64(n))
}

// share returns the lane's part of the buckets of its link: that of new flows.
func share(l lane) string {
	total := uint32(0)
	for _, one := range l.link.Lanes {
		total += one.Buckets
	}
	if total == 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f%%", 100*float64(l.Buckets)/float64(total))
}

func laneWhy(l lane) string {
	var all []string
	for _, text := range []string{l.Reason, l.GetOut().GetReason(), l.GetIn().GetReason(), l.LastError} {
		if text != "" && !strings.Contains(strings.Join(all, "; "), text) {
			all = append(all, text)
		}
	}
	if l.Silent {
		all = append(all, "only the kernel of "+l.link.Node+" answers")
	}
	return strings.Join(all, "; ")
}

func (a *app) addLinks(_, get, describe, watch *cobra.Command) {
	nounCommands[*isthmusv1.LinkStatus]{
		singular: "link", plural: "links", aliases: []string{"lanes", "lane"}, columns: linkColumns,
		samples:  [2]string{"pair", "west"},
		list:     "List the lanes of the links to other nodes, with the state of each direction",
		describe: "Show everything about links: each lane with its directions, loss, round trips and counters",
		watch:    "Follow the links",
		rows: func(links []*isthmusv1.LinkStatus) ([]look, [][]cell) {
			var rows []lane
			for _, l := range links {
				for _, one := range l.Lanes {
					rows = append(rows, lane{one, l})
				}
			}
			return rowsOf(a, laneColumns, rows)
		},
	}.add(a, get, describe, watch)
}

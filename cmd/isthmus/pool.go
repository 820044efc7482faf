package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

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
	{header: "WEIGHT", style: number, value: func(_ *app, m member) string { return count(uint64(m.Weight)) }},
	{header: "HEALTH", style: state, value: func(_ *app, m member) string { return m.Health }},
	{header: "SINCE", style: age, value: func(a *app, m member) string { return a.since(m.Since) }},
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
	}, brief: func(p *isthmusv1.PoolStatus) string { return many(len(p.Members), "addresses") }},
}

func announces(p *isthmusv1.PoolStatus) string {
	list := strings.Join(p.Announce, ",")
	if list != "" && !p.Announced {
		return list + " (withdrawn)"
	}
	return list
}

func (a *app) addPools(_, get, describe, watch *cobra.Command) {
	nounCommands[*isthmusv1.PoolStatus]{
		singular: "pool", plural: "pools", columns: poolColumns,
		samples:  [2]string{"main", "partner"},
		list:     "List the source addresses of the pools, with their health",
		describe: "Show everything about pools, with the probes of each address",
		watch:    "Follow the pools",
		rows: func(pools []*isthmusv1.PoolStatus) ([]look, [][]cell) {
			var rows []member
			for _, p := range pools {
				for _, m := range p.Members {
					rows = append(rows, member{m, p})
				}
			}
			return rowsOf(a, memberColumns, rows)
		},
	}.add(a, get, describe, watch)
}

var nameColumns = []column[*isthmusv1.NameStatus]{
	{header: "NAME", value: func(_ *app, n *isthmusv1.NameStatus) string { return n.Name }},
	{header: "POLICIES", value: func(_ *app, n *isthmusv1.NameStatus) string { return strings.Join(n.Policies, ",") }, brief: func(n *isthmusv1.NameStatus) string { return many(len(n.Policies), "policies") }},
	{header: "ADDRESSES", value: func(a *app, n *isthmusv1.NameStatus) string {
		if some := 4; len(n.Addresses) > some && a.output != "wide" {
			return fmt.Sprintf("%s and %d more", strings.Join(n.Addresses[:some], ","), len(n.Addresses)-some)
		}
		return strings.Join(n.Addresses, ",")
	}, brief: func(n *isthmusv1.NameStatus) string { return many(len(n.Addresses), "addresses") }},
	{header: "JUST-GONE", value: func(a *app, n *isthmusv1.NameStatus) string {
		var out []string
		for i, g := range slices.Backward(n.Gone) {
			if len(out) == 2 && a.output != "wide" {
				return fmt.Sprintf("%s and %d more", strings.Join(out, ","), i+1)
			}
			out = append(out, fmt.Sprintf("%s (%s)", g.Address, a.age(g.Since)))
		}
		return strings.Join(out, ",")
	}, brief: func(n *isthmusv1.NameStatus) string { return many(len(n.Gone), "addresses") }},
	{header: "NEXT", style: age, value: func(a *app, n *isthmusv1.NameStatus) string { return a.until(n.Next) }},
	{header: "ERROR", value: func(_ *app, n *isthmusv1.NameStatus) string { return n.LastError }},
	{header: "FAILING", style: age, wide: true, value: func(a *app, n *isthmusv1.NameStatus) string { return a.since(n.Failing) }},
}

func (a *app) addNames(_, get, describe, watch *cobra.Command) {
	nounCommands[*isthmusv1.NameStatus]{
		singular: "name", plural: "names", columns: nameColumns,
		samples:  [2]string{"api.partner.example", "'*.example.com'"},
		list:     "List the domain names of the egress policies and their addresses",
		describe: "Show everything about domain names",
		watch:    "Follow the domain names",
	}.add(a, get, describe, watch)
}

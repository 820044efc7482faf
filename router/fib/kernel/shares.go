package kernel

import (
	"context"
	"fmt"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/netlink"
)

// Shares counts, by interface, the buckets of resilient groups that lead into it: they are the
// shares of new flows. Of several groups with an interface, the one with the smallest id counts,
// since all groups over the same lanes have the same members. It has a socket of its own and may be
// called from any goroutine.
func Shares(ctx context.Context) (map[string]int, error) {
	d, err := New()
	if err != nil {
		return nil, fmt.Errorf("reading the buckets of nexthop groups: %w", err)
	}
	defer d.Close()
	state := fib.State{}
	err = d.dump(ctx, nextHopDump, func() { state = fib.State{} }, func(m netlink.Message) error { return decodeNextHop(m, &state) })
	if err != nil {
		return nil, fmt.Errorf("reading nexthop objects: %w", err)
	}
	type key struct{ group, member uint32 }
	var counts map[key]int
	err = d.dump(ctx, bucketDump, func() { counts = map[key]int{} }, func(m netlink.Message) error {
		group, member, err := decodeBucket(m)
		counts[key{group, member}]++
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the buckets of nexthop groups: %w", err)
	}
	links, err := d.Links(ctx)
	if err != nil {
		return nil, err
	}
	return shares(state, links, func(group, member uint32) int { return counts[key{group, member}] }), nil
}

// shares assigns counts of buckets to interfaces.
func shares(s fib.State, links []fib.Link, count func(group, member uint32) int) map[string]int {
	names, ifaces := map[uint32]string{}, map[uint32]string{}
	for _, l := range links {
		names[l.Index] = l.Name
	}
	for _, o := range s.NextHops {
		ifaces[o.ID] = names[o.Link]
	}
	out, from := map[string]int{}, map[string]uint32{}
	for _, g := range s.Groups {
		if g.Buckets == 0 {
			continue
		}
		for _, member := range g.Members {
			iface := ifaces[member]
			if first, ok := from[iface]; iface != "" && (!ok || g.ID < first) {
				out[iface], from[iface] = count(g.ID, member), g.ID
			}
		}
	}
	return out
}

package report

import (
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"

	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/observe"
)

// routes returns the routes that isthmus owns, by key.
func (r *Report) routes() []*isthmusv1.Route {
	states, machine := r.FIB.Routes(), r.Observed.Machine()
	outranking := machine.Outranking()
	slices.SortFunc(states, func(a, b fib.RouteState) int { return a.Key.Compare(b.Key) })
	out := make([]*isthmusv1.Route, 0, len(states))
	r.Observed.Read(func(seen *observe.State) {
		// names of tunnels by interface, and peers by name
		names, peers := map[string]string{}, map[string]bgp.Peer{}
		for _, c := range seen.Target.Tunnels {
			names[c.Interface] = c.Name
		}
		for _, p := range seen.Target.BGP.Peers {
			peers[p.Name] = p
		}
		for _, s := range states {
			route := routeMessage(s, names, peers, seen.Paths[s.Key])
			if other, outranked := outranking[s.Key.Prefix]; outranked && s.Installed && !transits(s, machine) {
				route.Conditions = append(route.Conditions, condition.Outranked.Warning(time.Time{}, "a route of the machine by interface %s has the metric %d, which is smaller than %d: packets to the prefix take that one", other.Interface, other.Metric, fib.Metric))
			}
			out = append(out, route)
		}
	})
	return out
}

// transits reports whether forwarded packets take a default route before that of the machine.
func transits(s fib.RouteState, machine fib.Surroundings) bool {
	family := 0
	if s.Key.Prefix.Addr().Is6() {
		family = 1
	}
	return s.Transit && machine.Transit[family]
}

func routeMessage(s fib.RouteState, names map[string]string, peers map[string]bgp.Peer, l observe.Learned) *isthmusv1.Route {
	route := &isthmusv1.Route{Prefix: s.Key.Prefix.String(), Source: sourceName(s.Source), Installed: s.Installed, Blackhole: s.Blackhole}
	from := map[fib.NextHop]bgp.Path{}
	if s.Source == fib.BGP {
		route.Since = stamp(l.At)
		for i, p := range l.Paths {
			if i == 0 {
				route.AsPath = asPath(p.ASPath)
			}
			for _, hop := range observe.NextHops(peers[p.Peer], s.Key.Prefix) {
				from[hop] = p
			}
		}
	}
	for _, h := range s.NextHops {
		hop := &isthmusv1.NextHop{Tunnel: names[h.Interface], Interface: h.Interface, Dead: !slices.Contains(s.Alive, h)}
		if p, ok := from[h]; ok {
			hop.Peer = p.Peer
			if p.NextHop.IsValid() {
				hop.Gateway = p.NextHop.String()
			}
		}
		route.NextHops = append(route.NextHops, hop)
	}
	if s.Takes != nil {
		route.Conditions = append(route.Conditions, condition.Withheld.Warning(time.Time{}, "the prefix takes %s, %s", shown(s.Takes.Key.Prefix), s.Takes.Why))
	}
	return route
}

// shown formats a prefix, a single address without its length.
func shown(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func sourceName(s fib.Source) string {
	switch s {
	case fib.Static:
		return "static"
	case fib.BGP:
		return "bgp"
	}
	return "former run"
}

func asPath(path []uint32) string {
	words := make([]string, len(path))
	for i, n := range path {
		words[i] = fmt.Sprint(n)
	}
	return strings.Join(words, " ")
}

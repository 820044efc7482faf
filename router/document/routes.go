package document

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/plan"
)

// maxDecisions bounds the decisions of policies for one plan. One takes some 100 ns.
const maxDecisions = 5_000_000

// routed adds to the changes of peers the routes that go and the prefixes that are withdrawn and
// announced, by the policies and the paths that are in use now. Paths that an import policy refuses
// at present are not known.
func (m *Manager) routed(changes []plan.Change, from, to plan.Target) []plan.Change {
	var learned map[netip.Prefix][]bgp.Path
	var static map[fib.Key]bool
	decisions := 0
	for i := range changes {
		c := &changes[i]
		taking := c.Kind == "route" && c.Action == plan.Add
		if !taking && (c.Kind != "peer" || c.Action == plan.Add) {
			continue
		}
		if learned == nil {
			learned, static = m.Machine.Learned(), map[fib.Key]bool{}
			for _, r := range from.Routes {
				static[r.Key] = true
			}
		}
		if taking {
			if said := taken(c.Name, static, learned); said != "" {
				interrupt(c, said)
			}
			continue
		}
		if decisions += 2*len(learned) + len(from.BGP.Announce) + len(to.BGP.Announce); decisions > maxDecisions {
			interrupt(c, "the routes that change are not counted: there are too many")
			continue
		}
		is, ok := peerNamed(to, c.Name)
		if n := m.Machine.Received(c.Name); ok && is.MaxPrefixes != 0 && n > is.MaxPrefixes {
			interrupt(c, fmt.Sprintf("the session is closed and held down: the peer has sent %s, more than maxPrefixes", counted(int(n), "prefix", "prefixes")))
		}
		r := rerouting{from: from, to: to, learned: learned}
		if was, had := peerNamed(from, c.Name); had && ok && !is.Disabled {
			r.peer(&was, &is)
		} else if had {
			r.peer(&was, nil)
		}
		if len(r.gone) > 0 {
			interrupt(c, fmt.Sprintf("%s: %s, and withdrawn from other peers, unless another peer announces the same", counted(len(r.gone), "route goes", "routes go"), few(r.gone)))
		}
		if len(r.less) > 0 {
			interrupt(c, fmt.Sprintf("%s paths of other peers alone: %s", counted(len(r.less), "route keeps", "routes keep"), few(r.less)))
		}
		if ok && len(r.withdrawn) > 0 {
			interrupt(c, fmt.Sprintf("%s withdrawn from the peer: %s", counted(len(r.withdrawn), "prefix is", "prefixes are"), few(r.withdrawn)))
		}
		if len(r.added) > 0 {
			c.Fields = append(c.Fields, fmt.Sprintf("%s announced to the peer: %s", counted(len(r.added), "prefix is", "prefixes are"), few(r.added)))
		}
	}
	return changes
}

// taken says from which route a new one takes packets: from the longest one that has its prefix.
func taken(name string, static map[fib.Key]bool, learned map[netip.Prefix][]bgp.Path) string {
	prefix, err := netip.ParsePrefix(name)
	if err != nil {
		return "" // of another table
	}
	for bits := prefix.Bits(); bits >= 0; bits-- {
		p := netip.PrefixFrom(prefix.Addr(), bits).Masked()
		if static[fib.Main(p)] {
			return fmt.Sprintf("it takes the packets to %v from the static route to %v", prefix, p)
		}
		if paths := learned[p]; len(paths) > 0 {
			return fmt.Sprintf("it takes the packets to %v from the route to %v, learned from peer %s", prefix, p, paths[0].Peer)
		}
	}
	return ""
}

// interrupt adds an interruption to a change.
func interrupt(c *plan.Change, what string) {
	if c.Interrupts != "" {
		what = c.Interrupts + "; " + what
	}
	c.Interrupts = what
}

func peerNamed(t plan.Target, name string) (bgp.Peer, bool) {
	i := slices.IndexFunc(t.BGP.Peers, func(p bgp.Peer) bool { return p.Name == name })
	if i < 0 {
		return bgp.Peer{}, false
	}
	return t.BGP.Peers[i], true
}

// rerouting collects the prefixes that a change of one peer affects.
type rerouting struct {
	from, to plan.Target
	learned  map[netip.Prefix][]bgp.Path

	gone      []netip.Prefix // no path stays
	less      []netip.Prefix // paths of other peers stay
	withdrawn []netip.Prefix // from the peer
	added     []netip.Prefix // announced to the peer
}

// peer compares the decisions of a peer's former and next policies; nil: it is removed.
func (r *rerouting) peer(was, is *bgp.Peer) {
	former := was.Decider(r.from.BGP.ASN)
	var next bgp.Decider
	if is != nil {
		next = is.Decider(r.to.BGP.ASN)
	}
	known := map[string]*bgp.Peer{}
	for i := range r.from.BGP.Peers {
		known[r.from.BGP.Peers[i].Name] = &r.from.BGP.Peers[i]
	}
	announce := func(by *bgp.Peer, route bgp.Route, stays bool) {
		_, before := former.Announce(by, route)
		after := false
		if is != nil && stays {
			_, after = next.Announce(by, route)
		}
		switch {
		case before && !after:
			r.withdrawn = append(r.withdrawn, route.Prefix)
		case !before && after:
			r.added = append(r.added, route.Prefix)
		}
	}
	for prefix, paths := range r.learned {
		for _, p := range paths {
			if p.Peer != was.Name {
				continue
			}
			refused := is == nil
			if !refused {
				_, accepted := next.Accept(bgp.Route{Prefix: prefix, ASPath: p.ASPath, Kept: p.Kept})
				refused = !accepted
			}
			switch {
			case refused && len(paths) == 1:
				r.gone = append(r.gone, prefix)
			case refused:
				r.less = append(r.less, prefix)
			}
		}
		// The best path is the first; a peer does not get back its own.
		if best := paths[0]; best.Peer != was.Name {
			announce(known[best.Peer], bgp.Route{Prefix: prefix, ASPath: best.ASPath, Kept: best.Kept}, true)
		}
	}
	for _, prefix := range r.from.BGP.Announce {
		announce(nil, bgp.Route{Prefix: prefix}, slices.Contains(r.to.BGP.Announce, prefix))
	}
	for _, list := range [][]netip.Prefix{r.gone, r.less, r.withdrawn, r.added} {
		slices.SortFunc(list, netip.Prefix.Compare)
	}
}

// counted formats a number with its words.
func counted(n int, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return thousands(n) + " " + more
}

// few lists the first four prefixes, and counts the others.
func few(prefixes []netip.Prefix) string {
	const most = 4
	var names []string
	for _, p := range prefixes[:min(most, len(prefixes))] {
		names = append(names, p.String())
	}
	if more := len(prefixes) - most; more > 0 {
		names = append(names, thousands(more)+" more")
	}
	return strings.Join(names, ", ")
}

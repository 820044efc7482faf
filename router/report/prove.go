package report

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/live"
	"github.com/isthmus-net/isthmus/router/plan"
)

const (
	maxProved = 64                     // prefixes of each kind in one request
	writeTime = 5 * time.Second        // bound for the rules to reflect the observed facts
	writePace = 100 * time.Millisecond // between two reads of the rules
)

// everybody has every source or destination.
var everybody = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}

// ProveEgress implements api.Router.
func (r *Report) ProveEgress(ctx context.Context, q *isthmusv1.ProveEgressRequest) (*isthmusv1.EgressProof, error) {
	destinations, err := prefixes("destinations", q.Destinations)
	if err != nil {
		return nil, err
	}
	if len(destinations) == 0 {
		return nil, fmt.Errorf("%w: destinations: at least one prefix is needed", api.ErrInvalid)
	}
	sources, err := prefixes("sources", q.Sources)
	if err != nil {
		return nil, err
	}
	if len(sources) == 0 {
		sources = everybody
	}
	var expected []netip.Addr
	for i, text := range q.Expect {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("%w: expect[%d]: %q is not an address", api.ErrInvalid, i, text)
		}
		expected = append(expected, a)
	}
	canary, err := readCanary(q)
	if err != nil {
		return nil, err
	}
	done, err := r.takeTurn(ctx)
	if err != nil {
		return nil, err
	}
	defer done()

	target, generation, config, differences, err := r.differences(ctx)
	if err != nil {
		return nil, err
	}
	if canary != nil && canary.from.IsValid() {
		if err := r.refuseSource(canary.from, target); err != nil {
			return nil, err
		}
	}
	p := &isthmusv1.EgressProof{
		Node: target.Node.Name, Generation: generation, Time: timestamppb.Now(), Sources: texts(sources), Destinations: texts(destinations),
	}
	if len(q.Expect) == 0 {
		expected = deciding(config, sources, destinations)
	}
	slices.SortFunc(expected, netip.Addr.Compare)
	expected = slices.Compact(expected)
	p.Expected = texts(expected)

	for _, d := range differences {
		p.Violations = append(p.Violations, fmt.Sprintf("the rules in the kernel are not those of generation %d: %s", generation, d))
	}
	foreign, err := r.NAT.Foreign(ctx)
	if err != nil {
		return nil, err
	}
	p.Violations = append(p.Violations, foreign...)
	seen, err := r.Addresses.Surroundings()
	if err != nil {
		return nil, err
	}
	p.Violations = append(p.Violations, seen.Filters...)
	for _, d := range destinations {
		p.Violations = append(p.Violations, seen.Doubts(config.Underlay, d)...)
		for _, route := range r.FIB.Routes() {
			if route.Key.Domain != 0 || !route.Installed || route.Blackhole {
				continue
			}
			to, best := route.Key.Prefix, seen.Best(d.Addr())
			if to.Bits() <= d.Bits() && to.Contains(d.Addr()) && (to.Bits() > best || best == 0 && transits(route, seen)) && byOther(route, config.Underlay) {
				p.Violations = append(p.Violations, fmt.Sprintf("the route to %v leads inside, not to %s", to, config.Underlay))
			}
		}
	}
	slices.Sort(p.Violations)
	p.Violations = slices.Compact(p.Violations)
	now, err := r.NAT.Departures(ctx, config.Underlay, sources, destinations)
	if err != nil {
		p.Violations = append(p.Violations, fmt.Sprintf("the rules in the kernel cannot be followed: %v", err))
	}
	used := judge(p, "now", config, now, expected)
	for i, pool := range config.Pools {
		for j, a := range pool.Addresses {
			broken := config
			broken.Pools = slices.Clone(config.Pools)
			broken.Pools[i].Addresses = slices.Clone(pool.Addresses)
			broken.Pools[i].Addresses[j].Down = true
			then, err := r.NAT.Predict(broken, sources, destinations)
			if err != nil {
				return nil, err
			}
			judge(p, "without "+a.Public.String(), broken, then, expected)
		}
	}

	state, err := r.NAT.Observe(ctx)
	if err != nil {
		return nil, err
	}
	p.GuardPackets, p.GuardBytes = state.Guard.Packets, state.Guard.Bytes
	switch {
	case canary == nil:
	case canary.from.IsValid():
		c := r.callFromInside(ctx, canary, config.Underlay)
		p.Canaries = append(p.Canaries, c)
		if c.Error != "" {
			p.Violations = append(p.Violations, fmt.Sprintf("the canary called from %s, by the way of forwarded packets, got no answer: %s", c.Address, c.Error))
		} else if !slices.Contains(p.Expected, c.SeenAs) {
			p.Violations = append(p.Violations, fmt.Sprintf("the canary called from %s, by the way of forwarded packets, was seen as %s, which is not expected", c.Address, c.SeenAs))
		}
	default:
		done()
		p.Canaries = r.callCanaries(ctx, canary.url, config, used)
		for _, c := range p.Canaries {
			if c.SeenAs != c.PublicAddress {
				p.Violations = append(p.Violations, fmt.Sprintf("the canary called from %s was seen as %q instead of %s: %s", c.Address, c.SeenAs, c.PublicAddress, c.Error))
			}
		}
	}
	p.Holds = len(p.Violations) == 0
	return p, nil
}

// differences returns the effective configuration, and the differences of the kernel's rules from
// it. New facts, such as an address of the node, reach the rules a moment later: only a difference
// that stays for writeTime counts.
func (r *Report) differences(ctx context.Context) (t plan.Target, generation uint64, c nat.Config, found []string, err error) {
	for end := time.Now().Add(writeTime); ; {
		status := r.Documents.Status()
		t, generation = status.Target, status.Present.Generation
		c = live.Of(&t, r.Observed.Facts()).NAT
		if c.Underlay == "" {
			return t, generation, c, nil, fmt.Errorf("%w: no document is applied; apply one", api.ErrPrecondition)
		}
		found, err = r.NAT.Differences(ctx, c)
		if err != nil || len(found) == 0 || time.Now().After(end) {
			return t, generation, c, found, err
		}
		select {
		case <-ctx.Done():
			return t, generation, c, nil, context.Cause(ctx)
		case <-time.After(writePace):
		}
	}
}

// byOther reports whether a route leads to another interface.
func byOther(r fib.RouteState, iface string) bool {
	return slices.ContainsFunc(r.NextHops, func(h fib.NextHop) bool { return h.Interface != iface })
}

func prefixes(field string, list []string) ([]netip.Prefix, error) {
	if len(list) > maxProved {
		return nil, fmt.Errorf("%w: %s: %d prefixes, at most %d", api.ErrInvalid, field, len(list), maxProved)
	}
	var out []netip.Prefix
	for i, text := range list {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("%w: %s[%d]: %q is not a prefix such as 198.51.100.0/24", api.ErrInvalid, field, i, text)
		}
		out = append(out, p)
	}
	return out, nil
}

// deciding returns the public addresses of the pools of the policies that may match flows. It reads
// only the policies, not the outcome. A rule that one other rule beats for all of the flows does
// not count; a rule that only several others together beat does.
func deciding(c nat.Config, sources, destinations []netip.Prefix) (out []netip.Addr) {
	rules, err := c.Rules() // best first
	if err != nil {
		return nil // no driver applies so many rules
	}
	type use struct {
		pool string
		v4   bool
	}
	seen := map[use]bool{} // a pool may have thousands of addresses and rules
	better := newCovers(rules)
	for i, rule := range rules {
		u := use{rule.Policy.Pool, rule.Source.Addr().Is4()}
		if rule.Policy.Action != nat.SNAT || seen[u] {
			continue
		}
		for _, src := range common(sources, rule.Source) {
			for _, dst := range common(destinations, rule.Destination) {
				if !seen[u] && !better.beat(i, src, dst) {
					seen[u] = true
				}
			}
		}
		if !seen[u] {
			continue
		}
		for _, a := range c.Pool(u.pool).Addresses {
			if a.Address.Is4() == u.v4 {
				out = append(out, a.Public)
			}
		}
	}
	return out
}

// common returns the intersections of a prefix with a list of others.
func common(list []netip.Prefix, p netip.Prefix) (out []netip.Prefix) {
	for _, q := range list {
		switch {
		case !q.Overlaps(p):
		case q.Bits() > p.Bits():
			out = append(out, q)
		default:
			out = append(out, p)
		}
	}
	return out
}

// covers finds rules that match all flows between two prefixes.
type covers struct {
	rules []nat.Rule
	at    map[[2]netip.Prefix][]int // by source and destination, in order of precedence
	// prefix lengths in use, of sources and destinations, of IPv4 and IPv6
	bits [2][2][129]bool
}

func newCovers(rules []nat.Rule) *covers {
	c := &covers{rules: rules, at: map[[2]netip.Prefix][]int{}}
	for i, r := range rules {
		c.at[[2]netip.Prefix{r.Source, r.Destination}] = append(c.at[[2]netip.Prefix{r.Source, r.Destination}], i)
		family := r.Source.Addr().BitLen() / 128
		c.bits[0][family][r.Source.Bits()], c.bits[1][family][r.Destination.Bits()] = true, true
	}
	return c
}

// beat reports whether a rule before a place matches all flows of its rule between two prefixes.
func (c *covers) beat(place int, src, dst netip.Prefix) bool {
	family, r := src.Addr().BitLen()/128, &c.rules[place]
	for s := src.Bits(); s >= 0; s-- {
		if !c.bits[0][family][s] {
			continue
		}
		from, _ := src.Addr().Prefix(s)
		for d := dst.Bits(); d >= 0; d-- {
			if !c.bits[1][family][d] {
				continue
			}
			to, _ := dst.Addr().Prefix(d)
			for _, i := range c.at[[2]netip.Prefix{from, to}] {
				if i >= place {
					break
				}
				if b := &c.rules[i]; (b.Protocol == 0 || b.Protocol == r.Protocol) && b.Ports.First <= r.Ports.First && r.Ports.Last <= b.Ports.Last {
					return true
				}
			}
		}
	}
	return false
}

// judge adds a state with its violations to a proof, and returns the interface addresses that flows
// may have.
func judge(p *isthmusv1.EgressProof, name string, c nat.Config, departures []nat.Departure, expected []netip.Addr) (used []netip.Addr) {
	state := &isthmusv1.EgressProofState{Name: name}
	p.States = append(p.States, state)
	for _, d := range departures {
		switch {
		case !d.Address.IsValid() && stays(d.Sources):
		case !d.Address.IsValid():
			state.Untranslated = append(state.Untranslated, fmt.Sprintf("%s-%s", d.Sources.First, d.Sources.Last))
		case !slices.Contains(used, d.Address):
			used = append(used, d.Address)
		}
	}
	slices.Sort(state.Untranslated)
	state.Untranslated = slices.Compact(state.Untranslated)
	if n := len(state.Untranslated); n > 0 {
		p.Violations = append(p.Violations, fmt.Sprintf("%s: flows may leave untranslated, from %s", name, strings.Join(state.Untranslated[:min(n, 3)], ", ")))
	}
	slices.SortFunc(used, netip.Addr.Compare)
	for _, a := range used {
		public := publicOf(c, a)
		if !public.IsValid() {
			p.Violations = append(p.Violations, fmt.Sprintf("%s: flows may leave as %s, which is not in a pool", name, a))
			continue
		}
		if state.PublicAddresses = append(state.PublicAddresses, public.String()); !slices.Contains(expected, public) {
			p.Violations = append(p.Violations, fmt.Sprintf("%s: flows may be seen as %s, which is not expected", name, public))
		}
	}
	return used
}

// stays reports whether no router, including this one, forwards packets with such sources: the
// unspecified address (RFC 4291 section 2.5.2) and link-local ones (section 2.5.6). The guard lets
// them pass, since neighbour discovery uses them on the underlay.
func stays(sources nat.Range) bool {
	linkLocal := sources.First.Is6() && sources.First.IsLinkLocalUnicast() && sources.Last.IsLinkLocalUnicast()
	return linkLocal || sources.First == netip.IPv6Unspecified() && sources.Last == sources.First
}

// public reports whether an address is on the Internet side: not the node's, its platform's, a
// pool's, or in an inside network.
func (r *Report) public(a netip.Addr) bool {
	t := r.Observed.Target()
	seen := r.Observed.Machine()
	if !a.IsGlobalUnicast() || nat.PlatformOf(a).IsValid() ||
		slices.ContainsFunc(seen.Addresses, func(o fib.Assigned) bool { return o.Prefix.Addr() == a }) || publicOf(t.NAT, a).IsValid() {
		return false
	}
	for _, c := range t.NAT.Attachments {
		if slices.ContainsFunc(c.Sources, func(p netip.Prefix) bool { return p.Bits() > 0 && p.Contains(a) }) {
			return false
		}
	}
	return true
}

// publicOf returns the public address of an address on the interface.
func publicOf(c nat.Config, a netip.Addr) netip.Addr {
	for _, pool := range c.Pools {
		for _, o := range pool.Addresses {
			if o.Address == a {
				return o.Public
			}
		}
	}
	return netip.Addr{}
}

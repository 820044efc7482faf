package nftables

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/isthmus-net/isthmus/nat"
)

// Views of the policies. Each view is a set of layers that is looked up at one point of a packet's
// path.
const (
	// policyView holds every rule. It is looked up after routing, when a flow leaves by the
	// underlay.
	policyView = "policy"
	// rejectView holds the rules that reject, and the rules that beat them. It is looked up where
	// the kernel can still send a refusal.
	rejectView = "reject"
	// pickupView holds the rules that pick up late connections, and the rules that beat them. Only
	// late packets are looked up.
	pickupView = "pickup"
	// frontView holds the port forwards at pool addresses, and the rules that beat them. It is
	// looked up before routing, for packets to these addresses.
	frontView = "front"
	// proxyView holds the rules that redirect to proxies, and the rules that beat them. It is
	// looked up before routing, for packets from inside that would leave by the underlay.
	proxyView = "proxy"
	// plainView holds the pairs of prefixes between which packets may keep their source. The guard
	// looks it up.
	plainView = "plain"
	// exactView holds the rules that name addresses of the cloud's platform. Only flows to these
	// addresses are looked up.
	exactView = "exact"
)

// layerIndex finds the last layer in which a rule may be overlapped. It compares prefixes only:
// rules of one precedence never overlap, and rules of different precedence are kept apart.
type layerIndex struct {
	// exact and below hold, by destination and source, the number of layers used there, and at or
	// below there.
	exact, below          map[[2]netip.Prefix]int
	sources, destinations lengths
}

// lengths marks the prefix lengths that occur, of IPv4 and IPv6.
type lengths [2][129]bool

// parents yields the prefixes that contain p and have a length that occurs, beginning with p.
func (l *lengths) parents(p netip.Prefix, yield func(netip.Prefix)) {
	occur := &l[b2i(p.Addr().Is6())]
	for bits := p.Bits(); bits >= 0; bits-- {
		if occur[bits] {
			q, _ := p.Addr().Prefix(bits)
			yield(q)
		}
	}
}

// view is a point at which rules are looked up.
type view struct {
	name string
	// wants reports whether a policy must be looked up here. The view also holds the rules that
	// beat a rule of such a policy.
	wants func(*nat.Policy) bool
	// verdict returns the view's element for a rule, and adds the chains that the element needs to
	// a ruleset.
	verdict func(*ruleset, *nat.Rule) element
}

// Indexes of the views in which the layers of rules are stored.
const (
	inPolicy = iota
	inPickup
	inFront
	inProxy
	inReject
	viewCount
)

// laid is a rule with its layer in each view, counted from 0; absent where it has none.
type laid struct {
	nat.Rule
	layers [viewCount]int16
}

const absent = -1

// views returns all views but plainView and exactView.
func views(c nat.Config) [viewCount]view {
	pools := map[string]*[2]bool{}
	for i := range c.Pools {
		has := &[2]bool{}
		for _, a := range c.Pools[i].Addresses {
			has[b2i(a.Address.Is6())] = true
		}
		pools[c.Pools[i].Name] = has
	}
	does := func(action nat.Action) func(*nat.Policy) bool {
		return func(p *nat.Policy) bool { return p.Does() == action }
	}
	// The other effects of a rule are decided elsewhere, by policyView, which holds all policies:
	// rules that beat such a rule need not be in this view. A flow that no port forward takes may
	// still be redirected to a proxy.
	target := func(action nat.Action) func(*ruleset, *nat.Rule) element {
		return func(r *ruleset, rule *nat.Rule) element {
			if p := rule.Policy; p.Does() == action {
				return element{kind: gotoTo, chain: r.addTarget(c, p), policy: p.Name}
			}
			return element{kind: back}
		}
	}
	return [viewCount]view{
		inPolicy: {policyView, func(*nat.Policy) bool { return true }, func(r *ruleset, rule *nat.Rule) element {
			p, ipv6 := rule.Policy, rule.Source.Addr().Is6()
			e := element{kind: drop, policy: p.Name}
			switch has := pools[p.Pool]; {
			case p.Action == nat.NoNAT:
				e.kind, e.chain = r.timed(p.Timeouts, "plain", accept, "")
			case p.Action == nat.SNAT && has != nil && has[b2i(ipv6)]:
				pool := poolName(p.Pool, ipv6)
				e.kind, e.chain = r.timed(p.Timeouts, pool, gotoTo, pool)
			}
			return e
		}},
		inPickup: {pickupView, func(p *nat.Policy) bool { return p.Pickup }, func(_ *ruleset, rule *nat.Rule) element {
			if rule.Policy.Pickup {
				return element{kind: gotoTo, chain: policyView + "-" + familyOf(rule.Source.Addr().Is6()).suffix}
			}
			return element{kind: gotoTo, chain: dropped}
		}},
		inFront: {frontView, does(nat.DNAT), target(nat.DNAT)},
		inProxy: {proxyView, does(nat.Redirect), target(nat.Redirect)},
		inReject: {rejectView, does(nat.Reject), func(_ *ruleset, rule *nat.Rule) element {
			if rule.Policy.Does() == nat.Reject {
				return element{kind: gotoTo, chain: rejected, policy: rule.Policy.Name}
			}
			return element{kind: back} // to the caller, which looks up refusals
		}},
	}
}

// addPolicies lays the policies' rules into the views.
func (r *ruleset) addPolicies(c nat.Config, rules []nat.Rule) {
	r.laid = make([]laid, len(rules))
	for i := range rules {
		r.laid[i] = laid{rules[i], [viewCount]int16{absent, absent, absent, absent, absent}}
	}
	for v, view := range views(c) {
		members := make([]int, 0, len(rules))
		if v == inPolicy {
			for i := range rules {
				members = append(members, i)
			}
		} else {
			members = deciding(rules, view.wants)
		}
		inView := rules
		if len(members) < len(rules) {
			inView = make([]nat.Rule, len(members))
			for i, at := range members {
				inView[i] = rules[at]
			}
		}
		r.lay(view.name, inView, func(i, layer int) element {
			r.laid[members[i]].layers[v] = int16(layer)
			return view.verdict(r, &inView[i])
		})
	}
	r.addPlain(c)
	var exact []nat.Rule
	for i := range rules {
		if rules[i].NamesPlatform() {
			exact = append(exact, rules[i])
		}
	}
	r.lay(exactView, exact, func(int, int) element { return element{kind: gotoTo, chain: "leaving"} })
}

// addPlain lays the pairs of prefixes that the guard lets pass without translation.
func (r *ruleset) addPlain(c nat.Config) {
	r.lay(plainView, plain(c), func(int, int) element { return element{kind: accept} })
}

// plain returns the pairs of prefixes of the policies without translation. The guard sees the
// packets of both directions of a flow, therefore protocol and port, which are those of its first
// packet, must not matter.
func plain(c nat.Config) []nat.Rule {
	var pairs nat.Config
	for _, p := range c.Policies {
		if p.Action == nat.NoNAT {
			pairs.Policies = append(pairs.Policies, nat.Policy{Sources: p.Sources, Destinations: p.Destinations})
		}
	}
	rules, err := pairs.Rules()
	if err != nil {
		return nil // compile refuses such policies; the guard then lets nothing else pass
	}
	return slices.CompactFunc(rules, func(a, b nat.Rule) bool { return a.Source == b.Source && a.Destination == b.Destination })
}

// deciding returns the indexes of the rules of wanted policies, and of the rules that beat one of
// them for some flow.
func deciding(rules []nat.Rule, wanted func(*nat.Policy) bool) (out []int) {
	if !slices.ContainsFunc(rules, func(r nat.Rule) bool { return wanted(r.Policy) }) {
		return nil
	}
	type pair struct{ destination, source netip.Prefix }
	// wanted rules: with, and at or below, a source
	exact, below := map[pair]bool{}, map[pair]bool{}
	index := newLayerIndex(rules)
	for i := len(rules) - 1; i >= 0; i-- {
		r := &rules[i]
		keep := wanted(r.Policy)
		if keep {
			exact[pair{r.Destination, r.Source}] = true
			index.sources.parents(r.Source, func(src netip.Prefix) { below[pair{r.Destination, src}] = true })
		} else if len(exact) > 0 {
			// The rules that this one may beat have a destination at or above its own, and a
			// source above, at or below its own.
			index.destinations.parents(r.Destination, func(dst netip.Prefix) {
				keep = keep || below[pair{dst, r.Source}]
				index.sources.parents(r.Source, func(src netip.Prefix) { keep = keep || exact[pair{dst, src}] })
			})
		}
		if keep {
			out = append(out, i)
		}
	}
	slices.Reverse(out)
	return out
}

// newLayerIndex returns an empty index for some rules.
func newLayerIndex(rules []nat.Rule) *layerIndex {
	index := &layerIndex{exact: map[[2]netip.Prefix]int{}, below: map[[2]netip.Prefix]int{}}
	for i := range rules {
		ipv6 := b2i(rules[i].Source.Addr().Is6())
		index.sources[ipv6][rules[i].Source.Bits()] = true
		index.destinations[ipv6][rules[i].Destination.Bits()] = true
	}
	return index
}

// lay puts rules, which are sorted by precedence, into the layers of a view. It calls verdict once
// for each rule, with its index and layer.
func (r *ruleset) lay(view string, rules []nat.Rule, verdict func(place, layer int) element) {
	index := newLayerIndex(rules)
	chosen := make([]int, len(rules))
	var sizes [2][]int
	for first, n := 0, 0; first < len(rules); first += n {
		n = 1
		for first+n < len(rules) && nat.Precedence(rules[first], rules[first+n]) == 0 {
			n++
		}
		for i := first; i < first+n; i++ {
			chosen[i] = index.first(&rules[i])
		}
		for i := first; i < first+n; i++ {
			index.add(&rules[i], chosen[i])
			size := &sizes[b2i(rules[i].Source.Addr().Is6())]
			for len(*size) <= chosen[i] {
				*size = append(*size, 0)
			}
			(*size)[chosen[i]]++
		}
	}
	for _, f := range families {
		size := sizes[b2i(f.ipv6)]
		for layer := range size {
			size[layer] = parts(size[layer])
			for part := range size[layer] {
				r.sets[layerMap(view, layer, part, size[layer], f.ipv6)] = &set{
					shape: shape{isMap: true, isVerdict: true, isInterval: true, isConcat: true}, elements: map[string]element{}}
			}
		}
	}
	r.layers[view] = sizes
	for i := range rules {
		key := ruleKey(&rules[i])
		r.sets[r.mapFor(view, chosen[i], &rules[i], key)].elements[key] = verdict(i, chosen[i])
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// first returns the first layer that is behind the layers of all rules that beat r. These rules
// have a destination at or below its own, and a source above, at or below its own.
func (x *layerIndex) first(r *nat.Rule) int {
	layer := x.below[[2]netip.Prefix{r.Destination, r.Source}]
	x.sources.parents(r.Source, func(src netip.Prefix) {
		layer = max(layer, x.exact[[2]netip.Prefix{r.Destination, src}])
	})
	return layer
}

func (x *layerIndex) add(r *nat.Rule, layer int) {
	x.destinations.parents(r.Destination, func(dst netip.Prefix) {
		k := [2]netip.Prefix{dst, r.Source}
		x.exact[k] = max(x.exact[k], layer+1)
		x.sources.parents(r.Source, func(src netip.Prefix) {
			k := [2]netip.Prefix{dst, src}
			x.below[k] = max(x.below[k], layer+1)
		})
	})
}

// ruleKey returns the first and the last key of a rule: source, destination, protocol and port,
// each padded to a multiple of four bytes.
func ruleKey(r *nat.Rule) string {
	protocols := [2]byte{0, 255}
	if r.Protocol != 0 {
		protocols = [2]byte{r.Protocol, r.Protocol}
	}
	var key []byte
	for i, port := range []uint16{r.Ports.First, r.Ports.Last} {
		key = append(key, bound(r.Source, i)...)
		key = append(key, bound(r.Destination, i)...)
		key = append(key, protocols[i], 0, 0, 0)
		key = binary.BigEndian.AppendUint16(key, port)
		key = append(key, 0, 0)
	}
	return string(key)
}

// bound returns the first (0) or the last (1) address of a prefix.
func bound(p netip.Prefix, which int) []byte {
	a := p.Masked().Addr().AsSlice()
	if which == 1 {
		for bit := p.Bits(); bit < len(a)*8; bit++ {
			a[bit/8] |= 0x80 >> (bit % 8)
		}
	}
	return a
}

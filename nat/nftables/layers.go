package nftables

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// Views of the policies. Each is a set of layers, asked at one place of a packet's way.
const (
	// policyView holds every rule. It is asked behind routing, when the flow leaves by the underlay.
	policyView = "policy"
	// rejectView holds what rejects, and what beats that. It is asked where a refusal can still be sent.
	rejectView = "reject"
	// pickupView holds what picks late connections up, and what beats that. Only late ones ask it.
	pickupView = "pickup"
	// frontView holds what is open at addresses of pools, and what beats that. It is asked before routing, for these addresses.
	frontView = "front"
	// proxyView holds what goes to proxies, and what beats that. It is asked before routing, from inside, for what would leave by the
	// underlay.
	proxyView = "proxy"
	// plainView holds the pairs of prefixes between which packets may keep their source. The guard asks it.
	plainView = "plain"
	// exactView holds what names addresses of the cloud's platform. Only flows to these ask it.
	exactView = "exact"
)

// layerIndex finds the last layer in which something may overlap a rule. It only looks at prefixes: rules of one precedence
// never overlap, and those of different precedence are kept apart.
type layerIndex struct {
	exact, below          map[[2]netip.Prefix]int // of a destination and a source: layers used there, and at or below there
	sources, destinations lengths
}

// lengths are the prefix lengths that occur, of IPv4 and IPv6.
type lengths [2][129]bool

// parents yields the prefixes that contain p and may occur, p first.
func (l *lengths) parents(p netip.Prefix, yield func(netip.Prefix)) {
	occur := &l[b2i(p.Addr().Is6())]
	for bits := p.Bits(); bits >= 0; bits-- {
		if occur[bits] {
			q, _ := p.Addr().Prefix(bits)
			yield(q)
		}
	}
}

// view is a place where rules are looked up.
type view struct {
	name string
	// wants says whether a policy must be looked up here. The view also holds the rules that beat one of such a policy.
	wants func(*nat.Policy) bool
	// verdict is what the view holds for a rule. It adds the chains that it needs to a ruleset.
	verdict func(*ruleset, *nat.Rule) element
}

// The views in which a rule's layer is known, by place in views.
const (
	inPolicy = iota
	inPickup
	inFront
	inProxy
	inReject
	viewCount
)

// laid is a rule with its layer in each view, from 0; absent where it is not.
type laid struct {
	nat.Rule
	layers [viewCount]int16
}

const absent = -1

// views returns the views, all but that of plain.
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
	// Whatever else a rule does is decided elsewhere, by all policies: what beats this one need not be in the view. What is no server's
	// may still be a proxy's.
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
			return element{kind: back} // to where refusals are looked up
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

// addPlain lays what the guard lets pass without translation.
func (r *ruleset) addPlain(c nat.Config) {
	r.lay(plainView, plain(c), func(int, int) element { return element{kind: accept} })
}

// plain returns the pairs of prefixes of the policies without translation. The guard sees the packets of both sides of a flow,
// so that protocol and port, which are those of its first packet, must not matter.
func plain(c nat.Config) []nat.Rule {
	var pairs nat.Config
	for _, p := range c.Policies {
		if p.Action == nat.NoNAT {
			pairs.Policies = append(pairs.Policies, nat.Policy{Sources: p.Sources, Destinations: p.Destinations})
		}
	}
	rules, err := pairs.Rules()
	if err != nil {
		return nil // compile refuses such policies, and so the guard lets nothing more pass
	}
	return slices.CompactFunc(rules, func(a, b nat.Rule) bool { return a.Source == b.Source && a.Destination == b.Destination })
}

// deciding returns the places of the rules of wanted policies and of those that beat one of them for some flow.
func deciding(rules []nat.Rule, wanted func(*nat.Policy) bool) (out []int) {
	if !slices.ContainsFunc(rules, func(r nat.Rule) bool { return wanted(r.Policy) }) {
		return nil
	}
	type pair struct{ destination, source netip.Prefix }
	exact, below := map[pair]bool{}, map[pair]bool{} // wanted rules: with, and at or below, a source
	index := newLayerIndex(rules)
	for i := len(rules) - 1; i >= 0; i-- {
		r := &rules[i]
		keep := wanted(r.Policy)
		if keep {
			exact[pair{r.Destination, r.Source}] = true
			index.sources.parents(r.Source, func(src netip.Prefix) { below[pair{r.Destination, src}] = true })
		} else if len(exact) > 0 {
			// What it may beat has a destination at or above its own, and a source above, at or below.
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

// lay puts rules, which are in order of precedence, into the layers of a view. verdict is asked once for each rule, by its place and layer.
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

// first returns the first layer in which a rule loses against all that it may overlap. Those all have a
// destination at or below its own, and a source above, at or below.
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

// ruleKey returns the first and the last key of a rule: source, destination, protocol and port, each filled up to four bytes.
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

// layerMap returns the name of one of the maps of a layer.
func layerMap(view string, layer, part, parts int, ipv6 bool) string {
	if parts > 1 {
		return fmt.Sprintf("%s-%d.%d-%s", view, layer+1, part+1, familyOf(ipv6).suffix)
	}
	return fmt.Sprintf("%s-%d-%s", view, layer+1, familyOf(ipv6).suffix)
}

// mapSize is how many elements a map of a layer has on the average before the layer gets twice as many maps.
const mapSize = 1536

// parts returns into how many maps, a power of two, a layer with some elements is divided. To remove an element the kernel (6.18,
// nft_pipapo_remove) looks at each one before it, about 5 us each; to add one it copies the map. One more look-up costs a new
// flow some 0.1 us.
func parts(elements int) int {
	n := 1
	for n*mapSize < elements {
		n *= 2
	}
	return n
}

// part returns which of the maps of a layer has a key.
func part(key string, parts int) int {
	h := fnv.New32a()
	h.Write([]byte(key))
	return int(uint64(h.Sum32()) * uint64(parts) >> 32) // the upper bits: the lower ones depend on too little
}

// mapFor returns the name of the map that a rule is in.
func (r *ruleset) mapFor(view string, layer int, rule *nat.Rule, key string) string {
	ipv6 := rule.Source.Addr().Is6()
	n := 1
	if parts := r.layers[view][b2i(ipv6)]; layer < len(parts) {
		n = parts[layer]
	}
	return layerMap(view, layer, part(key, n), n, ipv6)
}

// ask adds the chains that look a packet up in a view, and returns how to get there. What no layer of the view has
// comes back and goes on behind.
func (r *ruleset) ask(view string, f family) []expr.Any {
	name := view + "-" + f.suffix
	port := register(2*f.size + 4)
	withPorts := func(l4 byte) []expr.Any {
		return exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, l4), verdict(expr.VerdictGoto, name+"-ports"))
	}
	// Packets of other protocols have no port; what stands at its place must not decide, nor be needed.
	others := r.lookups(view, f, &expr.Immediate{Register: port, Data: []byte{0, 0}})
	r.chains[name] = &chain{rules: append([][]expr.Any{withPorts(unix.IPPROTO_TCP), withPorts(unix.IPPROTO_UDP)}, others...)}
	r.chains[name+"-ports"] = &chain{rules: r.lookups(view, f, transport(2, 2, port))}
	return exprs(verdict(expr.VerdictJump, name))
}

// lookups returns one rule for each map of the layers of a view.
func (r *ruleset) lookups(view string, f family, port expr.Any) (rules [][]expr.Any) {
	for layer, parts := range r.layers[view][b2i(f.ipv6)] {
		for part := range parts {
			rules = append(rules, exprs(
				network(f.source, f.size, register(0)),
				network(f.dst, f.size, register(f.size)),
				meta(expr.MetaKeyL4PROTO, register(2*f.size)),
				port,
				&expr.Lookup{SourceRegister: register(0), IsDestRegSet: true, SetName: layerMap(view, layer, part, parts, f.ipv6)},
			))
		}
	}
	return rules
}

package nftables

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// Two final chains: rejected refuses so that the sender gets an answer; dropped counts, samples
// and drops.
const (
	rejected = "rejected"
	dropped  = "dropped"
)

// targetChain is the chain that addTarget adds for a policy.
func targetChain(p *nat.Policy) string { return "to-" + p.Name }

// addTarget adds the chain that sends flows to the server or proxy of a policy, and returns its
// name.
func (r *ruleset) addTarget(c nat.Config, p *nat.Policy) string {
	name := targetChain(p)
	dnat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(familyOf(p.To.Addr().Is6()).nfproto), RegAddrMin: reg1, RegAddrMax: reg1}
	parts := exprs(&expr.Immediate{Register: reg1, Data: p.To.Addr().AsSlice()})
	if port := p.To.Port(); port != 0 {
		dnat.RegProtoMin, dnat.RegProtoMax, dnat.Specified = unix.NFT_REG_2, unix.NFT_REG_2, true
		parts = append(parts, &expr.Immediate{Register: unix.NFT_REG_2, Data: binary.BigEndian.AppendUint16(nil, port)})
	}
	rules := append(r.setTimeouts(p.Timeouts), append(parts, dnat))
	if p.Action == nat.DNAT {
		f := familyOf(p.To.Addr().Is6())
		rules = slices.Insert(rules, 0,
			// the server would answer with a reset
			rule(late(), exprs(verdict(expr.VerdictDrop, ""))),
			rule(comes(expr.CmpOpNeq, c.Underlay), markFront(f)))
		if len(c.Arms()) > 0 {
			rules = slices.Insert(rules, 2, rule(comes(expr.CmpOpEq, c.Underlay), isFamily(f), inPrefixes(f, f.source, armsSet(f.ipv6)), markFront(f)))
		}
	}
	r.chains[name] = &chain{rules: rules}
	return name
}

// markFront stores in the packet mark which of the pools' addresses the packet was sent to.
func markFront(f family) []expr.Any {
	return exprs(network(f.dst, f.size, reg1), mapLookup(frontMap(f.ipv6)), &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg1})
}

// fronts returns two maps: from the addresses with port forwards to their marks, and back.
func fronts(c nat.Config) map[string]*set {
	sets := map[string]*set{}
	for _, f := range families {
		sets[frontMap(f.ipv6)] = &set{shape: shape{isMap: true}, elements: map[string]element{}}
		sets[hairpinMap(f.ipv6)] = &set{shape: shape{isMap: true}, elements: map[string]element{}}
	}
	var open []netip.Prefix
	for i := range c.Policies {
		if p := &c.Policies[i]; p.Action == nat.DNAT {
			open = append(open, p.Opens(c.Pool(p.Pool))...)
		}
	}
	slices.SortFunc(open, netip.Prefix.Compare)
	for i, p := range slices.Compact(open) {
		address, mark := string(p.Addr().AsSlice()), string(binary.NativeEndian.AppendUint32(nil, firstMark+uint32(i)))
		sets[frontMap(p.Addr().Is6())].elements[address] = element{data: mark}
		sets[hairpinMap(p.Addr().Is6())].elements[mark] = element{data: address}
	}
	return sets
}

// addArrival adds the translation of the destination of new flows, before routing.
func (r *ruleset) addArrival(c nat.Config) {
	arrival := &chain{kind: nftables.ChainTypeNAT, hook: *nftables.ChainHookPrerouting, priority: *nftables.ChainPriorityNATDest}
	maps.Copy(r.sets, fronts(c))
	for _, f := range families {
		if len(r.layers[frontView][b2i(f.ipv6)]) > 0 {
			arrival.rules = append(arrival.rules, rule(isFamily(f), exprs(network(f.dst, f.size, reg1), mapLookup(frontMap(f.ipv6))), r.ask(frontView, f)))
		}
		if len(r.layers[proxyView][b2i(f.ipv6)]) > 0 {
			proxied := rule(exprs(&expr.Fib{Register: reg1, ResultOIFNAME: true, FlagDADDR: true}, compare(expr.CmpOpEq, interfaceName(c.Underlay)...)), r.ask(proxyView, f))
			arrival.rules = append(arrival.rules, rule(isFamily(f), late(), exprs(verdict(expr.VerdictAccept, ""))), rule(isFamily(f), comes(expr.CmpOpNeq, c.Underlay), proxied))
			if len(c.Arms()) > 0 {
				// A packet between two networks behind the underlay stays inside.
				arrival.rules = append(arrival.rules,
					rule(isFamily(f), inPrefixes(f, f.dst, armsSet(f.ipv6)), exprs(verdict(expr.VerdictAccept, ""))),
					rule(isFamily(f), comes(expr.CmpOpEq, c.Underlay), inPrefixes(f, f.source, armsSet(f.ipv6)), proxied))
			}
		}
	}
	r.chains["arrival"] = arrival
}

// hairpin gives flows from inside to a pool's address that lead back inside this address as their
// source. Otherwise client and server might answer each other on a path that bypasses this node.
// Conntrack has the address, but the library cannot read back a rule that loads it; therefore the
// mark of the flow's first packet carries it.
func hairpin(c nat.Config, f family) (rules [][]expr.Any) {
	translate := exprs(meta(expr.MetaKeyMARK, reg1), mapLookup(hairpinMap(f.ipv6)),
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto), RegAddrMin: reg1, RegAddrMax: reg1})
	rules = [][]expr.Any{rule(isFamily(f), leaves(expr.CmpOpNeq, c.Underlay), translate)}
	if len(c.Arms()) > 0 {
		rules = append(rules, rule(isFamily(f), leaves(expr.CmpOpEq, c.Underlay), inPrefixes(f, f.dst, armsSet(f.ipv6)), translate))
	}
	return rules
}

// addEgress adds the choice of the source address of new flows.
func (r *ruleset) addEgress(c nat.Config) {
	egress := &chain{kind: nftables.ChainTypeNAT, hook: *nftables.ChainHookPostrouting, priority: *nftables.ChainPriorityNATSource}
	for _, f := range families {
		if len(r.layers[frontView][b2i(f.ipv6)]) > 0 {
			egress.rules = append(egress.rules, hairpin(c, f)...)
		}
	}
	egress.rules = append(egress.rules, rule(leaves(expr.CmpOpNeq, c.Underlay), exprs(verdict(expr.VerdictAccept, ""))))
	egress.rules = append(egress.rules, arms(c, nil, destinationOf, exprs(verdict(expr.VerdictAccept, "")))...)
	egress.rules = append(egress.rules, rule(encrypts(), exprs(verdict(expr.VerdictAccept, ""))))
	for _, f := range families {
		egress.rules = append(egress.rules, rule(hasOwnSource(f), exprs(verdict(expr.VerdictAccept, ""))))
		ask := r.ask(policyView, f)
		pickup := dropped
		if len(r.layers[pickupView][b2i(f.ipv6)]) > 0 {
			pickup = pickupView + "-" + f.suffix
			r.chains[pickup] = &chain{rules: append(r.lookups(pickupView, f, transport(2, 2, register(2*f.size+4))), exprs(verdict(expr.VerdictGoto, dropped)))}
		}
		egress.rules = append(egress.rules, rule(isFamily(f), late(), exprs(verdict(expr.VerdictGoto, pickup))), rule(isFamily(f), ask))
	}
	// A flow that matches no policy must not pass the guard because another policy names its
	// prefixes.
	egress.rules = append(append(egress.rules, linkLocal()...), exprs(verdict(expr.VerdictGoto, dropped)))
	r.chains["egress"] = egress
}

// addMetadata drops packets that are forwarded from inside to the addresses at which the platform
// serves its machines, since an attachment's network card may lead there just like the underlay's.
// The chain sees only the first packets of flows, after translation of their destination. Packets
// of the node itself have no incoming interface, and pass. Tunnels are not checked: they lead to
// another network, in which such an address belongs to another host.
func (r *ruleset) addMetadata(c nat.Config) {
	plain := c.Plain()
	if len(plain)+len(c.Arms()) == 0 {
		return
	}
	r.sets[plainSet] = &set{elements: map[string]element{}}
	for _, name := range plain {
		r.sets[plainSet].elements[string(interfaceName(name))] = element{}
	}
	first := &chain{kind: nftables.ChainTypeNAT, hook: *nftables.ChainHookPostrouting, priority: *nftables.ChainPriorityNATSource - 1}
	first.rules = append(first.rules, rule(exprs(meta(expr.MetaKeyOIFNAME, reg1), setLookup(plainSet)), goTo("metadata-inside")))
	first.rules = append(first.rules, arms(c, leaves(expr.CmpOpEq, c.Underlay), destinationOf, goTo("metadata-inside"))...)
	inside := &chain{rules: [][]expr.Any{exprs(meta(expr.MetaKeyIIF, reg1), compare(expr.CmpOpEq, 0, 0, 0, 0), verdict(expr.VerdictAccept, ""))}}
	for _, p := range nat.Platform {
		if f := familyOf(p.Addr().Is6()); p.IsSingleIP() {
			inside.rules = append(inside.rules, rule(isFamily(f), isIn(f, f.dst, p), goTo(dropChain(nat.DropPlatform))))
		}
	}
	r.chains["metadata"], r.chains["metadata-inside"] = first, inside
}

// linkLocal lets neighbour discovery and similar protocols pass (RFC 4861), which use a link-local
// source or none. The kernel forwards neither.
func linkLocal() [][]expr.Any {
	return [][]expr.Any{
		rule(isFamily(familyOf(true)), exprs(network(8, 2, reg1),
			&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: []byte{0, 0}},
			compare(expr.CmpOpEq, 0xfe, 0x80), verdict(expr.VerdictAccept, ""))),
		rule(isFamily(familyOf(true)), exprs(network(8, 16, reg1), compare(expr.CmpOpEq, make([]byte, 16)...), verdict(expr.VerdictAccept, ""))),
	}
}

// fewAddresses is how many pool addresses of a family the guard compares one by one. A set lookup
// takes as long as about eight comparisons.
const fewAddresses = 4

// addGuard adds the last check of packets that leave by the underlay, after translation. By then,
// most of them have a source of the node.
func (r *ruleset) addGuard(c nat.Config) {
	guard := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookPostrouting, priority: *nftables.ChainPriorityConntrackHelper}
	if index := c.Links.Of(c.Underlay); index != 0 {
		guard.rules = append(guard.rules, rule(leavesByIndex(index), goTo("guard-own")))
	}
	guard.rules = append(guard.rules, rule(leaves(expr.CmpOpEq, c.Underlay), goTo("guard-own")))
	r.chains["guard"] = guard
	// A packet passes only the rules of its own family.
	own := func(f family) (rules [][]expr.Any) {
		var few []netip.Addr
		for _, p := range c.Pools {
			for _, a := range p.Addresses {
				if a.Address.Is6() == f.ipv6 {
					few = append(few, a.Address)
				}
			}
		}
		slices.SortFunc(few, netip.Addr.Compare)
		few = slices.Compact(few)
		for _, a := range few[:min(len(few), fewAddresses)] {
			rules = append(rules, rule(isIn(f, f.source, netip.PrefixFrom(a, a.BitLen())), exprs(verdict(expr.VerdictAccept, ""))))
		}
		return append(rules, exprs(network(f.source, f.size, reg1), setLookup(ownSet(f.ipv6)), verdict(expr.VerdictAccept, "")), goTo("guard-rest"))
	}
	r.chains["guard-6"] = &chain{rules: own(familyOf(true))}
	r.chains["guard-own"] = &chain{rules: append([][]expr.Any{rule(isFamily(familyOf(true)), goTo("guard-6"))}, own(familyOf(false))...)}
	guard = &chain{}
	guard.rules = append(guard.rules, rule(encrypts(), exprs(verdict(expr.VerdictAccept, ""))))
	guard.rules = append(guard.rules, arms(c, nil, destinationOf, exprs(verdict(expr.VerdictAccept, "")))...)
	for _, f := range families {
		if len(r.layers[plainView][b2i(f.ipv6)]) > 0 {
			name := plainView + "-" + f.suffix
			// All packets of a flow are matched by its pair of prefixes, whichever side began it.
			r.chains[name] = &chain{rules: r.lookups(plainView, f, &expr.Immediate{Register: register(2*f.size + 4), Data: []byte{0, 0}})}
			guard.rules = append(guard.rules, rule(isFamily(f), state(expr.CtStateBitINVALID, expr.CmpOpEq), exprs(verdict(expr.VerdictJump, name))))
		}
	}
	guard.rules = append(append(guard.rules, linkLocal()...), exprs(verdict(expr.VerdictGoto, dropped)))
	r.chains["guard-rest"] = guard
}

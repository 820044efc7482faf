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

// The chains in which packets end: one that refuses so that the sender sees it, and one that counts and samples.
const (
	rejected = "rejected"
	dropped  = "dropped"
)

// targetChain is the chain that addTarget adds for a policy.
func targetChain(p *nat.Policy) string { return "to-" + p.Name }

// addTarget adds the chain that sends flows to the server or proxy of a policy, and returns its name.
func (r *ruleset) addTarget(c nat.Config, p *nat.Policy) string {
	name := targetChain(p)
	dnat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(of(p.To.Addr().Is6()).nfproto), RegAddrMin: reg1, RegAddrMax: reg1}
	parts := do(&expr.Immediate{Register: reg1, Data: p.To.Addr().AsSlice()})
	if port := p.To.Port(); port != 0 {
		dnat.RegProtoMin, dnat.RegProtoMax, dnat.Specified = unix.NFT_REG_2, unix.NFT_REG_2, true
		parts = append(parts, &expr.Immediate{Register: unix.NFT_REG_2, Data: binary.BigEndian.AppendUint16(nil, port)})
	}
	rules := append(r.setTimeouts(p.Timeouts), append(parts, dnat))
	if p.Action == nat.DNAT {
		f := of(p.To.Addr().Is6())
		rules = slices.Insert(rules, 0,
			rule(late(), do(verdict(expr.VerdictDrop, ""))), // the server would answer by a reset
			rule(comes(expr.CmpOpNeq, c.Underlay), do(network(f.dst, f.size, reg1), to(frontMap(f.ipv6)),
				&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg1})))
	}
	r.chains[name] = &chain{rules: rules}
	return name
}

// addInput keeps strangers away from the BGP process, which listens on all addresses of the node. It speaks with
// itself over the loopback interface.
//
// It also keeps the node from answering for flows that it does not know: what comes for a pool's address and is not turned
// back belongs to nobody here. A reset would end a connection that another node may be about to take over.
func (r *ruleset) addInput(c nat.Config) {
	const bgp = 179 // RFC 4271 section 8.2.1
	input := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookInput, priority: *nftables.ChainPriorityFilter, rules: [][]expr.Any{do(
		meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_TCP),
		transport(2, 2, reg1), compare(expr.CmpOpEq, 0, bgp),
		meta(expr.MetaKeyIIFNAME, reg1),
		&expr.Lookup{SourceRegister: reg1, SetName: bgpSet, Invert: true},
		verdict(expr.VerdictDrop, ""),
	)}}
	for _, f := range families {
		icmp := byte(unix.IPPROTO_ICMP)
		if f.ipv6 {
			icmp = unix.IPPROTO_ICMPV6 // neighbour discovery too
		}
		input.rules = append(input.rules, rule(isFamily(f), do(network(f.dst, f.size, reg1), in(poolSet(f.ipv6)),
			meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpNeq, icmp)),
			state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED, expr.CmpOpEq), do(verdict(expr.VerdictDrop, ""))))
		r.sets[poolSet(f.ipv6)] = &set{elements: map[string]element{}}
	}
	for _, p := range c.Pools {
		for _, a := range p.Addresses {
			if !slices.Contains(c.Own, a.Address) {
				r.sets[poolSet(a.Address.Is6())].elements[string(a.Address.AsSlice())] = element{}
			}
		}
	}
	r.chains["input"] = input
}

// fronts returns the maps of the addresses at which something is open, and of their marks.
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

// addArrival adds what happens to the destination of new flows before they are routed.
func (r *ruleset) addArrival(c nat.Config) {
	arrival := &chain{kind: nftables.ChainTypeNAT, hook: *nftables.ChainHookPrerouting, priority: *nftables.ChainPriorityNATDest}
	maps.Copy(r.sets, fronts(c))
	for _, f := range families {
		if len(r.layers[frontView][b2i(f.ipv6)]) > 0 {
			arrival.rules = append(arrival.rules, rule(isFamily(f), do(network(f.dst, f.size, reg1), to(frontMap(f.ipv6))), r.ask(frontView, f)))
		}
		if len(r.layers[proxyView][b2i(f.ipv6)]) > 0 {
			arrival.rules = append(arrival.rules, rule(isFamily(f), late(), do(verdict(expr.VerdictAccept, ""))), rule(isFamily(f), comes(expr.CmpOpNeq, c.Underlay),
				do(&expr.Fib{Register: reg1, ResultOIFNAME: true, FlagDADDR: true}, compare(expr.CmpOpEq, interfaceName(c.Underlay)...)),
				r.ask(proxyView, f)))
		}
	}
	r.chains["arrival"] = arrival
}

// hairpin gives flows from inside to inside that asked for an address of a pool that address as source: client and
// server may have a way to each other that does not come by here. Conntrack knows the address, but the library cannot read a rule back
// that asks it; so the address has come along as a mark of the flow's first packet.
func hairpin(f family, underlay string) []expr.Any {
	return rule(isFamily(f), leaves(expr.CmpOpNeq, underlay), comes(expr.CmpOpNeq, underlay),
		do(meta(expr.MetaKeyMARK, reg1), to(hairpinMap(f.ipv6)),
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto), RegAddrMin: reg1, RegAddrMax: reg1}))
}

// addForward adds what happens to forwarded packets before their source is translated.
func (r *ruleset) addForward(c nat.Config) {
	const maxSegmentSize = 2 // RFC 9293 section 3.2, TCP option kind
	forward := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookForward, priority: *nftables.ChainPriorityMangle}
	for _, f := range families {
		for _, key := range []expr.MetaKey{expr.MetaKeyOIFNAME, expr.MetaKeyIIFNAME} {
			// The kernel never raises the option, so the smaller of two clamps wins.
			forward.rules = append(forward.rules, rule(isFamily(f), do(
				meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_TCP),
				transport(13, 1, reg1),
				&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{0x06}, Xor: []byte{0}},
				compare(expr.CmpOpEq, 0x02), // SYN without RST
				meta(key, reg1),
				&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: clampMap(f.ipv6)},
				&expr.Exthdr{SourceRegister: reg1, Type: maxSegmentSize, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
			)))
		}
		// Someone inside uses an address of ours as source. It would pass the guard.
		forward.rules = append(forward.rules, rule(leaves(expr.CmpOpEq, c.Underlay), hasOwnSource(f), do(verdict(expr.VerdictGoto, dropped))))
	}
	for _, f := range families {
		if len(r.layers[rejectView][b2i(f.ipv6)]) > 0 {
			forward.rules = append(forward.rules, rule(leaves(expr.CmpOpEq, c.Underlay), isFamily(f), begins(), r.ask(rejectView, f)))
		}
	}
	forward.rules = append(forward.rules, refusals(c.Underlay))
	r.chains["forward"] = forward
	r.chains[rejected] = &chain{rules: [][]expr.Any{
		do(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_TCP), &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}),
		do(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}),
	}}
}

// addEgress adds the choice of the source address of new flows.
func (r *ruleset) addEgress(c nat.Config) {
	egress := &chain{kind: nftables.ChainTypeNAT, hook: *nftables.ChainHookPostrouting, priority: *nftables.ChainPriorityNATSource}
	for _, f := range families {
		if len(r.layers[frontView][b2i(f.ipv6)]) > 0 {
			egress.rules = append(egress.rules, hairpin(f, c.Underlay))
		}
	}
	egress.rules = append(egress.rules,
		rule(leaves(expr.CmpOpNeq, c.Underlay), do(verdict(expr.VerdictAccept, ""))),
		rule(encrypts(), do(verdict(expr.VerdictAccept, ""))))
	for _, f := range families {
		egress.rules = append(egress.rules, rule(hasOwnSource(f), do(verdict(expr.VerdictAccept, ""))))
		ask := r.ask(policyView, f)
		pickup := dropped
		if len(r.layers[pickupView][b2i(f.ipv6)]) > 0 {
			pickup = pickupView + "-" + f.suffix
			r.chains[pickup] = &chain{rules: append(r.lookups(pickupView, f, transport(2, 2, register(2*f.size+4))), do(verdict(expr.VerdictGoto, dropped)))}
		}
		egress.rules = append(egress.rules, rule(isFamily(f), late(), do(verdict(expr.VerdictGoto, pickup))), rule(isFamily(f), ask))
	}
	// A flow that no policy decides must not pass the guard because another policy names its prefixes.
	egress.rules = append(append(egress.rules, linkLocal()...), do(verdict(expr.VerdictGoto, dropped)))
	r.chains["egress"] = egress
}

// linkLocal lets neighbour discovery and its like pass (RFC 4861), which use the link-local address or none; the kernel forwards
// neither.
func linkLocal() [][]expr.Any {
	return [][]expr.Any{
		rule(isFamily(of(true)), do(network(8, 2, reg1),
			&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: []byte{0, 0}},
			compare(expr.CmpOpEq, 0xfe, 0x80), verdict(expr.VerdictAccept, ""))),
		rule(isFamily(of(true)), do(network(8, 16, reg1), compare(expr.CmpOpEq, make([]byte, 16)...), verdict(expr.VerdictAccept, ""))),
	}
}

// addGuard adds the last look at what leaves by the underlay, after translation.
func (r *ruleset) addGuard(c nat.Config) {
	guard := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookPostrouting, priority: *nftables.ChainPriorityConntrackHelper}
	guard.rules = append(guard.rules,
		rule(leaves(expr.CmpOpNeq, c.Underlay), do(verdict(expr.VerdictAccept, ""))),
		rule(encrypts(), do(verdict(expr.VerdictAccept, ""))))
	for _, f := range families {
		guard.rules = append(guard.rules, rule(hasOwnSource(f), do(verdict(expr.VerdictAccept, ""))))
	}
	for _, f := range families {
		if len(r.layers[plainView][b2i(f.ipv6)]) > 0 {
			name := plainView + "-" + f.suffix
			// Whichever way the flow began, its pair of prefixes stands for all its packets.
			r.chains[name] = &chain{rules: r.lookups(plainView, f, &expr.Immediate{Register: register(2*f.size + 4), Data: []byte{0, 0}})}
			guard.rules = append(guard.rules, rule(isFamily(f), state(expr.CtStateBitINVALID, expr.CmpOpEq), do(verdict(expr.VerdictJump, name))))
		}
	}
	guard.rules = append(append(guard.rules, linkLocal()...), do(verdict(expr.VerdictGoto, dropped)))
	r.chains["guard"] = guard
	r.chains[dropped] = &chain{rules: [][]expr.Any{
		do(&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: guardCounter}),
		do(&expr.Limit{Type: expr.LimitTypePkts, Rate: 1, Unit: expr.LimitTimeSecond, Burst: 5},
			&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN, Group: SampleGroup, Snaplen: sampleSize}),
		do(verdict(expr.VerdictDrop, "")),
	}}
}

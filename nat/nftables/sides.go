package nftables

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// Every forwarded packet passes these rules. Therefore rules that decide most packets come first,
// interface names are looked up in hash tables, and for a flow that connection tracking has, only
// its interfaces are checked.

const (
	// attachedSet holds the interfaces of attachments, without the underlay's.
	attachedSet = "attached"
	// attachedIndexSet is attachedSet by the indexes of interfaces.
	attachedIndexSet = "attached-index"
	// knownSet holds the interfaces of attachments, the underlay and the loopback.
	knownSet = "known"
	// plainSet holds the interfaces of attachments that are neither tunnels nor the underlay.
	plainSet = "cards"
	// fromMap leads from a known interface to the chain of its sources.
	fromMap = "from"
	// indexMap is fromMap by interface index. Comparing or looking up a name takes the kernel
	// about twice as long.
	indexMap = "from-index"

	// sourcesChain checks whether a packet's source belongs to its incoming interface.
	sourcesChain = "sources"
	// sourcesPriority is after defragmentation and mapped prefixes, and before connection
	// tracking.
	sourcesPriority nftables.ChainPriority = -290

	// fewPrefixes is how many prefixes a chain compares one by one; more are looked up in a set.
	fewPrefixes = 3
)

func armsSet(ipv6 bool) string { return "arms" + familyOf(ipv6).suffix }

func fromChain(iface string) string { return "from-" + iface }

func fromSet(iface string, ipv6 bool) string { return "from-" + iface + "-" + familyOf(ipv6).suffix }

func dropChain(r nat.Reason) string {
	if r == nat.DropGuard {
		return dropped
	}
	return "drop-" + string(r)
}

// dropCounter returns the name of the counter of a reason.
func dropCounter(r nat.Reason) string { return string(r) }

// addDrops adds the chains that count, sample and drop.
func (r *ruleset) addDrops() {
	for _, reason := range nat.Reasons {
		r.chains[dropChain(reason)] = &chain{rules: [][]expr.Any{
			exprs(&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: dropCounter(reason)}),
			exprs(&expr.Limit{Type: expr.LimitTypePkts, Rate: 1, Unit: expr.LimitTimeSecond, Burst: 5},
				&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN | 1<<unix.NFTA_LOG_PREFIX, Group: SampleGroup, Snaplen: sampleSize, Data: []byte(reason)}),
			exprs(verdict(expr.VerdictDrop, "")),
		}}
	}
}

// isNeighbour matches neighbour discovery for the node itself (RFC 4861): its packets come from a
// host on the link, whose address need not be among the attachment's sources, and their hop limit
// shows that no router has forwarded them.
func isNeighbour() []expr.Any {
	const hopLimit, untouched = 7, 255
	const first, last = 133, 137 // router solicitation to redirect
	return rule(isFamily(familyOf(true)), exprs(
		meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_ICMPV6),
		network(hopLimit, 1, reg1), compare(expr.CmpOpEq, untouched),
		transport(0, 1, reg1), compare(expr.CmpOpGte, first), compare(expr.CmpOpLte, last),
		&expr.Fib{Register: reg1, ResultADDRTYPE: true, FlagDADDR: true}, compare(expr.CmpOpNeq, nativeUint32(unix.RTN_UNICAST)...)))
}

// addSides adds the sets and chains by which packets of different interfaces are distinguished. It
// drops packets whose source does not belong to their attachment, before connection tracking: a
// spoofed packet must neither create an entry nor refresh one.
func (r *ruleset) addSides(c nat.Config) {
	r.sets[attachedSet] = &set{elements: map[string]element{}}
	r.sets[fromMap] = &set{shape: shape{isMap: true, isVerdict: true}, elements: map[string]element{}}
	r.sets[indexMap] = &set{shape: shape{isMap: true, isVerdict: true}, elements: map[string]element{}}
	pass := exprs(verdict(expr.VerdictAccept, ""))
	for _, name := range c.Attached() {
		key := string(interfaceName(name))
		r.sets[attachedSet].elements[key] = element{}
		r.sets[fromMap].elements[key] = element{kind: gotoTo, chain: fromChain(name)}
		from := &chain{rules: [][]expr.Any{rule(isFamily(familyOf(true)), goTo(fromChain(name)+"-ipv6"))}}
		from6 := &chain{}
		var sources []netip.Prefix
		for _, a := range c.Attachments {
			if a.Interface == name {
				sources = append(sources, a.Sources...)
			}
		}
		sources = outermost(sources)
		for i, f := range families {
			into := []*chain{from, from6}[i]
			var own []netip.Prefix
			for _, p := range sources {
				if p.Addr().Is6() == f.ipv6 {
					own = append(own, p)
				}
			}
			if len(own) > fewPrefixes {
				r.sets[fromSet(name, f.ipv6)] = prefixSet(own, f.ipv6)
				into.rules = append(into.rules, rule(inPrefixes(f, f.source, fromSet(name, f.ipv6)), pass))
				continue
			}
			for _, p := range own {
				into.rules = append(into.rules, rule(isIn(f, f.source, p), pass))
			}
		}
		// A host that requests an address has none yet (RFC 2131). The kernel forwards neither
		// this source nor link-local ones.
		from.rules = append(from.rules, rule(isIn(familyOf(false), familyOf(false).source, netip.MustParsePrefix("0.0.0.0/32")), pass), goTo(dropChain(nat.DropSource)))
		from6.rules = append(from6.rules, rule(isNeighbour(), pass))
		from6.rules = append(append(from6.rules, linkLocal()...), goTo(dropChain(nat.DropSource)))
		r.chains[fromChain(name)], r.chains[fromChain(name)+"-ipv6"] = from, from6
	}
	for _, name := range []string{c.Underlay, "lo"} {
		r.sets[fromMap].elements[string(interfaceName(name))] = element{kind: accept}
	}
	r.sets[knownSet] = &set{elements: map[string]element{}}
	for key := range r.sets[fromMap].elements {
		r.sets[knownSet].elements[key] = element{}
	}
	for _, link := range c.Links {
		if e, ok := r.sets[fromMap].elements[string(interfaceName(link.Interface))]; ok {
			r.sets[indexMap].elements[string(nativeUint32(link.Index))] = e
		}
	}
	// A packet from any other interface may reach the node itself or a multicast group, and is not
	// forwarded. This chain drops it, so that the forward chain need not check the interface of
	// every packet. While the table is replaced, a packet may find the map empty: the kernel
	// removes the elements of a map, but not those of a set, before the last packet has left the
	// rules that use it. The lookup in the set lets such a packet pass.
	r.chains[sourcesChain] = &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookPrerouting, priority: sourcesPriority, rules: [][]expr.Any{
		exprs(meta(expr.MetaKeyIIF, reg1), &expr.Lookup{SourceRegister: reg1, IsDestRegSet: true, SetName: indexMap}),
		exprs(meta(expr.MetaKeyIIFNAME, reg1), &expr.Lookup{SourceRegister: reg1, IsDestRegSet: true, SetName: fromMap}),
		rule(exprs(meta(expr.MetaKeyIIFNAME, reg1), setLookup(knownSet)), pass),
		exprs(&expr.Fib{Register: reg1, ResultADDRTYPE: true, FlagDADDR: true}, compare(expr.CmpOpEq, nativeUint32(unix.RTN_UNICAST)...),
			verdict(expr.VerdictGoto, dropChain(nat.DropInterface))),
	}}
	if arms := c.Arms(); len(arms) > 0 {
		for _, f := range families {
			r.sets[armsSet(f.ipv6)] = prefixSet(arms, f.ipv6)
		}
	}
}

// arms returns the rules that match packets with an address, at the given offset, of a network
// that is attached through the underlay's own interface. direction restricts them to packets that
// come or leave by the underlay. Without such an attachment there are no rules.
func arms(c nat.Config, direction []expr.Any, offset func(family) uint32, then []expr.Any) (rules [][]expr.Any) {
	if len(c.Arms()) == 0 {
		return nil
	}
	for _, f := range families {
		rules = append(rules, rule(direction, isFamily(f), inPrefixes(f, offset(f), armsSet(f.ipv6)), then))
	}
	return rules
}

func sourceOf(f family) uint32      { return f.source }
func destinationOf(f family) uint32 { return f.dst }

// isAttached matches packets that come or leave by the interface of an attachment.
func isAttached(key expr.MetaKey) []expr.Any { return exprs(meta(key, reg1), setLookup(attachedSet)) }

func goTo(name string) []expr.Any { return exprs(verdict(expr.VerdictGoto, name)) }

// addForward adds the processing of forwarded packets before their source is translated.
func (r *ruleset) addForward(c nat.Config) {
	forward := &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookForward, priority: *nftables.ChainPriorityMangle}
	out, comesIn := leaves(expr.CmpOpEq, c.Underlay), comes(expr.CmpOpEq, c.Underlay)

	// Most packets belong to established flows between an attachment and the underlay. Their
	// incoming interface is certain: the chain of sources passes only packets from attachments and
	// the underlay. A flow with a translated destination takes the longer path below: its original
	// destination is the node's own address, so its packets may come by any interface.
	under := exprs(&expr.Ct{Register: reg1, Key: expr.CtKeySTATUS},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: nativeUint32(answered | destinationTranslated), Xor: make([]byte, 4)},
		compare(expr.CmpOpEq, nativeUint32(answered)...))
	r.sets[attachedIndexSet] = &set{elements: map[string]element{}}
	for _, link := range c.Links {
		if _, ok := r.sets[attachedSet].elements[string(interfaceName(link.Interface))]; ok {
			r.sets[attachedIndexSet].elements[string(nativeUint32(link.Index))] = element{}
		}
	}
	if index := c.Links.Of(c.Underlay); index != 0 {
		underlay := func(key expr.MetaKey, op expr.CmpOp) []expr.Any {
			return exprs(meta(key, reg1), compare(op, nativeUint32(index)...))
		}
		forward.rules = append(forward.rules,
			rule(underlay(expr.MetaKeyOIF, expr.CmpOpEq), underlay(expr.MetaKeyIIF, expr.CmpOpNeq), under, goTo("clamp")),
			rule(exprs(meta(expr.MetaKeyOIF, reg1), setLookup(attachedIndexSet)), goTo("inward-index")))
		r.chains["inward-index"] = &chain{rules: [][]expr.Any{
			rule(underlay(expr.MetaKeyIIF, expr.CmpOpEq), isEstablished(), isTranslated(), goTo("clamp")),
			rule(exprs(meta(expr.MetaKeyIIF, reg1), setLookup(attachedIndexSet)), goTo("clamp")),
			goTo("inward"),
		}}
	}

	// By outgoing interface.
	forward.rules = append(forward.rules, arms(c, out, destinationOf, goTo("inward"))...)
	forward.rules = append(forward.rules,
		rule(out, isAttached(expr.MetaKeyIIFNAME), goTo("leave")),
		rule(out, goTo("outward")),
		rule(isAttached(expr.MetaKeyOIFNAME), goTo("inward")),
		goTo(dropChain(nat.DropInterface)))
	r.chains["forward"] = forward

	// By incoming interface.
	inward := &chain{rules: [][]expr.Any{rule(isAttached(expr.MetaKeyIIFNAME), goTo("clamp"))}}
	inward.rules = append(inward.rules, arms(c, comesIn, sourceOf, goTo("clamp"))...)
	inward.rules = append(inward.rules, rule(comesIn, goTo("arrive")), goTo(dropChain(nat.DropInterface)))
	r.chains["inward"] = inward

	outward := &chain{}
	outward.rules = append(outward.rules, arms(c, comesIn, sourceOf, goTo("leave"))...)
	outward.rules = append(outward.rules, rule(comesIn, goTo(dropChain(nat.DropUnderlay))), goTo(dropChain(nat.DropInterface)))
	r.chains["outward"] = outward

	r.addArrive(c)
	r.addLeave(c)
	r.addClamp()
}

// underWay matches packets of flows that have been answered, and errors about them.
func underWay() []expr.Any {
	return state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED, expr.CmpOpNeq)
}

// isEstablished matches packets of flows that have been answered. Errors about them are in state
// related, and are not matched.
func isEstablished() []expr.Any {
	return exprs(&expr.Ct{Register: reg1, Key: expr.CtKeySTATE}, compare(expr.CmpOpEq, nativeUint32(expr.CtStateBitESTABLISHED)...))
}

func isNotTCP() []expr.Any {
	return exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpNeq, unix.IPPROTO_TCP))
}

// isTranslated matches packets of flows with a translated source or destination.
func isTranslated() []expr.Any {
	return exprs(&expr.Ct{Register: reg1, Key: expr.CtKeySTATUS},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: nativeUint32(sourceTranslated | destinationTranslated), Xor: make([]byte, 4)},
		compare(expr.CmpOpNeq, 0, 0, 0, 0))
}

// flowing accepts established flows that are not TCP at once, and sends TCP to the chain that
// clamps its MSS.
func flowing() [][]expr.Any {
	return [][]expr.Any{
		rule(isEstablished(), isNotTCP(), exprs(verdict(expr.VerdictAccept, ""))),
		rule(underWay(), goTo("clamp")),
	}
}

// Status bits of a conntrack entry.
const (
	answered              = 1 << 1 // IPS_SEEN_REPLY
	sourceTranslated      = 1 << 4 // IPS_SRC_NAT
	destinationTranslated = 1 << 5 // IPS_DST_NAT
)

// addArrive adds the rules for packets from the underlay to the inside.
func (r *ruleset) addArrive(c nat.Config) {
	// The addresses of an established flow without translation are checked: it may be a flow
	// between two attachments, and the packet a spoofed one.
	arrive := &chain{rules: [][]expr.Any{
		rule(isEstablished(), isTranslated(), goTo("clamp")),
		rule(state(expr.CtStateBitRELATED, expr.CmpOpNeq), goTo("clamp")),
	}}
	opened := exprs(&expr.Ct{Register: reg1, Key: expr.CtKeySTATUS},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: nativeUint32(destinationTranslated), Xor: make([]byte, 4)},
		compare(expr.CmpOpNeq, 0, 0, 0, 0))
	// The source of the packet must be routed by the underlay: sources inside, and those of the
	// node, must not come by it.
	arrive.rules = append(arrive.rules,
		rule(opened, exprs(&expr.Fib{Register: reg1, ResultOIFNAME: true, FlagSADDR: true}, compare(expr.CmpOpEq, interfaceName(c.Underlay)...)), goTo("clamp")))
	for _, f := range families {
		if len(r.layers[plainView][b2i(f.ipv6)]) == 0 {
			continue
		}
		name := plainView + "-in-" + f.suffix
		r.chains[name] = &chain{}
		for layer, parts := range r.layers[plainView][b2i(f.ipv6)] {
			for part := range parts {
				// The packet's source is among the policy's destinations.
				r.chains[name].rules = append(r.chains[name].rules, exprs(
					network(f.dst, f.size, register(0)),
					network(f.source, f.size, register(f.size)),
					meta(expr.MetaKeyL4PROTO, register(2*f.size)),
					&expr.Immediate{Register: register(2*f.size + 4), Data: []byte{0, 0}},
					&expr.Lookup{SourceRegister: register(0), IsDestRegSet: true, SetName: layerMap(plainView, layer, part, parts, f.ipv6)},
				))
			}
		}
		arrive.rules = append(arrive.rules, rule(isFamily(f), exprs(verdict(expr.VerdictJump, name))))
	}
	arrive.rules = append(arrive.rules, goTo(dropChain(nat.DropUnderlay)))
	r.chains["arrive"] = arrive
}

// addLeave adds the rules for packets from the inside to the underlay.
func (r *ruleset) addLeave(c nat.Config) {
	leave := &chain{rules: flowing()}
	for _, f := range families {
		// A host inside that uses an address of the node as its source. Such a packet would pass
		// the guard.
		leave.rules = append(leave.rules, rule(hasOwnSource(f), goTo(dropped)))
	}
	for _, f := range families {
		refuse := goTo(dropChain(nat.DropPlatform))
		if len(r.layers[exactView][b2i(f.ipv6)]) > 0 {
			r.chains["platform-"+f.suffix] = &chain{rules: [][]expr.Any{r.ask(exactView, f), refuse}}
			refuse = goTo("platform-" + f.suffix)
		}
		for _, p := range nat.Platform {
			if p.Addr().Is6() == f.ipv6 {
				leave.rules = append(leave.rules, rule(isFamily(f), isIn(f, f.dst, p), refuse))
			}
		}
	}
	leaving := &chain{}
	for _, f := range families {
		if len(r.layers[rejectView][b2i(f.ipv6)]) > 0 {
			leaving.rules = append(leaving.rules, rule(isFamily(f), begins(), r.ask(rejectView, f)))
		}
	}
	leaving.rules = append(leaving.rules, refusals(), goTo("clamp"))
	leave.rules = append(leave.rules, goTo("leaving"))
	r.chains["leave"], r.chains["leaving"] = leave, leaving
}

// addClamp adds the last chain of the forward hook: it clamps the MSS of TCP (RFC 9293 section
// 3.7.1) and accepts all packets.
func (r *ruleset) addClamp() {
	const maxSegmentSize = 2 // RFC 9293 section 3.2, TCP option kind
	const syn, rst = 0x02, 0x04
	pass := exprs(verdict(expr.VerdictAccept, ""))
	clamp := &chain{rules: [][]expr.Any{
		rule(exprs(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpNeq, unix.IPPROTO_TCP)), pass),
		rule(exprs(transport(13, 1, reg1),
			&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{syn | rst}, Xor: []byte{0}},
			compare(expr.CmpOpNeq, syn)), pass),
	}}
	for _, f := range families {
		for _, key := range []expr.MetaKey{expr.MetaKeyOIFNAME, expr.MetaKeyIIFNAME} {
			// The kernel never raises the option, so the smaller of two clamps wins.
			clamp.rules = append(clamp.rules, rule(isFamily(f), exprs(
				meta(key, reg1),
				&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: clampMap(f.ipv6)},
				&expr.Exthdr{SourceRegister: reg1, Type: maxSegmentSize, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt},
			)))
		}
	}
	clamp.rules = append(clamp.rules, pass)
	r.chains["clamp"] = clamp
}

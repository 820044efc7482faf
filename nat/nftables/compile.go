package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// tableName is the name of our table, of family inet.
const tableName = "isthmus"

// bgpSet is the name of the set of interfaces by which BGP may come in.
const bgpSet = "bgp"

// firstMark is the mark of packets from inside for the first address at which something is open; the next ones follow.
const firstMark = 0x49530000

// guardCounter is the name of the counter of what the guard dropped.
const guardCounter = "guard"

// ruleset is the content of our table, wanted or read back, in a form that can be compared. It must not be changed once it is made.
type ruleset struct {
	chains map[string]*chain
	sets   map[string]*set
	layers map[string][2][]int // of each view and family: how many maps each layer has; not read back
	laid   []laid              // the rules, in order; not read back
	// timeouts are the objects that rules refer to, by name; read back they have no content.
	timeouts map[string]*expr.CtTimeout
}

// chain is a chain with its rules. The hook is empty for one that is only jumped to.
type chain struct {
	kind     nftables.ChainType
	hook     nftables.ChainHook
	priority nftables.ChainPriority
	rules    [][]expr.Any
}

// set is a set or a map. Elements are keyed by their first and last key, one after the other when they differ.
type set struct {
	shape    shape
	elements map[string]element
}

// shape is what a set is like. A dynamic one is filled by rules: its elements are not part of what is wanted.
type shape struct {
	isMap, isVerdict, isInterval, isConcat, isDynamic bool

	size uint32 // see room
}

// element is what a map holds under a key, and for whom.
type element struct {
	data   string      // of a data map
	kind   int32       // verdict of a verdict map
	chain  string      // with goto
	policy string      // that is counted
	before nat.Counter // what the policy counted before the element was made; not part of what is wanted
	now    nat.Counter // what the element counted; not part of what is wanted
}

// wants says whether two elements are the same but for their counters.
func (e element) wants(f element) bool {
	return e.data == f.data && e.kind == f.kind && e.chain == f.chain && e.policy == f.policy
}

// verdict kinds, as 32 bit numbers
const (
	drop   = int32(expr.VerdictDrop)
	accept = int32(expr.VerdictAccept)
	gotoTo = int32(expr.VerdictGoto)
)

// definition is what the kernel must be told to make a set.
type definition struct {
	name      string
	key, data nftables.SetDatatype
	shape     shape
	counter   bool
	timeout   time.Duration // of elements of a dynamic set
}

var (
	policyKey4 = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	policyKey6 = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService)
)

// define returns the definition of a set of ours by its name.
func define(name string, s *set) definition {
	d := definition{name: name, shape: s.shape}
	ipv6 := name[len(name)-1] == '6'
	addr, policyKey := nftables.TypeIPAddr, policyKey4
	if ipv6 {
		addr, policyKey = nftables.TypeIP6Addr, policyKey6
	}
	switch {
	case name == bgpSet:
		d.key = nftables.TypeIFName
	case s.shape.isVerdict:
		d.key, d.data, d.counter = policyKey, nftables.TypeVerdict, true
	case name == clampMap(ipv6):
		d.key, d.data = nftables.TypeIFName, nftables.TypeInetService
	case name == frontMap(ipv6):
		d.key, d.data = addr, nftables.TypeMark
	case name == hairpinMap(ipv6):
		d.key, d.data = nftables.TypeMark, addr
	default:
		if !d.placement(addr) {
			d.key = addr
		}
	}
	return d
}

// family tells IPv4 from IPv6 in expressions and names.
type family struct {
	ipv6        bool
	suffix      string
	nfproto     byte
	source, dst uint32 // offsets in the network header
	size        uint32 // of an address
}

var families = []family{
	{false, "4", unix.NFPROTO_IPV4, 12, 16, 4},
	{true, "6", unix.NFPROTO_IPV6, 8, 24, 16},
}

func of(ipv6 bool) family {
	if ipv6 {
		return families[1]
	}
	return families[0]
}

func ownSet(ipv6 bool) string     { return "own" + of(ipv6).suffix }
func frontMap(ipv6 bool) string   { return "front" + of(ipv6).suffix }
func hairpinMap(ipv6 bool) string { return "hairpin" + of(ipv6).suffix }
func poolSet(ipv6 bool) string    { return "pool" + of(ipv6).suffix }
func clampMap(ipv6 bool) string   { return "mss" + of(ipv6).suffix }

// layerMap returns the name of one of the maps of a layer.
func layerMap(view string, layer, part, parts int, ipv6 bool) string {
	if parts > 1 {
		return fmt.Sprintf("%s-%d.%d-%s", view, layer+1, part+1, of(ipv6).suffix)
	}
	return fmt.Sprintf("%s-%d-%s", view, layer+1, of(ipv6).suffix)
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
func poolName(pool string, ipv6 bool) string { return "pool-" + pool + "-" + of(ipv6).suffix }

// Registers. The kernel names a register by its number of four bytes unless it begins one of the four of sixteen bytes; written so,
// rules are read back as they were written.
func register(offset uint32) uint32 {
	if offset%16 == 0 {
		return unix.NFT_REG_1 + offset/16
	}
	return unix.NFT_REG32_00 + offset/4
}

const reg1 = unix.NFT_REG_1

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
)

// The chains in which packets end: one that refuses so that the sender sees it, and one that counts and samples.
const (
	rejected = "rejected"
	dropped  = "dropped"
)

// compile returns the table for a configuration.
//
// The policies' rules are laid into layers, each of which is a map from source, destination, protocol and port to a verdict.
// Rules in one layer do not overlap, and what is in an earlier layer wins over what it overlaps in a later one. So a new
// flow costs one look-up per layer, and the number of layers is how deep policies nest, not how many there are.
func compile(c nat.Config) (*ruleset, error) {
	rules := c.Rules()
	if err := check(c, rules); err != nil {
		return nil, err
	}
	r := &ruleset{chains: map[string]*chain{}, sets: map[string]*set{}, layers: map[string][2][]int{}, timeouts: map[string]*expr.CtTimeout{}}
	r.addPolicies(c, rules)
	r.addPools(c)
	r.addRefusals()
	for _, f := range families {
		r.sets[ownSet(f.ipv6)] = &set{elements: map[string]element{}}
		r.sets[clampMap(f.ipv6)] = &set{shape: shape{isMap: true}, elements: map[string]element{}}
	}
	own := slices.Clone(c.Own)
	for _, p := range c.Pools {
		for _, a := range p.Addresses {
			own = append(own, a.Address)
		}
	}
	for _, a := range own {
		r.sets[ownSet(a.Is6())].elements[string(a.AsSlice())] = element{}
	}
	for _, k := range c.Clamps {
		for i, mss := range []uint16{k.IPv4, k.IPv6} {
			if mss > 0 {
				data := string(binary.BigEndian.AppendUint16(nil, mss))
				r.sets[clampMap(i == 1)].elements[string(interfaceName(k.Interface))] = element{data: data}
			}
		}
	}

	r.sets[bgpSet] = &set{elements: map[string]element{}}
	for _, name := range append([]string{"lo"}, c.Tunnels...) {
		r.sets[bgpSet].elements[string(interfaceName(name))] = element{}
	}

	r.addMaps(c)
	r.addArrival(c)
	r.addInput(c)
	r.addForward(c)
	r.addEgress(c)
	r.addGuard(c)
	for _, s := range r.sets {
		s.shape.size = room(s)
	}
	r.place(c, nil)
	r.refuse(c, nat.Overload{})
	return r, nil
}

// room returns how many elements a set of which only configurations change the elements shall have room for; 0: any number. The
// kernel keeps a set without a size in a table that it makes larger a moment after elements were added, and while it
// does, elements are missing from what it lists.
func room(s *set) uint32 {
	if s.shape.isInterval || s.shape.isDynamic {
		return 0
	}
	return max(64, uint32(2)<<bits.Len(uint(len(s.elements))))
}

func check(c nat.Config, rules []nat.Rule) error {
	if c.Underlay == "" || len(c.Underlay) >= unix.IFNAMSIZ {
		return fmt.Errorf("underlay interface %q: not a name", c.Underlay)
	}
	var errs []error
	for i, a := range c.Zones {
		for _, b := range c.Zones[:i] {
			if slices.ContainsFunc(a.Prefixes, func(p netip.Prefix) bool { return slices.ContainsFunc(b.Prefixes, p.Overlaps) }) {
				errs = append(errs, fmt.Errorf("zones %s and %s overlap", b.Name, a.Name))
			}
		}
	}
	for _, t := range nat.Ties(rules) {
		errs = append(errs, fmt.Errorf("policies %s and %s claim the same flows", t.A, t.B))
	}
	names := map[string]bool{}
	for _, p := range c.Policies {
		switch {
		case p.Name == "" || names[p.Name]:
			errs = append(errs, fmt.Errorf("policy %q: the name is not unique", p.Name))
		case !slices.Contains([]nat.Action{nat.SNAT, nat.NoNAT, nat.Deny, nat.Reject, nat.DNAT, nat.Redirect}, p.Action):
			errs = append(errs, fmt.Errorf("policy %s: unknown action %q", p.Name, p.Action))
		case !slices.Contains([]string{"", "tcp", "udp", "icmp"}, p.Protocol):
			errs = append(errs, fmt.Errorf("policy %s: unknown protocol %q", p.Name, p.Protocol))
		case (p.Action == nat.DNAT || p.Action == nat.Redirect) && (!p.To.IsValid() || p.Protocol != "tcp" && p.Protocol != "udp"):
			errs = append(errs, fmt.Errorf("policy %s: %s without a target, or without tcp or udp", p.Name, p.Action))
		case len(p.Ports) > 0 && p.Protocol != "tcp" && p.Protocol != "udp":
			errs = append(errs, fmt.Errorf("policy %s: ports without tcp or udp", p.Name))
		}
		names[p.Name] = true
	}
	for _, m := range c.Maps {
		if !m.Inside.Addr().Is4() || !m.Mapped.Addr().Is4() || m.Inside.Bits() != m.Mapped.Bits() {
			errs = append(errs, fmt.Errorf("map %v to %v: not IPv4 prefixes of one length", m.Inside, m.Mapped))
		}
	}
	for _, r := range rules {
		if r.Policy.Action == nat.NoNAT && nat.Exposes(r.Source, r.Destination) {
			errs = append(errs, fmt.Errorf("policy %s: from %v to %v, inside addresses would reach the Internet", r.Policy.Name, r.Source, r.Destination))
		}
	}
	return errors.Join(errs...)
}

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
	// Whatever else a rule does is decided behind routing, by all policies: what beats this one need not be in the view.
	target := func(action nat.Action) func(*ruleset, *nat.Rule) element {
		return func(r *ruleset, rule *nat.Rule) element {
			if p := rule.Policy; p.Does() == action {
				return element{kind: gotoTo, chain: r.addTarget(c, p), policy: p.Name}
			}
			return element{kind: accept}
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
				return element{kind: gotoTo, chain: policyView + "-" + of(rule.Source.Addr().Is6()).suffix}
			}
			return element{kind: gotoTo, chain: dropped}
		}},
		inFront: {frontView, does(nat.DNAT), target(nat.DNAT)},
		inProxy: {proxyView, does(nat.Redirect), target(nat.Redirect)},
		inReject: {rejectView, does(nat.Reject), func(_ *ruleset, rule *nat.Rule) element {
			if rule.Policy.Does() == nat.Reject {
				return element{kind: gotoTo, chain: rejected, policy: rule.Policy.Name}
			}
			return element{kind: accept}
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
		of := rules
		if len(members) < len(rules) {
			of = make([]nat.Rule, len(members))
			for i, at := range members {
				of[i] = rules[at]
			}
		}
		r.lay(view.name, of, func(i, layer int) element {
			r.laid[members[i]].layers[v] = int16(layer)
			return view.verdict(r, &of[i])
		})
	}
	r.addPlain(c)
}

// addPlain lays what the guard lets pass without translation.
func (r *ruleset) addPlain(c nat.Config) {
	r.lay(plainView, plain(c), func(int, int) element { return element{kind: accept} })
}

// timedInfix is in the names of chains that set timeouts.
const timedInfix = "-for"

// timed returns a verdict for flows with timeouts: the given one, behind a chain that sets them when there are any.
func (r *ruleset) timed(t nat.Timeouts, name string, kind int32, chainName string) (int32, string) {
	if t == (nat.Timeouts{}) {
		return kind, chainName
	}
	name += timedInfix
	for _, object := range timeouts(t) {
		name += "-" + timeoutName(object)
	}
	r.chains[name] = &chain{rules: append(r.setTimeouts(t), do(verdict(expr.VerdictKind(kind), chainName)))}
	return gotoTo, name
}

// setTimeouts returns rules that give a flow timeouts.
func (r *ruleset) setTimeouts(t nat.Timeouts) (rules [][]expr.Any) {
	for _, object := range timeouts(t) {
		id := timeoutName(object)
		r.timeouts[id] = object
		rules = append(rules, do(&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: id}))
	}
	return rules
}

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

// timeouts returns the objects for a policy's timeouts. An object of a protocol does nothing to the packets of others, and is
// complete: what the policy does not say is as the kernel has it (nf_conntrack_proto_tcp.c, nf_conntrack_proto_udp.c).
func timeouts(t nat.Timeouts) (objects []*expr.CtTimeout) {
	seconds := func(d time.Duration, standard uint32) uint32 {
		if d == 0 {
			return standard
		}
		return uint32(d / time.Second)
	}
	if t.TCPEstablished != 0 || t.TCPClosing != 0 {
		objects = append(objects, &expr.CtTimeout{L3Proto: unix.NFPROTO_IPV4, L4Proto: unix.IPPROTO_TCP, Policy: expr.CtStatePolicyTimeout{
			expr.CtStateTCPSYNSENT: 120, expr.CtStateTCPSYNRECV: 60, expr.CtStateTCPSYNSENT2: 120,
			expr.CtStateTCPESTABLISHED: seconds(t.TCPEstablished, 432000),
			expr.CtStateTCPFINWAIT:     seconds(t.TCPClosing, 120), expr.CtStateTCPCLOSEWAIT: seconds(t.TCPClosing, 60),
			expr.CtStateTCPLASTACK: seconds(t.TCPClosing, 30), expr.CtStateTCPTIMEWAIT: seconds(t.TCPClosing, 120),
			expr.CtStateTCPCLOSE: 10, expr.CtStateTCPRETRANS: 300, expr.CtStateTCPUNACK: 300,
		}})
	}
	if t.UDP != 0 || t.UDPStream != 0 {
		objects = append(objects, &expr.CtTimeout{L3Proto: unix.NFPROTO_IPV4, L4Proto: unix.IPPROTO_UDP, Policy: expr.CtStatePolicyTimeout{
			expr.CtStateUDPUNREPLIED: seconds(t.UDP, 30), expr.CtStateUDPREPLIED: seconds(t.UDPStream, 120),
		}})
	}
	return objects
}

// timeoutName says everything that is in an object: the kernel cannot change one, and flows that have it lose it when it goes.
func timeoutName(t *expr.CtTimeout) string {
	if t.L4Proto == unix.IPPROTO_UDP {
		return fmt.Sprintf("udp-%d-%d", t.Policy[expr.CtStateUDPUNREPLIED], t.Policy[expr.CtStateUDPREPLIED])
	}
	return fmt.Sprintf("tcp-%d-%d-%d-%d", t.Policy[expr.CtStateTCPESTABLISHED], t.Policy[expr.CtStateTCPFINWAIT], t.Policy[expr.CtStateTCPCLOSEWAIT], t.Policy[expr.CtStateTCPLASTACK])
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
	return slices.CompactFunc(pairs.Rules(), func(a, b nat.Rule) bool { return a.Source == b.Source && a.Destination == b.Destination })
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

// Expressions.

func meta(key expr.MetaKey, reg uint32) expr.Any { return &expr.Meta{Key: key, Register: reg} }

func compare(op expr.CmpOp, data ...byte) expr.Any {
	return &expr.Cmp{Op: op, Register: reg1, Data: data}
}

func network(offset, size, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
}

func transport(offset, size, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: size}
}

// to replaces register 1 by what a map has for it.
func to(set string) expr.Any {
	return &expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: set}
}

func in(set string) expr.Any { return &expr.Lookup{SourceRegister: reg1, SetName: set} }

func verdict(kind expr.VerdictKind, chain string) expr.Any {
	return &expr.Verdict{Kind: kind, Chain: chain}
}

func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func do(e ...expr.Any) []expr.Any { return e }

// isFamily matches IPv4 or IPv6.
func isFamily(f family) []expr.Any {
	return do(meta(expr.MetaKeyNFPROTO, reg1), compare(expr.CmpOpEq, f.nfproto))
}

// interfaceName returns a name as the kernel compares it.
func interfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// leaves matches packets that leave by an interface, or by any other.
func leaves(op expr.CmpOp, name string) []expr.Any {
	return do(meta(expr.MetaKeyOIFNAME, reg1), compare(op, interfaceName(name)...))
}

// comes matches packets that came by an interface, or by any other.
func comes(op expr.CmpOp, name string) []expr.Any {
	return do(meta(expr.MetaKeyIIFNAME, reg1), compare(op, interfaceName(name)...))
}

// encrypts matches packets that IPsec takes next. Those from an xfrm interface pass postrouting once more, still in the
// clear, with the underlay as their way out; what leaves there comes by once again, with the outer header.
func encrypts() []expr.Any {
	const xfrm = 4 // NFT_RT_XFRM
	return do(&expr.Rt{Register: reg1, Key: xfrm}, compare(expr.CmpOpEq, 1))
}

// hasOwnSource matches packets whose source is the node's or a pool's.
func hasOwnSource(f family) []expr.Any {
	return rule(isFamily(f), do(network(f.source, f.size, reg1), in(ownSet(f.ipv6))))
}

// state compares some bits of a packet's state in connection tracking with none of them.
func state(bits uint32, op expr.CmpOp) []expr.Any {
	return do(&expr.Ct{Register: reg1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		compare(op, 0, 0, 0, 0))
}

// begins matches packets of flows that are not under way.
func begins() []expr.Any { return state(expr.CtStateBitNEW, expr.CmpOpNeq) }

// late matches TCP packets that open no connection (RFC 9293 section 3.5). Where only first packets of flows come by, they are
// of connections that began elsewhere.
func late() []expr.Any {
	const fin, syn, rst, ack = 0x01, 0x02, 0x04, 0x10
	return do(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_TCP),
		transport(13, 1, reg1),
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		compare(expr.CmpOpNeq, syn))
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

// ask adds the chains that look a packet up in a view, and returns how to get there. What no layer of the view has
// comes back and goes on behind.
func (r *ruleset) ask(view string, f family) []expr.Any {
	name := view + "-" + f.suffix
	port := register(2*f.size + 4)
	withPorts := func(l4 byte) []expr.Any {
		return do(meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, l4), verdict(expr.VerdictGoto, name+"-ports"))
	}
	// Packets of other protocols have no port; what stands at its place must not decide, nor be needed.
	others := r.lookups(view, f, &expr.Immediate{Register: port, Data: []byte{0, 0}})
	r.chains[name] = &chain{rules: append([][]expr.Any{withPorts(unix.IPPROTO_TCP), withPorts(unix.IPPROTO_UDP)}, others...)}
	r.chains[name+"-ports"] = &chain{rules: r.lookups(view, f, transport(2, 2, port))}
	return do(verdict(expr.VerdictJump, name))
}

// lookups returns one rule for each map of the layers of a view.
func (r *ruleset) lookups(view string, f family, port expr.Any) (rules [][]expr.Any) {
	for layer, parts := range r.layers[view][b2i(f.ipv6)] {
		for part := range parts {
			rules = append(rules, do(
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

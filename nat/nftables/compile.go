package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/isthmus-net/isthmus/nat"
	"golang.org/x/sys/unix"
)

// tableName is the name of our table, of family inet.
const tableName = "isthmus"

// bgpSet is the name of the set of interfaces by which BGP may come in.
const bgpSet = "bgp"

// guardCounter is the name of the counter of what the guard dropped.
const guardCounter = "guard"

// ruleset is the content of our table, wanted or read back, in a form that can be compared. It must not be changed once it is made.
type ruleset struct {
	chains map[string]*chain
	sets   map[string]*set
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

func ownSet(ipv6 bool) string   { return "own" + of(ipv6).suffix }
func clampMap(ipv6 bool) string { return "mss" + of(ipv6).suffix }
func policyMap(layer int, ipv6 bool) string {
	return fmt.Sprintf("policy-%d-%s", layer+1, of(ipv6).suffix)
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
	r := &ruleset{chains: map[string]*chain{}, sets: map[string]*set{}}
	layers := r.addPolicies(c, rules)
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

	r.addInput()
	r.addForward(c)
	r.addEgress(c, layers)
	r.addGuard(c)
	r.place(c, nil)
	r.refuse(c, nat.Overload{})
	return r, nil
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
		case p.Action != nat.SNAT && p.Action != nat.Deny:
			errs = append(errs, fmt.Errorf("policy %s: unknown action %q", p.Name, p.Action))
		case !slices.Contains([]string{"", "tcp", "udp", "icmp"}, p.Protocol):
			errs = append(errs, fmt.Errorf("policy %s: unknown protocol %q", p.Name, p.Protocol))
		case len(p.Ports) > 0 && p.Protocol != "tcp" && p.Protocol != "udp":
			errs = append(errs, fmt.Errorf("policy %s: ports without tcp or udp", p.Name))
		}
		names[p.Name] = true
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

// addPolicies lays the policies' rules into layers, and returns how many there are of each family.
func (r *ruleset) addPolicies(c nat.Config, rules []nat.Rule) (layers [2]int) {
	index := layerIndex{exact: map[[2]netip.Prefix]int{}, below: map[[2]netip.Prefix]int{}}
	for i := range rules {
		ipv6 := b2i(rules[i].Source.Addr().Is6())
		index.sources[ipv6][rules[i].Source.Bits()] = true
		index.destinations[ipv6][rules[i].Destination.Bits()] = true
	}
	pools := map[string]*[2]bool{}
	for i := range c.Pools {
		has := &[2]bool{}
		for _, a := range c.Pools[i].Addresses {
			has[b2i(a.Address.Is6())] = true
		}
		pools[c.Pools[i].Name] = has
	}
	for len(rules) > 0 {
		n := 1
		for n < len(rules) && nat.Precedence(rules[0], rules[n]) == 0 {
			n++
		}
		chosen := make([]int, n)
		for i := range n {
			chosen[i] = index.first(&rules[i])
		}
		for i := range n {
			rule := &rules[i]
			index.add(rule, chosen[i])
			ipv6 := rule.Source.Addr().Is6()
			layers[b2i(ipv6)] = max(layers[b2i(ipv6)], chosen[i]+1)
			name := policyMap(chosen[i], ipv6)
			if r.sets[name] == nil {
				r.sets[name] = &set{shape: shape{isMap: true, isVerdict: true, isInterval: true, isConcat: true}, elements: map[string]element{}}
			}
			e := element{kind: drop, policy: rule.Policy.Name}
			if has := pools[rule.Policy.Pool]; rule.Policy.Action == nat.SNAT && has != nil && has[b2i(ipv6)] {
				e.kind, e.chain = gotoTo, poolName(rule.Policy.Pool, ipv6)
			}
			r.sets[name].elements[ruleKey(rule)] = e
		}
		rules = rules[n:]
	}
	return layers
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

// addInput keeps strangers away from the BGP process, which listens on all addresses of the node. It speaks with
// itself over the loopback interface.
func (r *ruleset) addInput() {
	const bgp = 179 // RFC 4271 section 8.2.1
	r.chains["input"] = &chain{kind: nftables.ChainTypeFilter, hook: *nftables.ChainHookInput, priority: *nftables.ChainPriorityFilter, rules: [][]expr.Any{do(
		meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, unix.IPPROTO_TCP),
		transport(2, 2, reg1), compare(expr.CmpOpEq, 0, bgp),
		meta(expr.MetaKeyIIFNAME, reg1),
		&expr.Lookup{SourceRegister: reg1, SetName: bgpSet, Invert: true},
		verdict(expr.VerdictDrop, ""),
	)}}
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
		forward.rules = append(forward.rules, rule(leaves(expr.CmpOpEq, c.Underlay), hasOwnSource(f), do(verdict(expr.VerdictGoto, "dropped"))))
	}
	forward.rules = append(forward.rules, refusals(c.Underlay))
	r.chains["forward"] = forward
}

// addEgress adds the choice of the source address of new flows.
func (r *ruleset) addEgress(c nat.Config, layers [2]int) {
	egress := &chain{kind: nftables.ChainTypeNAT, hook: *nftables.ChainHookPostrouting, priority: *nftables.ChainPriorityNATSource}
	egress.rules = append(egress.rules,
		rule(leaves(expr.CmpOpNeq, c.Underlay), do(verdict(expr.VerdictAccept, ""))),
		rule(encrypts(), do(verdict(expr.VerdictAccept, ""))))
	for _, f := range families {
		ports, others := "egress-ports-"+f.suffix, "egress-"+f.suffix
		egress.rules = append(egress.rules, rule(hasOwnSource(f), do(verdict(expr.VerdictAccept, ""))))
		for _, l4 := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			egress.rules = append(egress.rules, rule(isFamily(f), do(
				meta(expr.MetaKeyL4PROTO, reg1), compare(expr.CmpOpEq, l4), verdict(expr.VerdictGoto, ports))))
		}
		egress.rules = append(egress.rules, rule(isFamily(f), do(verdict(expr.VerdictGoto, others))))
		// Packets of other protocols have no port; what stands at its place must not decide, nor be needed.
		r.chains[ports] = lookups(f, layers[b2i(f.ipv6)], transport(2, 2, register(2*f.size+4)))
		r.chains[others] = lookups(f, layers[b2i(f.ipv6)], &expr.Immediate{Register: register(2*f.size + 4), Data: []byte{0, 0}})
	}
	r.chains["egress"] = egress
}

func lookups(f family, layers int, port expr.Any) *chain {
	c := &chain{}
	for layer := range layers {
		c.rules = append(c.rules, do(
			network(f.source, f.size, register(0)),
			network(f.dst, f.size, register(f.size)),
			meta(expr.MetaKeyL4PROTO, register(2*f.size)),
			port,
			&expr.Lookup{SourceRegister: register(0), IsDestRegSet: true, SetName: policyMap(layer, f.ipv6)},
		))
	}
	return c
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
	// Neighbour discovery and its like (RFC 4861) use the link-local address or none; the kernel forwards neither.
	guard.rules = append(guard.rules,
		rule(isFamily(of(true)), do(network(8, 2, reg1),
			&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 2, Mask: []byte{0xff, 0xc0}, Xor: []byte{0, 0}},
			compare(expr.CmpOpEq, 0xfe, 0x80), verdict(expr.VerdictAccept, ""))),
		rule(isFamily(of(true)), do(network(8, 16, reg1), compare(expr.CmpOpEq, make([]byte, 16)...), verdict(expr.VerdictAccept, ""))),
		do(verdict(expr.VerdictGoto, "dropped")),
	)
	r.chains["guard"] = guard
	r.chains["dropped"] = &chain{rules: [][]expr.Any{
		do(&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: guardCounter}),
		do(&expr.Limit{Type: expr.LimitTypePkts, Rate: 1, Unit: expr.LimitTimeSecond, Burst: 5},
			&expr.Log{Key: 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_LEVEL, Level: expr.LogLevelWarning, Data: []byte("isthmus guard: ")}),
		do(verdict(expr.VerdictDrop, "")),
	}}
}

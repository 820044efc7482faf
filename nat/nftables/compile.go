package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// tableName is the name of our table, of family inet.
const tableName = "isthmus"

// firstMark is the packet mark for the first address with a port forward; the other addresses get
// the following marks.
const firstMark = 0x49530000

// ruleset is the content of our table, compiled or read back, in a form that can be compared. It
// is immutable once it is made.
type ruleset struct {
	chains map[string]*chain
	sets   map[string]*set
	// layers holds, by view and family, the number of maps of each layer. It is not read back.
	layers map[string][2][]int
	laid   []laid // the rules, in order of precedence; not read back
	// timeouts are the objects that rules refer to, by name. Read back, they have no content.
	timeouts map[string]*expr.CtTimeout
}

// chain is a chain with its rules. A chain without a hook is only reached by jump or goto.
type chain struct {
	kind     nftables.ChainType
	hook     nftables.ChainHook
	priority nftables.ChainPriority
	rules    [][]expr.Any
}

// set is a set or a map. The key of an element is its first and, when they can differ, its last
// key, concatenated.
type set struct {
	shape    shape
	elements map[string]element
}

// shape holds the properties of a set. A dynamic set is filled by rules: its elements are not
// compared.
type shape struct {
	isMap, isVerdict, isInterval, isConcat, isDynamic bool

	size uint32 // see room
}

// element is the value of an element, and the policy that it counts for.
type element struct {
	data   string      // value in a data map
	kind   int32       // verdict of a verdict map
	chain  string      // target of a goto
	policy string      // counted policy
	before nat.Counter // the policy's count before the element was made; not compared
	now    nat.Counter // the element's own count; not compared
}

// wants reports whether two elements are equal, counters aside.
func (e element) wants(f element) bool {
	return e.data == f.data && e.kind == f.kind && e.chain == f.chain && e.policy == f.policy
}

// Verdict codes as in netlink messages.
const (
	drop   = int32(expr.VerdictDrop)
	accept = int32(expr.VerdictAccept)
	back   = int32(expr.VerdictReturn)
	gotoTo = int32(expr.VerdictGoto)
)

// definition holds the properties that the kernel needs to create a set.
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
	case name == attachedSet, name == knownSet, name == tunnelSet, name == plainSet:
		d.key = nftables.TypeIFName
	case name == fromMap:
		d.key, d.data = nftables.TypeIFName, nftables.TypeVerdict
	case name == attachedIndexSet:
		d.key = nftables.TypeIFIndex
	case name == indexMap:
		d.key, d.data = nftables.TypeIFIndex, nftables.TypeVerdict
	case name == sessionSet(ipv6), name == laneSet(ipv6), name == dnsDoors(ipv6), name == metricsDoors(ipv6):
		d.key = nftables.MustConcatSetType(nftables.TypeIFName, addr)
	case name == armsSet(ipv6), name == apiSet(ipv6), name == metricsSources(ipv6), name == sshSet(ipv6), name == sshTunnelSet(ipv6), strings.HasPrefix(name, "from-"), strings.HasPrefix(name, "dns-"):
		d.key = nftables.MustConcatSetType(addr, nftables.TypeInetProto)
	case name == portSet:
		d.key = nftables.TypeInetService
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

// family holds what differs between IPv4 and IPv6 in expressions and names.
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

// familyOf returns IPv6 or IPv4.
func familyOf(ipv6 bool) family {
	if ipv6 {
		return families[1]
	}
	return families[0]
}

func ownSet(ipv6 bool) string { return "own" + familyOf(ipv6).suffix }

func frontMap(ipv6 bool) string { return "front" + familyOf(ipv6).suffix }

func hairpinMap(ipv6 bool) string { return "hairpin" + familyOf(ipv6).suffix }

func poolSet(ipv6 bool) string { return "pool" + familyOf(ipv6).suffix }

func clampMap(ipv6 bool) string { return "mss" + familyOf(ipv6).suffix }

func poolName(pool string, ipv6 bool) string { return "pool-" + pool + "-" + familyOf(ipv6).suffix }

// compile returns the table for a configuration.
//
// The rules of the policies are laid into layers. Each layer is a map from source, destination,
// protocol and port to a verdict. Rules in one layer do not overlap, and a rule in an earlier
// layer wins over the rules that it overlaps in later layers. A new flow costs one lookup per
// layer, and the number of layers is the depth to which policies nest, not their number.
func compile(c nat.Config) (*ruleset, error) {
	rules, err := c.Rules()
	if err != nil {
		return nil, err
	}
	if err := check(c, rules); err != nil {
		return nil, err
	}
	r := &ruleset{chains: map[string]*chain{}, sets: map[string]*set{}, layers: map[string][2][]int{}, timeouts: map[string]*expr.CtTimeout{}}
	if c.Underlay == "" {
		r.addRefusals()
		r.addDrops()
		r.addInput(c)
		r.addNoForward(c)
		return r.finished(c), nil
	}
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

	r.addMaps(c)
	r.addDrops()
	r.addSides(c)
	r.addArrival(c)
	r.addInput(c)
	r.addForward(c)
	r.addMetadata(c)
	r.addEgress(c)
	r.addGuard(c)
	return r.finished(c), nil
}

// finished sets the sizes of sets, and adds the sets that are filled at runtime.
func (r *ruleset) finished(c nat.Config) *ruleset {
	for _, s := range r.sets {
		s.shape.size = room(s)
	}
	r.place(c, nil)
	r.refuse(c, nat.Overload{})
	return r
}

// room returns the size of a set whose elements only configurations change; 0 means unlimited. The
// kernel keeps a set without a size in a resizable hash table, which it grows asynchronously after
// elements were added. While it does, dumps of the set miss elements.
func room(s *set) uint32 {
	if s.shape.isInterval || s.shape.isDynamic {
		return 0
	}
	return max(64, uint32(2)<<bits.Len(uint(len(s.elements))))
}

func check(c nat.Config, rules []nat.Rule) error {
	if c.Underlay == "" && len(c.Attachments)+len(c.Pools)+len(c.Policies) > 0 || len(c.Underlay) >= unix.IFNAMSIZ {
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
		_, known := nat.PolicyProtocol(p.Protocol, false)
		switch {
		case p.Name == "" || names[p.Name]:
			errs = append(errs, fmt.Errorf("policy %q: the name is not unique", p.Name))
		case !slices.Contains([]nat.Action{nat.SNAT, nat.NoNAT, nat.Deny, nat.Reject, nat.DNAT, nat.Redirect}, p.Action):
			errs = append(errs, fmt.Errorf("policy %s: unknown action %q", p.Name, p.Action))
		case !known:
			errs = append(errs, fmt.Errorf("policy %s: unknown protocol %q", p.Name, p.Protocol))
		case (p.Action == nat.DNAT || p.Action == nat.Redirect) && (!p.To.IsValid() || !nat.TakesPorts(p.Protocol)):
			errs = append(errs, fmt.Errorf("policy %s: %s without a target, or without tcp or udp", p.Name, p.Action))
		case len(p.Ports) > 0 && !nat.TakesPorts(p.Protocol):
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

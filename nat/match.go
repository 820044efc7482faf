package nat

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"net/netip"
	"slices"
)

// Flow has the properties of a new flow that the policies match.
type Flow struct {
	Source, Destination netip.Addr
	Protocol            uint8  // IP protocol number
	Port                uint16 // of the destination, with TCP and UDP
	// Late means that the first observed packet opens no TCP connection: the flow began elsewhere,
	// or long ago.
	Late bool
	// Outside means that it arrives by the underlay; otherwise it comes from inside and goes to an
	// address of a pool or would leave by the underlay.
	Outside bool
}

// Decision is the treatment of a flow toward the underlay.
type Decision struct {
	Policy string // the matching policy; empty: none
	Action Action // of that policy; Reject while its proxy is down
	// Address is the source that the flow continues with. It is zero for a flow that ends here: it
	// is denied or rejected; its pool has no address of its family; it is late and its policy does
	// not pick it up; it goes to an address of the node without a server; it goes to the cloud's
	// platform, which its policy does not name; or no policy matches. Of these, the guard drops the
	// flows from inside that are late or without a policy.
	Address netip.Addr
	// Ports are those that it may leave with, or ICMP identifiers; zero: every one.
	Ports PortRange
	// To is the destination that the flow continues with, if it is another one.
	To netip.AddrPort
}

// Does returns the present action of a policy.
func (p *Policy) Does() Action {
	if p.Action == Redirect && p.Down {
		return Reject
	}
	return p.Action
}

// Rule is one combination of a policy's prefixes and ports. All rules of a policy lead to the same
// decision.
type Rule struct {
	Policy              *Policy
	Source, Destination netip.Prefix
	Protocol            uint8     // 0: every one
	Ports               PortRange // 0 to 65535: every one
}

var everyPort = PortRange{0, 65535}

// specificity ranks rules of equal destination length by protocol and port.
func (r *Rule) specificity() int {
	switch {
	case r.Ports != everyPort:
		return 2
	case r.Protocol != 0:
		return 1
	default:
		return 0
	}
}

// Precedence orders rules, best first: by length of the destination prefix; then those with a
// protocol and ports, those with a protocol, those without; then by length of the source prefix.
// Rules that are equal by this and match a common flow tie.
func Precedence(a, b Rule) int {
	return cmp.Or(
		cmp.Compare(b.Destination.Bits(), a.Destination.Bits()),
		cmp.Compare(b.specificity(), a.specificity()),
		cmp.Compare(b.Source.Bits(), a.Source.Bits()),
	)
}

// Matches reports whether a rule applies to a flow.
func (r *Rule) Matches(f Flow) bool {
	return r.Source.Contains(f.Source) && r.Destination.Contains(f.Destination) &&
		(r.Protocol == 0 || r.Protocol == f.Protocol) && (r.Ports == everyPort || r.Ports.First <= f.Port && f.Port <= r.Ports.Last)
}

// MaxRules bounds the rules of all policies of a configuration together. Checking, compiling and
// applying that many takes 200 to 400 MB and some seconds; without a bound, 12 KB of text make 36
// million.
const MaxRules = 1 << 17

// ErrTooManyRules means that the policies have more than MaxRules rules together.
var ErrTooManyRules = fmt.Errorf("the policies make more than %d rules", MaxRules)

// parts are the prefixes and ports of a policy. It has a rule for each combination of them within a
// family.
type parts struct {
	sources, destinations [2][]netip.Prefix // IPv4 and IPv6
	ports                 []PortRange
}

// parts returns the parts of a policy; pool is its pool.
func (p *Policy) parts(pool *Pool) (out parts) {
	if p.Action == Redirect && p.Down && p.Bypass {
		return out
	}
	destinations := p.Destinations
	if p.Action == DNAT {
		destinations = p.Opens(*pool)
	} else if len(destinations) == 0 && len(p.Names) == 0 {
		destinations = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	byFamily := func(prefixes []netip.Prefix) (out [2][]netip.Prefix) {
		all := distinct(prefixes)
		six := slices.IndexFunc(all, func(p netip.Prefix) bool { return !p.Addr().Is4() })
		if six < 0 {
			six = len(all)
		}
		return [2][]netip.Prefix{all[:six], all[six:]}
	}
	out.sources, out.destinations, out.ports = byFamily(p.Sources), byFamily(destinations), mergePorts(p.Ports)
	if p.To.IsValid() {
		out.sources[b2i(p.To.Addr().Is4())] = nil // of the other family
	}
	return out
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// count returns the number of rules of the parts. It does not overflow: a list has less than 2^31
// entries, and ports at most 2^15 ranges.
func (p *parts) count() int {
	n := 0
	for family := range p.sources {
		product := math.MaxInt
		if d := len(p.destinations[family]) * len(p.ports); d == 0 || len(p.sources[family]) <= math.MaxInt/2/d {
			product = len(p.sources[family]) * d
		}
		n = min(n, math.MaxInt-product) + product
	}
	return n
}

// pools returns the pools by name.
func (c *Config) pools() map[string]*Pool {
	pools := make(map[string]*Pool, len(c.Pools))
	for i := range c.Pools {
		if p := &c.Pools[i]; pools[p.Name] == nil {
			pools[p.Name] = p
		}
	}
	return pools
}

// CountRules returns the number of rules of each policy, in their order, and of all together,
// without making one. Sums stop at the largest int.
func (c *Config) CountRules() (each []int, all int) {
	pools := c.pools()
	each = make([]int, len(c.Policies))
	for i := range c.Policies {
		p := &c.Policies[i]
		pool := pools[p.Pool]
		if pool == nil {
			pool = &Pool{}
		}
		apart := p.parts(pool)
		each[i] = apart.count()
		all = min(all, math.MaxInt-each[i]) + each[i]
	}
	return each, all
}

// Rules returns the rules of the policies. Their order is by Precedence, and total: it depends only
// on the policies' content. If there are more than MaxRules, it makes none and returns
// ErrTooManyRules.
func (c *Config) Rules() ([]Rule, error) {
	each, all := c.CountRules()
	if all > MaxRules {
		return nil, ErrTooManyRules
	}
	pools := c.pools()
	rules := make([]Rule, 0, all)
	for i := range c.Policies {
		if each[i] == 0 {
			continue
		}
		p := &c.Policies[i]
		pool := pools[p.Pool]
		if pool == nil {
			pool = &Pool{}
		}
		apart := p.parts(pool)
		for family := range apart.sources {
			for _, src := range apart.sources[family] {
				for _, dst := range apart.destinations[family] {
					for _, r := range apart.ports {
						protocol, _ := PolicyProtocol(p.Protocol, src.Addr().Is6())
						rules = append(rules, Rule{p, src, dst, protocol, r})
					}
				}
			}
		}
	}
	slices.SortFunc(rules, Order)
	return rules, nil
}

// best returns the first rule that matches a flow, and false if none does. It makes only matching
// rules.
func (c *Config) best(f Flow) (best Rule, found bool) {
	pools := c.pools()
	for i := range c.Policies {
		p := &c.Policies[i]
		pool := pools[p.Pool]
		if pool == nil {
			pool = &Pool{}
		}
		apart, family := p.parts(pool), b2i(f.Source.Is6())
		without := func(a netip.Addr) func(netip.Prefix) bool {
			return func(p netip.Prefix) bool { return !p.Contains(a) }
		}
		destinations := slices.DeleteFunc(apart.destinations[family], without(f.Destination))
		for _, src := range slices.DeleteFunc(apart.sources[family], without(f.Source)) {
			for _, dst := range destinations {
				for _, ports := range apart.ports {
					protocol, _ := PolicyProtocol(p.Protocol, src.Addr().Is6())
					r := Rule{p, src, dst, protocol, ports}
					if r.Matches(f) && (!found || Order(r, best) < 0) {
						best, found = r, true
					}
				}
			}
		}
	}
	return best, found
}

// Order is the order of Config.Rules.
func Order(a, b Rule) int {
	if c := Precedence(a, b); c != 0 {
		return c
	}
	if c := a.Destination.Addr().Compare(b.Destination.Addr()); c != 0 {
		return c
	}
	if c := a.Source.Addr().Compare(b.Source.Addr()); c != 0 {
		return c
	}
	return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Ports.First, b.Ports.First), cmp.Compare(a.Policy.Name, b.Policy.Name))
}

// Opens returns the addresses at which a policy with DNAT listens, on the interface and in public:
// those of its pool, or those of them that are among the destinations under either address.
func (p *Policy) Opens(pool Pool) (addrs []netip.Prefix) {
	among := make(map[netip.Prefix]bool, len(p.Destinations))
	for _, d := range p.Destinations {
		among[d] = true
	}
	for _, a := range pool.Addresses {
		both := []netip.Prefix{netip.PrefixFrom(a.Address, a.Address.BitLen())}
		if a.Public.IsValid() && a.Public != a.Address {
			both = append(both, netip.PrefixFrom(a.Public, a.Public.BitLen()))
		}
		if len(p.Destinations) == 0 || slices.ContainsFunc(both, func(o netip.Prefix) bool { return among[o] }) {
			addrs = append(addrs, both...)
		}
	}
	return addrs
}

func distinct(prefixes []netip.Prefix) []netip.Prefix {
	masked := make([]netip.Prefix, len(prefixes))
	for i, p := range prefixes {
		masked[i] = p.Masked()
	}
	slices.SortFunc(masked, netip.Prefix.Compare)
	return slices.Compact(masked)
}

// mergePorts returns the same ports in ascending ranges that do not touch; all ports if there are
// none.
func mergePorts(ports []PortRange) []PortRange {
	if len(ports) == 0 {
		return []PortRange{everyPort}
	}
	sorted := slices.SortedFunc(slices.Values(ports), func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	merged := sorted[:1]
	for _, r := range sorted[1:] {
		if last := &merged[len(merged)-1]; int(r.First) <= int(last.Last)+1 {
			last.Last = max(last.Last, r.Last)
		} else {
			merged = append(merged, r)
		}
	}
	return merged
}

// Tie is two policies that match a common flow with equal rank.
type Tie struct{ A, B string }

// MaxTies bounds the pairs that Ties returns.
const MaxTies = 1000

// Ties returns the pairs of policies that tie, in order of their rules, which come from
// Config.Rules. A policy does not tie with itself, nor with another one of its name. Of more than
// MaxTies pairs it returns the first.
func Ties(rules []Rule) []Tie {
	var ties []Tie
	// Each step of the inner loop finds a pair. Two policies have at most as many steps as rules,
	// since the ranges of one do not overlap: so the bound on pairs bounds the steps.
	seen := map[[2]*Policy]bool{}
	told := map[Tie]bool{}
	for i := range rules {
		a := &rules[i]
		for j := i + 1; j < len(rules) && len(seen) <= MaxTies; j++ {
			b := &rules[j]
			// Rules that can tie are adjacent, ordered by protocol and first port.
			if Precedence(*a, *b) != 0 || a.Destination != b.Destination || a.Source != b.Source || a.Protocol != b.Protocol || b.Ports.First > a.Ports.Last {
				break
			}
			pair := [2]*Policy{a.Policy, b.Policy}
			if seen[pair] || seen[[2]*Policy{b.Policy, a.Policy}] {
				continue
			}
			seen[pair] = true
			if t := (Tie{a.Policy.Name, b.Policy.Name}); t.A != t.B && !told[t] {
				told[t] = true
				ties = append(ties, t)
			}
		}
	}
	return ties
}

// Match is the definition of the policies: it returns the treatment of a new flow. It checks every
// policy and is meant for explanations, plans and tests.
func (c *Config) Match(f Flow) Decision {
	rule, found := c.best(f)
	if !found {
		return Decision{}
	}
	p := rule.Policy
	d := Decision{Policy: p.Name, Action: p.Does()}
	switch {
	case d.Action != DNAT && d.Action != Redirect && PlatformOf(f.Destination).IsValid() && !rule.NamesPlatform():
		return Decision{}
	case f.Late && !p.Pickup:
	case d.Action != DNAT && (f.Outside || slices.Contains(c.addresses(), f.Destination)):
	case d.Action == SNAT:
		if pool := c.Pool(p.Pool); pool.Blocks != nil {
			d.Address, d.Ports, _ = pool.Block(f.Source)
		} else {
			d.Address = pool.For(f.Source, c.Zone(f.Source))
		}
	case d.Action == NoNAT:
		d.Address = f.Source
	case d.Action == DNAT || d.Action == Redirect:
		d.Address, d.To = f.Source, p.To
		if p.To.Port() == 0 {
			d.To = netip.AddrPortFrom(p.To.Addr(), f.Port)
		}
		if d.Action == DNAT && !f.Outside {
			d.Address = f.Destination // so that the answers come through this node
		}
	}
	return d
}

// addresses returns the addresses on the underlay: the node's and those of pools.
func (c *Config) addresses() []netip.Addr {
	all := slices.Clone(c.Own)
	for _, p := range c.Pools {
		for _, a := range p.Addresses {
			all = append(all, a.Address)
		}
	}
	return all
}

// Pool returns the pool with a name, an empty one if there is none.
func (c *Config) Pool(name string) Pool {
	for _, p := range c.Pools {
		if p.Name == name {
			return p
		}
	}
	return Pool{Name: name}
}

// HashSeed makes Hash differ from other uses of the same function on a packet's path.
const HashSeed = 0x49535448

// Hash is Bob Jenkins' hash (lookup3, 2006) of an address with HashSeed, as the kernel computes it
// in nftables' "jhash" on a machine of this byte order.
func Hash(a netip.Addr) uint32 {
	key := a.AsSlice()
	x := uint32(0xdeadbeef) + uint32(len(key)) + HashSeed
	y, z := x, x
	for ; len(key) > 12; key = key[12:] {
		x += binary.NativeEndian.Uint32(key)
		y += binary.NativeEndian.Uint32(key[4:])
		z += binary.NativeEndian.Uint32(key[8:])
		x = (x - z) ^ bits.RotateLeft32(z, 4)
		z += y
		y = (y - x) ^ bits.RotateLeft32(x, 6)
		x += z
		z = (z - y) ^ bits.RotateLeft32(y, 8)
		y += x
		x = (x - z) ^ bits.RotateLeft32(z, 16)
		z += y
		y = (y - x) ^ bits.RotateLeft32(x, 19)
		x += z
		z = (z - y) ^ bits.RotateLeft32(y, 4)
		y += x
	}
	// Four bytes are left, of IPv4 and of IPv6. The kernel reads a tail byte by byte, least
	// significant first.
	x += binary.LittleEndian.Uint32(key)
	z = (z ^ y) - bits.RotateLeft32(y, 14)
	x = (x ^ z) - bits.RotateLeft32(z, 11)
	y = (y ^ x) - bits.RotateLeft32(x, 25)
	z = (z ^ y) - bits.RotateLeft32(y, 16)
	x = (x ^ z) - bits.RotateLeft32(z, 4)
	y = (y ^ x) - bits.RotateLeft32(x, 14)
	z = (z ^ y) - bits.RotateLeft32(y, 24)
	return z
}

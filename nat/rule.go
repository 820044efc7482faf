package nat

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
)

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

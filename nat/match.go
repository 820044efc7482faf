package nat

import (
	"encoding/binary"
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
			if f.Late && pool.Shared {
				d.Address = pool.Home(f.Source, c.Zone(f.Source))
			}
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

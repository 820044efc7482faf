// Package apipa allocates and checks inside addresses from the IPv4 link-local range
// 169.254.0.0/16 (RFC 3927), which the clouds' gateways use inside tunnels.
package apipa

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// LinkLocal is the whole range (RFC 3927 section 2.1).
var LinkLocal = netip.MustParsePrefix("169.254.0.0/16")

// Range is the range from which blocks are allocated. It avoids the addresses that clouds reserve:
// the low blocks of AWS and Oracle, the metadata and time services of all clouds, and 169.254.21.0
// to 169.254.22.255, the only addresses that Azure accepts.
var Range = netip.MustParsePrefix("169.254.64.0/18")

// Default is the rule for a tunnel that is not to one of the clouds.
var Default = Rule{From: []netip.Prefix{Range}}

// ErrExhausted means that all addresses that may be allocated are in use.
var ErrExhausted = errors.New("no free inside addresses")

// Rule describes which inside IPv4 addresses a gateway accepts. The zero value of a field means no
// restriction.
type Rule struct {
	// From lists where addresses are allocated: within LinkLocal, none longer than a /30.
	From     []netip.Prefix
	Within   []netip.Prefix // link-local addresses must be in one of these
	Only     bool           // addresses must be link-local
	Reserved []netip.Prefix // must not be used; nothing is allocated from a /30 that overlaps it
	Bits     []int          // prefix lengths of the local address
	// PeerFirst means that in each /30 the gateway has the first host address, and this node the
	// second.
	PeerFirst bool
	// Single means that addresses are allocated one by one instead of in a /30. All tunnels of a
	// node to this cloud have the same local address, because the gateway identifies this node by
	// one address.
	Single bool
}

// Check returns what is wrong with a pair of IPv4 addresses and how to fix it, or empty texts when
// the gateway accepts them.
func (r Rule) Check(local netip.Prefix, remote netip.Addr) (rule, remedy string) {
	for _, a := range []netip.Addr{local.Addr(), remote} {
		linkLocal := LinkLocal.Contains(a)
		switch {
		case !linkLocal && r.Only:
			return fmt.Sprintf("has %s, which is not in %s", a, LinkLocal), "give a block from " + join(r.From) + ", or leave it out"
		case linkLocal && len(r.Within) > 0 && !within(r.Within, a):
			return fmt.Sprintf("has %s; of %s only %s is accepted", a, LinkLocal, join(r.Within)), "give addresses from there, or omit it"
		}
		for _, p := range r.Reserved {
			if p.Contains(a) {
				return fmt.Sprintf("has %s from %s, which is reserved", a, p), "give a block from " + join(r.From) + ", or leave it out"
			}
		}
	}
	if len(r.Bits) > 0 && !slices.Contains(r.Bits, local.Bits()) {
		return fmt.Sprintf("is a /%d", local.Bits()), fmt.Sprintf("give the address with /%d", r.Bits[0])
	}
	if r.PeerFirst {
		base := netip.PrefixFrom(local.Addr(), 30).Masked().Addr()
		if peer, own := base.Next(), base.Next().Next(); remote != peer || local.Addr() != own {
			return fmt.Sprintf("has %s for this node and %s for the gateway, which always has the first host address of its /30", local.Addr(), remote),
				fmt.Sprintf("give %s/30 with remote %s", own, peer)
		}
	}
	return "", ""
}

// Account counts the users of every address in LinkLocal. The zero value has no users.
type Account struct{ users [1 << 16]int32 }

// Use adds a user to every address in p. Addresses outside of LinkLocal are ignored.
func (a *Account) Use(p netip.Prefix) { a.add(p, 1) }

// Release removes a user from every address in p, which must have been passed to Use.
func (a *Account) Release(p netip.Prefix) { a.add(p, -1) }

func (a *Account) add(p netip.Prefix, n int32) {
	for first, end := span(p); first < end; first++ {
		a.users[first] += n
	}
}

// Users returns the highest number of users of an address in p.
func (a *Account) Users(p netip.Prefix) int {
	most := int32(0)
	for first, end := span(p); first < end; first++ {
		most = max(most, a.users[first])
	}
	return int(most)
}

// Free returns the lowest /30 that the rule allows and that has no users, or with Single the
// lowest such address, as a /32. It stays free until Use. A single address is never the first or
// last of a /30, so that the other end may put it into one.
func (a *Account) Free(r Rule) (netip.Prefix, error) {
	for _, from := range r.From {
		first, end := span(from)
		for i := first; i+4 <= end; i += 4 {
			u := a.users[i : i+4]
			var p netip.Prefix
			switch {
			case !r.Single && u[0]|u[1]|u[2]|u[3] == 0:
				p = netip.PrefixFrom(address(i), 30)
			case r.Single && u[1] == 0:
				p = netip.PrefixFrom(address(i+1), 32)
			case r.Single && u[2] == 0:
				p = netip.PrefixFrom(address(i+2), 32)
			default:
				continue
			}
			block := netip.PrefixFrom(address(i), 30)
			at := slices.IndexFunc(r.Reserved, block.Overlaps)
			if at < 0 {
				return p, nil
			}
			_, after := span(r.Reserved[at])
			i = (after - 1) &^ 3 // continue with the next block
		}
	}
	return netip.Prefix{}, ErrExhausted
}

// span returns the offset in LinkLocal of the first address in p, and the offset after its last.
func span(p netip.Prefix) (first, end int) {
	if !p.Overlaps(LinkLocal) {
		return 0, 0
	}
	if p.Bits() < LinkLocal.Bits() {
		p = LinkLocal
	}
	b := p.Masked().Addr().As4()
	first = int(b[2])<<8 | int(b[3])
	return first, first + 1<<(32-p.Bits())
}

func address(number int) netip.Addr {
	return netip.AddrFrom4([4]byte{169, 254, byte(number >> 8), byte(number)})
}

func within(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

func join(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, ", ")
}

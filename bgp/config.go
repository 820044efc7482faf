// Package bgp holds the types and the contract of BGP sessions (RFC 4271). Only prefixes that a
// policy names are accepted or announced (RFC 8212). The package has no implementation: bgp/gobgp
// implements Driver.
package bgp

import (
	"fmt"
	"math"
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/router/secret"
)

// Config is the desired state of BGP on a node.
type Config struct {
	ASN      uint32
	RouterID netip.Addr // IPv4
	Peers    []Peer     // by name
	// Reason is sent to the peers that are shut down from now on (RFC 9003). A change of it alone
	// changes nothing.
	Reason   string
	Announce []netip.Prefix
}

// Peer is one session. Address is unique on the node, because it identifies the session.
type Peer struct {
	Name      string
	Tunnel    string // name of the tunnel or the link that carries it
	Interface string // of that tunnel; the session is bound to it (SO_BINDTODEVICE)
	// Lanes are the interfaces of the lanes, if a link carries the session. Interface is empty
	// then, and the session uses any of them.
	Lanes []string

	Address      netip.Addr
	LocalAddress netip.Addr
	// OtherLocal is this node's address of the other family inside the tunnel. If it is valid, the
	// session also carries that family (RFC 4760), with this address as next hop. It is always an
	// IPv6 address: GoBGP would announce IPv4 prefixes with an IPv6 next hop (RFC 8950) in a
	// session of IPv6.
	OtherLocal  netip.Addr
	ASN         uint32
	HoldTime    time.Duration // whole seconds, 3s to 65535s
	Keepalive   time.Duration // whole seconds
	TTL         uint8
	Passive     bool
	Password    secret.Ref // zero: none (RFC 2385)
	Import      Import
	Export      Export
	MaxPrefixes uint32
	ASOverride  bool
	AllowOwnAS  uint8
	// GracefulRestart offers RFC 4724 to the peer with this restart time, at most 4095s; 0 offers
	// none.
	GracefulRestart time.Duration
	// Disabled means that the session is shut down.
	Disabled bool
}

// Rule matches the prefixes inside Prefix whose length is from Min to Max.
type Rule struct {
	Prefix   netip.Prefix
	Min, Max uint8
}

// Match reports whether p is one of the prefixes that the rule names.
func (r Rule) Match(p netip.Prefix) bool {
	return p.Bits() >= int(r.Min) && p.Bits() <= int(r.Max) && p.Bits() >= r.Prefix.Bits() && r.Prefix.Contains(p.Addr())
}

// Capacity is the number of prefixes that the rule can match.
func (r Rule) Capacity() float64 {
	n := 0.0
	for bits := max(int(r.Min), r.Prefix.Bits()); bits <= int(r.Max); bits++ {
		n += math.Ldexp(1, bits-r.Prefix.Bits())
	}
	return n
}

// String returns the rule in the words of the document, as "10.0.0.0/8 le 24".
func (r Rule) String() string {
	s := r.Prefix.String()
	if int(r.Min) != r.Prefix.Bits() {
		s += fmt.Sprintf(" ge %d", r.Min)
	}
	if r.Max != r.Min {
		s += fmt.Sprintf(" le %d", r.Max)
	}
	return s
}

// Import is what is accepted: what no rule matches is refused.
type Import struct {
	Allow           []Rule
	LocalPreference uint32 // 0: that of an internal peer, else 100
}

// Export is what is announced: what no rule matches is held back.
type Export struct {
	Allow   []Rule
	MED     *uint32 // nil: none is sent
	Prepend uint8
	// MaxPrefixes bounds the announced prefixes; 0: no limit. More than the peer accepts would end
	// the session (Cease, Maximum Number of Prefixes Reached, RFC 4486). The excess is held back:
	// the node's own announcements come first, then short prefixes, then low addresses.
	MaxPrefixes uint32
}

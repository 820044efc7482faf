package egress

import (
	"errors"
	"net/netip"
	"strings"
	"time"
)

// DNS configures the resolver of domain names in egress policies, and the DNS proxy for spokes.
type DNS struct {
	// Resolvers are the servers to query; the next is used when one fails. None: those of
	// /etc/resolv.conf.
	Resolvers []netip.AddrPort
	Floor     time.Duration // the shortest time to live that counts
	Grace     time.Duration // time for which addresses stay while no server answers
	// Hold is how long an address stays after it was last answered or used by a flow; 0: twice its
	// time to live, whether it is used or not.
	Hold  time.Duration
	Proxy []Listener
}

// Listener is where the proxy listens: UDP and TCP port 53 of an address, for queries that arrive
// on one interface.
type Listener struct {
	Address   netip.Addr
	Interface string
}

// ParseName checks a domain name or wildcard and returns it in lower case without its final dot.
// The error is the rule that the text breaks.
func ParseName(text string) (string, error) {
	name := strings.TrimSuffix(strings.ToLower(text), ".")
	rest, wild := strings.CutPrefix(name, "*.")
	if _, err := netip.ParseAddr(name); err == nil {
		return "", errors.New("is an address")
	}
	if len(name) > 253 || rest == "" {
		return "", errors.New("is not a valid domain name")
	}
	labels := strings.Split(rest, ".")
	for _, l := range labels {
		bad := strings.ContainsFunc(l, func(r rune) bool { return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '_') })
		if bad || l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return "", errors.New("is not a valid domain name")
		}
	}
	if wild && len(labels) < 2 {
		return "", errors.New("matches a whole top-level domain")
	}
	return name, nil
}

// IsWildcard reports whether a parsed name begins with "*.".
func IsWildcard(name string) bool { return strings.HasPrefix(name, "*.") }

// NameMatches reports whether a name or wildcard of a policy matches a name, both parsed. A
// wildcard matches all names below its domain, and not the domain itself.
func NameMatches(pattern, name string) bool {
	if IsWildcard(pattern) {
		return len(name) > len(pattern)-1 && strings.HasSuffix(name, pattern[1:])
	}
	return pattern == name
}

package nat

import (
	"net/netip"
	"slices"
)

// private has the prefixes that are not routed on the Internet.
var private = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),      // RFC 1122 section 3.2.1.3
	netip.MustParsePrefix("10.0.0.0/8"),     // RFC 1918
	netip.MustParsePrefix("100.64.0.0/10"),  // RFC 6598
	netip.MustParsePrefix("127.0.0.0/8"),    // RFC 1122 section 3.2.1.3
	netip.MustParsePrefix("169.254.0.0/16"), // RFC 3927
	netip.MustParsePrefix("172.16.0.0/12"),  // RFC 1918
	netip.MustParsePrefix("192.168.0.0/16"), // RFC 1918
	netip.MustParsePrefix("240.0.0.0/4"),    // RFC 1112 section 4
	netip.MustParsePrefix("fc00::/7"),       // RFC 4193
	netip.MustParsePrefix("fe80::/10"),      // RFC 4291 section 2.5.6
}

// Exposes reports whether a packet from source to destination could carry an inside address into
// the Internet: some of source is private, and not all of destination is.
func Exposes(source, destination netip.Prefix) bool {
	return slices.ContainsFunc(private, source.Overlaps) && !slices.ContainsFunc(private, func(p netip.Prefix) bool {
		return p.Bits() <= destination.Bits() && p.Contains(destination.Addr())
	})
}

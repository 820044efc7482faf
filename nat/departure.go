package nat

import "net/netip"

// Departure is a set of new flows from inside that leave by the underlay, and the source address
// that all of them may leave with. Properties of a flow that are known only when it arrives, such
// as the hash of its source, are left open: one flow may be in several.
type Departure struct {
	Sources, Destinations Range
	Protocols             [2]uint8  // first and last IP protocol number
	Ports                 PortRange // of the destination; of protocols without ports, nothing
	// Address is the source that they may leave with. The zero Addr: their own source,
	// untranslated.
	Address netip.Addr
}

// Range is a range of addresses of one family, both ends included.
type Range struct{ First, Last netip.Addr }

package tunnel

import (
	"net/netip"
)

// Kind names a way to carry packets to a peer. It is the field of the document that holds the
// kind's settings.
type Kind string

// The kinds of tunnels. A new kind has settings in Config, a carrier in a file of this package, a
// driver, and a line in Config.carrier.
const (
	KindIPsec     Kind = "ipsec"
	KindWireGuard Kind = "wireguard"
)

// carrier is what the settings of each kind say about themselves.
type carrier interface {
	kind() Kind
	outside() netip.AddrPort
	listenPort() uint16
	needs() [][]string
	embedded(can func(string) bool) bool
	lane() bool
	mtu(underlay int) int
	diff(former carrier) differences
}

// carrier returns the settings that are set. It is the only place that tells the kinds apart.
func (c Config) carrier() carrier {
	switch {
	case c.IPsec != nil:
		return c.IPsec
	case c.WireGuard != nil:
		return c.WireGuard
	}
	return none{}
}

// Kind returns the kind of the tunnel, or the empty one when it has none.
func (c Config) Kind() Kind { return c.carrier().kind() }

// Outside returns where the encrypted packets go. The address is invalid while the peer is to be
// learned, and the port is 0 where the kind chooses it.
func (c Config) Outside() netip.AddrPort { return c.carrier().outside() }

// ListenPort returns the UDP port of this tunnel alone, 0 when it has none.
func (c Config) ListenPort() uint16 { return c.carrier().listenPort() }

// Needs returns sets of kernel capabilities, as router/host names them. The kernel needs all of one
// set.
func (c Config) Needs() [][]string { return c.carrier().needs() }

// Embedded reports whether the tunnel has a device in the daemon, on a kernel with certain
// capabilities. See MaxEmbedded.
func (c Config) Embedded(can func(capability string) bool) bool { return c.carrier().embedded(can) }

// Lane reports whether the peer of such a tunnel is another isthmus node.
func (c Config) Lane() bool { return c.carrier().lane() }

// LargestMTU returns the size in bytes of the largest inside packet that fits into one packet of an
// underlay with a certain MTU, whichever of the configured algorithms is agreed upon.
func (c Config) LargestMTU(underlay int) int { return c.carrier().mtu(underlay) }

// none is the carrier of a Config without settings of any kind.
type none struct{}

func (none) kind() Kind                      { return "" }
func (none) outside() netip.AddrPort         { return netip.AddrPort{} }
func (none) listenPort() uint16              { return 0 }
func (none) needs() [][]string               { return [][]string{{}} }
func (none) embedded(func(string) bool) bool { return false }
func (none) lane() bool                      { return false }
func (none) mtu(underlay int) int            { return underlay }
func (none) diff(carrier) differences        { return nil }

// outerHeader returns the size of the IP header around the encrypted packets. A peer that is not
// known yet may be reached over IPv6.
func outerHeader(a netip.Addr) int {
	if a.Is4() {
		return 20
	}
	return 40
}

package tunnel

import (
	"net/netip"
)

// Kind names the protocol of a tunnel. It is the field of the document with the settings of the
// kind.
type Kind string

// The kinds of tunnels. A new kind needs settings in Config, a carrier in a file of this package, a
// driver, and a line in Config.carrier.
const (
	KindIPsec     Kind = "ipsec"
	KindWireGuard Kind = "wireguard"
)

// carrier is implemented by the settings of each kind.
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

// carrier returns the settings that are present. It is the only place that distinguishes the kinds.
func (c Config) carrier() carrier {
	switch {
	case c.IPsec != nil:
		return c.IPsec
	case c.WireGuard != nil:
		return c.WireGuard
	}
	return none{}
}

// Kind returns the kind of the tunnel, "" if it has none.
func (c Config) Kind() Kind { return c.carrier().kind() }

// Outside returns the destination of the encrypted packets. The address is invalid until the peer
// is learned, and the port is 0 if the kind chooses it.
func (c Config) Outside() netip.AddrPort { return c.carrier().outside() }

// ListenPort returns the UDP port used by this tunnel only, 0 if it has none.
func (c Config) ListenPort() uint16 { return c.carrier().listenPort() }

// Needs returns sets of kernel capabilities, with the names of router/host. The kernel needs all
// capabilities of one set.
func (c Config) Needs() [][]string { return c.carrier().needs() }

// Embedded reports whether the tunnel needs a device in the daemon on a kernel with the given
// capabilities. See MaxEmbedded.
func (c Config) Embedded(can func(capability string) bool) bool { return c.carrier().embedded(can) }

// Lane reports whether the peer is another isthmus node.
func (c Config) Lane() bool { return c.carrier().lane() }

// LargestMTU returns the size in bytes of the largest inside packet that fits into one packet of an
// underlay with the given MTU, whichever of the configured algorithms is negotiated.
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

// outerHeader returns the size of the IP header around the encrypted packets. A peer that is still
// unknown may be reached over IPv6.
func outerHeader(a netip.Addr) int {
	if a.Is4() {
		return 20
	}
	return 40
}

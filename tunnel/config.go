// Package tunnel holds the types and the contract of encrypted point-to-point links. Each tunnel
// has a network interface of its own, so that a route to it is a route to exactly one peer. The
// package has no backend: tunnel/ipsec and tunnel/wireguard implement Driver.
package tunnel

import (
	"net/netip"
)

// Mark is the prefix of the alias of every interface that isthmus made (IFLA_IFALIAS) and of the
// name of every connection that it loaded into charon. Objects without it are never changed or
// removed.
const Mark = "isthmus:"

// MaxEmbedded bounds the WireGuard tunnels of a node on a kernel without WireGuard. Each has a
// device in the daemon then: one under load was measured at 210 to 310 MB, since its buffer pools
// are unbounded on Linux.
const MaxEmbedded = 16

// Config is the desired state of one tunnel. All choices have been made: a driver only applies it.
type Config struct {
	Name string // unique on the node
	// number from the ledger, not reused while the tunnel exists; the if_id of an xfrm interface
	ID        uint32
	Interface string // kernel interface name
	Underlay  string // interface that carries the encrypted packets
	MTU       int    // bytes
	Inside    []Inside
	Probe     Probe
	// Own are further addresses of this node on the interface, without a route: those of the link
	// whose lane the tunnel is.
	Own []netip.Addr
	// Link is the name of the link whose lane the tunnel is, and Number the lane's number, from 1.
	// Empty and 0: it is not a lane.
	Link   string
	Number int
	// Disabled means that the document shuts the tunnel down. No driver applies it.
	Disabled bool

	// Exactly one of these is set; see Kind.
	IPsec     *IPsec
	WireGuard *WireGuard
}

// Inside is a pair of addresses in a tunnel. Local carries the prefix length to configure; with /32
// and /128 a host route to Remote is needed as well.
type Inside struct {
	Local  netip.Prefix
	Remote netip.Addr
}

// String returns the pair, as "169.254.64.2/30 to 169.254.64.1".
func (i Inside) String() string { return i.Local.String() + " to " + i.Remote.String() }

// Probe says whether echo requests to the remote inside address show that a tunnel carries data.
type Probe string

// The values of Probe.
const (
	ProbeOff Probe = ""
	// ProbeAuto draws no conclusion from missing answers if the peer has sent data and has never
	// answered a request: it may drop echo requests.
	ProbeAuto   Probe = "auto"
	ProbeStrict Probe = "strict" // the peer is known to answer
)

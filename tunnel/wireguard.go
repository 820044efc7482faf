package tunnel

import (
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/router/secret"
)

// WireGuard configures a WireGuard interface with one peer that may send and receive all addresses.
type WireGuard struct {
	PrivateKey    secret.Ref
	PeerPublicKey [32]byte
	PresharedKey  secret.Ref     // zero: none
	Endpoint      netip.AddrPort // zero: learnt
	ListenPort    uint16
	Keepalive     time.Duration // whole seconds; 0: none
}

func (*WireGuard) kind() Kind { return KindWireGuard }

func (w *WireGuard) outside() netip.AddrPort { return w.Endpoint }

func (w *WireGuard) listenPort() uint16 { return w.ListenPort }

func (*WireGuard) needs() [][]string { return [][]string{{"wireguard"}, {"tun"}} }

func (*WireGuard) embedded(can func(string) bool) bool { return !can("wireguard") && can("tun") }

func (*WireGuard) lane() bool { return true }

// mtu counts 8 bytes of UDP, 16 of header and 16 of tag (WireGuard paper, section 5.4.6). The
// padding to 16 bytes stops at the MTU.
func (w *WireGuard) mtu(underlay int) int { return underlay - outerHeader(w.Endpoint.Addr()) - 8 - 32 }

func (w *WireGuard) diff(former carrier) (d differences) {
	x, is := former.(*WireGuard)
	if !is { // nothing
		x = &WireGuard{}
	}
	const rekeyed = "a new handshake is needed"
	d.add("wireguard.privateKey", x.PrivateKey, w.PrivateKey, rekeyed)
	d.add("wireguard.peerPublicKey", keyText(x.PeerPublicKey), keyText(w.PeerPublicKey), rekeyed)
	d.add("wireguard.presharedKey", x.PresharedKey, w.PresharedKey, rekeyed)
	d.add("wireguard.endpoint", x.Endpoint, w.Endpoint, "")
	d.add("wireguard.listenPort", x.ListenPort, w.ListenPort, "the peer must send to the new port")
	d.add("wireguard.keepalive", x.Keepalive, w.Keepalive, "")
	return d
}

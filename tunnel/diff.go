package tunnel

import (
	"fmt"
	"reflect"
	"slices"
)

// Difference is one field in which two configurations of a tunnel differ.
type Difference struct {
	Field    string
	Old, New string
	// Interrupts says why traffic stops for a moment when it is changed; empty when it does not.
	Interrupts string
}

// Diff returns the fields in which b differs from a, in the order of declaration.
func Diff(a, b Config) []Difference {
	var d []Difference
	add := func(field string, old, new any, interrupts string) {
		if !reflect.DeepEqual(old, new) {
			d = append(d, Difference{Field: field, Old: fmt.Sprint(old), New: fmt.Sprint(new), Interrupts: interrupts})
		}
	}
	if a.Kind() != b.Kind() {
		return []Difference{{Field: "kind", Old: a.Kind(), New: b.Kind(), Interrupts: "the tunnel is made again"}}
	}
	const rehomed = "the interface is made again"
	add("id", a.ID, b.ID, rehomed)
	add("interface", a.Interface, b.Interface, rehomed)
	add("underlay", a.Underlay, b.Underlay, rehomed)
	add("mtu", a.MTU, b.MTU, "")
	if !slices.Equal(a.Inside, b.Inside) {
		add("inside", a.Inside, b.Inside, "sessions on the former inside addresses end")
	}
	if a.IPsec != nil && b.IPsec != nil {
		x, y := a.IPsec, b.IPsec
		const renegotiated = "the IKE SA is negotiated again"
		add("ipsec.localAddress", x.LocalAddress, y.LocalAddress, renegotiated)
		add("ipsec.remoteAddress", x.RemoteAddress, y.RemoteAddress, renegotiated)
		add("ipsec.localIdentity", x.LocalIdentity, y.LocalIdentity, renegotiated)
		add("ipsec.remoteIdentity", x.RemoteIdentity, y.RemoteIdentity, renegotiated)
		add("ipsec.psk", x.PSK, y.PSK, "")
		add("ipsec.ikeProposals", x.IKEProposals, y.IKEProposals, "")
		add("ipsec.espProposals", x.ESPProposals, y.ESPProposals, "")
		add("ipsec.ikeRekey", x.IKERekey, y.IKERekey, "")
		add("ipsec.childRekey", x.ChildRekey, y.ChildRekey, "")
		add("ipsec.childRekeyBytes", x.ChildRekeyBytes, y.ChildRekeyBytes, "")
		add("ipsec.dpdDelay", x.DPDDelay, y.DPDDelay, "")
		add("ipsec.respondOnly", x.RespondOnly, y.RespondOnly, "")
		add("ipsec.replayWindow", x.ReplayWindow, y.ReplayWindow, "")
	}
	if a.WireGuard != nil && b.WireGuard != nil {
		x, y := a.WireGuard, b.WireGuard
		const rekeyed = "a new handshake is needed"
		add("wireguard.privateKey", x.PrivateKey, y.PrivateKey, rekeyed)
		add("wireguard.peerPublicKey", x.PeerPublicKey, y.PeerPublicKey, rekeyed)
		add("wireguard.presharedKey", x.PresharedKey, y.PresharedKey, rekeyed)
		add("wireguard.endpoint", x.Endpoint, y.Endpoint, "")
		add("wireguard.listenPort", x.ListenPort, y.ListenPort, "the peer must send to the new port")
		add("wireguard.keepalive", x.Keepalive, y.Keepalive, "")
	}
	return d
}

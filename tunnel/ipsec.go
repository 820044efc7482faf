package tunnel

import (
	"net/netip"
	"time"

	"github.com/isthmus-net/isthmus/router/secret"
)

// IPsec configures an IKEv2 tunnel with selectors for all addresses of its inside families:
// 0.0.0.0/0, ::/0 or both. A gateway with one family may refuse a proposal of both instead of
// narrowing it.
type IPsec struct {
	LocalAddress    netip.Addr // on the underlay interface
	RemoteAddress   netip.Addr
	LocalIdentity   string
	RemoteIdentity  string
	PSK             secret.Ref
	IKEProposals    []string // strongSwan notation, best first
	ESPProposals    []string
	IKERekey        time.Duration
	ChildRekey      time.Duration
	ChildRekeyBytes uint64 // 0: no limit
	DPDDelay        time.Duration
	RespondOnly     bool
	ReplayWindow    uint32 // packets
	ForceUDP        bool   // encapsulates ESP in UDP without a NAT as well (RFC 3948)
}

func (*IPsec) kind() Kind { return KindIPsec }

func (i *IPsec) outside() netip.AddrPort { return netip.AddrPortFrom(i.RemoteAddress, 0) }

func (*IPsec) listenPort() uint16 { return 0 } // charon uses one port for all of its tunnels

func (*IPsec) needs() [][]string { return [][]string{{"esp", "xfrm-interface"}} }

func (*IPsec) embedded(func(string) bool) bool { return false }

func (*IPsec) lane() bool { return false }

func (i *IPsec) mtu(underlay int) int {
	mtu := underlay
	for _, p := range i.ESPProposals {
		bytes, align := espOverhead(p)
		const trailer = 2 // in bytes; part of the aligned length
		room := underlay - outerHeader(i.LocalAddress) - bytes + trailer
		mtu = min(mtu, room/align*align-trailer)
	}
	return mtu
}

func (i *IPsec) diff(former carrier) (d differences) {
	x, is := former.(*IPsec)
	if !is { // nothing
		x = &IPsec{}
	}
	const renegotiated = "the IKE SA is negotiated again"
	d.add("ipsec.localAddress", x.LocalAddress, i.LocalAddress, renegotiated)
	d.add("ipsec.remoteAddress", x.RemoteAddress, i.RemoteAddress, renegotiated)
	d.add("ipsec.localIdentity", x.LocalIdentity, i.LocalIdentity, renegotiated)
	d.add("ipsec.remoteIdentity", x.RemoteIdentity, i.RemoteIdentity, renegotiated)
	d.add("ipsec.psk", x.PSK, i.PSK, "")
	d.add("ipsec.ikeProposals", x.IKEProposals, i.IKEProposals, "")
	d.add("ipsec.espProposals", x.ESPProposals, i.ESPProposals, "")
	d.add("ipsec.ikeRekey", x.IKERekey, i.IKERekey, "")
	d.add("ipsec.childRekey", x.ChildRekey, i.ChildRekey, "")
	d.add("ipsec.childRekeyBytes", x.ChildRekeyBytes, i.ChildRekeyBytes, "")
	d.add("ipsec.dpdDelay", x.DPDDelay, i.DPDDelay, "")
	d.add("ipsec.respondOnly", x.RespondOnly, i.RespondOnly, "")
	d.add("ipsec.replayWindow", x.ReplayWindow, i.ReplayWindow, "")
	d.add("ipsec.udpEncapsulation", x.udp(), i.udp(), renegotiated)
	return d
}

// udp returns the field of the document.
func (i *IPsec) udp() string {
	if i.ForceUDP {
		return "always"
	}
	return "auto"
}

package wireguard

import (
	"bytes"
	"encoding/base64"
	"errors"
	"net"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
)

// stale is the age from which on a session's keys are refused (REJECT_AFTER_TIME, WireGuard paper,
// section 6.1).
const stale = 180 * time.Second

var everything = []net.IPNet{
	{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
	{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
}

// keys are the values of a tunnel's secret references. They have no text form.
type keys struct {
	private   wgtypes.Key
	preshared wgtypes.Key // zero: none
}

func (keys) String() string   { return "(keys)" }
func (keys) GoString() string { return "(keys)" }

// parseKey accepts base64 text as wg(8) writes it, and 32 raw bytes.
func parseKey(b []byte) (wgtypes.Key, error) {
	if len(b) != wgtypes.KeyLen {
		raw, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(b)))
		if err != nil || len(raw) != wgtypes.KeyLen {
			return wgtypes.Key{}, errors.New("not a WireGuard key: want 32 bytes, or their base64 text")
		}
		b = raw
	}
	return wgtypes.Key(b), nil
}

// compileLink returns the interface of a tunnel.
func compileLink(c tunnel.Config, kind string) link.Wanted {
	w := link.Wanted{
		Name: c.Interface, Kind: kind, Alias: tunnel.Mark + c.Name, MTU: c.MTU,
		Sysctls: map[string]string{
			"ipv4/conf/%s/rp_filter":        "2", // the return path may be another tunnel
			"ipv4/conf/%s/accept_redirects": "0",
			"ipv4/conf/%s/send_redirects":   "0",
			"ipv6/conf/%s/accept_redirects": "0",
			"ipv6/conf/%s/accept_ra":        "0",
		},
	}
	for _, in := range c.Inside {
		w.Addresses = append(w.Addresses, link.Address{Local: in.Local, Peer: in.Remote})
	}
	for _, a := range c.Own {
		w.Addresses = append(w.Addresses, link.Address{Local: netip.PrefixFrom(a, a.BitLen())})
	}
	return w
}

// compile returns the smallest change that makes the device match the configuration, and whether
// there is any. former is the endpoint configured before, zero if unknown: the peer may have
// roamed since, and is then left at its current endpoint unless it is silent there.
func compile(have *wgtypes.Device, want tunnel.WireGuard, k keys, former netip.AddrPort, now time.Time) (wgtypes.Config, bool) {
	var c wgtypes.Config
	change := false
	if have.PrivateKey != k.private {
		c.PrivateKey, change = &k.private, true
	}
	if port := int(want.ListenPort); have.ListenPort != port && port != 0 {
		c.ListenPort, change = &port, true
	}
	var peer *wgtypes.Peer
	for i, p := range have.Peers {
		if p.PublicKey == wgtypes.Key(want.PeerPublicKey) {
			peer = &have.Peers[i]
			continue
		}
		c.Peers, change = append(c.Peers, wgtypes.PeerConfig{PublicKey: p.PublicKey, Remove: true}), true
	}
	keepalive := want.Keepalive.Truncate(time.Second)
	p := wgtypes.PeerConfig{PublicKey: want.PeerPublicKey}
	differs := peer == nil
	if peer == nil {
		peer = &wgtypes.Peer{}
	} else {
		p.UpdateOnly = true
	}
	if peer.PresharedKey != k.preshared {
		p.PresharedKey, differs = &k.preshared, true
	}
	if peer.PersistentKeepaliveInterval != keepalive {
		p.PersistentKeepaliveInterval, differs = &keepalive, true
	}
	if !sameNets(peer.AllowedIPs, everything) {
		p.ReplaceAllowedIPs, p.AllowedIPs, differs = true, everything, true
	}
	if e := want.Endpoint; e.IsValid() && endpoint(peer.Endpoint) != e {
		silent := now.Sub(peer.LastHandshakeTime) > stale
		if former.IsValid() && former != e || silent {
			p.Endpoint, differs = net.UDPAddrFromAddrPort(e), true
		}
	}
	if differs {
		c.Peers, change = append(c.Peers, p), true
	}
	return c, change
}

func sameNets(a, b []net.IPNet) bool {
	if len(a) != len(b) {
		return false
	}
	for _, x := range a {
		found := false
		for _, y := range b {
			found = found || x.String() == y.String()
		}
		if !found {
			return false
		}
	}
	return true
}

func endpoint(a *net.UDPAddr) netip.AddrPort {
	if a == nil {
		return netip.AddrPort{}
	}
	e := a.AddrPort()
	return netip.AddrPortFrom(e.Addr().Unmap(), e.Port())
}

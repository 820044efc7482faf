package spec

import (
	"encoding/base64"
	"net/netip"
	"strconv"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/tunnel"
)

func (c *checker) wireguard(path string, w *isthmusv1.WireGuard) *tunnel.WireGuard {
	out := &tunnel.WireGuard{
		PrivateKey: c.secret(path+".privateKey", w.GetPrivateKey()),
		ListenPort: uint16(c.Number(path+".listenPort", w.GetListenPort(), 0, 1, 65535)),
	}
	if w.GetPresharedKey() != "" {
		out.PresharedKey = c.secret(path+".presharedKey", w.GetPresharedKey())
	}
	if text := w.GetPeerPublicKey(); text == "" {
		c.Missing(path+".peerPublicKey", "give the key that `wg pubkey` or `isthmus secret set --generate wireguard` printed on the other side")
	} else if key, err := base64.StdEncoding.DecodeString(text); err != nil || len(key) != 32 {
		c.Problem(path+".peerPublicKey", text, "is not a valid public key", "give 44 characters of base64, as `wg pubkey` prints")
	} else {
		copy(out.PeerPublicKey[:], key)
	}
	var keepalive time.Duration
	if text := w.GetEndpoint(); text != "" {
		ap, err := netip.ParseAddrPort(text)
		if err != nil || ap.Port() == 0 {
			c.Problem(path+".endpoint", text, "is not an address with a port", `write it as "203.0.113.7:51820"`)
		} else if _, ok := c.Address(path+".endpoint", ap.Addr().String()); ok {
			out.Endpoint, keepalive = ap, 25*time.Second
		}
	}
	out.Keepalive = c.duration(path+".keepalive", w.GetKeepalive(), keepalive, time.Second, 65535*time.Second)
	switch at, taken := c.ports[out.ListenPort]; {
	case w.GetListenPort() == 0:
		c.Missing(path+".listenPort", "give a UDP port of this node, such as 51820")
	case taken && out.ListenPort != 0:
		c.Problem(path+".listenPort", strconv.Itoa(int(out.ListenPort)), "is the port of "+at, "give each tunnel a port of its own")
	default:
		c.ports[out.ListenPort] = path
	}
	return out
}

package peer

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// WGKey is a WireGuard key pair in the base64 form of wg(8).
type WGKey struct{ Private, Public string }

// NewWGKey makes a key pair.
func NewWGKey() (WGKey, error) {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return WGKey{}, fmt.Errorf("making a WireGuard key: %w", err)
	}
	b := k.Bytes()
	b[0] &= 248 // as wg genkey does; X25519 does it again on use (RFC 7748 section 5)
	b[31] = b[31]&127 | 64
	enc := base64.StdEncoding.EncodeToString
	return WGKey{Private: enc(b), Public: enc(k.PublicKey().Bytes())}, nil
}

// WGDevice is one kernel WireGuard interface with one peer that may send and
// receive everything.
type WGDevice struct {
	Name     string
	Key      string // private
	Port     uint16
	Inside   netip.Prefix
	Peer     string // public key
	Endpoint netip.AddrPort
	// Mark is put on outer packets, if not 0.
	Mark uint32
	// Keepalive interval, none if 0.
	Keepalive time.Duration
}

// Add makes the interface in a node that is up.
func (d WGDevice) Add(ctx context.Context, n *lab.Node) error {
	fail := func(err error) error { return fmt.Errorf("adding WireGuard interface %s: %w", d.Name, err) }
	dir, err := n.Dir()
	if err != nil {
		return fail(err)
	}
	conf := filepath.Join(dir, d.Name+".wg")
	text := fmt.Sprintf("[Interface]\nPrivateKey = %s\nListenPort = %d\nFwMark = %d\n[Peer]\nPublicKey = %s\nEndpoint = %s\nAllowedIPs = 0.0.0.0/0, ::/0\nPersistentKeepalive = %d\n",
		d.Key, d.Port, d.Mark, d.Peer, d.Endpoint, int(d.Keepalive.Seconds()))
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return fail(err)
	}
	for _, cmd := range [][]string{
		{"ip", "link", "add", d.Name, "type", "wireguard"},
		{"wg", "setconf", d.Name, conf},
		{"ip", "addr", "add", d.Inside.String(), "dev", d.Name},
		{"ip", "link", "set", d.Name, "mtu", "1420", "up"},
	} {
		if _, err := n.ExecPeer(ctx, cmd...); err != nil {
			return fail(err)
		}
	}
	return nil
}

// Site is a private router with plain WireGuard and BIRD.
type Site struct {
	Name    string
	Node    *lab.Node
	Device  WGDevice
	BGP     BGPConfig
	Speaker *BIRD
}

// SiteConfig of a site.
type SiteConfig struct {
	ASN, RouterASN uint32
	Outside        netip.Addr
	Inside         netip.Prefix // of the site, with the length of the link's prefix
	Router         netip.Addr   // inside address of the router
	Endpoint       netip.AddrPort
	Port           uint16
	Key            WGKey
	RouterKey      string // public
	Announce       []netip.Prefix
	Hold           time.Duration
}

// NewSite adds the site's node.
func NewSite(l *lab.Lab, net *Internet, name string, c SiteConfig) *Site {
	s := &Site{Name: name, Node: l.Node(name),
		Device: WGDevice{Name: "wg0", Key: c.Key.Private, Port: c.Port, Inside: c.Inside, Peer: c.RouterKey, Endpoint: c.Endpoint, Mark: underlayMark},
		BGP: BGPConfig{ASN: c.ASN, RouterID: c.Outside, Announce: c.Announce,
			Neighbors: []Neighbor{{Name: "isthmus", Local: c.Inside.Addr(), Remote: c.Router, ASN: c.RouterASN, Hold: c.Hold}}},
	}
	net.Attach(s.Node, c.Outside)
	return s
}

// Start makes the WireGuard interface and starts BIRD. The lab must be up.
func (s *Site) Start(ctx context.Context) (err error) {
	if err = s.Device.Add(ctx, s.Node); err == nil {
		s.Speaker, err = StartBIRD(ctx, s.Node, s.BGP)
	}
	if err != nil {
		return fmt.Errorf("starting site %s: %w", s.Name, err)
	}
	return nil
}

// Established returns nil when the site's BGP session is established.
func (s *Site) Established(ctx context.Context) error {
	if err := Established(ctx, s.Speaker); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	return nil
}

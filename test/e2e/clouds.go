// Package e2e has whole scenarios: the topology of "Tunnels Between Clouds" with a node in the
// middle, and the checks of it.
package e2e

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
)

// Fixed facts of the topology. Outside addresses are from the documentation networks.
var (
	NodePrivate   = netip.MustParsePrefix("10.99.0.10/24") // of the uplink, IPsec and WireGuard
	EgressPrivate = netip.MustParsePrefix("10.99.0.11/24") // of the uplink, for SNAT
	// manages the node over the Internet
	Operator     = netip.MustParseAddr("198.51.100.1")
	NodePublic   = netip.MustParseAddr("198.51.100.20")
	EgressPublic = netip.MustParseAddr("198.51.100.21") // the one address that the partner sees
	PartnerAddr  = netip.MustParseAddr("192.0.2.80")

	VPC    = netip.MustParsePrefix("172.16.0.0/16")
	VNet   = netip.MustParsePrefix("192.168.0.0/16")
	Subnet = netip.MustParsePrefix("10.0.1.0/24")
	Office = netip.MustParsePrefix("172.20.0.0/24")
	// Inside are all sources that must never appear on the Internet.
	Inside = []netip.Prefix{VPC, VNet, Subnet, Office, netip.MustParsePrefix("169.254.0.0/16")}
)

const (
	NodeASN   = 64620
	AWSASN    = 65002
	AzureASN  = 65001
	GoogleASN = 65003
	SiteASN   = 65004

	// Uplink is the node's interface to the Internet.
	Uplink = "eth0"
	// SitePort is where the site's WireGuard listens, NodePort where the node's must.
	SitePort, NodePort = 51820, 51821
)

// SiteOutside is where the site's WireGuard listens.
var SiteOutside = netip.MustParseAddr("192.0.2.40")

// Spoke is a host behind a gateway.
type Spoke struct {
	Node *lab.Node
	Addr netip.Addr
}

// Clouds is the topology. Its node has an uplink behind 1:1 NAT and nothing else: the caller turns
// it into a router.
//
//	spokes - gateways - Internet - 1:1 NAT - node
//	                       |
//	                    partner
type Clouds struct {
	Lab                *lab.Lab
	Internet           *peer.Internet
	AWS, Azure, Google *peer.Gateway
	Site               *peer.Site
	Node, NAT          *lab.Node
	// Spokes in the order AWS, Azure, Google, site.
	Spokes []Spoke

	// SiteKey and NodeKey are the WireGuard keys; SiteInside and NodeInside
	// the addresses on that link.
	SiteKey, NodeKey       peer.WGKey
	SiteInside, NodeInside netip.Prefix

	partner *peer.Server
}

// CloudsOptions change the gateways. The zero value is the demo's topology.
type CloudsOptions struct {
	Lab lab.Options
	// Change, if not nil, may change a gateway's configuration ("aws", "azure",
	// "google") before it is built.
	Change func(name string, c *peer.Config)
}

// PSK makes a pre-shared key that every cloud accepts.
func PSK() string {
	var b [20]byte
	rand.Read(b[:])
	// every cloud accepts letters and digits, not beginning with a zero
	return "k" + base32.StdEncoding.EncodeToString(b[:])
}

// NewClouds builds the topology and starts the 1:1 NAT and the partner, but no gateway.
func NewClouds(ctx context.Context, o CloudsOptions) (c *Clouds, err error) {
	l, err := lab.New(o.Lab)
	if err != nil {
		return nil, fmt.Errorf("building the clouds: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("building the clouds: %w", errors.Join(err, l.Close()))
		}
	}()
	c = &Clouds{Lab: l, SiteInside: netip.MustParsePrefix("169.254.80.1/30"), NodeInside: netip.MustParsePrefix("169.254.80.2/30")}
	if c.SiteKey, err = peer.NewWGKey(); err != nil {
		return nil, err
	}
	if c.NodeKey, err = peer.NewWGKey(); err != nil {
		return nil, err
	}
	c.Internet = peer.NewInternet(l, "internet", netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("192.0.2.0/24"))

	hub := DefaultHub(l, c.Internet)
	c.NAT, c.Node = hub.NAT, hub.Node

	addr := netip.MustParseAddr
	config := func(name string, g peer.Config) peer.Config {
		g.Router, g.RouterASN = NodePublic, NodeASN
		if o.Change != nil {
			o.Change(name, &g)
		}
		return g
	}
	c.AWS = peer.NewAWS(l, c.Internet, "aws", config("aws", peer.Config{ASN: AWSASN, Announce: []netip.Prefix{VPC}, Peerings: []peer.Peering{
		{Outside: addr("203.0.113.11"), Inside: addr("169.254.64.1"), PeerInside: addr("169.254.64.2"), PSK: PSK()},
		{Outside: addr("203.0.113.12"), Inside: addr("169.254.64.5"), PeerInside: addr("169.254.64.6"), PSK: PSK()},
	}}))
	shared := PSK() // one per connection, and both instances are one connection
	c.Azure = peer.NewAzure(l, c.Internet, "azure", config("azure", peer.Config{ASN: AzureASN, Announce: []netip.Prefix{VNet}, Peerings: []peer.Peering{
		{Outside: addr("203.0.113.21"), Inside: addr("169.254.21.2"), PeerInside: addr("169.254.21.1"), PSK: shared},
		{Outside: addr("203.0.113.22"), Inside: addr("169.254.21.6"), PeerInside: addr("169.254.21.1"), PSK: shared},
	}}))
	c.Google = peer.NewGoogle(l, c.Internet, "google", config("google", peer.Config{ASN: GoogleASN, FRR: true, Announce: []netip.Prefix{Subnet}, Peerings: []peer.Peering{
		{Outside: addr("203.0.113.31"), Inside: addr("169.254.66.1"), PeerInside: addr("169.254.66.2"), PSK: PSK()},
		{Outside: addr("203.0.113.32"), Inside: addr("169.254.66.5"), PeerInside: addr("169.254.66.6"), PSK: PSK()},
	}}))
	c.Site = peer.NewSite(l, c.Internet, "site", peer.SiteConfig{ASN: SiteASN, RouterASN: NodeASN, Outside: SiteOutside,
		Inside: c.SiteInside, Router: c.NodeInside.Addr(), Endpoint: netip.AddrPortFrom(NodePublic, NodePort), Port: SitePort,
		Key: c.SiteKey, RouterKey: c.NodeKey.Public, Announce: []netip.Prefix{Office}, Hold: 30 * time.Second})

	// One host behind each gateway; Azure's has both instances on its network.
	spoke := func(name, host string, routers ...lab.End) {
		c.Spokes = append(c.Spokes, NewSpoke(l, name, netip.MustParsePrefix(host), routers...))
	}
	gateway := func(n *lab.Node, a string) lab.End {
		return lab.End{Node: n, Name: "lan", Addrs: []netip.Prefix{netip.MustParsePrefix(a)}}
	}
	spoke("aws-spoke", "172.16.1.10/24", gateway(c.AWS.Instances[0].Router, "172.16.1.1/24"))
	spoke("azure-spoke", "192.168.1.10/24", gateway(c.Azure.Instances[0].Router, "192.168.1.4/24"), gateway(c.Azure.Instances[1].Router, "192.168.1.5/24"))
	c.Azure.JoinVNet(addr("192.168.1.4"), addr("192.168.1.5"))
	spoke("google-spoke", "10.0.1.10/24", gateway(c.Google.Instances[0].Router, "10.0.1.1/24"))
	spoke("site-spoke", "172.20.0.10/24", gateway(c.Site.Node, "172.20.0.1/24"))

	partnerNode := l.Node("partner")
	c.Internet.Node.Port("br0", lab.End{Node: partnerNode, Name: "eth0", Addrs: []netip.Prefix{netip.PrefixFrom(PartnerAddr, 24)}})
	partnerNode.IP("route add default via 192.0.2.1")
	if err := l.Up(ctx); err != nil {
		return nil, err
	}
	if err := hub.Translate(ctx); err != nil {
		return nil, err
	}
	if c.partner, err = peer.StartServer(partnerNode, PartnerAddr); err != nil {
		return nil, err
	}
	return c, nil
}

// NewSpoke adds a host, and a bridge that connects it with the given interfaces of routers.
func NewSpoke(l *lab.Lab, name string, host netip.Prefix, routers ...lab.End) Spoke {
	n := l.Node(name)
	n.Bridge("lan", host)
	var via string
	for _, r := range routers {
		n.Port("lan", r)
		via += " nexthop via " + r.Addrs[0].Addr().String()
	}
	n.IP("route add default%s", via)
	return Spoke{n, host.Addr()}
}

// Hub is a node with only an uplink, and the 1:1 NAT in front of it.
type Hub struct {
	NAT, Node *lab.Node
	pairs     []lab.Pair
}

// first is the first host address of the /24 of an address.
func first(a netip.Addr) netip.Prefix {
	p, _ := a.Prefix(24)
	return netip.PrefixFrom(p.Addr().Next(), 24)
}

// NewNAT adds a 1:1 NAT without a node behind it. wan is an address of the NAT itself; Gateway is
// its other one. Translate must be called when the lab is up.
func NewNAT(l *lab.Lab, internet *peer.Internet, name string, wan netip.Addr, pairs ...lab.Pair) *Hub {
	h := &Hub{NAT: l.Node(name), pairs: pairs}
	internet.Attach(h.NAT, wan)
	// passes on all packets of the node, also those that it must not send
	h.NAT.IP("route add default via %s dev wan onlink", first(wan).Addr())
	for _, p := range pairs {
		internet.Node.IP("route add %s/32 via %s dev br0", p.Public, wan)
	}
	return h
}

// Gateway is the address that the NAT has toward the node: the first host address of the /24 of the
// private addresses.
func (h *Hub) Gateway() netip.Prefix { return first(h.pairs[0].Private) }

// NewHub adds a node with the private addresses of the pairs, and the 1:1 NAT.
func NewHub(l *lab.Lab, internet *peer.Internet, nat, node string, wan netip.Addr, pairs ...lab.Pair) *Hub {
	h := NewNAT(l, internet, nat, wan, pairs...)
	h.Node = l.Node(node)
	gateway := h.Gateway()
	var private []netip.Prefix
	for _, p := range pairs {
		private = append(private, netip.PrefixFrom(p.Private, 24))
	}
	l.Link(lab.End{Node: h.NAT, Name: "node", Addrs: []netip.Prefix{gateway}}, lab.End{Node: h.Node, Name: Uplink, Addrs: private})
	h.Node.IP("route add default via %s", gateway.Addr())
	return h
}

// DefaultHub is the hub of most topologies: nodes "nat" and "node", with NodePublic and
// EgressPublic.
func DefaultHub(l *lab.Lab, internet *peer.Internet) *Hub {
	return NewHub(l, internet, "nat", "node", netip.MustParseAddr("198.51.100.2"),
		lab.Pair{Private: NodePrivate.Addr(), Public: NodePublic}, lab.Pair{Private: EgressPrivate.Addr(), Public: EgressPublic})
}

// Translate starts the 1:1 NAT.
func (h *Hub) Translate(ctx context.Context) error { return h.NAT.OneToOne(ctx, "wan", h.pairs...) }

// Gateways are the three clouds' gateways.
func (c *Clouds) Gateways() []*peer.Gateway { return []*peer.Gateway{c.AWS, c.Azure, c.Google} }

// Start starts all gateways and the site at the same time.
func (c *Clouds) Start(ctx context.Context) error {
	var errs [4]error
	var wg sync.WaitGroup
	for i, g := range c.Gateways() {
		wg.Go(func() { errs[i] = g.Start(ctx) })
	}
	wg.Go(func() { errs[3] = c.Site.Start(ctx) })
	wg.Wait()
	return errors.Join(errs[:]...)
}

// Established returns nil when all BGP sessions of all peers are established, else an error that
// names the missing ones.
func (c *Clouds) Established(ctx context.Context) error {
	var errs []error
	for _, g := range c.Gateways() {
		errs = append(errs, g.Established(ctx))
	}
	return errors.Join(append(errs, c.Site.Established(ctx))...)
}

// Close removes everything.
func (c *Clouds) Close() error {
	if c.partner != nil {
		c.partner.Close()
	}
	return c.Lab.Close()
}

// Mesh is pings between every pair of spokes, in both directions.
type Mesh struct {
	names   []string
	pingers []*lab.Pinger
}

// PingMesh starts to ping between all spokes, 1/interval packets a second on each of the
// twelve ways.
func (c *Clouds) PingMesh(interval time.Duration) (*Mesh, error) {
	m := &Mesh{}
	for _, from := range c.Spokes {
		for _, to := range c.Spokes {
			if from == to {
				continue
			}
			p, err := from.Node.Ping(to.Addr, lab.PingOptions{Interval: interval})
			if err != nil {
				m.Stop()
				return nil, err
			}
			m.names, m.pingers = append(m.names, from.Node.Name+" to "+to.Node.Name), append(m.pingers, p)
		}
	}
	return m, nil
}

// Stop ends the pings and returns the reports by "A to B".
func (m *Mesh) Stop() map[string]lab.Report {
	reports := make([]lab.Report, len(m.pingers))
	var wg sync.WaitGroup
	for i, p := range m.pingers {
		wg.Go(func() { reports[i] = p.Stop() })
	}
	wg.Wait()
	r := map[string]lab.Report{}
	for i, name := range m.names {
		r[name] = reports[i]
	}
	return r
}

// AllReachable waits until every spoke answers every other, else the error names those that do not.
func (c *Clouds) AllReachable(ctx context.Context, limit time.Duration) error {
	return lab.Until(ctx, limit, func() error {
		m, err := c.PingMesh(100 * time.Millisecond)
		if err != nil {
			return err
		}
		time.Sleep(250 * time.Millisecond)
		var errs []error
		for name, r := range m.Stop() {
			if r.Lost > 0 {
				errs = append(errs, fmt.Errorf("%s: %v", name, r))
			}
		}
		return errors.Join(errs...)
	})
}

// PartnerSources are the source addresses of all requests so far.
func (c *Clouds) PartnerSources() []netip.Addr { return c.partner.Sources() }

// Ask sends one HTTP request from the spoke to the partner and returns the source address
// that the partner saw.
func (c *Clouds) Ask(ctx context.Context, s Spoke) (netip.Addr, error) {
	return peer.Ask(ctx, s.Node, PartnerAddr)
}

// Package native has one isthmusd with a tunnel to every cloud's look-alike, each cloud with both
// IKE and both BGP implementations, and checks the promises of each preset.
package native

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"

	"github.com/isthmus-net/isthmus/test/e2e"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
)

// cell is a gateway of the matrix, with the preset that the node has for it.
type cell struct {
	*peer.Gateway
	cloud string
	ipsec string     // optional fields in the document
	lan   netip.Addr // behind it
}

// matrix is the topology: gateways around the node, each with a network of its own behind it.
type matrix struct {
	lab      *lab.Lab
	internet *peer.Internet
	node     *lab.Node
	cells    []*cell
}

// many is how many prefixes one gateway announces: more than a virtual private gateway accepts.
const many = 150

// oursByVolume makes this node rekey by volume, before the gateway would.
const oursByVolume = "childRekeyBytes: 1048576"

var addr = netip.MustParseAddr

// newMatrix builds it. Byte lifetimes are small, so that tests reach them.
func newMatrix(ctx context.Context) (m *matrix, err error) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		return nil, fmt.Errorf("building the matrix: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("building the matrix: %w", errors.Join(err, l.Close()))
		}
	}()
	m = &matrix{lab: l}
	m.internet = peer.NewInternet(l, "internet", netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("198.51.100.0/24"))
	hub := e2e.DefaultHub(l, m.internet)
	m.node = hub.Node

	type maker func(*lab.Lab, *peer.Internet, string, peer.Config) *peer.Gateway
	add := func(cloud string, build maker, name string, c peer.Config) *cell {
		k := len(m.cells) + 1
		x := &cell{cloud: cloud, lan: netip.AddrFrom4([4]byte{10, byte(k), 0, 1})}
		c.Router, c.RouterASN = e2e.NodePublic, e2e.NodeASN
		c.Announce = append(c.Announce, netip.PrefixFrom(x.lan, 16).Masked())
		key := e2e.PSK()
		for i := range c.Peerings {
			p := &c.Peerings[i]
			p.Outside, p.PSK = netip.AddrFrom4([4]byte{203, 0, 113, byte(10*k + i)}), key
		}
		x.Gateway = build(l, m.internet, name, c)
		for _, i := range x.Instances {
			i.Router.IP("link add lan type dummy")
			i.Router.IP("addr add %s/32 dev lan", x.lan)
			i.Router.IP("link set lan up")
		}
		m.cells = append(m.cells, x)
		return x
	}
	pair := func(inside, router string) peer.Peering {
		return peer.Peering{Inside: addr(inside), PeerInside: addr(router)}
	}
	apipa := func(inside, router, subnet string) peer.Peering {
		p := pair(inside, router)
		p.Subnet = addr(subnet)
		return p
	}
	// The proposals of a gateway that is restricted to one combination, in the notation of both
	// implementations.
	const ike, esp = peer.AzureIKE, peer.AzureESP

	// A virtual private gateway with all options as they are by default.
	add("aws", peer.NewAWS, "aws", peer.Config{ASN: 64512, MaxPrefixes: 100,
		Peerings: []peer.Peering{pair("169.254.64.1", "169.254.64.2"), pair("169.254.64.5", "169.254.64.6")}})
	// A transit gateway, StartupAction=start, with options restricted.
	add("aws", peer.NewAWS, "aws-start", peer.Config{ASN: 64513, Start: "start", IKE: ike, ESP: esp, Libreswan: true, FRR: true,
		Peerings: []peer.Peering{pair("169.254.64.9", "169.254.64.10")}})
	azure := peer.Config{ASN: 65011, FRR: true, Alternate: true,
		Peerings: []peer.Peering{apipa("169.254.21.2", "169.254.21.1", "10.254.1.4"), apipa("169.254.21.6", "169.254.21.1", "10.254.1.5")}}
	azure.Life = peer.AzureLife
	azure.Life.ChildRekeyBytes, azure.Life.ChildExpireBytes = 1<<20, 3<<19
	add("azure", peer.NewAzure, "azure", azure)
	add("azure", peer.NewAzure, "azdefault", peer.Config{ASN: 65515, IKE: peer.AzureDefaultIKE, ESP: peer.AzureDefaultESP,
		Peerings: []peer.Peering{apipa("169.254.22.2", "169.254.22.1", "10.254.2.4")},
	}).ipsec = "ikeProposals: [aes256-sha256-modp1024], espProposals: [aes256gcm16]"
	add("azure-vwan", peer.NewAzure, "vwan", peer.Config{ASN: 65515, Libreswan: true, Alternate: true,
		Peerings: []peer.Peering{apipa("169.254.22.14", "169.254.22.13", "10.254.3.4"), apipa("169.254.22.18", "169.254.22.13", "10.254.3.5")},
	}).ipsec = oursByVolume
	add("gcp", peer.NewGoogle, "gcp", peer.Config{ASN: 64530, FRR: true, Peerings: []peer.Peering{pair("169.254.66.1", "169.254.66.2")}})
	add("gcp", peer.NewGoogle, "gcp2", peer.Config{ASN: 64531, IKE: ike, ESP: esp, Libreswan: true, Peerings: []peer.Peering{pair("169.254.66.5", "169.254.66.6")}})
	add("oci", peer.NewOracle, "oci", peer.Config{ASN: 31898, Libreswan: true, FRR: true, Peerings: []peer.Peering{pair("169.254.67.1", "169.254.67.2")}})
	flood := peer.Config{ASN: 14544, Peerings: []peer.Peering{pair("169.254.67.5", "169.254.67.6")}}
	for i := range many {
		flood.Announce = append(flood.Announce, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(i), 0}), 24))
	}
	add("oci", peer.NewOracle, "oci2", flood)
	if err := l.Up(ctx); err != nil {
		return nil, err
	}
	return m, hub.Translate(ctx)
}

// start starts all gateways, a few at a time: otherwise their waits may time out.
func (m *matrix) start(ctx context.Context) error {
	errs := make([]error, len(m.cells))
	var wg sync.WaitGroup
	places := make(chan struct{}, 3)
	for i, c := range m.cells {
		wg.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			errs[i] = c.Start(ctx)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// tunnel is one tunnel of the matrix, from both sides.
type tunnel struct {
	name     string // ours
	cell     *cell
	instance *peer.Instance
	theirs   string
	peering  peer.Peering
}

func (m *matrix) tunnels() (out []tunnel) {
	for _, c := range m.cells {
		k := 0
		for _, i := range c.Instances {
			for _, t := range i.Tunnels {
				out = append(out, tunnel{fmt.Sprintf("%s-%d", c.Name, k), c, i, t.Name, c.Config.Peerings[k]})
				k++
			}
		}
	}
	return out
}

// document is the node's, with required fields only.
func (m *matrix) document() string {
	var tunnels, peers strings.Builder
	for _, t := range m.tunnels() {
		inside := fmt.Sprintf("{local: %s/30}", t.peering.PeerInside)
		if strings.HasPrefix(t.cell.cloud, "azure") {
			inside = fmt.Sprintf("{local: %s/32, remote: %s}", t.peering.PeerInside, t.peering.Inside)
		}
		more := ""
		if t.cell.ipsec != "" {
			more = ", " + t.cell.ipsec
		}
		fmt.Fprintf(&tunnels, "- {name: %s, cloud: %s, inside: [%s], ipsec: {remoteAddress: %s, psk: %s%s}}\n",
			t.name, t.cell.cloud, inside, t.peering.Outside, t.cell.Name, more)
		fmt.Fprintf(&peers, "- {name: %s, tunnel: %s, asn: %d, import: {allow: [{prefix: 10.0.0.0/8, le: 24}]}, export: {allow: [{prefix: 10.0.0.0/8, le: 24}]}}\n",
			t.name, t.name, t.cell.Config.ASN)
	}
	return fmt.Sprintf("node: {name: hub-1, asn: %d}\nunderlay: {interface: %s, address: %s, publicAddress: %s}\ntunnels:\n%speers:\n%s",
		e2e.NodeASN, e2e.Uplink, e2e.NodePrivate.Addr(), e2e.NodePublic, tunnels.String(), peers.String())
}

// Package rendered reads back what isthmus topology render writes for a cloud, as the cloud would:
// commands in a shell script, or Terraform. It is strict: an argument that the cloud's tool does
// not have, or one that is missing, is an error. The result is enough to configure a gateway that
// behaves as the cloud's.
package rendered

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Gateway is a VPN gateway as a cloud's side configures it.
type Gateway struct {
	Cloud string // "aws", "azure" or "gcp"
	Name  string // with underscores for hyphens
	ASN   uint32
	// Tunnels are all that the gateway attempts or answers: for Azure each connection from both
	// instances.
	Tunnels []Tunnel
}

// Tunnel is one tunnel, seen from the gateway.
type Tunnel struct {
	// of the cloud's object, with underscores for hyphens; for Azure both instances have the
	// connection's
	Name string
	// Azure's instance, Google's interface, or AWS's tunnel of the connection, from 0
	Instance int
	// Outside is the name of the gateway's own outside address, PeerOutside the peer's address, or
	// its name when the address is unknown.
	Outside, PeerOutside string
	// Inside is the gateway's inside address, PeerInside that of the peer, which are also the BGP
	// addresses.
	Inside     netip.Prefix
	PeerInside netip.Addr
	// PSK names the pre-shared key: an environment variable, or a variable of Terraform in lower
	// case.
	PSK      string
	PeerASN  uint32
	IKE, ESP string // proposals in strongSwan's notation
	Start    bool   // the gateway opens the tunnel
}

// Parse reads one cloud's side: form is "cli" or "terraform".
func Parse(form, text string) ([]Gateway, error) {
	var o objects
	var err error
	if form == "terraform" {
		o, err = readTerraform(text)
	} else {
		o, err = readShell(text)
	}
	if err != nil {
		return nil, err
	}
	return o.gateways()
}

// objects are the objects of the clouds, by the names that refer to them.
type objects struct {
	outside map[string]string // place of an own outside address -> its name

	awsGateways  map[string]awsGateway
	customers    map[string]peer
	connections  []awsConnection
	azure        map[string]azureGateway
	locals       map[string]peer
	azureTunnels []azureConnection
	routers      map[string]uint32 // of Google
	externals    map[string][]string
	gcpTunnels   []gcpTunnel
	interfaces   map[string]netip.Prefix // by tunnel
	peers        map[string]peer         // by interface
}

func newObjects() objects {
	return objects{
		outside: map[string]string{}, awsGateways: map[string]awsGateway{}, customers: map[string]peer{}, azure: map[string]azureGateway{}, locals: map[string]peer{},
		routers: map[string]uint32{}, externals: map[string][]string{}, interfaces: map[string]netip.Prefix{}, peers: map[string]peer{},
	}
}

type awsGateway struct {
	name string
	asn  uint32
}

// peer is a cloud's configuration of the other side.
type peer struct {
	outside string
	asn     uint32
	inside  netip.Addr
}

type awsConnection struct {
	name, gateway, customer string
	tunnels                 [2]awsTunnel
}

type awsTunnel struct {
	cidr                netip.Prefix
	psk, ike, esp       string
	start               bool
	outsideAt           string // key of objects.outside
	versions, dpdAction string
}

type azureGateway struct {
	asn    uint32
	custom [2][]netip.Addr
}

type azureConnection struct {
	name, gateway, local, psk, ike, esp string
	custom                              [2]netip.Addr
}

type gcpTunnel struct {
	name, gateway, external, router, psk, ike, esp string
	number, peer                                   int
}

// gateways combines the objects.
func (o objects) gateways() ([]Gateway, error) {
	all := map[string]*Gateway{}
	get := func(cloud, name string, asn uint32) *Gateway {
		name = underscores(name)
		if all[name] == nil {
			all[name] = &Gateway{Cloud: cloud, Name: name, ASN: asn}
		}
		return all[name]
	}
	for _, c := range o.connections {
		g, ok := o.awsGateways[c.gateway]
		p, known := o.customers[c.customer]
		if !ok || !known {
			return nil, fmt.Errorf("connection %s: no gateway %q or customer gateway %q", c.name, c.gateway, c.customer)
		}
		for i, t := range c.tunnels {
			// AWS has the first host address of the /30, its customer the second.
			first := t.cidr.Addr().Next()
			out := Tunnel{
				Name: underscores(c.name), Instance: i, Outside: o.outside[t.outsideAt], PeerOutside: p.outside,
				Inside: netip.PrefixFrom(first, t.cidr.Bits()), PeerInside: first.Next(),
				PSK: t.psk, PeerASN: p.asn, IKE: t.ike, ESP: t.esp, Start: t.start,
			}
			if t.cidr != t.cidr.Masked() || t.cidr.Bits() != 30 || t.versions != "ikev2" || t.dpdAction != "restart" {
				return nil, fmt.Errorf("connection %s: tunnel %d: bad cidr %s, versions %q or DPD action %q", c.name, i, t.cidr, t.versions, t.dpdAction)
			}
			gateway := get("aws", g.name, g.asn)
			gateway.Tunnels = append(gateway.Tunnels, out)
		}
	}
	for _, c := range o.azureTunnels {
		g, ok := o.azure[c.gateway]
		p, known := o.locals[c.local]
		if !ok || !known {
			return nil, fmt.Errorf("connection %s: no gateway %q or local network gateway %q", c.name, c.gateway, c.local)
		}
		for i := range 2 {
			if !slices.Contains(g.custom[i], c.custom[i]) {
				return nil, fmt.Errorf("connection %s: instance %d has no BGP address %s", c.name, i, c.custom[i])
			}
			gateway := get("azure", c.gateway, g.asn)
			gateway.Tunnels = append(gateway.Tunnels, Tunnel{
				Name: underscores(c.name), Instance: i, Outside: o.outside[underscores(c.gateway)+" "+strconv.Itoa(i)], PeerOutside: p.outside,
				Inside: netip.PrefixFrom(c.custom[i], 32), PeerInside: p.inside, PSK: c.psk, PeerASN: p.asn, IKE: c.ike, ESP: c.esp, Start: true,
			})
		}
	}
	for _, t := range o.gcpTunnels {
		asn, ok := o.routers[t.router]
		inside, has := o.interfaces[t.name]
		p, known := o.peers[t.name]
		external := o.externals[t.external]
		if !ok || !has || !known || t.peer >= len(external) {
			return nil, fmt.Errorf("tunnel %s: no router %q, interface, BGP peer or external gateway %q", t.name, t.router, t.external)
		}
		gateway := get("gcp", t.gateway, asn)
		gateway.Tunnels = append(gateway.Tunnels, Tunnel{
			Name: underscores(t.name), Instance: t.number, Outside: o.outside[underscores(t.gateway)+" "+strconv.Itoa(t.number)], PeerOutside: external[t.peer],
			Inside: inside, PeerInside: p.inside, PSK: t.psk, PeerASN: p.asn, IKE: t.ike, ESP: t.esp, Start: true,
		})
	}
	var out []Gateway
	for _, g := range all {
		for _, t := range g.Tunnels {
			if t.Outside == "" || t.PSK == "" || t.PeerOutside == "" || !t.PeerInside.IsValid() || t.PeerASN == 0 || g.ASN == 0 {
				return nil, fmt.Errorf("gateway %s: incomplete tunnel %+v", g.Name, t)
			}
		}
		out = append(out, *g)
	}
	slices.SortFunc(out, func(a, b Gateway) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

func underscores(name string) string { return strings.ReplaceAll(name, "-", "_") }

// words are the clouds' names of algorithms in strongSwan's notation, each with its source.
var words = map[string]string{
	// EC2 API model, Phase1EncryptionAlgorithms and so on.
	"AES256-GCM-16": "aes256gcm16", "SHA2-384": "sha384", "20": "ecp384",
	// Azure, "About cryptographic requirements and Azure VPN gateways"; the integrity of GCM is the
	// cipher's own.
	"GCMAES256": "aes256gcm16", "SHA384": "sha384", "ECP384": "ecp384",
	// Google, "Supported IKE ciphers".
	"AES-GCM-16-256": "aes256gcm16", "PRF-HMAC-SHA2-384": "sha384", "Group-20": "ecp384",
}

// proposal makes a proposal of a cipher, an integrity algorithm or pseudo-random function that IKE
// uses with it, and a group.
func proposal(cipher, prf, group string) (string, error) {
	var out []string
	for i, w := range []string{cipher, prf, group} {
		if w == "" && i == 1 {
			continue
		}
		known, ok := words[w]
		if !ok {
			return "", fmt.Errorf("%q is not an algorithm that is known here", w)
		}
		if i == 1 {
			known = "prf" + known
		}
		out = append(out, known)
	}
	return strings.Join(out, "-"), nil
}

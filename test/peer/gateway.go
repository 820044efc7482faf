package peer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// Internet is a node with a bridge to which every outside address is attached. It routes between
// the networks whose first address it has on the bridge.
type Internet struct {
	Node     *lab.Node
	networks []netip.Prefix
}

const (
	internetBridge = "br0"
	underlayTable  = 100 // default route to the Internet
	underlayMark   = 100 // of WireGuard's outer packets
)

// NewInternet adds the node. Each network's first host address becomes its gateway.
func NewInternet(l *lab.Lab, name string, networks ...netip.Prefix) *Internet {
	i := &Internet{Node: l.Node(name), networks: networks}
	var gateways []netip.Prefix
	for _, p := range networks {
		gateways = append(gateways, netip.PrefixFrom(p.Masked().Addr().Next(), p.Bits()))
	}
	i.Node.Bridge(internetBridge, gateways...)
	return i
}

// Attach gives the node an interface "wan" with outside addresses. Its main table has no route to
// the Internet: only packets from an outside address, and those with the underlay's mark, go there.
// So BGP's routes for the Internet apply to everything else.
func (i *Internet) Attach(n *lab.Node, addrs ...netip.Addr) {
	var own []netip.Prefix
	for _, a := range addrs {
		own = append(own, netip.PrefixFrom(a, a.BitLen()))
	}
	i.Node.Port(internetBridge, lab.End{Node: n, Name: "wan", Addrs: own})
	n.IP("route add default via %s dev wan onlink table %d", i.gateway(addrs[0]), underlayTable)
	n.IP("rule add fwmark %d lookup %d", underlayMark, underlayTable)
	for _, a := range addrs {
		n.IP("rule add from %s lookup %d", a, underlayTable)
	}
}

func (i *Internet) gateway(a netip.Addr) netip.Addr {
	for _, p := range i.networks {
		if p.Contains(a) {
			return p.Masked().Addr().Next()
		}
	}
	panic(fmt.Sprintf("address %s is in no network of the Internet", a))
}

// Peering is one tunnel between a gateway and a router, seen from the gateway. The value in
// parentheses applies where a field is zero.
type Peering struct {
	// Name of the tunnel, and of its session in BIRD (its index).
	Name string
	// Outside is the gateway's public address. Tunnels of one Azure instance, or of one of Google's
	// interfaces, share it.
	Outside netip.Addr
	// PeerOutside is the other end's public address and IKE identity, PeerASN its ASN (Config's
	// Router and RouterASN).
	PeerOutside netip.Addr
	PeerASN     uint32
	// IKE, ESP and Start are those of the Tunnel (Config's).
	IKE, ESP, Start string
	// Inside and PeerInside are the two BGP addresses.
	Inside, PeerInside netip.Addr
	PSK                string
	// Subnet is an Azure instance's private address, from which it opens BGP sessions too, if
	// valid.
	Subnet netip.Addr
}

// Config of a gateway. NewAWS and the like fill zero fields with the values of that cloud.
type Config struct {
	ASN uint32
	// Router is the public address of the router, which is also its IKE identity; RouterASN its
	// ASN.
	Router    netip.Addr
	RouterASN uint32
	// Announce are the prefixes behind the gateway.
	Announce []netip.Prefix
	Peerings []Peering
	// IKE, ESP, Start, Life, DPD and MTU are those of each Tunnel.
	IKE, ESP, Start string
	Life            Life
	DPD             time.Duration
	MTU             int
	// Hold is the BGP hold time.
	Hold time.Duration
	// MaxPrefixes is the number of prefixes above which the gateway ends the session.
	MaxPrefixes int
	// MED of announced routes, none if 0.
	MED uint32
	// Libreswan does IKE instead of strongSwan, where an instance has one tunnel, and FRR BGP
	// instead of BIRD. Alternate has every second instance use the others.
	Libreswan, FRR, Alternate bool
	// Userland has strongSwan do ESP itself: for a kernel that has no ESP, a gateway of AWS or
	// Oracle, and one tunnel.
	Userland bool
}

// Gateway is a cloud's VPN gateway.
type Gateway struct {
	Name      string
	Config    Config
	Instances []*Instance
}

// Instance is one machine of a gateway.
type Instance struct {
	// Node has the tunnels. Router terminates BGP and leads to the spokes; it is the same node
	// except for Google.
	Node, Router *lab.Node
	Tunnels      []Tunnel
	// BGP has a neighbour for each tunnel, in the same order, before all others.
	BGP BGPConfig
	// CharonOptions and, after Start, the running daemons.
	CharonOptions CharonOptions
	IKE           IKE
	Speaker       Speaker

	libreswan, frr bool
	silent         bool         // toward strangers
	inside         netip.Prefix // of the TUN device, with CharonOptions.Userland
}

// AWSIKE and AWSESP are the proposals that an AWS tunnel accepts without restrictions, except the
// Diffie-Hellman groups 22 to 24, which strongSwan 6 has dropped.
const (
	awsGroups = "modp1024-modp2048-modp3072-modp4096-modp6144-modp8192-ecp256-ecp384-ecp521"

	AWSIKE = "aes128gcm16-aes256gcm16-prfsha1-prfsha256-prfsha384-prfsha512-" + awsGroups +
		",aes128-aes256-sha1-sha256-sha384-sha512-" + awsGroups
	AWSESP = "aes128gcm16-aes256gcm16-modp1536-" + awsGroups + ",aes128-aes256-sha1-sha256-sha384-sha512-modp1536-" + awsGroups
)

// Azure's default policies offer nothing better than modp1024, so connections to other routers have
// a custom policy, which is exactly one combination: this one.
const (
	AzureIKE = "aes256gcm16-prfsha384-ecp384"
	AzureESP = "aes256gcm16-ecp384"

	AzureDefaultIKE = "aes256-sha1-modp1024,aes256-sha256-modp1024,aes128-sha1-modp1024,aes128-sha256-modp1024"
	AzureDefaultESP = "aes256gcm16,aes256-sha1,aes256-sha256,aes128-sha1"
)

// AzureLife are Azure's lifetimes, by time and by volume.
var AzureLife = Life{IKERekey: 27000 * time.Second, IKEExpire: 28800 * time.Second, ChildRekey: 25000 * time.Second, ChildExpire: 27000 * time.Second,
	Fuzz: 600 * time.Second, ChildRekeyBytes: 92_160_000 << 10, ChildExpireBytes: 102_400_000 << 10}

// Oracle's recommended custom parameters.
const (
	OracleIKE = "aes256-sha384-ecp384"
	OracleESP = "aes256gcm16-ecp384"
)

// Google's proposals in the order of its table, by which it also selects.
const (
	GoogleIKE = "aes128gcm16-aes192gcm16-aes256gcm16-prfsha1-prfsha256-prfsha384-prfsha512-modp2048-modp1536-modp3072-modp4096-modp8192-modp1024-ecp256-ecp384-ecp521-curve25519," +
		"aes128-aes192-aes256-sha256-sha384-sha512-sha1-modp2048-modp1536-modp3072-modp4096-modp8192-modp1024-ecp256-ecp384-ecp521-curve25519"
	GoogleESP = "aes128gcm16-aes256gcm16-aes192gcm16-modp2048-modp1536-modp3072-modp4096-modp8192-modp1024-ecp256-ecp384-ecp521-curve25519," +
		"aes128-aes256-aes192-sha256-sha512-sha1-modp2048-modp1536-modp3072-modp4096-modp8192-modp1024-ecp256-ecp384-ecp521-curve25519"
)

func orElse[T comparable](v *T, value T) {
	var zero T
	if *v == zero {
		*v = value
	}
}

func (c Config) tunnel(name string, ifID uint32, p Peering) Tunnel {
	return Tunnel{Name: cmp.Or(p.Name, name), Local: p.Outside, Remote: cmp.Or(p.PeerOutside, c.Router), PSK: p.PSK, IfID: ifID,
		IKE: cmp.Or(p.IKE, c.IKE), ESP: cmp.Or(p.ESP, c.ESP), Start: cmp.Or(p.Start, c.Start), Life: c.Life, DPD: c.DPD, MTU: c.MTU}
}

func (c Config) neighbor(name string, p Peering) Neighbor {
	return Neighbor{Name: name, Local: p.Inside, Remote: p.PeerInside, ASN: cmp.Or(p.PeerASN, c.RouterASN), Hold: c.Hold, MaxPrefixes: c.MaxPrefixes, MED: c.MED}
}

// NewAWS adds a transit gateway's VPN connection: one node with one outside address per tunnel,
// /30 inside, the router must initiate, hold time 30 s.
func NewAWS(l *lab.Lab, internet *Internet, name string, c Config) *Gateway {
	orElse(&c.MaxPrefixes, 1000)
	orElse(&c.MED, 100)
	orElse(&c.IKE, AWSIKE)
	orElse(&c.ESP, AWSESP)
	orElse(&c.Start, "none")
	orElse(&c.Life, Life{IKERekey: 28530 * time.Second, IKEExpire: 28800 * time.Second, ChildRekey: 3330 * time.Second, ChildExpire: 3600 * time.Second,
		Fuzz: 270 * time.Second, ReplayWindow: 1024})
	orElse(&c.DPD, 10*time.Second)
	orElse(&c.MTU, 1438)
	orElse(&c.Hold, 30*time.Second)
	g := newRouterGateway(l, internet, name, c)
	g.Instances[0].silent = true
	return g
}

// NewOracle adds an OCI Site-to-Site VPN connection: as AWS's, but the gateway initiates too. Hold
// time 180 s.
func NewOracle(l *lab.Lab, internet *Internet, name string, c Config) *Gateway {
	orElse(&c.IKE, OracleIKE)
	orElse(&c.ESP, OracleESP)
	orElse(&c.Start, "start")
	orElse(&c.Life, Life{IKERekey: 28530 * time.Second, IKEExpire: 28800 * time.Second, ChildRekey: 3330 * time.Second, ChildExpire: 3600 * time.Second, Fuzz: 270 * time.Second})
	orElse(&c.DPD, 10*time.Second)
	orElse(&c.MTU, 1420)
	orElse(&c.Hold, 180*time.Second)
	return newRouterGateway(l, internet, name, c)
}

// newRouterGateway adds a gateway that is one node with one outside address per tunnel and a /30 in
// each.
func newRouterGateway(l *lab.Lab, internet *Internet, name string, c Config) *Gateway {
	if c.Userland && len(c.Peerings) != 1 {
		panic("a gateway that does ESP itself has one tunnel: it has one device for all of them")
	}
	n := l.Node(name)
	// DPD gives up 30 s after the last answer: 2.5 s, then 1.8 times longer each.
	i := &Instance{Node: n, Router: n, libreswan: c.Libreswan, frr: c.FRR, CharonOptions: CharonOptions{Lines: []string{"retransmit_timeout = 2.5", "retransmit_tries = 3"}}}
	i.CharonOptions.Userland = c.Userland
	var outside []netip.Addr
	for k, p := range c.Peerings {
		outside = append(outside, p.Outside)
		t := c.tunnel(fmt.Sprintf("tunnel%d", k+1), uint32(k+1), p)
		if c.Userland {
			t.IfID, i.inside = 0, netip.PrefixFrom(p.Inside, 30)
		} else {
			t.Interface(n, netip.PrefixFrom(p.Inside, 30))
		}
		i.Tunnels = append(i.Tunnels, t)
		i.BGP.Neighbors = append(i.BGP.Neighbors, c.neighbor(t.Name, p))
	}
	internet.Attach(n, outside...)
	i.BGP.ASN, i.BGP.RouterID, i.BGP.Announce, i.BGP.Multipath = c.ASN, outside[0], c.Announce, true
	return &Gateway{Name: name, Config: c, Instances: []*Instance{i}}
}

// NewAzure adds an active-active VPN gateway: one node, an instance, for each public address of the
// peerings. A BGP address is an APIPA /32 on the instance, the router's is reached through the
// tunnel by a host route, and the router must open the session. Hold time 180 s. Each instance
// passes its learnt routes to the other over the VNet, see JoinVNet.
func NewAzure(l *lab.Lab, internet *Internet, name string, c Config) *Gateway {
	orElse(&c.IKE, AzureIKE)
	orElse(&c.ESP, AzureESP)
	orElse(&c.Start, "start")
	orElse(&c.Life, AzureLife)
	orElse(&c.DPD, 15*time.Second)
	orElse(&c.MTU, 1400)
	orElse(&c.Hold, 180*time.Second)
	orElse(&c.MaxPrefixes, 4000)
	g := &Gateway{Name: name, Config: c}
	instances := map[netip.Addr]*Instance{}
	for _, p := range c.Peerings {
		i := instances[p.Outside]
		if i == nil {
			k := len(g.Instances)
			n := l.Node(fmt.Sprintf("%s%d", name, k))
			other := c.Alternate && k%2 == 1
			i = &Instance{Node: n, Router: n, libreswan: c.Libreswan != other, frr: c.FRR != other,
				BGP: BGPConfig{ASN: c.ASN, RouterID: p.Outside, Announce: c.Announce, Multipath: true}}
			n.IP("link add bgp type dummy")
			n.IP("link set bgp up")
			internet.Attach(n, p.Outside)
			instances[p.Outside], g.Instances = i, append(g.Instances, i)
		}
		t := c.tunnel("tunnel", uint32(len(i.Tunnels)+1), p)
		t.Interface(i.Node)
		// a connection that never answers has the address of another one
		i.Node.IP("addr replace %s/32 dev bgp", p.Inside)
		if p.Subnet.IsValid() {
			i.Node.IP("addr replace %s/32 dev bgp", p.Subnet)
		}
		i.Node.IP("route add %s/32 dev %s src %s", p.PeerInside, t.Device(), p.Inside)
		nb := c.neighbor(t.Name, p)
		nb.Passive, nb.Multihop, nb.Device = true, true, t.Device()
		i.Tunnels, i.BGP.Neighbors = append(i.Tunnels, t), append(i.BGP.Neighbors, nb)
	}
	return g
}

// JoinVNet makes the instances of an Azure gateway, whose addresses on the VNet are given in order,
// exchange their learnt routes.
func (g *Gateway) JoinVNet(addrs ...netip.Addr) {
	for a, i := range g.Instances {
		for b := range g.Instances {
			if a != b {
				i.BGP.Neighbors = append(i.BGP.Neighbors, Neighbor{Name: fmt.Sprintf("instance%d", b), Local: addrs[a], Remote: addrs[b], ASN: g.Config.ASN, Transit: true})
			}
		}
	}
}

// NewGoogle adds an HA VPN gateway, which does IPsec and nothing else, with the peerings' outside
// addresses, and behind it a Cloud Router, which has the inside addresses. Either side may
// initiate; this one does on traffic. Hold time 60 s.
//
// Between the two nodes is one veth per tunnel, and the gateway connects each to its tunnel for any
// destination, without decrementing the TTL of packets to link-local addresses: BGP ends one hop
// behind the tunnel and is still single-hop. Unlike in the real one, the spokes' packets take the
// same way.
func NewGoogle(l *lab.Lab, internet *Internet, name string, c Config) *Gateway {
	orElse(&c.IKE, GoogleIKE)
	orElse(&c.ESP, GoogleESP)
	orElse(&c.Start, "trap")
	orElse(&c.Life, Life{IKERekey: 34000 * time.Second, IKEExpire: 36000 * time.Second, ChildRekey: 9800 * time.Second, ChildExpire: 10800 * time.Second, Fuzz: 600 * time.Second})
	orElse(&c.DPD, 20*time.Second)
	orElse(&c.MTU, 1398)
	orElse(&c.Hold, 60*time.Second)
	orElse(&c.MaxPrefixes, 5000)
	orElse(&c.MED, 100)
	gw, cr := l.Node(name+"-gw"), l.Node(name+"-cr")
	i := &Instance{Node: gw, Router: cr, libreswan: c.Libreswan, frr: c.FRR, silent: true}
	var outside []netip.Addr
	for k, p := range c.Peerings {
		if !slices.Contains(outside, p.Outside) {
			outside = append(outside, p.Outside)
		}
		t := c.tunnel(fmt.Sprintf("tunnel%d", k), uint32(k+1), p)
		t.Interface(gw)
		veth, device := fmt.Sprintf("router%d", k), fmt.Sprintf("tunnel%d", k)
		l.Link(lab.End{Node: cr, Name: device, Addrs: []netip.Prefix{netip.PrefixFrom(p.Inside, 30)}}, lab.End{Node: gw, Name: veth})
		cr.IP("link set %s mtu %d", device, c.MTU)
		out, in := 1000+2*k, 1001+2*k // routing tables
		gw.IP("rule add iif %s lookup %d", veth, out)
		gw.IP("route add default dev %s table %d", t.Device(), out)
		gw.IP("rule add iif %s lookup %d", t.Device(), in)
		gw.IP("route add default via %s dev %s onlink table %d", p.Inside, veth, in)
		i.Tunnels = append(i.Tunnels, t)
		i.BGP.Neighbors = append(i.BGP.Neighbors, c.neighbor(t.Name, p))
	}
	internet.Attach(gw, outside...)
	i.BGP.ASN, i.BGP.RouterID, i.BGP.Announce, i.BGP.Multipath = c.ASN, c.Peerings[0].Inside, c.Announce, true
	return &Gateway{Name: name, Config: c, Instances: []*Instance{i}}
}

// Start starts the daemons of all instances at the same time and loads the tunnels. The lab
// must be up.
func (g *Gateway) Start(ctx context.Context) error {
	errs := make([]error, 2*len(g.Instances))
	var wg sync.WaitGroup
	for k, i := range g.Instances {
		wg.Go(func() { errs[2*k] = i.startIPsec(ctx) })
		wg.Go(func() { errs[2*k+1] = i.startBGP(ctx) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("starting gateway %s: %w", g.Name, err)
	}
	return nil
}

func (i *Instance) startIPsec(ctx context.Context) (err error) {
	if i.Node != i.Router {
		for k := range i.Tunnels {
			// answers ARP for all addresses behind the tunnel
			if err := i.Node.Sysctl(fmt.Sprintf("ipv4/conf/router%d/proxy_arp", k), "1"); err != nil {
				return err
			}
		}
		if _, err := i.Node.ExecInput(ctx, googleRules, "nft", "-f", "-"); err != nil {
			return err
		}
	}
	if i.silent {
		if err := i.ignoreStrangers(ctx); err != nil {
			return err
		}
	}
	return i.startIKE(ctx)
}

// ignoreStrangers has a gateway answer, at the outside address of a tunnel, only the other end of
// that tunnel. strongSwan alone would send an error to a stranger, which would then give up.
func (i *Instance) ignoreStrangers(ctx context.Context) error {
	var known []string
	for _, t := range i.Tunnels {
		known = append(known, fmt.Sprintf("%s . %s", t.Remote, t.Local))
	}
	rules := fmt.Sprintf(`table ip strangers {
	counter ike { }
	chain in { type filter hook prerouting priority raw; udp dport { 500, 4500 } ip saddr . ip daddr != { %s } counter name ike drop; }
}`, strings.Join(known, ", "))
	_, err := i.Node.ExecInput(ctx, rules, "nft", "-f", "-")
	return err
}

func (i *Instance) startIKE(ctx context.Context) (err error) {
	if i.libreswan {
		i.IKE, err = StartPluto(ctx, i.Node)
	} else {
		i.IKE, err = StartCharon(ctx, i.Node, i.CharonOptions)
	}
	if err != nil {
		return err
	}
	if i.CharonOptions.Userland {
		// charon has made the device.
		for _, line := range []string{"addr add " + i.inside.String() + " dev " + UserlandDevice, fmt.Sprintf("link set %s mtu %d up", UserlandDevice, i.Tunnels[0].MTU)} {
			if _, err := i.Node.Exec(ctx, append([]string{"ip"}, strings.Fields(line)...)...); err != nil {
				return err
			}
		}
	}
	return i.IKE.Load(ctx, i.Tunnels...)
}

// The first rule keeps BGP single-hop, see NewGoogle. The others drop the first fragment of an IKE
// message, which has its ports and, on port 4500, the non-ESP marker (RFC 3948 section 2.2); they
// come before the kernel reassembles fragments.
const googleRules = `table ip google {
	counter ike { }
	chain ttl { type filter hook prerouting priority mangle; ip daddr 169.254.0.0/16 ip ttl < 255 ip ttl set 64; }
	chain fragments {
		type filter hook prerouting priority -450;
		ip frag-off & 0x3fff == 0x2000 udp dport 500 counter name ike drop
		ip frag-off & 0x3fff == 0x2000 udp dport 4500 @th,64,32 0 counter name ike drop
	}
}`

// FragmentsDropped is how many fragmented IKE messages a Google gateway has dropped.
func (g *Gateway) FragmentsDropped(ctx context.Context) (int, error) { return g.dropped(ctx, "google") }

// StrangersDropped is how many packets to the IKE ports AWS's or Google's gateway has dropped
// because they were not from the other end of a tunnel.
func (g *Gateway) StrangersDropped(ctx context.Context) (int, error) {
	return g.dropped(ctx, "strangers")
}

func (g *Gateway) dropped(ctx context.Context, table string) (n int, err error) {
	out, err := g.Instances[0].Node.Exec(ctx, "nft", "list", "counter", "ip", table, "ike")
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(out, "packets ")
	if _, err := fmt.Sscan(after, &n); err != nil {
		return 0, fmt.Errorf("reading nft's counter: %w", err)
	}
	return n, nil
}

// Stray opens a TCP connection for BGP to the router from the private address of an Azure instance,
// as it does all the time, and returns why there is none.
func (g *Gateway) Stray(instance int, limit time.Duration) error {
	i := g.Instances[instance]
	p := g.Config.Peerings[slices.IndexFunc(g.Config.Peerings, func(p Peering) bool { return p.Outside == i.Tunnels[0].Local })]
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: p.Subnet.AsSlice()}, Timeout: limit}
	return i.Node.Do(func() error {
		c, err := d.Dial("tcp", netip.AddrPortFrom(p.PeerInside, 179).String())
		if err == nil {
			c.Close()
		}
		return err
	})
}

// Restart lets the instance's IKE daemon crash and start without state.
func (i *Instance) Restart(ctx context.Context) error {
	if err := i.IKE.Kill(ctx); err != nil {
		return fmt.Errorf("restarting %s: %w", i.Node.Name, err)
	}
	return i.startIKE(ctx)
}

// Replace replaces the endpoint of the tunnel with this index as AWS does: it is gone silently,
// with all its state, for the given time, and comes back at the same address. The other tunnels are
// not affected. Only for strongSwan.
func (i *Instance) Replace(ctx context.Context, k int, gone time.Duration) error {
	t := i.Tunnels[k]
	fail := func(err error) error {
		return fmt.Errorf("replacing the endpoint of %s in %s: %w", t.Name, i.Node.Name, err)
	}
	silent := fmt.Sprintf(`table ip replaced { chain in { type filter hook prerouting priority raw; ip daddr %[1]s drop; }; chain out { type filter hook output priority raw; ip saddr %[1]s drop; }; }`, t.Local)
	if _, err := i.Node.ExecInput(ctx, silent, "nft", "-f", "-"); err != nil {
		return fail(err)
	}
	charon, ok := i.IKE.(*Charon)
	if !ok {
		return fail(errors.New("libreswan waits for an answer to its DELETE"))
	}
	// It fails because the DELETE gets no answer, which is intended.
	_, failed := charon.Swanctl(ctx, "--terminate", "--ike", t.Name, "--force", "--timeout", "1")
	err := lab.Until(ctx, 10*time.Second, func() error {
		children, err := charon.Children(ctx)
		if err == nil && children[t.Name] > 0 {
			err = fmt.Errorf("it has still a CHILD SA: %w", errors.Join(errNotYet, failed))
		}
		return err
	})
	if err != nil {
		return fail(err)
	}
	if err := i.Speaker.Bounce(ctx, i.BGP.Neighbors[k]); err != nil {
		return fail(err)
	}
	select {
	case <-time.After(gone):
	case <-ctx.Done():
	}
	if _, err := i.Node.Exec(ctx, "nft", "delete", "table", "ip", "replaced"); err != nil {
		return fail(err)
	}
	return nil
}

func (i *Instance) startBGP(ctx context.Context) (err error) {
	if i.frr {
		i.Speaker, err = StartFRR(ctx, i.Router, i.BGP)
	} else {
		i.Speaker, err = StartBIRD(ctx, i.Router, i.BGP)
	}
	return err
}

// Established returns nil when every BGP session of the gateway is established, else an error that
// names the missing ones.
func (g *Gateway) Established(ctx context.Context) error {
	var errs []error
	for _, i := range g.Instances {
		if err := Established(ctx, i.Speaker); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", i.Router.Name, err))
		}
	}
	return errors.Join(errs...)
}

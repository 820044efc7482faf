// Package crowd makes a router with many clients, for tests of their flows.
package crowd

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	"github.com/isthmus-net/isthmus/nat/nftables"
	"github.com/isthmus-net/isthmus/test/netns"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// Crowd is many clients behind a router, and a server on its underlay that answers to UDP.
type Crowd struct {
	Client, Router, Server *netns.NS
	Driver                 *nftables.Driver
	NetNS                  int // of the router
	Config                 nat.Config
	Flows                  *conntrack.Conn
	wg                     sync.WaitGroup
}

// New makes a crowd whose pool, "p", has the given number of addresses, in namespaces that end with
// the test.
func New(t testing.TB, addresses int) *Crowd {
	c := &Crowd{Client: netns.New(t), Router: netns.New(t), Server: netns.New(t)}
	netns.Veth(c.Router, "tun0", c.Client, "r0")
	netns.Veth(c.Router, "up0", c.Server, "r0")
	c.Client.Run("ip addr add 172.31.0.2/30 dev r0\nip route add default via 172.31.0.1\nip route add local 10.0.0.0/16 dev lo")
	c.Router.Run(`sysctl -qw net.ipv4.ip_forward=1 net.netfilter.nf_conntrack_udp_timeout=600 net.ipv4.icmp_ratelimit=0 net.ipv4.icmp_msgs_per_sec=100000 net.ipv4.icmp_msgs_burst=10000
		ip addr add 172.31.0.1/30 dev tun0
		ip addr add 192.0.2.1/24 dev up0
		ip route add 10.0.0.0/16 via 172.31.0.2
		ip route add 198.51.100.0/24 via 192.0.2.254`)
	c.Server.Run(`ip addr add 192.0.2.254/24 dev r0
		ip addr add 198.51.100.1/24 dev lo`)
	config := nat.Config{Underlay: "up0", Attachments: []nat.Attachment{{Interface: "tun0", Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("172.31.0.0/30")}}}, Own: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Pools: []nat.Pool{{Name: "p"}},
		Policies: []nat.Policy{{Name: "all", Action: nat.SNAT, Sources: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}, Pool: "p"}}}
	for i := range addresses {
		a := netip.AddrFrom4([4]byte{192, 0, 2, byte(11 + i)})
		c.Router.Run("ip addr add " + a.String() + "/24 dev up0")
		config.Pools[0].Addresses = append(config.Pools[0].Addresses, nat.PoolAddress{Address: a, Public: a})
	}
	f, err := os.Open(c.Router.Path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	c.NetNS = int(f.Fd())
	c.Driver = nftables.New(nftables.Options{NetNS: c.NetNS})
	if err := c.Driver.Apply(context.Background(), config); err != nil {
		t.Fatal(err)
	}
	c.Router.Do(func() { c.Flows, err = conntrack.Open() })
	if err != nil {
		t.Fatal(err)
	}
	c.Config = config
	var echo *net.UDPConn
	c.Server.Do(func() {
		echo, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 53})
	})
	if err != nil {
		t.Fatal(err)
	}
	c.wg.Go(func() {
		if err := traffic.Echo(echo, nil); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		echo.Close()
		c.wg.Wait()
		c.Flows.Close()
	})
	return c
}

// Ends sends requests from the given number of sources in turn, each from the next port.
func Ends(sources, firstPort int) traffic.Ends {
	return func(i int) (from, to netip.AddrPort) {
		s := i % sources
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(s >> 8), byte(s)}), uint16(firstPort+i/sources)), netip.MustParseAddrPort("198.51.100.1:53")
	}
}

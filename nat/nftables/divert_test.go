package nftables

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
	"github.com/isthmus-net/isthmus/test/traffic"
)

func TestDivert(t *testing.T) {
	ns := netns.New(t)
	file, err := os.Open(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var ike, standIn, sender net.PacketConn
	ns.Do(func() {
		listen := func(address string) net.PacketConn {
			c, e := net.ListenPacket("udp4", address)
			if e != nil {
				err = e
			}
			return c
		}
		ike, standIn, sender = listen("127.0.0.1:4500"), listen("127.0.0.1:0"), listen("127.0.0.1:0")
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.PacketConn{ike, standIn, sender} {
		defer c.Close()
	}
	arrives := func(what string, at net.PacketConn, packet ...byte) {
		t.Helper()
		if _, err := sender.WriteTo(packet, ike.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		at.SetReadDeadline(time.Now().Add(waitTime(true)))
		if _, _, err := at.ReadFrom(make([]byte, 100)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	esp, marked := []byte{1, 2, 3, 4, 0, 0, 0, 1, 9, 9}, []byte{0, 0, 0, 0, 9, 9, 9, 9}
	d := Divert{NetNS: int(file.Fd())}
	port := uint16(standIn.LocalAddr().(*net.UDPAddr).Port)
	for range 2 {
		if err := d.To(port); err != nil {
			t.Fatal(err)
		}
		arrives("ESP, diverted", standIn, esp...)
		arrives("IKE", ike, marked...)
		if err := d.To(0); err != nil {
			t.Fatal(err)
		}
		arrives("ESP, no longer diverted", ike, esp...)
	}
	if err := d.To(port); err != nil {
		t.Fatal(err)
	}
	time.Sleep(divertLife + time.Second)
	arrives("ESP, kept diverted", standIn, esp...)
	d.stop() // as after the death of the process
	time.Sleep(divertLife + time.Second)
	arrives("ESP, after the death of the process", ike, esp...)
	if err := new(Divert{NetNS: int(file.Fd())}).To(0); err != nil {
		t.Error(err)
	}
}

// TestDivertLeavesFlows sends a translated flow from port 4500 while ESP is diverted.
func TestDivertLeavesFlows(t *testing.T) {
	s := newSite(t)
	d := newDriver(t, s.router)
	apply(t, d, nat.Config{Underlay: "up0", Attachments: inside("tun0"), Own: []netip.Addr{addr("192.0.2.1")}, Pools: []nat.Pool{pool("one", "192.0.2.11")},
		Policies: []nat.Policy{{Name: "all", Action: nat.SNAT, Sources: pfx("10.0.0.0/8"), Pool: "one"}}})
	s.router.Run("ip addr add 192.0.2.11/32 dev up0")
	s.inside.Run("ip addr add 10.0.0.1/32 dev lo")
	s.outside.Run("ip addr add 198.51.100.1/32 dev lo")
	divert := &Divert{NetNS: d.options.NetNS}
	if err := divert.To(5000); err != nil {
		t.Fatal(err)
	}
	defer divert.To(0)
	var server *net.UDPConn
	var err error
	s.outside.Do(func() { server, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 53}) })
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan netip.AddrPort, 10)
	ended := make(chan error)
	go func() { ended <- traffic.Echo(server, func(from netip.AddrPort) { seen <- from }) }()
	var o traffic.Outcome
	s.inside.Do(func() {
		o, err = traffic.Ask(1, func(int) (from, to netip.AddrPort) {
			return netip.MustParseAddrPort("10.0.0.1:4500"), netip.MustParseAddrPort("198.51.100.1:53")
		})
	})
	server.Close()
	if err := errors.Join(err, <-ended); err != nil {
		t.Fatal(err)
	}
	if from := <-seen; o.Answered != 1 || from != netip.MustParseAddrPort("192.0.2.11:4500") {
		t.Errorf("seen as %v: %v", from, o)
	}
}

package nftables

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/test/netns"
	"github.com/isthmus-net/isthmus/test/traffic"
	"golang.org/x/sys/unix"
)

// site is a router with an underlay and an inside. Packets are crafted at the inside and captured
// on the underlay, so that none can be missed and every source is possible.
type site struct {
	t                       testing.TB
	inside, router, outside *netns.NS
	in, out                 *traffic.Tap
}

func newSite(t testing.TB) *site {
	s := &site{t: t, inside: netns.New(t), router: netns.New(t), outside: netns.New(t)}
	netns.Veth(s.router, "tun0", s.inside, "in0")
	netns.Veth(s.router, "up0", s.outside, "out0")
	// Packets are identified by their flow label, so packets that a node itself sends must have
	// none.
	for _, ns := range []*netns.NS{s.inside, s.router, s.outside} {
		ns.Run("sysctl -qw net.ipv6.auto_flowlabels=0")
	}
	s.router.Run(`sysctl -qw net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.default.send_redirects=0 net.ipv4.conf.tun0.send_redirects=0 net.ipv4.conf.up0.send_redirects=0 net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0 net.ipv4.conf.tun0.rp_filter=0 net.ipv4.conf.up0.rp_filter=0
		ip addr add 192.0.2.1/32 dev up0
		ip -6 addr add 2001:db8:ff::1/128 dev up0 nodad`)
	// All links have one MAC address and no neighbour discovery, so that every packet arrives at
	// once.
	for ns, links := range map[*netns.NS][]string{s.inside: {"in0"}, s.router: {"tun0", "up0"}, s.outside: {"out0"}} {
		for _, l := range links {
			ns.Run("ip link set " + l + " down\nip link set " + l + " address 02:00:00:00:00:01 arp off\nip link set " + l + " up")
		}
	}
	s.router.Run(`ip route add 10.0.0.0/8 dev tun0
		ip route add 44.0.0.0/8 dev tun0
		ip route add 172.17.0.0/16 dev tun0
		ip route add default dev up0
		ip -6 addr replace 2001:db8:ff::1/128 dev up0 nodad
		ip -6 route add 2001:db8:a::/48 dev tun0
		ip -6 route add 2001:db8:2c::/48 dev tun0
		ip -6 route add default dev up0`)
	for _, ns := range []*netns.NS{s.inside, s.outside} {
		ns.Run("sysctl -qw net.ipv4.ip_forward=0")
	}
	s.inside.Run("ip route add default dev in0\nip -6 route add default dev in0")
	s.outside.Run("ip route add default dev out0\nip -6 route add default dev out0")
	tap := func(ns *netns.NS) (tap *traffic.Tap) {
		var err error
		ns.Do(func() { tap, err = traffic.OpenTap() })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(tap.Close)
		return tap
	}
	s.in, s.out = tap(s.inside), tap(s.outside)
	return s
}

// forgetFlows empties the router's connection tracking.
func (s *site) forgetFlows() {
	s.t.Helper()
	var err error
	s.router.Do(func() { err = traffic.Forget() })
	if err != nil {
		s.t.Fatal(err)
	}
}

// transmit sends the first packet of a flow, marked with id.
func (s *site) transmit(f nat.Flow, id uint16, flags byte) {
	s.t.Helper()
	from := s.in
	if f.Outside {
		from = s.out
	}
	if err := from.Send(f, id, flags); err != nil {
		s.t.Fatal(err)
	}
}

// receive returns the packets that left by the underlay, by id, once none has come for the pause.
func (s *site) receive(pause time.Duration) map[uint16]traffic.Packet {
	s.t.Helper()
	return s.arrivals(s.out, pause)
}

// silent checks that nothing leaves by the underlay.
func (s *site) silent() {
	s.t.Helper()
	arrived, err := s.out.Receive(50 * time.Millisecond)
	if err != nil {
		s.t.Fatal(err)
	}
	if len(arrived.Packets)+len(arrived.Answers) > 0 {
		s.t.Errorf("left by the underlay: %v %v", arrived.Packets, arrived.Answers)
	}
}

// arrivals returns the packets that arrived at a side, except ICMP answers.
func (s *site) arrivals(at *traffic.Tap, pause time.Duration) map[uint16]traffic.Packet {
	s.t.Helper()
	arrived, err := at.Receive(pause)
	if err != nil {
		s.t.Fatal(err)
	}
	return arrived.Packets
}

var errTimeout = errors.New("no answer")

// try sends from a socket inside to a server that answers anything, and returns the error that it
// gets, or errTimeout.
func (s *site) try(network, from, to string, port int, wait time.Duration) error {
	s.t.Helper()
	var c net.Conn
	var err error
	s.inside.Do(func() {
		d := net.Dialer{Timeout: wait}
		if network == "tcp" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from), Port: port}
		} else {
			d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(from), Port: port}
		}
		c, err = d.Dial(network, to)
	})
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(wait))
		if _, err = c.Write([]byte("x")); err == nil {
			_, err = c.Read(make([]byte, 1))
		}
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return errTimeout
	}
	if no, ok := errors.AsType[unix.Errno](err); ok {
		return no
	}
	return err
}

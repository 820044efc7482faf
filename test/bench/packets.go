package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/nftables"
	"github.com/isthmus-net/isthmus/test/lab"
)

// packetFlows is the number of flows that the packets are spread over.
const packetFlows = 64

// flowPair are the ends of the flows of a family.
type flowPair struct {
	name, from, to, pool string
	domain               int
}

var flowPairs = []flowPair{
	{"IPv4", "10.0.0.1", "198.51.0.1", "192.0.2.11", unix.AF_INET},
	{"IPv6", "2001:db8:a::1", "2001:db8:b::1", "2001:db8:9::11", unix.AF_INET6},
}

// packetConfig returns a configuration with so many policies and attachments.
func packetConfig(rules, attachments int) nat.Config {
	c := policies(rules)
	c.Own = append(c.Own, netip.MustParseAddr("2001:db8:9::1"))
	pool6 := netip.MustParseAddr("2001:db8:9::11")
	c.Pools[0].Addresses = append(c.Pools[0].Addresses, nat.PoolAddress{Address: pool6, Public: pool6})
	all := &c.Policies[len(c.Policies)-1]
	all.Sources = append(all.Sources, netip.MustParsePrefix("2001:db8:a::/48"))
	c.Attachments[0].Sources = append(c.Attachments[0].Sources, netip.MustParsePrefix("2001:db8:a::/48"))
	for i := 1; i < attachments; i++ {
		c.Attachments = append(c.Attachments, nat.Attachment{Interface: fmt.Sprintf("other%d", i), Sources: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 20, byte(i), 0}), 24)}})
	}
	for _, a := range c.Attachments {
		c.Clamps = append(c.Clamps, nat.Clamp{Interface: a.Interface, IPv4: 1360, IPv6: 1340})
	}
	return c
}

// packetRouter is a router between a client and a server.
type packetRouter struct {
	lab                    *lab.Lab
	client, router, server *lab.Node
	ns                     int // the router's namespace
	links                  nat.Links
}

// packetRouter makes a client, a router and a server. The client is behind the router's interface
// tun0: one end of a veth pair, or an xfrm interface. The server is behind up0.
func (b *bench) packetRouter(ctx context.Context, ipsec bool) (made *packetRouter, err error) {
	l, err := b.lab()
	if err != nil {
		return nil, err
	}
	r := &packetRouter{lab: l, client: l.Node("client"), router: l.Node("router"), server: l.Node("server"), ns: -1}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	client, router, server := r.client, r.router, r.server
	addrs := func(list ...string) (out []netip.Prefix) {
		for _, a := range list {
			out = append(out, netip.MustParsePrefix(a))
		}
		return out
	}
	inner, outer := addrs("172.31.0.2/30", "2001:db8:1f::2/64"), addrs("172.31.0.1/30", "2001:db8:1f::1/64")
	if ipsec {
		l.Link(lab.End{Node: client, Name: "wire", Addrs: addrs("203.0.113.2/30")}, lab.End{Node: router, Name: "wire", Addrs: addrs("203.0.113.1/30")})
		tunnelEnd(client, "r0", "203.0.113.2", "203.0.113.1", inner)
		tunnelEnd(router, "tun0", "203.0.113.1", "203.0.113.2", outer)
	} else {
		l.Link(lab.End{Node: client, Name: "r0", Addrs: inner}, lab.End{Node: router, Name: "tun0", Addrs: outer})
	}
	l.Link(lab.End{Node: router, Name: "up0", Addrs: addrs("192.0.2.1/24", "192.0.2.11/24", "2001:db8:9::1/64", "2001:db8:9::11/64")}, lab.End{Node: server, Name: "r0", Addrs: addrs("192.0.2.254/24", "2001:db8:9::fe/64")})
	client.IP("route add default via 172.31.0.1")
	client.IP("route add ::/0 via 2001:db8:1f::1")
	router.IP("route add 10.0.0.0/8 via 172.31.0.2")
	router.IP("route add 2001:db8:a::/48 via 2001:db8:1f::2")
	router.IP("route add default via 192.0.2.254")
	router.IP("route add ::/0 via 2001:db8:9::fe")
	server.IP("route add 10.0.0.0/8 via 192.0.2.1") // without NAT
	server.IP("route add 2001:db8:a::/48 via 2001:db8:9::1")
	for _, p := range flowPairs {
		length := 32
		if p.domain == unix.AF_INET6 {
			length = 128
		}
		client.IP("addr add %s/%d dev lo", p.from, length)
		server.IP("addr add %s/%d dev lo", p.to, length)
	}
	if err := l.Up(ctx); err != nil {
		return nil, err
	}
	if r.ns, err = unix.Open("/run/netns/"+router.Namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, err
	}
	r.links, err = links(router)
	return r, err
}

func (r *packetRouter) close() error {
	if r.ns >= 0 {
		unix.Close(r.ns)
	}
	return r.lab.Close()
}

// rules replaces all rules of the router by a text.
func (r *packetRouter) rules(ctx context.Context, text string) error {
	_, err := r.router.ExecInput(ctx, "flush ruleset\n"+text, "nft", "-f", "-")
	return err
}

// plainRules is one SNAT rule for each family, and nothing else.
const plainRules = "table inet linear {\nchain post {\ntype nat hook postrouting priority srcnat;\noifname up0 meta nfproto ipv4 snat ip to 192.0.2.11\noifname up0 snat ip6 to 2001:db8:9::11\n}\n}\n"

// packets measures what a packet of an established flow costs the thread that sends it, and that
// carries it through the router.
func (b *bench) packets(ctx context.Context) (err error) {
	r, err := b.packetRouter(ctx, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	text := func(rules string) func() error {
		return func() error { return r.rules(ctx, rules) }
	}
	policies := func(policies, attachments int) func() error {
		c := packetConfig(policies, attachments)
		c.Links = r.links
		return func() error {
			if err := r.rules(ctx, ""); err != nil {
				return err
			}
			return nftables.New(nftables.Options{NetNS: r.ns}).Apply(ctx, c)
		}
	}
	type contender struct {
		row   string
		apply func() error
		fast  bool // a flowtable is to carry the packets
	}
	n := b.size(10_000)
	contenders := []contender{
		{"one policy, one attachment", policies(1, 1), false},
		{"no rules", text(""), false},
		{"one plain rule", text(plainRules), false},
		{"the same, three empty chains", text(plainRules + hooks), false},
		{"the same, sides by hand", text(plainRules + sidesAlone), false},
		{"one policy, 200 attachments", policies(1, 200), false},
		{fmt.Sprint(n, " policies, 200 attachments"), policies(n, 200), false},
	}
	over := []string{"no rules", "one plain rule"}
	if r.takesFlowtables(ctx) {
		more := []contender{
			{"one plain rule, flowtable", text(plainRules + flowtable("")), true},
			{"the same, counting and checking", text(plainRules + flowtable("counter;") + deviceChecks), true},
		}
		for _, c := range more {
			contenders, over = append(contenders, c), append(over, c.row)
		}
	}
	t := newTable("Egress: nanoseconds of CPU time for a packet of an established flow, 22 bytes of UDP, %d flows", packetFlows)
	for range 2*b.rounds - 1 {
		for _, c := range contenders {
			if err := c.apply(); err != nil {
				return fmt.Errorf("%s: %w", c.row, err)
			}
			for _, p := range flowPairs {
				before, err := r.slow(ctx, c.fast)
				if err != nil {
					return err
				}
				packets := b.size(100_000)
				cost, err := packetCost(r.client, r.router, r.server, p, packets)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", c.row, p.name, err)
				}
				if after, err := r.slow(ctx, c.fast); err != nil {
					return err
				} else if n := after - before; n > packets/10 {
					return fmt.Errorf("%s, %s: the flowtable left %d of %d packets to the forward hook", c.row, p.name, n, packets)
				}
				t.add(c.row, p.name+" ns", cost)
			}
		}
	}
	t.print(os.Stdout, over...)
	return nil
}

// links returns the interfaces of a router of this bench, as isthmusd finds them.
func links(router *lab.Node) (all nat.Links, err error) {
	err = router.Do(func() error {
		for _, name := range []string{"tun0", "up0"} {
			i, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			all = append(all, nat.Link{Interface: name, Index: uint32(i.Index)})
		}
		return nil
	})
	return all, err
}

func socketAddress(p flowPair, address string, port int) unix.Sockaddr {
	a := netip.MustParseAddr(address)
	if p.domain == unix.AF_INET {
		return &unix.SockaddrInet4{Port: port, Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Port: port, Addr: a.As16()}
}

// datagram opens a UDP socket at an address and port in a node. It waits 5 seconds for a packet.
func datagram(at *lab.Node, p flowPair, address string, port int) (fd int, err error) {
	err = at.Do(func() error {
		if fd, err = unix.Socket(p.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		wait := unix.NsecToTimeval(int64(5 * time.Second))
		return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait), unix.Bind(fd, socketAddress(p, address, port)))
	})
	return fd, err
}

// exchange sends packets there and back, so that the flow is established, and returns the source
// that the server saw.
func exchange(fd, sink, rounds int) (from unix.Sockaddr, err error) {
	payload := make([]byte, 22)
	for range rounds {
		if _, err := unix.Write(fd, payload); err != nil {
			return nil, err
		}
		if _, from, err = unix.Recvfrom(sink, payload, 0); err != nil {
			return nil, fmt.Errorf("a request did not come: %w", err)
		}
		if err := unix.Sendto(sink, payload, 0, from); err != nil {
			return nil, err
		}
		if _, err := unix.Read(fd, payload); err != nil {
			return nil, fmt.Errorf("an answer did not come: %w", err)
		}
	}
	return from, nil
}

// packetBatches is the number of parts in which the packets are sent. Only the part counts that
// other work of the machine disturbed least.
const packetBatches = 400

// packetCost opens flows, waits for an answer on each, and sends n packets over them.
func packetCost(client, router, server *lab.Node, p flowPair, n int) (ns float64, err error) {
	const port = 9000
	if err := router.Do(forgetFlows); err != nil {
		return 0, fmt.Errorf("emptying the connection table: %w", err)
	}
	sink, err := datagram(server, p, p.to, port)
	if err != nil {
		return 0, err
	}
	defer unix.Close(sink)
	var flows []int
	defer func() {
		for _, fd := range flows {
			unix.Close(fd)
		}
	}()
	payload := make([]byte, 22)
	for i := range packetFlows {
		fd, err := datagram(client, p, p.from, 20000+i)
		if err != nil {
			return 0, err
		}
		flows = append(flows, fd)
		if err := unix.Connect(fd, socketAddress(p, p.to, port)); err != nil {
			return 0, err
		}
		if _, err := exchange(fd, sink, 3); err != nil {
			return 0, err
		}
	}
	err = client.Do(func() error {
		for range packetBatches {
			start := threadTime()
			for i := range n / packetBatches {
				if _, err := unix.Write(flows[i%packetFlows], payload); err != nil && !errors.Is(err, unix.ENOBUFS) {
					return err
				}
			}
			if cost := float64((threadTime() - start).Nanoseconds()) / float64(n/packetBatches); ns == 0 || cost < ns {
				ns = cost
			}
		}
		return nil
	})
	return ns, err
}

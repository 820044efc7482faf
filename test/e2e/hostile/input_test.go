package hostile

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/traffic"
)

// probe is a packet that a node answers by itself when it admits the packet: with a reset, an echo
// reply or an ICMP error.
type probe struct {
	name     string
	protocol uint8
	port     uint16
	pieces   bool // in two fragments
}

var probes = []probe{
	{"ssh", unix.IPPROTO_TCP, 22, false}, {"ssh in pieces", unix.IPPROTO_TCP, 22, true}, {"web", unix.IPPROTO_TCP, 80, false}, {"web in pieces", unix.IPPROTO_TCP, 80, true},
	{"bgp", unix.IPPROTO_TCP, 179, false}, {"api", unix.IPPROTO_TCP, 7443, false}, {"api in pieces", unix.IPPROTO_TCP, 7443, true},
	{"traceroute", unix.IPPROTO_UDP, 33434, false}, {"ike", unix.IPPROTO_UDP, 500, false}, {"dhcp", unix.IPPROTO_UDP, 68, false}, {"ping", unix.IPPROTO_ICMP, 0, false},
	{"vrrp", 112, 0, false}, {"gre", unix.IPPROTO_GRE, 0, false}, {"sctp", 132, 0, false},
}

// knock sends a probe to the node.
func (w *world) knock(card string, p probe, id uint16, source, destination netip.Addr) {
	w.Helper()
	protocol := p.protocol
	if protocol == unix.IPPROTO_ICMP && source.Is6() {
		protocol = unix.IPPROTO_ICMPV6
	}
	if !p.pieces {
		w.ok(w.taps[card].Send(nat.Flow{Source: source, Destination: destination, Protocol: protocol, Port: p.port}, id, 0x02))
		return
	}
	// A header of 24 bytes, so that the first fragment has all of it (RFC 7112), and 8 bytes more.
	l4 := make([]byte, 32)
	binary.BigEndian.PutUint16(l4, 1024+id)
	binary.BigEndian.PutUint16(l4[2:], p.port)
	l4[12], l4[13] = 6<<4, 0x02
	copy(l4[20:], []byte{1, 1, 1, 0})
	pseudo := slices.Concat(source.AsSlice(), destination.AsSlice(), []byte{0, protocol, 0, byte(len(l4))}, l4)
	binary.BigEndian.PutUint16(l4[16:], traffic.Checksum(pseudo))
	for i, part := range [][]byte{l4[:24], l4[24:]} {
		at, more := uint16(i*24), uint16(1-i)
		if source.Is6() {
			header := binary.BigEndian.AppendUint16([]byte{protocol, 0}, at|more)
			w.ok(w.taps[card].SendPacket(source, destination, unix.IPPROTO_FRAGMENT, id, 64, append(binary.BigEndian.AppendUint32(header, uint32(id)), part...)))
			continue
		}
		h := []byte{0x45, 0, 0, byte(20 + len(part)), byte(id >> 8), byte(id), byte(more<<5) | byte(at/8>>8), byte(at / 8), 64, protocol, 0, 0}
		w.ok(unix.Sendto(w.taps[card].Send4, slices.Concat(h, source.AsSlice(), destination.AsSlice(), part), 0, &unix.SockaddrInet4{Addr: destination.As4()}))
	}
}

// neighbours are the networks of the sources of a card; the last byte distinguishes probes.
var neighbours = map[string][2]string{
	"lan0": {"10.1.0.0", "2001:db8:a::"}, "shop0": {"172.16.0.0", "2001:db8:c::"}, "wan": {"198.51.100.0", "2001:db8:b::"}, "mgmt0": {"192.168.0.0", "2001:db8:d::"},
}

// answers sends every probe by every card in both families, and returns those that the node
// answers, as "wan 4 api".
func (w *world) answers() map[string]bool {
	w.Helper()
	w.ok(w.hub.Do(traffic.Forget))
	type from struct{ source, destination netip.Addr }
	sent := map[from]string{}
	id := uint16(0)
	for _, card := range cards {
		for i, own := range []string{"192.0.2.100", "2001:db8:9::100"} {
			for n, p := range probes {
				id++
				source := netip.MustParseAddr(neighbours[card][i]).AsSlice()
				source[len(source)-1] = byte(n + 1)
				k := from{destination: netip.MustParseAddr(own)}
				k.source, _ = netip.AddrFromSlice(source)
				sent[k] = fmt.Sprintf("%s %d %s", card, 4+2*i, p.name)
				w.knock(card, p, id, k.source, k.destination)
			}
		}
	}
	got := map[string]bool{}
	for _, sounds := range w.receive() {
		for _, p := range sounds.All {
			if what, ok := sent[from{p.Destination, p.Source}]; ok {
				got[what] = true
			}
		}
	}
	return got
}

// wants waits until the answers equal those of a model: rules change a moment after a command.
func (w *world) wants(what string, may func(card string, six bool, p probe) bool) {
	w.Helper()
	yes := 0
	err := lab.Until(w.Context(), 30*time.Second, func() error {
		got := w.answers()
		var wrong []string
		yes = 0
		for _, card := range cards {
			for _, six := range []bool{false, true} {
				for _, p := range probes {
					name := fmt.Sprintf("%s %d %s", card, map[bool]int{false: 4, true: 6}[six], p.name)
					want := may(card, six, p)
					if want {
						yes++
					}
					if got[name] != want {
						wrong = append(wrong, fmt.Sprintf("%s: answered %v, want %v", name, got[name], want))
					}
				}
			}
		}
		if len(wrong) > 0 {
			return fmt.Errorf("%d are wrong: %s", len(wrong), strings.Join(wrong, "; "))
		}
		return nil
	})
	w.Logf("%s: %d of %d probes are answered", what, yes, len(cards)*2*len(probes))
	if err != nil {
		out, _ := w.hub.Exec(w.Context(), "nft", "list", "table", "inet", "isthmus")
		w.Fatalf("%s: %v\n%s", what, err, out)
	}
}

// TestInput checks which packets the node answers, from which side, under drop and keep, with and
// without a document, and after another process has removed the rules.
func TestInput(t *testing.T) {
	w := begin(t)
	for key, value := range map[string]string{"ipv4/icmp_ratelimit": "0", "ipv6/icmp/ratelimit": "0", "ipv4/tcp_invalid_ratelimit": "0"} {
		w.ok(w.hub.Sysctl(key, value))
	}
	w.ok(w.hub.Do(func() error { // later kernels have these in each namespace
		for _, key := range []string{"icmp_msgs_per_sec", "icmp_msgs_burst"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/"+key, []byte("100000"), 0); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
				return err
			}
		}
		return nil
	}))
	everything := func(string, bool, probe) bool { return true }
	is := func(p probe, name string) bool { return strings.TrimSuffix(p.name, " in pieces") == name }
	dropped := func(api, ssh func(card string, six bool) bool) func(string, bool, probe) bool {
		return func(card string, six bool, p probe) bool {
			return is(p, "ping") || is(p, "api") && api(card, six) || is(p, "ssh") && ssh(card, six)
		}
	}
	byWan4 := func(card string, six bool) bool { return card == "wan" && !six }
	never := func(string, bool) bool { return false }
	w.wants("no daemon", everything)

	const from = "198.51.100.0/25"
	w.hub.Args = []string{"-listen", ":7443", "-api-from", from}
	w.hub.Args = append(w.hub.Args, "-input", "keep")
	w.hub.Start(t)
	w.wants("keep, no document", func(card string, six bool, p probe) bool { return !is(p, "api") || byWan4(card, six) })
	w.hub.Kill()

	w.hub.Args[len(w.hub.Args)-1] = "drop"
	w.hub.Start(t)
	w.wants("drop, no document", dropped(byWan4, never))
	for range 3 {
		_, err := w.hub.Exec(t.Context(), "nft", "flush", "ruleset")
		w.ok(err)
		w.wants("drop, no document, flushed", dropped(byWan4, never))
	}

	const access = "access: {api: [\"2001:db8:b::/64\", 10.1.0.0/24], ssh: [192.168.0.0/16, \"2001:db8:d::/48\", 172.16.0.0/16]}\n"
	api := func(card string, six bool) bool { return card == "wan" || card == "lan0" && !six }
	ssh := func(card string, six bool) bool { return card == "mgmt0" || card == "shop0" && !six }
	w.hub.Apply(t, access+document)
	w.wants("drop", dropped(api, ssh))
	_, err := w.hub.Exec(t.Context(), "nft", "flush", "ruleset")
	w.ok(err)
	w.wants("drop, flushed", dropped(api, ssh))
	w.hub.Kill()
	w.wants("drop, without the daemon", dropped(api, ssh))
	_, err = w.hub.Exec(t.Context(), "nft", "flush", "ruleset")
	w.ok(err)
	w.hub.Start(t)
	w.hub.Settled(t)
	w.wants("drop, started again", dropped(api, ssh))

	changes := w.hub.Apply(t, strings.Replace(access, "{api", "{input: keep, api", 1)+document)
	w.wants("keep", func(card string, six bool, p probe) bool {
		return is(p, "api") && api(card, six) || !is(p, "api") && !is(p, "bgp")
	})
	if !strings.Contains(changes, "input") {
		t.Errorf("changes: %s", changes)
	}
	changes = w.hub.Apply(t, strings.Replace(access, "{api", "{input: drop, api", 1)+document)
	w.wants("drop again", dropped(api, ssh))
	if !strings.Contains(changes, "services of the machine that the document does not open get no new flows") {
		t.Errorf("changes: %s", changes)
	}
	// Counters are up to two seconds old.
	w.ok(lab.Until(t.Context(), 30*time.Second, func() error {
		all := &isthmusv1.ListPoliciesResponse{}
		if err := w.hub.Get(t.Context(), "nat", all); err != nil {
			return err
		}
		if !slices.ContainsFunc(all.GetDrops(), func(d *isthmusv1.Drop) bool { return d.GetReason() == "input" && d.GetPackets() > 0 }) {
			return fmt.Errorf("none was counted: %v", all.GetDrops())
		}
		return nil
	}))
}

// TestConnectionsStay checks that an SSH connection whose source stays allowed goes on through
// documents that change others, and ends when its source is not allowed.
func TestConnectionsStay(t *testing.T) {
	w := begin(t)
	_, err := w.others["wan"].Exec(t.Context(), "ip", "addr", "add", "198.51.100.7/32", "dev", "r0")
	w.ok(err)
	w.echo("[::]:22")
	w.hub.Start(t)
	const head = "node: {name: hub}\nunderlay: {interface: wan, address: 192.0.2.100}\naccess: {ssh: [%s]}\n"
	w.hub.Apply(t, fmt.Sprintf(head, "198.51.100.0/24"))
	var c net.Conn
	w.ok(lab.Until(t.Context(), 30*time.Second, func() (err error) {
		c, err = w.others["wan"].DialContext(t.Context(), "tcp", "192.0.2.100:22")
		return err
	}))
	defer c.Close()
	answers := func(limit time.Duration) error {
		w.ok(c.SetDeadline(time.Now().Add(limit)))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		return err
	}
	for _, list := range []string{"198.51.100.0/24, 203.0.113.0/24", "198.51.100.7/32", "0.0.0.0/0"} {
		w.hub.Apply(t, fmt.Sprintf(head, list)+"attachments: [{name: lan, interface: lan0, sources: [10.1.0.0/16]}]\n")
		if err := answers(30 * time.Second); err != nil {
			t.Fatalf("while %s may: %v", list, err)
		}
	}
	changes := w.hub.Apply(t, fmt.Sprintf(head, "203.0.113.0/24"))
	if err := answers(2 * time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("goes on when its source may not: %v", err)
	}
	if !strings.Contains(changes, "SSH from 0.0.0.0/0 ends") {
		t.Errorf("changes: %s", changes)
	}
}

// echo answers each byte of connections to an address of the hub.
func (w *world) echo(address string) {
	l, err := w.hub.Listen("tcp", address)
	w.ok(err)
	w.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 1)
				for {
					if _, err := c.Read(b); err != nil {
						return
					}
					if _, err := c.Write(b); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// TestUplink checks that under drop, with and without a document, the underlay still works as in a
// cloud's network: an address by DHCP and its renewal, in both families, neighbour discovery, and
// the route from router advertisements.
func TestUplink(t *testing.T) {
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{T: t, hub: daemon.New(l.Node("hub"), daemon.Build(t, "../../.."))}
	cloud := l.Node("cloud")
	l.Link(lab.End{Node: w.hub.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")}, lab.End{Node: cloud, Name: "hub0", Addrs: daemon.Prefixes("192.0.2.1/24")})
	cloud.IP("addr add 2001:db8:9::1/64 dev hub0 nodad")
	w.ok(l.Up(t.Context()))
	for key, value := range map[string]string{"ipv4/ip_forward": "0", "ipv6/conf/all/forwarding": "0", "ipv6/conf/wan/accept_ra": "1"} {
		w.ok(w.hub.Sysctl(key, value))
	}
	w.hub.Start(t)
	server, err := cloud.Start("dnsmasq", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--interface=hub0", "--bind-interfaces", "--leasefile-ro", "--no-ping", "--pid-file=", "--user=root",
		"--dhcp-authoritative", "--dhcp-range=192.0.2.50,192.0.2.99,2m", "--dhcp-range=2001:db8:9::100,2001:db8:9::1ff,64,2m", "--enable-ra", "--ra-param=hub0,4,30", "--log-dhcp")
	w.ok(err)
	works := func(when string) {
		t.Helper()
		failed := func(what string, err error) {
			if err != nil {
				log, _ := os.ReadFile(server.Log)
				rules, _ := w.hub.Exec(t.Context(), "nft", "list", "table", "inet", "isthmus")
				t.Fatalf("%s: %s: %v\n%s\n%s", when, what, err, log, rules)
			}
		}
		until := func(what string, f func() error) { t.Helper(); failed(what, lab.Until(t.Context(), 60*time.Second, f)) }
		run := func(n *lab.Node, argv ...string) (string, error) { return n.Exec(t.Context(), argv...) }
		until("DHCP", func() error { return w.hub.Do(leases4) })
		until("DHCP of IPv6", func() error { return w.hub.Do(leases6) })
		_, err := run(w.hub.Node, "ip", "-6", "route", "flush", "proto", "ra")
		failed("forgetting routes", err)
		until("router advertisement", func() error {
			out, err := run(w.hub.Node, "ip", "-6", "route", "show", "default", "proto", "ra")
			if err == nil && !strings.Contains(out, "dev wan") {
				err = fmt.Errorf("the default route is %q", out)
			}
			return err
		})
		_, _ = run(cloud, "ip", "-6", "neigh", "flush", "dev", "hub0")
		until("neighbour discovery", func() error {
			_, err := run(cloud, "ping", "-6", "-n", "-c1", "-W2", "2001:db8:9::50")
			return err
		})
	}
	_, err = w.hub.Exec(t.Context(), "ip", "addr", "add", "2001:db8:9::50/64", "dev", "wan", "nodad")
	w.ok(err)
	works("without a document")
	w.hub.Apply(t, "node: {name: hub}\nunderlay: {interface: wan, address: 192.0.2.100}\n")
	out, err := w.hub.Exec(t.Context(), "sysctl", "-n", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.wan.accept_ra")
	if w.ok(err); strings.Join(strings.Fields(out), "") != "12" {
		t.Errorf("forwarding and advertisements: %s", out)
	}
	works("with a document")
}

// leases4 gets a lease and renews it, as a DHCP client with only UDP sockets does (RFC 2131).
func leases4() error {
	c, err := udp("udp4", "0.0.0.0:68")
	if err != nil {
		return err
	}
	defer c.Close()
	iface, err := net.InterfaceByName("wan")
	if err != nil {
		return err
	}
	ask := func(kind byte, to string, client netip.Addr, options ...byte) (answer byte, given, server netip.Addr, err error) {
		b := make([]byte, 240)
		b[0], b[1], b[2] = 1, 1, 6
		copy(b[4:], "isth")
		if b[10] = 0x80; client.IsValid() { // else broadcast the answer
			b[10] = 0
			copy(b[12:], client.AsSlice())
		}
		copy(b[28:], iface.HardwareAddr)
		copy(b[236:], []byte{99, 130, 83, 99})
		b = append(append(append(b, 53, 1, kind), options...), 255)
		destination := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to))
		if _, err := c.WriteTo(b, destination); err != nil {
			return 0, given, server, err
		}
		for buffer := make([]byte, 1500); ; {
			n, from, err := c.ReadFrom(buffer)
			if err != nil {
				return 0, given, server, fmt.Errorf("message %d of DHCP: %w", kind, err)
			}
			if n < 243 || string(buffer[4:8]) != "isth" {
				continue
			}
			i := bytes.Index(buffer[240:n], []byte{53, 1})
			if i < 0 {
				continue
			}
			return buffer[242+i], netip.AddrFrom4([4]byte(buffer[16:20])), from.(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
		}
	}
	const discover, offer, request, ack = 1, 2, 3, 5
	answer, given, server, err := ask(discover, "255.255.255.255:67", netip.Addr{})
	if err != nil || answer != offer {
		return fmt.Errorf("discovering: %d, %w", answer, err)
	}
	selected := slices.Concat([]byte{50, 4}, given.AsSlice(), []byte{54, 4}, server.AsSlice())
	if answer, _, _, err = ask(request, "255.255.255.255:67", netip.Addr{}, selected...); err != nil || answer != ack {
		return fmt.Errorf("requesting: %d, %w", answer, err)
	}
	// The client renews from an address that it has; here it uses the node's own.
	requested := slices.Concat([]byte{50, 4}, given.AsSlice())
	if answer, _, _, err = ask(request, netip.AddrPortFrom(server, 67).String(), netip.Addr{}, requested...); err != nil || answer != ack {
		return fmt.Errorf("renewing: %d, %w", answer, err)
	}
	return nil
}

// leases6 requests an address, which a DHCPv6 server advertises (RFC 8415).
func leases6() error {
	c, err := udp("udp6", "[::]:546")
	if err != nil {
		return err
	}
	defer c.Close()
	const solicit, advertise = 1, 2
	b := []byte{solicit, 'i', 's', 't'}
	b = append(b, 0, 1, 0, 10, 0, 3, 0, 1, 2, 0, 0, 0, 0, 9)       // client identifier
	b = append(b, 0, 3, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0) // IA_NA: requests an address
	b = append(b, 0, 8, 0, 2, 0, 0)                                // elapsed time
	to := &net.UDPAddr{IP: net.ParseIP("ff02::1:2"), Port: 547, Zone: "wan"}
	if _, err := c.WriteTo(b, to); err != nil {
		return err
	}
	for buffer := make([]byte, 1500); ; {
		n, _, err := c.ReadFrom(buffer)
		if err != nil {
			return fmt.Errorf("soliciting: %w", err)
		}
		if n > 4 && buffer[0] == advertise && string(buffer[1:4]) == "ist" {
			return nil
		}
	}
}

// udp opens a socket on the interface wan that may broadcast. Its exchange must end in 5 seconds:
// a lost datagram is not sent again, so the caller begins another exchange.
func udp(network, address string) (net.PacketConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		outer := c.Control(func(fd uintptr) {
			err = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1), unix.BindToDevice(int(fd), "wan"))
		})
		return errors.Join(outer, err)
	}}
	c, err := config.ListenPacket(context.Background(), network, address)
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(5 * time.Second))
}

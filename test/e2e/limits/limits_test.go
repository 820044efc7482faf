// Package limits exhausts the resources of a node: the ports of an address, and the connection
// table. Of the kernel it needs only network namespaces. Ring: namespace; needs root.
package limits

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/traffic"
)

const (
	first, second = "192.0.2.10", "192.0.2.11" // of pools
	partner       = "198.51.100.1"
	// the port to which the flows go, the first of them where there are several
	crowded = 53
	ports   = 64_512 // of an address, toward one service

	patience = time.Minute
)

// world is a running topology: clients with all of 10.0.0.0/15 behind the hub, and a partner on its
// underlay.
type world struct {
	*testing.T
	hub             *daemon.Node
	inside, partner *lab.Node
	leaks           *lab.Capture

	mu   sync.Mutex
	seen map[netip.Addr]int // packets, by the source that the partner saw
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func begin(t *testing.T) *world {
	l, err := lab.New(lab.Options{})
	w := &world{T: t, seen: map[netip.Addr]int{}}
	w.ok(err)
	t.Cleanup(func() {
		if t.Failed() && w.hub != nil && w.hub.Process != nil {
			log, _ := os.ReadFile(w.hub.Process.Log)
			t.Logf("%s", log)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	w.hub, w.inside, w.partner = daemon.New(l.Node("hub"), daemon.Build(t, "../../..")), l.Node("inside"), l.Node("partner")
	l.Link(lab.End{Node: w.hub.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")}, lab.End{Node: w.partner, Name: "lan", Addrs: daemon.Prefixes("192.0.2.1/24")})
	l.Link(lab.End{Node: w.hub.Node, Name: "in0", Addrs: daemon.Prefixes("172.31.0.1/30")}, lab.End{Node: w.inside, Name: "r0", Addrs: daemon.Prefixes("172.31.0.2/30")})
	w.hub.IP("route add default via 192.0.2.1")
	w.hub.IP("route add 10.0.0.0/15 via 172.31.0.2")
	w.inside.IP("route add default via 172.31.0.1")
	w.inside.IP("route add local 10.0.0.0/15 dev lo")
	w.partner.IP("addr add %s/32 dev lo", partner)
	w.ok(l.Up(t.Context()))
	// The kernel sends a host one ICMP error a second, and a few hosts represent many clients here.
	for key, value := range map[string]string{"icmp_ratelimit": "0", "icmp_msgs_per_sec": "100000", "icmp_msgs_burst": "10000"} {
		w.ok(w.hub.Sysctl("ipv4/"+key, value))
	}
	w.leaks, err = w.partner.Capture("", daemon.Prefixes("10.0.0.0/8", "172.16.0.0/12")...)
	w.ok(err)
	t.Cleanup(func() {
		if n, who, err := w.leaks.Stop(); n > 0 || err != nil {
			t.Errorf("%d packets left with an inside source (%v): %v", n, who, err)
		}
	})
	w.serve()
	w.hub.Start(t)
	return w
}

// document returns one with some pools and policies.
func document(egress string) string {
	return "node: {name: hub}\nunderlay: {interface: wan, address: 192.0.2.100}\n" +
		"attachments: [{name: inside, interface: in0, sources: [10.0.0.0/15, 172.31.0.0/30]}]\negress:\n" + egress
}

// echo answers UDP at a port of the partner.
func (w *world) echo(port int) {
	w.Helper()
	var c *net.UDPConn
	w.ok(w.partner.Do(func() (err error) {
		c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.ParseIP(partner), Port: port})
		return err
	}))
	ended := make(chan struct{})
	w.Cleanup(func() { c.Close(); <-ended })
	go func() {
		defer close(ended)
		err := traffic.Echo(c, func(from netip.AddrPort) {
			w.mu.Lock()
			w.seen[from.Addr()]++
			w.mu.Unlock()
		})
		if err != nil {
			w.Error(err)
		}
	}()
}

// serve has the partner accept TCP connections, and echo received data.
func (w *world) serve() {
	l, err := w.partner.Listen("tcp", partner+":443")
	w.ok(err)
	w.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
}

// seenAs returns the sources that the partner has seen since the last call.
func (w *world) seenAs() (names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for a := range w.seen {
		names = append(names, a.String())
	}
	clear(w.seen)
	slices.Sort(names)
	return names
}

// ends sends requests from the given number of sources of 10.0.0.0/16 in turn, each from the next
// port, to the given number of service ports in turn.
func ends(sources, services, firstPort int) traffic.Ends {
	to := netip.MustParseAddr(partner)
	return func(i int) (netip.AddrPort, netip.AddrPort) {
		s := i % sources
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(s >> 8), byte(s)}), uint16(firstPort+i/sources)), netip.AddrPortFrom(to, uint16(crowded+i%services))
	}
}

// behind moves the sources of 10.0.0.0/16 into 10.n.0.0/16.
func behind(n byte, e traffic.Ends) traffic.Ends {
	return func(i int) (netip.AddrPort, netip.AddrPort) {
		from, to := e(i)
		a := from.Addr().As4()
		a[1] = n
		return netip.AddrPortFrom(netip.AddrFrom4(a), from.Port()), to
	}
}

func (w *world) ask(what string, n int, e traffic.Ends) (o traffic.Outcome) {
	w.Helper()
	w.ok(w.inside.Do(func() (err error) { o, err = traffic.Ask(n, e); return err }))
	w.Logf("%s: %d requests, %v", what, n, o)
	return o
}

// connect opens a TCP connection from a source, and waits for an echo.
func (w *world) connect(from string) (c net.Conn, err error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 3 * time.Second}
	err = w.inside.Do(func() (err error) { c, err = d.DialContext(w.Context(), "tcp4", partner+":443"); return err })
	if err != nil {
		return nil, err
	}
	w.Cleanup(func() { c.Close() })
	return c, repeated(c)
}

func repeated(c net.Conn) error {
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return err
	}
	_, err := bufio.NewReader(c).ReadString('\n')
	return err
}

// ports reads the output of "get ports".
func (w *world) ports() *isthmusv1.ListPortsResponse {
	w.Helper()
	all := &isthmusv1.ListPortsResponse{}
	w.ok(w.hub.Get(w.Context(), "egress", all))
	return all
}

// use returns the use of the first address by the crowded service.
func (w *world) use() *isthmusv1.PortUse {
	w.Helper()
	all := w.ports().Ports
	i := slices.IndexFunc(all, func(p *isthmusv1.PortUse) bool {
		return p.Address == first && p.Destination == partner && p.Protocol == "udp" && p.Port == crowded
	})
	if i < 0 {
		w.Fatalf("port %d is not listed: %v", crowded, all)
	}
	return all[i]
}

// maybe marks a condition that may be there or not.
const maybe = "maybe "

// conditions waits until "get status" has exactly these, as type and severity.
func (w *world) conditions(limit time.Duration, want ...string) {
	w.Helper()
	began := time.Now()
	w.hub.Status(w.T, limit, func(s *isthmusv1.SystemStatus) bool {
		var have []string
		for _, c := range s.Conditions {
			have = append(have, c.Type+" "+c.Severity)
		}
		wanted := slices.Clone(want)
		for i, c := range want {
			if name, ok := strings.CutPrefix(c, maybe); ok {
				wanted[i] = name
				if !slices.Contains(have, name) {
					wanted[i] = ""
				}
			}
		}
		return slices.Equal(have, slices.DeleteFunc(wanted, func(c string) bool { return c == "" }))
	})
	w.Logf("conditions %q after %v", want, time.Since(began).Round(100*time.Millisecond))
}

// says checks that the table of "get ports" has the words.
func (w *world) says(words string) {
	w.Helper()
	out, err := w.hub.CLI(w.Context(), "", "get", "egress")
	if err != nil || !strings.Contains(strings.Join(strings.Fields(out), " "), words) {
		w.Errorf("no %q in what get ports says: %v\n%s", words, err, out)
	}
}

// TestPorts makes more flows to one service than the pool's only address has ports for, adds
// another address and removes it again, and ends the flows of one request.
func TestPorts(t *testing.T) {
	t.Parallel()
	w := begin(t)
	w.echo(crowded)
	// No flow ends by itself while the test runs, on however busy a machine.
	one := document("  pools: [{name: partner, addresses: [{address: 192.0.2.10}]}]\n" +
		"  policies: [{name: all, sources: [10.0.0.0/15], destinations: [198.51.100.0/24], pool: partner, timeouts: {udp: 1h, udpStream: 1h}}]\n")
	w.hub.Apply(t, one)
	w.conditions(patience)
	tcp, err := w.connect("10.1.0.1")
	w.ok(err)
	var held *traffic.Held
	w.ok(w.inside.Do(func() (err error) { held, err = traffic.Hold(200, behind(1, ends(20, 1, 1024))); return err }))
	t.Cleanup(held.Close)
	alive := func(when string) {
		t.Helper()
		if n := held.Broken(); n > 0 {
			t.Errorf("%s: %d flows are broken", when, n)
		}
		if err := repeated(tcp); err != nil {
			t.Errorf("%s: the TCP connection: %v", when, err)
		}
	}
	alive("at first")

	const safe = 57_000
	if o := w.ask("up to 88 %", safe, ends(50, 1, 2000)); o.Answered != safe {
		t.Error("there was room for all")
	}
	w.conditions(patience, "PortsLow warning")
	low := w.use()
	t.Logf("%v", low)
	if low.State != "low" || low.Used < safe || low.Percent < 85 || low.ExhaustedIn.AsDuration() <= 0 || low.Refused != 0 {
		t.Error("there was no alarm before anything was lost")
	}
	const more = 10_000
	beyond := w.ask("and beyond", more, ends(50, 1, 10_000))
	if total := safe + beyond.Answered + 200; total > ports || total < ports*99/100 {
		t.Errorf("%d flows have a port", total)
	}
	if beyond.Refused+beyond.Answered < more*999/1000 {
		t.Errorf("%d requests received no answer", beyond.Lost)
	}
	w.conditions(patience, "PortsExhausted error")
	full := w.use()
	t.Logf("%v", full)
	if full.State != "exhausted" || full.Used > ports || full.Used+full.Free != ports || full.Percent < 99 || full.Refused < uint64(beyond.Refused) {
		t.Error("that does not say what happened")
	}
	w.says(" exhausted ")
	alive("when no port is left")
	if _, err := w.connect("10.1.0.2"); err != nil {
		t.Errorf("another service: %v", err)
	}
	if seen := w.seenAs(); !slices.Equal(seen, []string{first}) {
		t.Errorf("seen as %v", seen)
	}

	w.hub.Apply(t, strings.Replace(one, "{address: 192.0.2.10}", "{address: 192.0.2.10}, {address: 192.0.2.11}", 1))
	began := time.Now()
	w.ok(lab.Until(t.Context(), patience, func() error {
		if o := w.ask("first", 1, ends(1, 1, 60_000)); o.Answered != 1 {
			return errors.New("refused")
		}
		return nil
	}))
	t.Logf("no longer refused after %v", time.Since(began).Round(time.Millisecond))
	if o := w.ask("with another address", 1000, ends(50, 1, 12_000)); o.Answered != 1000 {
		t.Error("the second address does not take them")
	}
	if seen := w.seenAs(); !slices.Equal(seen, []string{second}) {
		t.Errorf("seen as %v", seen)
	}
	w.conditions(patience, "PortsLow warning")
	alive("with another address")

	if said := w.hub.Apply(t, one); !strings.Contains(said, "1,001 flows from "+second+" end") {
		t.Errorf("the second address is listed as\n%s", said)
	}
	if o := w.ask("without it", 500, ends(50, 1, 13_000)); o.Refused < 300 || o.Lost > 0 {
		t.Error("few are refused")
	}
	w.conditions(patience, "PortsExhausted error")
	alive("without it")

	if _, err := w.hub.Exec(t.Context(), "conntrack", "-D", "-p", "udp", "-s", "10.0.0.0/16"); err != nil {
		t.Fatal(err)
	}
	// While no flow begins, they are counted every 30 s, or at a call of the API.
	w.ok(lab.Until(t.Context(), patience, func() error {
		if u := w.use(); u.State != "ok" {
			return fmt.Errorf("still %v", u)
		}
		return nil
	}))
	w.conditions(patience)
	if o := w.ask("after the flows have ended", 1000, ends(50, 1, 14_000)); o.Answered != 1000 {
		t.Error("not all are answered")
	}
	if u := w.use(); u.State != "ok" || u.Percent >= 75 {
		t.Errorf("%v", u)
	}
	alive("in the end")
}

// TestTable fills the connection table, in the size of this machine, with flows that the kernel
// does not drop early, through an address that is then removed.
func TestTable(t *testing.T) {
	t.Parallel()
	w := begin(t)
	egress := "  pools: [{name: partner, addresses: [{address: 192.0.2.10}]}, {name: bulk, addresses: [{address: 192.0.2.11}]}]\n" +
		"  policies:\n  - {name: few, sources: [10.1.0.0/16], pool: partner}\n" +
		"  - {name: many, sources: [10.0.0.0/16], pool: bulk, timeouts: {udp: 5m, udpStream: 5m}}\n"
	w.hub.Apply(t, document(egress))
	var limit int
	w.ok(lab.Until(t.Context(), patience, func() error {
		if limit = int(w.ports().Table.GetLimit()); limit == 0 {
			return errors.New("the size of the connection table is not known")
		}
		return nil
	}))
	services := limit/45_000 + 1
	for i := range services {
		w.echo(crowded + i)
	}
	var conns []net.Conn
	for i := range 50 {
		c, err := w.connect(fmt.Sprintf("10.1.0.%d", 1+i))
		w.ok(err)
		conns = append(conns, c)
	}
	alive := func(when string) {
		t.Helper()
		for _, c := range conns {
			if err := repeated(c); err != nil {
				t.Errorf("%s: %v", when, err)
			}
		}
	}
	const few = 50
	var held *traffic.Held
	w.ok(w.inside.Do(func() (err error) { held, err = traffic.Hold(few, ends(few, 1, 50_000)); return err }))
	t.Cleanup(held.Close)
	// Sources and services in turn form all combinations, since their numbers are coprime or the
	// ports differ.
	sources := 250
	flows := func(percent int) int { return limit / 100 * percent }
	fill := func(from, to int) {
		t.Helper()
		e := ends(sources, services, 1024)
		o := w.ask(fmt.Sprintf("up to %d %% of %d", to, limit), flows(to)-flows(from), func(i int) (netip.AddrPort, netip.AddrPort) { return e(flows(from) + i) })
		if o.Answered != flows(to)-flows(from) {
			t.Error("there was room for all")
		}
	}
	fill(0, 87)
	w.conditions(patience, "ConnectionTableLow warning")
	fill(87, 97)
	w.conditions(patience, "ConnectionTableLow warning")
	if c, err := w.connect("10.1.1.1"); err != nil {
		t.Errorf("while the kernel could drop flows with one packet in each direction: %v", err)
	} else {
		conns = append(conns, c)
	}
	fill(0, 97) // now it cannot
	w.conditions(patience, "ConnectionTableFull error")
	table := w.ports().Table
	t.Logf("%v", table)
	if !table.Full || int(table.Entries) < flows(97) || int(table.Assured) < flows(90) || table.Dropped != 0 {
		t.Error("that does not say what happened")
	}
	began := time.Now()
	if c, err := w.connect("10.1.1.2"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a new TCP connection: %v, %v", c, err)
	}
	t.Logf("refused after %v", time.Since(began).Round(time.Millisecond))
	if o := w.ask("while it is full", 200, ends(20, 1, 60_000)); o.Refused != 200 {
		t.Error("they are not refused")
	}
	if table := w.ports().Table; table.Refused < 201 {
		t.Errorf("%v", table)
	}
	alive("while it is full")
	if n := held.Broken(); n > 0 {
		t.Errorf("%d flows over UDP are broken", n)
	}
	if seen := w.seenAs(); !slices.Equal(seen, []string{second}) {
		t.Errorf("seen as %v", seen)
	}

	n := flows(97) + few
	want := fmt.Sprintf("%d,%03d flows from %s end", n/1000, n%1000, second)
	egress = strings.Replace(egress, ", {name: bulk, addresses: [{address: 192.0.2.11}]}", "", 1)
	began = time.Now()
	if said := w.hub.Apply(t, document(strings.Replace(egress, "pool: bulk", "pool: partner", 1))); !strings.Contains(said, want) {
		t.Errorf("no %q in\n%s", want, said)
	}
	t.Logf("%s: after %v", want, time.Since(began).Round(time.Millisecond))
	w.conditions(patience)
	if _, err := w.connect("10.1.1.3"); err != nil {
		t.Errorf("when it has room again: %v", err)
	}
	alive("when it has room again")
	if n := held.Broken(); n > 0 {
		t.Errorf("%d clients that go on sending have not got the other address", n)
	}
	if seen := w.seenAs(); !slices.Equal(seen, []string{first}) {
		t.Errorf("seen as %v", seen)
	}
}

// Package egress has a node with every kind of egress policy between clients, a proxy, two spokes
// with the same prefix behind WireGuard lanes, and a partner. Of the kernel it needs only TUN.
// Ring: namespace; needs root.
package egress

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat/conntrack"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
)

const (
	first, second = "192.0.2.10", "192.0.2.11" // the pool
	service       = "198.51.100.7:443"
	sources       = 50 // 172.16.1.10 and so on
)

// world is a running topology.
type world struct {
	*testing.T
	hub, east, west *daemon.Node
	partner         *lab.Node
	inside, proxy   *lab.Node
	leaks           *lab.Capture
	document        string
	flows           []*flow
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

const egress = `egress:
  pools: [{name: partner, addresses: [{address: 192.0.2.10}, {address: 192.0.2.11}]}]
  maps: [{tunnels: [egress0], inside: 10.1.0.0/24, mapped: 100.64.1.0/24}, {tunnels: [egress1], inside: 10.1.0.0/24, mapped: 100.64.2.0/24}]
  policies:
  - {name: all, sources: [172.16.0.0/16, 100.64.0.0/16], destinations: [198.51.100.0/24], pool: partner, timeouts: {tcpEstablished: 10m}}
  - {name: dark, action: deny, sources: [172.16.0.0/16], destinations: [198.51.100.0/24], protocol: tcp, ports: ["25"]}
  - {name: shut, action: reject, sources: [172.16.0.0/16], destinations: [198.51.100.0/24], protocol: tcp, ports: ["23"]}
  - {name: shut-udp, action: reject, sources: [172.16.0.0/16], destinations: [198.51.100.0/24], protocol: udp, ports: ["161"]}
  - {name: plain, action: no-nat, sources: [10.77.0.0/24], destinations: [10.99.0.0/24]}
  - {name: open, action: dnat, sources: [0.0.0.0/0], protocol: tcp, ports: ["8080"], pool: partner, to: "172.16.2.5:80"}
  - {name: web, action: redirect, sources: [172.16.0.0/16], destinations: [198.51.100.0/24], protocol: tcp, ports: ["80"], to: "172.31.1.2:3128",
     whenDown: bypass, probes: {interval: 1s, timeout: 1s, rise: 1, fall: 2, holdDown: 0s}}
  - {name: web-only, action: redirect, sources: [172.16.0.0/16], destinations: [198.51.100.0/24], protocol: tcp, ports: ["81"], to: "172.31.1.2:3128",
     probes: {interval: 1s, timeout: 1s, rise: 1, fall: 2, holdDown: 0s}}
`

// begin builds the topology and applies the document to the hub.
func begin(t *testing.T) *world {
	l, err := lab.New(lab.Options{})
	w := &world{T: t}
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
	bin := daemon.Build(t, "../../..")
	w.hub, w.east, w.west = daemon.New(l.Node("hub"), bin), daemon.New(l.Node("east"), bin), daemon.New(l.Node("west"), bin)
	w.partner, w.inside, w.proxy = l.Node("partner"), l.Node("inside"), l.Node("proxy")
	w.partner.Bridge("lan", daemon.Prefixes("192.0.2.1/24")...)
	w.partner.Port("lan", lab.End{Node: w.hub.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")})
	w.partner.Port("lan", lab.End{Node: w.east.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.101/24")})
	w.partner.Port("lan", lab.End{Node: w.west.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.102/24")})
	l.Link(lab.End{Node: w.hub.Node, Name: "in0", Addrs: daemon.Prefixes("172.31.0.1/30")}, lab.End{Node: w.inside, Name: "r0", Addrs: daemon.Prefixes("172.31.0.2/30")})
	l.Link(lab.End{Node: w.hub.Node, Name: "px0", Addrs: daemon.Prefixes("172.31.1.1/30")}, lab.End{Node: w.proxy, Name: "r0", Addrs: daemon.Prefixes("172.31.1.2/30")})
	w.hub.IP("route add default via 192.0.2.1")
	w.hub.IP("route add 172.16.0.0/16 via 172.31.0.2")
	w.hub.IP("route add 10.77.0.0/24 via 172.31.0.2")
	w.inside.IP("route add default via 172.31.0.1")
	w.proxy.IP("route add default via 172.31.1.1")
	w.partner.IP("route add 10.77.0.0/24 via 192.0.2.100")
	for _, a := range []string{"198.51.100.7", "198.51.100.8", "10.99.0.1"} {
		w.partner.IP("addr add %s/32 dev lo", a)
	}
	for i := range sources {
		w.inside.IP("addr add 172.16.1.%d/32 dev lo", 10+i)
	}
	w.inside.IP("addr add 172.16.2.5/32 dev lo")
	w.inside.IP("addr add 10.77.0.1/32 dev lo")
	w.east.IP("addr add 10.1.0.10/32 dev lo")
	w.west.IP("addr add 10.1.0.10/32 dev lo")
	w.ok(l.Up(t.Context()))
	w.leaks, err = w.partner.Capture("", daemon.Prefixes("172.16.0.0/12", "10.1.0.0/24", "100.64.0.0/16", "169.254.0.0/16")...)
	w.ok(err)
	for _, to := range []string{service, "198.51.100.7:23", "198.51.100.7:80", "198.51.100.7:81", "10.99.0.1:443"} {
		w.serve(w.partner, "partner", to)
	}
	w.serve(w.inside, "server", "172.16.2.5:80")
	w.serve(w.east.Node, "east", "10.1.0.10:443")
	w.serve(w.west.Node, "west", "10.1.0.10:443")
	w.canary()

	hubPrivate, hubPublic := daemon.Key(t)
	w.document = "node: {name: hub}\nunderlay: {interface: wan, address: 192.0.2.100}\nattachments:\n" +
		"- {name: inside, interface: in0, sources: [172.16.0.0/16, 10.77.0.0/24, 172.31.0.0/30]}\n- {name: proxy, interface: px0, sources: [172.31.1.0/30]}\ntunnels:\n"
	for i, site := range []*daemon.Node{w.east, w.west} {
		private, public := daemon.Key(t)
		// The sockets of embedded devices are in one directory for all nodes, so no two tunnels
		// have one name.
		w.document += fmt.Sprintf("- {name: egress%d, inside: [{local: 169.254.80.%d/31}], wireguard: {privateKey: lane, peerPublicKey: %s, endpoint: \"192.0.2.10%d:51820\", listenPort: 5182%d}}\n", i, 2*i, public, 1+i, i)
		site.Args = []string{"-input", "keep"} // it is its own spoke's server
		site.Start(t)
		w.secret(site, private)
		site.Apply(w.T, fmt.Sprintf("node: {name: %s}\nunderlay: {interface: wan, address: 192.0.2.10%d}\ntunnels: [{name: egress%d, inside: [{local: 169.254.80.%d/31}], wireguard: {privateKey: lane, peerPublicKey: %s, endpoint: \"192.0.2.100:5182%d\", listenPort: 51820}}]\nstaticRoutes: [{prefix: 198.51.100.0/24, tunnels: [egress%[3]d]}, {prefix: 100.64.0.0/16, tunnels: [egress%[3]d]}]\n",
			site.Name, 1+i, 2+i, 2*i+1, hubPublic, i))
	}
	w.document += egress
	w.hub.Start(t)
	w.secret(w.hub, hubPrivate)
	w.hub.Apply(w.T, w.document)
	return w
}

func (w *world) secret(n *daemon.Node, value string) {
	w.Helper()
	_, err := n.CLI(w.Context(), value, "secret", "set", "lane")
	w.ok(err)
}

// policy edits single policies, waits until the edit is applied, and checks that the list of
// changes has the words.
func (w *world) policy(stdin, words string, args ...string) {
	w.Helper()
	out, err := w.hub.CLI(w.Context(), stdin, append([]string{"policy"}, args...)...)
	w.ok(err)
	if !strings.Contains(out, words) {
		w.Errorf("policy %v: no %q in\n%s", args, words, out)
	}
	w.hub.Settled(w.T)
}

// plan returns what a document would change.
func (w *world) plan(document string) string {
	w.Helper()
	out, err := w.hub.CLI(w.Context(), document, "plan", "-f", "-")
	if err == nil || out == "" { // its status says that there are changes
		w.Fatalf("plan: %v\n%s", err, out)
	}
	return out
}

// says waits until the output of a command of the hub has the words.
func (w *world) says(limit time.Duration, words string, command ...string) {
	w.Helper()
	w.ok(lab.Until(w.Context(), limit, func() error {
		out, err := w.hub.CLI(w.Context(), "", command...)
		if err == nil && !strings.Contains(strings.Join(strings.Fields(out), " "), words) {
			err = fmt.Errorf("no %q in\n%s", words, out)
		}
		return err
	}))
}

// serve accepts connections, sends its name and the client's address, and then echoes received
// data.
func (w *world) serve(n *lab.Node, name, address string) net.Listener {
	w.Helper()
	l, err := n.Listen("tcp", address)
	w.ok(err)
	w.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				host, _, _ := net.SplitHostPort(conn.RemoteAddr().String())
				fmt.Fprintln(conn, name, host)
				// without the pipe that splice(2) takes: there are many of these
				io.Copy(struct{ io.Writer }{conn}, conn)
			}()
		}
	}()
	return l
}

// canary answers every request with the address that it comes from.
func (w *world) canary() {
	l, err := w.partner.Listen("tcp", "198.51.100.8:80")
	w.ok(err)
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintln(rw, host)
	})}
	go server.Serve(l)
	w.Cleanup(func() { server.Close() })
}

// flow is a connection through the hub.
type flow struct {
	net.Conn
	r    *bufio.Reader
	seen string // name of the server, and the client's address as it sees it
}

// open connects from an address of a node.
func (w *world) open(n *lab.Node, from, to string) (*flow, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 2 * time.Second}
	f := &flow{}
	err := n.Do(func() (err error) { f.Conn, err = d.DialContext(w.Context(), "tcp", to); return err })
	if err != nil {
		return nil, err
	}
	w.Cleanup(func() { f.Close() })
	w.flows = append(w.flows, f)
	f.r = bufio.NewReader(f)
	f.SetDeadline(time.Now().Add(10 * time.Second))
	line, err := f.r.ReadString('\n')
	f.seen = strings.TrimSpace(line)
	return f, err
}

// want opens a connection and checks that the server sees it as one of these.
func (w *world) want(n *lab.Node, from, to string, seen ...string) *flow {
	w.Helper()
	f, err := w.open(n, from, to)
	if err != nil {
		w.Fatalf("from %s to %s: %v", from, to, err)
	}
	for _, s := range seen {
		if f.seen == s {
			return f
		}
	}
	w.Fatalf("from %s to %s: %q, want one of %q", from, to, f.seen, seen)
	return nil
}

// broken sends data through each flow and counts those through which it does not come back.
func broken(flows []*flow) (n int) {
	line := fmt.Sprintln(time.Now().UnixNano())
	deadline := time.Now().Add(20 * time.Second)
	for _, f := range flows {
		f.SetDeadline(deadline)
		io.WriteString(f, line)
	}
	for _, f := range flows {
		if got, err := f.r.ReadString('\n'); err != nil || got != line {
			n++
		}
	}
	return n
}

// TestEgress uses each kind of policy, and changes everything under live flows.
func TestEgress(t *testing.T) {
	w := begin(t)
	w.actions()
	w.proxyDown()
	w.proof()
	w.killedEdits()
	w.liveFlows()
	if n, who, err := w.leaks.Stop(); n > 0 || err != nil {
		t.Errorf("%d packets left with an inside source (%v): %v", n, who, err)
	}
}

const client = "172.16.1.10"

func (w *world) actions() {
	w.Log("as whom")
	asPool := []string{"partner " + first, "partner " + second}
	seen := map[string]bool{}
	for i := range sources {
		from := fmt.Sprintf("172.16.1.%d", 10+i)
		f := w.want(w.inside, from, service, asPool...)
		seen[f.seen] = true
		if i < 5 {
			w.want(w.inside, from, service, f.seen) // the same source, the same address
		}
	}
	if len(seen) != 2 {
		w.Errorf("%d sources are all seen as %v", sources, seen)
	}
	plain := w.want(w.inside, "10.77.0.1", "10.99.0.1:443", "partner 10.77.0.1")

	w.Log("refused")
	var timeout net.Error
	if _, err := w.open(w.inside, client, "198.51.100.7:25"); !errors.As(err, &timeout) || !timeout.Timeout() {
		w.Errorf("deny: %v", err)
	}
	// a server listens there
	if _, err := w.open(w.inside, client, "198.51.100.7:23"); !errors.Is(err, unix.ECONNREFUSED) {
		w.Errorf("reject: %v", err)
	}
	var udp net.Conn
	d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(client)}}
	w.ok(w.inside.Do(func() (err error) { udp, err = d.DialContext(w.Context(), "udp", "198.51.100.7:161"); return err }))
	defer udp.Close()
	udp.SetDeadline(time.Now().Add(time.Minute))
	_, err := udp.Write([]byte("?"))
	w.ok(err)
	if _, err := udp.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		w.Errorf("no error reports that UDP is rejected: %v", err)
	}

	w.Log("forwarded")
	w.want(w.partner, "198.51.100.7", first+":8080", "server 198.51.100.7")
	w.want(w.partner, "198.51.100.7", second+":8080", "server 198.51.100.7")
	w.want(w.inside, client, first+":8080", "server "+first)

	w.Log("two spokes with one prefix")
	var east *flow
	w.ok(lab.Until(w.Context(), 20*time.Second, func() (err error) { // the lanes come up
		east, err = w.open(w.east.Node, "10.1.0.10", "100.64.2.10:443")
		return err
	}))
	if east.seen != "west 100.64.1.10" {
		w.Errorf("from east to west: %s", east.seen)
	}
	west := w.want(w.west.Node, "10.1.0.10", "100.64.1.10:443", "east 100.64.2.10")
	out := []*flow{w.want(w.east.Node, "10.1.0.10", service, asPool...), w.want(w.west.Node, "10.1.0.10", service, asPool...)}
	if n := broken(append(out, east, west, plain)); n > 0 {
		w.Errorf("%d of 5 flows do not go on", n)
	}

	w.Log("for how long")
	var table *conntrack.Conn
	w.ok(w.hub.Do(func() (err error) { table, err = conntrack.Open(); return err }))
	defer table.Close()
	established := 0
	w.ok(table.Dump(w.Context(), unix.AF_INET, func(f *conntrack.Flow) bool {
		if f.TCPState == 3 && f.Original.Destination == netip.MustParseAddrPort(service) {
			established++
			if f.Timeout > 10*time.Minute {
				w.Errorf("%+v is remembered longer than 10m", f)
			}
		}
		return true
	}))
	if established < sources {
		w.Errorf("%d flows are known", established)
	}
}

// down waits until the given number of proxies is reported down, and the rules have not been
// written for a while: the report precedes the rules.
func (w *world) down(proxies int) {
	w.Helper()
	w.ok(lab.Until(w.Context(), 10*time.Second, func() error {
		out, err := w.hub.CLI(w.Context(), "", "get", "nat", "-o", "wide")
		if n := strings.Count(out, "(down)"); err == nil && n != proxies {
			err = fmt.Errorf("%d proxies are down, want %d:\n%s", n, proxies, out)
		}
		return err
	}))
	var last uint64
	since := time.Now()
	w.hub.Status(w.T, 10*time.Second, func(s *isthmusv1.SystemStatus) bool {
		if n := s.GetCounters().GetNftablesTransactions(); n != last {
			last, since = n, time.Now()
		}
		return time.Since(since) >= 300*time.Millisecond
	})
}

// proxyDown starts and stops the proxy.
func (w *world) proxyDown() {
	w.Log("a proxy")
	const to, strict = "198.51.100.7:80", "198.51.100.7:81"
	blocked := func() {
		w.Helper()
		w.ok(lab.Until(w.Context(), 10*time.Second, func() error {
			f, err := w.open(w.inside, client, strict)
			if err == nil {
				return fmt.Errorf("without a proxy: %s", f.seen)
			} else if !errors.Is(err, unix.ECONNREFUSED) { // a server listens there
				return err
			}
			return nil
		}))
	}
	direct := []string{"partner " + first, "partner " + second}
	// it has not been started yet
	w.says(10*time.Second, "172.31.1.2:3128 (down)", "get", "nat", "-o", "wide")
	w.says(10*time.Second, "ProxyDown", "describe", "node")
	w.want(w.inside, client, to, direct...)
	blocked()
	proxy := w.serve(w.proxy, "proxy", "172.31.1.2:3128")
	w.ok(lab.Until(w.Context(), 15*time.Second, func() error {
		f, err := w.open(w.inside, client, to)
		if err == nil && f.seen != "proxy "+client {
			err = errors.New(f.seen)
		}
		return err
	}))
	through := w.want(w.inside, client, to, "proxy "+client)
	w.ok(lab.Until(w.Context(), 10*time.Second, func() error { _, err := w.open(w.inside, client, strict); return err }))
	w.want(w.inside, client, strict, "proxy "+client)
	w.ok(proxy.Close())
	w.down(2)
	w.ok(lab.Until(w.Context(), 5*time.Second, func() error { _, err := w.open(w.inside, client, to); return err }))
	w.want(w.inside, client, to, direct...)
	blocked()
	if broken([]*flow{through}) > 0 {
		w.Error("a flow through the proxy was cut")
	}
}

// proof checks that the addresses are proved, and that no change of the rules goes unnoticed.
func (w *world) proof() {
	w.Log("proof")
	prove := []string{"egress", "prove", "--to", "198.51.100.0/24", "--canary", "http://198.51.100.8/ip"}
	holds := func() {
		w.Helper()
		out, err := w.hub.CLI(w.Context(), "", prove...)
		if err != nil {
			w.Fatalf("%v\n%s", err, out)
		}
		words := strings.Join(strings.Fields(out), " ")
		for _, want := range []string{": HOLDS ", "expected 192.0.2.10, 192.0.2.11 ", " now may be seen as 192.0.2.10, 192.0.2.11 ",
			"without 192.0.2.10 may be seen as 192.0.2.11 ", "without 192.0.2.11 may be seen as 192.0.2.10 ",
			"canary from 192.0.2.10: seen as 192.0.2.10", "canary from 192.0.2.11: seen as 192.0.2.11"} {
			if !strings.Contains(words, want) {
				w.Errorf("no %q in\n%s", want, out)
			}
		}
	}
	holds()
	dir, err := w.hub.Dir()
	w.ok(err)
	file := filepath.Join(dir, "proof.json")
	signed, err := w.hub.CLI(w.Context(), "", append(prove, "-o", "json")...)
	w.ok(err)
	w.ok(os.WriteFile(file, []byte(signed), 0o600))
	out, err := w.hub.CLI(w.Context(), "", "egress", "verify", file, "--authority", w.authority(w.hub))
	if err != nil || !strings.Contains(out, ": HOLDS") {
		w.Errorf("the proof cannot be verified: %v\n%s", err, out)
	}
	if out, err := w.hub.CLI(w.Context(), "", "egress", "verify", file, "--authority", w.authority(w.east)); err == nil {
		w.Errorf("another node's authority verifies it:\n%s", out)
	}

	broken := func(how string) {
		w.Helper()
		if out, err := w.hub.CLI(w.Context(), "", prove...); err == nil || !strings.Contains(out, "DOES NOT HOLD") || !strings.Contains(out, "violation: ") {
			w.Errorf("%s: %v\n%s", how, err, out)
		}
	}
	run := func(words ...string) {
		w.Helper()
		_, err := w.hub.Exec(w.Context(), words...)
		w.ok(err)
	}
	nft := func(command string) { w.Helper(); run("nft", command) }
	table := func() string {
		w.Helper()
		out, err := w.hub.Exec(w.Context(), "nft", "list", "table", "inet", "isthmus")
		if err != nil {
			return err.Error()
		}
		return out
	}
	w.Log("changes of the rules are undone at once")
	for command, trace := range map[string]string{
		"add element inet isthmus own4 { 172.16.1.10 }":                              "own4 {",
		"insert rule inet isthmus egress ip saddr 172.16.1.11 snat ip to 192.0.2.99": "192.0.2.99",
		"insert rule inet isthmus guard accept":                                      "chain guard",
	} {
		before := section(table(), trace)
		nft(command)
		w.ok(lab.Until(w.Context(), 30*time.Second, func() error {
			if now := section(table(), trace); now != before {
				return fmt.Errorf("after %s:\n%s", command, now)
			}
			return nil
		}))
	}
	holds()
	w.Log("changes elsewhere are reported")
	for _, k := range []struct{ what, change, undo string }{
		{"another table translates", "nft table ip evil { chain p { type nat hook postrouting priority 50; oifname wan masquerade; }; }", "nft delete table ip evil"},
		{"another table writes a source behind the guard", "nft table ip evil { chain p { type filter hook postrouting priority 310; ip saddr set 10.66.66.66; }; }", "nft delete table ip evil"},
		{"a route leads elsewhere", "ip route add 198.51.100.0/25 via 172.31.0.2", "ip route del 198.51.100.0/25"},
		{"the default route leads elsewhere", "ip route replace default via 172.31.0.2", "ip route replace default via 192.0.2.1"},
		{"a routing rule", "ip rule add from 172.16.0.0/16 lookup 100", "ip rule del from 172.16.0.0/16 lookup 100"},
	} {
		run(strings.Fields(k.change)...)
		broken(k.what)
		run(strings.Fields(k.undo)...)
		holds()
	}
	w.forwardedCanary(prove, run)
	w.hub.Kill()
	w.hub.Start(w.T)
	w.hub.Settled(w.T)
	holds()
}

// forwardedCanary calls from inside. Such a call shows a rule of another table for forwarded
// packets, and a call of the node does not.
func (w *world) forwardedCanary(prove []string, run func(...string)) {
	const from = "172.16.255.254"
	w.Log("a canary from inside")
	forwarded := append(slices.Clone(prove), "--canary-from", from)
	trace := func() string {
		w.Helper()
		out, err := w.hub.Exec(w.Context(), "ip", "route", "show", "table", "all")
		w.ok(err)
		links, err := w.hub.Exec(w.Context(), "ip", "link")
		w.ok(err)
		return section(out+links, "canary0") + section(out, from)
	}
	out, err := w.hub.CLI(w.Context(), "", forwarded...)
	if err != nil || !strings.Contains(out, ": HOLDS") || !strings.Contains(out, "canary from "+from+": seen as "+first+"\n") && !strings.Contains(out, "canary from "+from+": seen as "+second+"\n") || strings.Contains(out, "canary from 192.0.2") {
		w.Errorf("from %s: %v\n%s", from, err, out)
	}
	if left := trace(); left != "" {
		w.Errorf("left over: %s", left)
	}
	run("nft", "table ip evil { chain f { type filter hook forward priority 0; oifname wan meta mark set 7; }; chain p { type nat hook postrouting priority 50; meta mark 7 masquerade; }; }")
	out, err = w.hub.CLI(w.Context(), "", forwarded...)
	if err == nil || !strings.Contains(out, "canary from "+from+": seen as 192.0.2.100\n") || !strings.Contains(out, "violation: the canary called from "+from) {
		w.Errorf("others masquerade what is forwarded: %v\n%s", err, out)
	}
	out, err = w.hub.CLI(w.Context(), "", prove...)
	if err == nil || !strings.Contains(out, "canary from 192.0.2.10: seen as 192.0.2.10") || !strings.Contains(out, "canary from 192.0.2.11: seen as 192.0.2.11") || strings.Contains(out, "violation: the canary") {
		w.Errorf("others masquerade what is forwarded, and the node calls: %v\n%s", err, out)
	}
	run("nft", "delete table ip evil")

	w.Log("the daemon dies while a canary calls")
	silent, err := w.partner.Listen("tcp", "198.51.100.8:8081")
	w.ok(err)
	defer silent.Close()
	went := make(chan error, 1)
	go func() {
		_, err := w.hub.CLI(w.Context(), "", "egress", "prove", "--to", "198.51.100.0/24", "--canary", "http://198.51.100.8:8081/ip", "--canary-from", from)
		went <- err
	}()
	called := make(chan net.Conn, 1)
	go func() {
		if conn, err := silent.Accept(); err == nil {
			called <- conn
		}
	}()
	select {
	case conn := <-called:
		defer conn.Close()
	case err := <-went:
		w.Fatalf("the canary was not called: %v", err)
	}
	if trace() == "" {
		w.Error("canary0 is missing while a canary calls")
	}
	w.hub.Kill()
	if err := <-went; err == nil {
		w.Error("a proof came from a daemon that died")
	}
	w.ok(lab.Until(w.Context(), 20*time.Second, func() error {
		if left := trace(); left != "" {
			return fmt.Errorf("left over: %s", left)
		}
		return nil
	}))
	w.hub.Start(w.T)
	w.hub.Settled(w.T)
}

// section returns the text after some words, up to the end of the paragraph; empty when they are
// missing.
func section(text, words string) string {
	i := strings.Index(text, words)
	if i < 0 {
		return ""
	}
	part, _, _ := strings.Cut(text[i:], "\n\n")
	return part
}

// authority returns a file with the certificate of a node's authority.
func (w *world) authority(n *daemon.Node) string {
	dir, err := n.Dir()
	w.ok(err)
	data, err := os.ReadFile(filepath.Join(dir, "state", "admin.yaml"))
	w.ok(err)
	var admin struct{ Authority string }
	w.ok(yaml.Unmarshal(data, &admin))
	file := filepath.Join(dir, "authority.pem")
	w.ok(os.WriteFile(file, []byte(admin.Authority), 0o600))
	return file
}

// liveFlows changes the document under 5,000 flows.
func (w *world) liveFlows() {
	const n = 5000
	for _, f := range w.flows {
		f.Close()
	}
	began := time.Now()
	var flows, plain, forwarded []*flow
	as := map[string]int{}
	for i := range n {
		f, err := w.open(w.inside, fmt.Sprintf("172.16.1.%d", 10+i%sources), service)
		w.ok(err)
		flows = append(flows, f)
		as[f.seen]++
	}
	for range 20 {
		plain = append(plain, w.want(w.inside, "10.77.0.1", "10.99.0.1:443", "partner 10.77.0.1"))
		// A flow from inside to the second address never leaves with it, and outlives it.
		forwarded = append(forwarded, w.want(w.partner, "198.51.100.7", first+":8080", "server 198.51.100.7"), w.want(w.inside, client, second+":8080", "server "+second))
		flows = append(flows, w.want(w.partner, "198.51.100.7", second+":8080", "server 198.51.100.7"))
	}
	w.Logf("%d flows are up after %v: %v", n, time.Since(began).Round(time.Millisecond), as)
	unbroken := func(when string) {
		w.Helper()
		if n := broken(slices.Concat(plain, forwarded, flows)); n > 0 {
			w.Fatalf("%s: %d flows are broken", when, n)
		}
	}
	unbroken("at first")
	document := w.document
	edit := func(old, next string) string {
		if strings.Count(document, old) != 1 {
			w.Fatalf("%q is not once in\n%s", old, document)
		}
		return strings.Replace(document, old, next, 1)
	}
	harmless := func(what, next string) {
		w.Helper()
		if out := w.plan(next); strings.Contains(out, " end") {
			w.Errorf("%s: flows are said to end:\n%s", what, out)
		}
		document = next
		w.hub.Apply(w.T, document)
		unbroken(what)
	}
	harmless("an address more, and other weights", edit("{address: 192.0.2.11}]", "{address: 192.0.2.11, weight: 3}, {address: 192.0.2.12}]"))
	harmless("everybody is denied", edit("  - {name: dark,", "  - {name: blocked, action: deny, sources: [172.16.0.0/16], destinations: [198.51.100.7/32]}\n  - {name: dark,"))
	if f, err := w.open(w.inside, client, service); err == nil {
		w.Errorf("a new flow is seen as %q", f.seen)
	}
	harmless("and no more", edit("  - {name: blocked, action: deny, sources: [172.16.0.0/16], destinations: [198.51.100.7/32]}\n", ""))
	w.policy("policies: [{name: blocked, action: deny, sources: [172.16.0.0/16], destinations: [198.51.100.7/32]}]", "+ add", "set", "-f", "-")
	unbroken("one policy more")
	if f, err := w.open(w.inside, client, service); err == nil {
		w.Errorf("one policy more: a new flow is seen as %q", f.seen)
	}
	w.policy("", "- remove", "delete", "blocked")
	unbroken("and one less")
	w.want(w.inside, client, service, "partner "+first, "partner "+second).Close()
	if text, err := w.hub.CLI(w.Context(), "", "get", "spec"); err != nil || text != document {
		w.Errorf("the document is another one after a policy came and went (%v):\n%s", err, text)
	}
	harmless("other timeouts, another server", strings.Replace(edit("tcpEstablished: 10m", "tcpEstablished: 20m"), "172.16.2.5:80", "172.16.2.5:81", 1))

	w.hub.Kill()
	unbroken("the daemon is dead")
	w.hub.Start(w.T)
	w.hub.Settled(w.T)
	unbroken("the daemon is back")

	ends := func(what, next, want string, which []*flow) {
		w.Helper()
		if out := w.plan(next); !strings.Contains(out, want) {
			w.Errorf("%s: no %q in\n%s", what, want, out)
		}
		document = next
		if out := w.hub.Apply(w.T, document); !strings.Contains(out, want) {
			w.Errorf("%s: no %q in the answer:\n%s", what, want, out)
		}
		if n := broken(which); n != len(which) {
			w.Errorf("%s: %d of %d flows are broken, want all", what, n, len(which))
		}
	}
	if out, err := w.hub.CLI(w.Context(), "", "policy", "delete", "plain", "--plan"); err == nil || !strings.Contains(out, "20 flows without translation end") {
		w.Errorf("a policy to delete: %v\n%s", err, out)
	}
	ends("no flow keeps its source", edit("  - {name: plain, action: no-nat, sources: [10.77.0.0/24], destinations: [10.99.0.0/24]}\n", ""), "20 flows without translation end", plain)
	plain = nil
	unbroken("the others")
	var leaving, staying []*flow
	for _, f := range flows {
		if f.seen == "partner "+second || f.seen == "server 198.51.100.7" {
			leaving = append(leaving, f)
		} else {
			staying = append(staying, f)
		}
	}
	// A canary that the node itself called from the address is a flow from it too, and may still
	// have a conntrack entry. Its socket ended with the daemon that was killed; without such a flow
	// the command fails.
	if out, err := w.hub.Exec(w.Context(), "conntrack", "-D", "-s", second); err == nil {
		w.Logf("flows of the node itself: %s", out)
	}
	ends("an address goes", edit(", {address: 192.0.2.11, weight: 3}", ""), fmt.Sprintf("%d,%03d flows from %s end", len(leaving)/1000, len(leaving)%1000, second), leaving)
	flows = staying
	unbroken("the others")
	w.Logf("%d flows ended as planned, %d are left", len(leaving), len(staying))
}

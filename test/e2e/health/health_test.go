// Package health has a node whose pool addresses become unhealthy, with a spoke behind a WireGuard
// lane that has BIRD, and a partner. Of the kernel it needs only TUN. Ring: namespace; needs root.
package health

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/test/vm"
)

const (
	service = "198.51.100.7" // and .9 and .10, port 443
	first   = "192.0.2.10"
	second  = "192.0.2.11"
)

// world is a running topology.
type world struct {
	*testing.T
	hub, site *daemon.Node
	partner   *lab.Node
	bird      *peer.BIRD
	leaks     *lab.Capture

	mu   sync.Mutex
	sick map[string]bool
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// begin builds the topology and applies a document with this egress part to the hub.
func begin(t *testing.T, egress string) *world {
	w := &world{T: t, sick: map[string]bool{}}
	img, err := vm.Build(t.Context(), t.Output())
	w.ok(err)
	l, err := lab.New(lab.Options{Root: img.Tree()})
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
	w.hub, w.site, w.partner = daemon.New(l.Node("hub"), bin), daemon.New(l.Node("site"), bin), l.Node("partner")
	w.site.Args = []string{"-bgp-port", "1790"} // 179 is BIRD's
	w.partner.Bridge("lan", daemon.Prefixes("192.0.2.1/24")...)
	w.partner.Port("lan", lab.End{Node: w.hub.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")})
	w.partner.Port("lan", lab.End{Node: w.site.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.101/24")})
	w.hub.IP("route add default via 192.0.2.1")
	for _, a := range []string{"198.51.100.7", "198.51.100.8", "198.51.100.9", "198.51.100.10", "198.51.100.53"} {
		w.partner.IP("addr add %s/32 dev lo", a)
	}
	for i := range 16 {
		w.site.IP("addr add 172.16.1.%d/32 dev lo", 10+i)
	}
	w.ok(l.Up(t.Context()))
	w.leaks, err = w.partner.Capture("", daemon.Prefixes("172.16.0.0/12", "169.254.0.0/16")...)
	w.ok(err)

	w.serve()
	hubPrivate, hubPublic := daemon.Key(t)
	sitePrivate, sitePublic := daemon.Key(t)
	tunnel := "tunnels: [{name: health%d, sources: [0.0.0.0/0], inside: [{local: 169.254.80.%[1]d/31}], wireguard: {privateKey: lane, peerPublicKey: %s, endpoint: \"192.0.2.10%d:51820\", listenPort: 51820}}]\n"
	w.site.Start(t)
	w.apply(w.site, sitePrivate, "node: {name: site}\nunderlay: {interface: wan, address: 192.0.2.101}\n"+fmt.Sprintf(tunnel, 1, hubPublic, 0))
	w.hub.Start(t)
	w.apply(w.hub, hubPrivate, "node: {name: hub, asn: 64600}\nunderlay: {interface: wan, address: 192.0.2.100}\n"+fmt.Sprintf(tunnel, 0, sitePublic, 1)+
		"peers: [{name: site, tunnel: health0, asn: 65001, holdTime: 9s, import: {allow: [{prefix: 172.16.1.0/24}]}, export: {allow: [{prefix: 0.0.0.0/0}]}}]\n"+egress)
	w.bird, err = peer.StartBIRD(t.Context(), w.site.Node, peer.BGPConfig{
		ASN: 65001, RouterID: netip.MustParseAddr("172.16.1.10"), Announce: daemon.Prefixes("172.16.1.0/24"), Neighbors: []peer.Neighbor{{
			Name: "hub", Local: netip.MustParseAddr("169.254.80.1"), Remote: netip.MustParseAddr("169.254.80.0"), ASN: 64600, Hold: 9 * time.Second}}})
	w.ok(err)
	return w
}

func (w *world) apply(n *daemon.Node, private, document string) {
	w.Helper()
	if private != "" {
		_, err := n.CLI(w.Context(), private, "secret", "set", "lane")
		w.ok(err)
	}
	_, err := n.CLI(w.Context(), document, "apply", "-f", "-")
	w.ok(err)
}

// serve starts the partner's service, which sends the client's address and then echoes received
// data, and a health check that some clients fail.
func (w *world) serve() {
	for _, address := range []string{service, "198.51.100.9", "198.51.100.10"} {
		l, err := w.partner.Listen("tcp", address+":443")
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
					fmt.Fprintln(conn, host)
					io.Copy(conn, conn)
				}()
			}
		}()
	}
	h, err := w.partner.Listen("tcp", "198.51.100.8:80")
	w.ok(err)
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.sick[host] {
			rw.WriteHeader(http.StatusServiceUnavailable)
		}
	})}
	go server.Serve(h)
	w.Cleanup(func() { server.Close() })
}

func (w *world) setSick(address string, sick bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sick[address] = sick
}

// flow is a connection from the site to the partner.
type flow struct {
	net.Conn
	r    *bufio.Reader
	seen string // the client's address as the partner sees it
}

// open connects from a source of the site to an address of the partner.
func (w *world) open(source int, to string) (*flow, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(172, 16, 1, byte(10+source))}, Timeout: 3 * time.Second}
	f := &flow{}
	err := w.site.Do(func() (err error) { f.Conn, err = d.DialContext(w.Context(), "tcp", to+":443"); return err })
	if err != nil {
		return nil, err
	}
	w.Cleanup(func() { f.Close() })
	f.r = bufio.NewReader(f)
	f.SetDeadline(time.Now().Add(30 * time.Second))
	line, err := f.r.ReadString('\n')
	f.seen = strings.TrimSpace(line)
	return f, err
}

// alive sends data there and back.
func (f *flow) alive() error {
	f.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := fmt.Fprintln(f, "ping"); err != nil {
		return err
	}
	line, err := f.r.ReadString('\n')
	if err == nil && line != "ping\n" {
		err = fmt.Errorf("got %q", line)
	}
	return err
}

// seen opens a flow from each source, and returns an error unless those in zone a leave as one
// address and those in zone b as another.
func (w *world) seen(a, b string) (flows []*flow, err error) {
	for i := range 16 {
		f, err := w.open(i, service)
		if err != nil {
			return nil, err
		}
		want := a
		if 10+i >= 16 {
			want = b
		}
		if f.seen != want {
			return nil, fmt.Errorf("a flow from 172.16.1.%d leaves as %s, want %s", 10+i, f.seen, want)
		}
		flows = append(flows, f)
	}
	return flows, nil
}

// wantSeen checks that the condition of seen holds now.
func (w *world) wantSeen(a, b string) []*flow {
	w.Helper()
	flows, err := w.seen(a, b)
	w.ok(err)
	return flows
}

// untilSeen waits for the condition of seen: the health of an address is in the rules a moment
// after it is shown.
func (w *world) untilSeen(a, b string) {
	w.Helper()
	w.ok(lab.Until(w.Context(), 5*time.Second, func() error { _, err := w.seen(a, b); return err }))
}

func (w *world) wantAlive(flows []*flow) {
	w.Helper()
	for _, f := range flows {
		if err := f.alive(); err != nil {
			w.Errorf("a flow as %s ended: %v", f.seen, err)
		}
	}
}

// until waits for words in the output of a command, or for the absence of those behind "not ".
func (w *world) until(limit time.Duration, words []string, command ...string) {
	w.Helper()
	w.ok(lab.Until(w.Context(), limit, func() error {
		out, err := w.hub.CLI(w.Context(), "", command...)
		for _, word := range words {
			if not, ok := strings.CutPrefix(word, "not "); ok && err == nil && strings.Contains(out, not) {
				err = fmt.Errorf("%q in\n%s", not, out)
			} else if !ok && err == nil && !strings.Contains(strings.Join(strings.Fields(out), " "), word) {
				err = fmt.Errorf("no %q in\n%s", word, out)
			}
		}
		return err
	}))
}

// untilDefault waits until BIRD has the default route, or no longer has it.
func (w *world) untilDefault(there bool) {
	w.Helper()
	w.ok(lab.Until(w.Context(), 60*time.Second, func() error {
		out, err := w.bird.Command("show route 0.0.0.0/0")
		if has := err == nil && strings.Contains(out, "0.0.0.0/0"); has != there {
			return fmt.Errorf("the default route is there: %v, want %v: %v %s", has, there, err, out)
		}
		return nil
	}))
}

func TestHealth(t *testing.T) {
	w := begin(t, `egress:
  zones: [{name: a, sources: [172.16.1.8/29]}, {name: b, sources: [172.16.1.16/28]}]
  pools:
  - name: partner
    addresses: [{address: 192.0.2.10, zone: a}, {address: 192.0.2.11, zone: b}]
    probes: {targets: ["http://198.51.100.8/health"], interval: 1s, timeout: 1s, rise: 2, fall: 2, holdDown: 6s}
    announce: [0.0.0.0/0]
  policies: [{name: all, sources: [172.16.0.0/12], pool: partner}]
`)
	w.untilDefault(true)
	w.until(10*time.Second, []string{first + " " + first + " a 1 healthy", second + " " + second + " b 1 healthy"}, "get", "pools")
	socket := filepath.Join(filepath.Dir(w.hub.Process.Log), "run", "api.sock")
	watch, err := w.hub.Node.Start("watch", w.hub.Program("isthmus"), "--socket", socket, "watch", "pools")
	w.ok(err)
	old := w.wantSeen(first, second)
	w.wantAlive(old)

	// One address fails its check: new flows of its zone leave by the other, old ones go on.
	w.setSick(first, true)
	w.until(10*time.Second, []string{first + " " + first + " a 1 down", "503 Service Unavailable", second + " " + second + " b 1 healthy"}, "get", "pools")
	w.until(5*time.Second, []string{"PoolDegraded", "503 Service Unavailable"}, "describe", "node")
	w.until(5*time.Second, []string{"health: down", "target: http://198.51.100.8:80/health state: down"}, "describe", "pool", "partner")
	w.untilSeen(second, second)
	w.wantAlive(old)

	// A restarted daemon detects that again, and breaks nothing. The embedded device of the lane is
	// also new.
	w.hub.Kill()
	w.hub.Start(t)
	w.until(15*time.Second, []string{first + " " + first + " a 1 down"}, "get", "pools")
	w.untilDefault(true)
	w.until(60*time.Second, []string{"established"}, "get", "peers")
	w.wantAlive(old)
	w.untilSeen(second, second)

	// The other one too: the route is withdrawn, so that the spoke may use another node. Addresses
	// stay in use.
	w.setSick(second, true)
	w.untilDefault(false)
	w.until(5*time.Second, []string{"PoolDown"}, "describe", "node")
	w.until(5*time.Second, []string{"0.0.0.0/0 (withdrawn)"}, "get", "pools", "-o", "wide")

	// It comes back, but only when it has been healthy for a while.
	w.setSick(second, false)
	began := time.Now()
	w.until(10*time.Second, []string{second + " " + second + " b 1 returning"}, "get", "pools")
	w.untilDefault(true)
	if held := time.Since(began); held < 6*time.Second {
		t.Errorf("it was back after %v", held)
	}
	w.untilSeen(second, second)
	w.setSick(first, false)
	w.until(10*time.Second, []string{first + " " + first + " a 1 returning"}, "get", "pools")
	w.wantSeen(second, second)
	w.until(15*time.Second, []string{first + " " + first + " a 1 healthy"}, "get", "pools")
	w.untilSeen(first, second)
	w.wantAlive(old)

	log, err := os.ReadFile(watch.Log)
	if text := strings.Join(strings.Fields(string(log)), " "); err != nil || !strings.Contains(text, "updated partner 1/2 0.0.0.0/0 192.0.2.10 down, 192.0.2.11 healthy") {
		t.Errorf("watch: %v\n%s", err, log)
	}
	if n, who, err := w.leaks.Stop(); n > 0 || err != nil {
		t.Errorf("%d packets left with an inside source (%v): %v", n, who, err)
	}
}

// reaches waits until a flow to an address of the partner can be opened, or no longer can: the
// addresses of a name are in the kernel a moment after they are known.
func (w *world) reaches(to string, want bool) (f *flow) {
	w.Helper()
	w.ok(lab.Until(w.Context(), 5*time.Second, func() (err error) {
		if f, err = w.open(0, to); (err == nil) != want {
			return fmt.Errorf("%s can be reached: %v, want %v: %w", to, err == nil, want, err)
		}
		return nil
	}))
	return f
}

// serveNames starts dnsmasq at the partner with these hosts.
func (w *world) serveNames(hosts string) *lab.Process {
	w.Helper()
	dir, err := w.partner.Dir()
	w.ok(err)
	file := filepath.Join(dir, "hosts")
	w.ok(os.WriteFile(file, []byte(hosts), 0o644))
	p, err := w.partner.Start("dnsmasq", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--addn-hosts="+file,
		"--listen-address=198.51.100.53", "--local=/example/", "--bind-interfaces", "--local-ttl=1", "--pid-file=", "--user=root", "--cname=www.partner.example,api.partner.example")
	w.ok(err)
	return p
}

// ask sends a query for an IPv4 address from a node and returns whether there was an answer, and
// with how many addresses.
func (w *world) ask(from *lab.Node, server, name string) (addresses int, err error) {
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: 7, RecursionDesired: true})
	w.ok(b.StartQuestions())
	w.ok(b.Question(dnsmessage.Question{Name: dnsmessage.MustNewName(name + "."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}))
	query, err := b.Finish()
	w.ok(err)
	conn, err := from.DialContext(w.Context(), "udp", server+":53")
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := conn.Write(query); err != nil {
		return 0, err
	}
	buffer := make([]byte, 4096)
	n, err := conn.Read(buffer)
	if err != nil {
		return 0, err
	}
	var m dnsmessage.Message
	err = m.Unpack(buffer[:n])
	return len(m.Answers), err
}

func TestNames(t *testing.T) {
	w := begin(t, `announce: [0.0.0.0/0]
egress:
  resolvers: [198.51.100.53]
  nameFloor: 1s
  nameGrace: 1h
  dnsProxy: {listen: [169.254.80.0, 10.99.0.53]}
  pools: [{name: partner, addresses: [{address: 192.0.2.10}]}]
  policies: [{name: partner, sources: [172.16.0.0/12], names: [www.partner.example, "*.example.com"], pool: partner}]
`)
	w.untilDefault(true)
	w.until(15*time.Second, []string{"DNSProxyDown", "10.99.0.53"}, "describe", "node")
	_, err := w.hub.Exec(t.Context(), "ip", "addr", "add", "10.99.0.53/32", "dev", "lo")
	w.ok(err)
	w.until(15*time.Second, []string{"not DNSProxyDown"}, "describe", "node")
	w.until(10*time.Second, []string{"www.partner.example partner -", "connection refused"}, "get", "names")
	w.reaches(service, false)

	// A name behind an alias; the server answers.
	server := w.serveNames("198.51.100.7 api.partner.example\n")
	w.until(15*time.Second, []string{"www.partner.example partner 198.51.100.7"}, "get", "names")
	old := w.reaches(service, true)
	w.reaches("198.51.100.9", false)
	w.until(5*time.Second, []string{"www.partner.example,*.example.com"}, "get", "nat")

	// It has another address: the old one is not a destination any more, but flows under way go on.
	server.Signal(unix.SIGTERM)
	<-server.Done()
	hosts := "198.51.100.9 api.partner.example\n198.51.100.10 new.example.com\n"
	for i := range 499 { // more than fits into a UDP message
		hosts += fmt.Sprintf("203.0.%d.%d api.partner.example\n", 112+i/250, i%250)
	}
	server = w.serveNames(hosts)
	w.until(15*time.Second, []string{"www.partner.example partner 198.51.100.9,203.0.112.0,203.0.112.1,203.0.112.2 and 496 more"}, "get", "names")
	w.reaches("198.51.100.9", true)
	w.reaches(service, false)
	w.wantAlive([]*flow{old})

	// A spoke reaches an address at once after the answer.
	w.reaches("198.51.100.10", false)
	if n, err := w.ask(w.site.Node, "169.254.80.0", "new.example.com"); n != 1 || err != nil {
		t.Fatalf("%d answers, %v", n, err)
	}
	told, err := w.open(0, "198.51.100.10")
	w.ok(err)
	w.until(5*time.Second, []string{"*.example.com partner 198.51.100.10 "}, "get", "names")

	if n, err := w.ask(w.site.Node, "10.99.0.53", "new.example.com"); n != 1 || err != nil {
		t.Errorf("at the node's address: %d answers, %v", n, err)
	}

	// The proxy is there for spokes alone: neither the node's addresses nor the inside address
	// answers on the underlay.
	for _, address := range []string{"169.254.80.0", "10.99.0.53"} {
		_, err = w.partner.Exec(t.Context(), "ip", "route", "add", address+"/32", "via", "192.0.2.100")
		w.ok(err)
	}
	for _, address := range []string{"192.0.2.100", "192.0.2.10", "169.254.80.0", "10.99.0.53"} {
		if n, err := w.ask(w.partner, address, "new.example.com"); err == nil {
			t.Errorf("%s gives strangers %d answers", address, n)
		}
	}

	// No server answers, and the daemon restarts: the last addresses stay.
	server.Signal(unix.SIGTERM)
	<-server.Done()
	w.until(15*time.Second, []string{"NameUnresolved"}, "describe", "node")
	w.hub.Kill()
	w.hub.Start(t)
	w.until(60*time.Second, []string{"established"}, "get", "peers")
	w.untilDefault(true)
	w.wantAlive([]*flow{old, told})
	w.reaches("198.51.100.9", true)
	w.until(5*time.Second, []string{"www.partner.example partner 198.51.100.9,"}, "get", "names")

	// NXDOMAIN from a server takes effect.
	w.serveNames("198.51.100.7 other.example\n")
	// it has no address now, and had this one a moment ago
	w.until(15*time.Second, []string{"www.partner.example partner - ", "198.51.100.9 ("}, "get", "names", "-o", "wide")
	w.reaches("198.51.100.9", false)
	w.wantAlive([]*flow{old, told})
	if n, who, err := w.leaks.Stop(); n > 0 || err != nil {
		t.Errorf("%d packets left with an inside source (%v): %v", n, who, err)
	}
}

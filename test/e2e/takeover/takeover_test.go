// Package takeover has two nodes that share public addresses, a site with WireGuard lanes to both,
// and a partner that accepts only these addresses. One node loses its power under load. Of the
// kernel it needs only TUN. Ring: namespace; needs root.
package takeover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
)

const (
	flows   = 5000
	service = "198.51.100.7:443"
)

// shared returns one of the addresses that the nodes share.
func shared(i int) string { return fmt.Sprintf("203.0.113.%d", 5+i) }

type end struct{ private, public string }

func key(t *testing.T) (e end) {
	e.private, e.public = daemon.Key(t)
	return e
}

type world struct {
	*testing.T
	a, b, site *daemon.Node
	partner    *lab.Node
	leaks      *lab.Capture
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) cli(n *daemon.Node, args ...string) string {
	out, err := n.CLI(w.Context(), "", args...)
	if err != nil {
		return err.Error()
	}
	return out
}

// begin starts the world with a pool of some addresses, and with probes as a document has them. The
// nodes watch each other over a link of three lanes and outside it, or over one tunnel.
func begin(t *testing.T, addresses int, probes string, linked bool) *world {
	w := &world{T: t}
	l, err := lab.New(lab.Options{})
	w.ok(err)
	bin := daemon.Build(t, "../../..")
	w.a, w.b, w.site, w.partner = daemon.New(l.Node("a"), bin), daemon.New(l.Node("b"), bin), daemon.New(l.Node("site"), bin), l.Node("partner")
	nodes := map[string]*daemon.Node{"a": w.a, "b": w.b, "site": w.site}
	t.Cleanup(func() {
		if t.Failed() {
			for name, n := range nodes {
				if n.Process != nil {
					log, _ := os.ReadFile(n.Process.Log)
					t.Logf("%s: %s", name, log)
				}
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	address := map[string]string{"a": "192.0.2.100", "b": "192.0.2.101", "site": "192.0.2.102"}
	w.partner.Bridge("lan", daemon.Prefixes("192.0.2.1/24")...)
	for name, n := range nodes {
		w.partner.Port("lan", lab.End{Node: n.Node, Name: "wan", Addrs: daemon.Prefixes(address[name] + "/24")})
		n.IP("route add default via 192.0.2.1")
	}
	w.partner.IP("addr add 198.51.100.7/32 dev lo")
	var take, move, pool []string
	for i := range addresses {
		w.partner.IP("route add %s/32 via %s", shared(i), address["a"])
		take, pool = append(take, shared(i)+"="+shared(i)), append(pool, "{address: "+shared(i)+"}")
	}
	for i := range 10 {
		w.site.IP("addr add 172.16.1.%d/32 dev lo", 10+i)
	}
	w.ok(l.Up(t.Context()))
	w.leaks, err = w.partner.Capture("", daemon.Prefixes("172.16.0.0/12", "169.254.0.0/16")...)
	w.ok(err)
	w.echo()

	// A route of the partner replaces the call of a cloud's API here.
	dir, err := w.partner.Dir()
	w.ok(err)
	for _, name := range []string{"a", "b"} {
		mover := filepath.Join(dir, "mover-"+name)
		move = nil
		for i := range addresses {
			move = append(move, fmt.Sprintf("route replace %s/32 via %s", shared(i), address[name]))
		}
		w.ok(os.WriteFile(mover, fmt.Appendf(nil, "#!/bin/sh\n[ \"$*\" = 'take %s' ] || exit 1\nexec nsenter --net=/run/netns/%s ip -b - <<end\n%s\nend\n",
			strings.Join(take, " "), w.partner.Namespace, strings.Join(move, "\n")), 0o755))
		nodes[name].Args = []string{"-mover", mover}
	}
	keys := map[string]end{"a": key(t), "b": key(t), "site": key(t)}
	lane := func(me, you string, local string, port int) string {
		return fmt.Sprintf("- {name: tk-%s-%s, inside: [{local: %s}], wireguard: {privateKey: lane, peerPublicKey: %s, endpoint: \"%s:%d\", listenPort: %d}}\n",
			me, you, local, keys[you].public, address[you], port, port)
	}
	// between returns what joins the two nodes, and where the takeover watches.
	between := func(me, you, local string, remote int) (joined, watch string) {
		if !linked {
			return lane(me, you, local, 51822), fmt.Sprintf("watch: [169.254.82.%d]", remote)
		}
		return fmt.Sprintf("links: [{name: pair, node: %s, lanes: 3, inside: [169.254.96.0/26], wireguard: {privateKey: lane, peerPublicKey: %s, endpoint: \"%s:51900\", listenPort: 51900}}]\n",
			you, keys[you].public, address[you]), "link: pair"
	}
	joinedA, watchA := between("a", "b", "169.254.82.0/31", 1)
	joinedB, watchB := between("b", "a", "169.254.82.1/31", 0)
	egress := `egress:
  pools:
  - name: partner
    addresses: [%s]
    probes: {targets: ["icmp://198.51.100.7"]%s}
    announce: [198.51.100.0/24]
  policies: [{name: all, sources: [172.16.0.0/12], pool: partner, pickup: true}]
  takeover: {%s}
  log: {}
`
	peering := "peers: [{name: site, tunnel: tk-%s-site, asn: 65001, holdTime: 9s, import: {allow: [{prefix: 172.16.1.0/24}]}, export: {allow: [{prefix: 198.51.100.0/24}]}}]\n"
	documents := map[string]string{
		"a": "node: {name: a, asn: 64601}\nunderlay: {interface: wan, address: 192.0.2.100}\ntunnels:\n" +
			lane("a", "site", "169.254.80.0/31", 51820) + joinedA + fmt.Sprintf(peering, "a") + fmt.Sprintf(egress, strings.Join(pool, ", "), probes, watchA),
		"b": "node: {name: b, asn: 64602}\nunderlay: {interface: wan, address: 192.0.2.101}\ntunnels:\n" +
			lane("b", "site", "169.254.81.0/31", 51821) + joinedB + fmt.Sprintf(peering, "b") + fmt.Sprintf(egress, strings.Join(pool, ", "), probes, watchB),
		// The site prefers b: when both nodes announce the prefix, b took the address last.
		"site": "node: {name: site, asn: 65001}\nunderlay: {interface: wan, address: 192.0.2.102}\ntunnels:\n" +
			lane("site", "a", "169.254.80.1/31", 51820) + lane("site", "b", "169.254.81.1/31", 51821) + `peers:
- {name: a, tunnel: tk-site-a, asn: 64601, holdTime: 9s, import: {allow: [{prefix: 198.51.100.0/24}]}, export: {allow: [{prefix: 172.16.1.0/24}]}}
- {name: b, tunnel: tk-site-b, asn: 64602, holdTime: 9s, import: {allow: [{prefix: 198.51.100.0/24}], localPreference: 200}, export: {allow: [{prefix: 172.16.1.0/24}]}}
announce: [172.16.1.0/24]
`,
	}
	for _, name := range []string{"site", "a", "b"} {
		n := nodes[name]
		n.Start(t)
		_, err := n.CLI(t.Context(), keys[name].private, "secret", "set", "lane")
		w.ok(err)
		_, err = n.CLI(t.Context(), documents[name], "apply", "-f", "-")
		w.ok(err)
	}
	return w
}

// echo runs the partner's service, which echoes received data, only to the shared addresses.
func (w *world) echo() {
	l, err := w.partner.Listen("tcp4", service)
	w.ok(err)
	w.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if !strings.HasPrefix(c.RemoteAddr().String(), "203.0.113.") {
				w.Errorf("the partner was called from %v", c.RemoteAddr())
			}
			go func() {
				defer c.Close()
				// a bare connection would have two pipes in addition to its socket
				io.Copy(struct{ io.Writer }{c}, c)
			}()
		}
	}()
}

// dial opens a flow from one of ten clients. With a port from 1 on, no two of them request the same
// one: a port that is not free is replaced by another, and the other node would choose a third one.
func (w *world) dial(ctx context.Context, i, port int) (c net.Conn, err error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(fmt.Sprintf("172.16.1.%d", 10+i%10)), Port: port}}
	if e := w.site.Do(func() error { c, err = d.DialContext(ctx, "tcp4", service); return nil }); e != nil {
		return nil, e
	}
	return c, err
}

// alive sends data through each flow, at a random moment within spread, and returns how many
// answer.
func alive(conns []net.Conn, spread, within time.Duration) int {
	var n atomic.Int64
	var wg sync.WaitGroup
	deadline := time.Now().Add(within)
	for i, c := range conns {
		wg.Go(func() {
			message := fmt.Appendf(nil, "%08d", i)
			if spread > 0 {
				time.Sleep(rand.N(spread))
			}
			c.SetDeadline(deadline)
			if _, err := c.Write(message); err != nil {
				return
			}
			answer := make([]byte, len(message))
			if _, err := io.ReadFull(c, answer); err == nil && string(answer) == string(message) {
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return int(n.Load())
}

// leads waits until the site's route leads only into one lane.
func (w *world) leads(tunnel string) {
	w.Helper()
	var routes string
	err := lab.Until(w.Context(), 60*time.Second, func() error {
		routes = w.cli(w.site, "get", "routes")
		if !strings.Contains(routes, tunnel) || strings.Count(routes, "tk-site-") != 1 {
			return errors.New(routes)
		}
		return nil
	})
	if err != nil {
		w.Fatalf("the site does not go by %s: %v\n%s\n%s", tunnel, err, w.cli(w.a, "get", "pools"), w.cli(w.b, "get", "pools"))
	}
}

// who checks which source had the public port of flow 7 at a time, according to a node.
func (w *world) who(n *daemon.Node, at time.Time) {
	w.Helper()
	out, err := n.CLI(w.Context(), "", "nat", "who", shared(0)+":20007", "--at", at.UTC().Format(time.RFC3339))
	if err != nil || !strings.Contains(out, "172.16.1.17:20007") || !strings.Contains(out, "all") || strings.Contains(out, "172.16.1.18") {
		w.Errorf("who had port 20007 at %v: %v\n%s", at, err, out)
	}
}

// standby waits until node a carries the traffic, and b finds that no address leads to it.
func (w *world) standby(addresses int) {
	w.Helper()
	w.leads("tk-site-a")
	w.ok(lab.Until(w.Context(), 60*time.Second, func() error {
		if out := w.cli(w.b, "get", "pools"); strings.Count(out, "down") != addresses {
			return fmt.Errorf("not all addresses that lead to a are down at b: %s", out)
		}
		if out := w.cli(w.b, "get", "status"); strings.Contains(out, "TakeoverNotReady") {
			return errors.New(out)
		}
		return nil
	}))
}

// open opens flows from distinct ports, and checks that all of them answer.
func (w *world) open(n int) []net.Conn {
	w.Helper()
	conns := make([]net.Conn, n)
	for i := range conns {
		ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
		c, err := w.dial(ctx, i, 20_000+i)
		cancel()
		w.ok(err)
		w.Cleanup(func() { c.Close() })
		conns[i] = c
	}
	if got := alive(conns, 0, time.Minute); got != n {
		w.Fatalf("%d of %d flows answer before anything happened", got, n)
	}
	return conns
}

// powerOff makes a powerless in one instant, and returns when the first new flow has answered and
// how many of the flows live. Each flow sends something within five seconds.
func (w *world) powerOff(conns []net.Conn) (first time.Duration, survived int) {
	w.Helper()
	if out, err := w.a.Exec(w.Context(), "ip", "link", "set", "wan", "down"); err != nil {
		w.Fatal(err, out)
	}
	start := time.Now()
	w.a.Kill()
	counted := make(chan int)
	go func() { counted <- alive(conns, 5*time.Second, 90*time.Second) }()
	for {
		ctx, cancel := context.WithTimeout(w.Context(), 300*time.Millisecond)
		c, err := w.dial(ctx, 0, 0)
		cancel()
		if err == nil {
			c.Close()
			break
		}
		if time.Since(start) > 30*time.Second {
			w.Fatalf("no new flow: %v\n%s\n%s", err, w.cli(w.b, "get", "status"), w.cli(w.b, "get", "pools"))
		}
	}
	first = time.Since(start)
	survived = <-counted
	w.Logf("new flows after %v; %d of %d flows survived the power-off (%.2f %%)", first.Round(10*time.Millisecond), survived, len(conns), 100*float64(survived)/float64(len(conns)))
	if survived < len(conns)*999/1000 {
		w.Errorf("%d of %d flows survived, fewer than 99.9 %%", survived, len(conns))
	}
	return first, survived
}

// TestPools has probes with their defaults (an interval of 5 s, a hold-down of a minute), and pools
// of several addresses: an address that was just taken is used at its first answer, and no flow
// leaves with another address than before, whichever address answers first.
func TestPools(t *testing.T) {
	for _, addresses := range []int{2, 4, 8} {
		t.Run(fmt.Sprint(addresses, " addresses"), func(t *testing.T) {
			w := begin(t, addresses, "", false)
			w.standby(addresses)
			w.powerOff(w.open(2000))
		})
	}
}

// quick are probes that notice at once where an address leads.
const quick = ", interval: 1s, timeout: 1s, rise: 1, fall: 2, holdDown: 0s"

// TestLanesCut cuts all lanes between two nodes that live. Each sees the other one outside the
// lanes, so that no address moves and no flow ends; the lanes return by themselves.
func TestLanesCut(t *testing.T) {
	w := begin(t, 1, quick, true)
	w.standby(1)
	conns := w.open(500)
	usable := func(n *daemon.Node, want string) {
		t.Helper()
		err := lab.Until(t.Context(), time.Minute, func() error {
			if out := w.cli(n, "get", "links", "-o", "jsonpath={.links[0].usable}"); strings.TrimSpace(out) != want {
				return fmt.Errorf("%s lanes are usable, want %s: %s", out, want, w.cli(n, "get", "links"))
			}
			return nil
		})
		w.ok(err)
	}
	for _, n := range []*daemon.Node{w.a, w.b} {
		usable(n, "3")
	}
	const cut = "table inet cut {\n chain in { type filter hook prerouting priority -400; iifname \"wan\" udp dport 51900-51902 drop; }\n}\n"
	for _, n := range []*daemon.Node{w.a, w.b} {
		if out, err := n.ExecInput(t.Context(), cut, "nft", "-f", "-"); err != nil {
			t.Fatal(err, out)
		}
	}
	for _, n := range []*daemon.Node{w.a, w.b} {
		usable(n, "0")
		w.ok(lab.Until(t.Context(), time.Minute, func() error {
			if out := w.cli(n, "describe", "node"); !strings.Contains(out, "LinkDown") {
				return errors.New(out)
			}
			return nil
		}))
	}
	// Ten times as long as a node that answers on no path keeps its addresses.
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		if n := alive(conns, time.Second, 30*time.Second); n < len(conns) {
			t.Fatalf("%d of %d flows live while the lanes are cut", n, len(conns))
		}
	}
	for _, n := range []*daemon.Node{w.a, w.b} {
		if out := w.cli(n, "describe", "node"); strings.Contains(out, "TookOver") || strings.Contains(out, "TakeoverFailed") {
			t.Errorf("an address was taken:\n%s", out)
		}
		if out, err := n.Exec(t.Context(), "nft", "delete", "table", "inet", "cut"); err != nil {
			t.Fatal(err, out)
		}
	}
	for _, n := range []*daemon.Node{w.a, w.b} {
		usable(n, "3")
	}
	if out, err := w.partner.Exec(t.Context(), "ip", "route", "get", shared(0)); err != nil || !strings.Contains(out, "via 192.0.2.100") {
		t.Errorf("the address moved: %s, %v", out, err)
	}
	if n := alive(conns, 0, time.Minute); n < len(conns) {
		t.Errorf("%d of %d flows live at the end", n, len(conns))
	}
}

func TestPowerOff(t *testing.T) {
	w := begin(t, 1, quick, true)
	w.standby(1)
	conns := w.open(flows)
	before := time.Now()
	w.who(w.a, before)
	_, survived := w.powerOff(conns)
	w.who(w.b, time.Now())
	if out := w.cli(w.b, "describe", "node"); !strings.Contains(out, "TookOver") {
		t.Errorf("b does not say that it took over:\n%s", out)
	}

	// The other node comes back. It finds that the address leads elsewhere, and leaves everything
	// as it is.
	if _, err := w.a.Exec(t.Context(), "ip", "link", "set", "wan", "up"); err != nil {
		t.Fatal(err)
	}
	_, err := w.a.Exec(t.Context(), "ip", "route", "replace", "default", "via", "192.0.2.1")
	w.ok(err)
	w.a.Start(t)
	w.ok(lab.Until(t.Context(), 60*time.Second, func() error {
		if peers := w.cli(w.site, "get", "peers"); strings.Count(peers, "established") != 2 {
			return errors.New(peers)
		}
		if pools := w.cli(w.a, "get", "pools"); !strings.Contains(pools, "down") {
			return errors.New(pools)
		}
		return nil
	}))
	w.leads("tk-site-b")
	w.who(w.a, before)
	if n := alive(conns, 0, 60*time.Second); n < survived {
		t.Errorf("%d flows were alive, %d are since the other node is back", survived, n)
	}
	n, sample, err := w.leaks.Stop()
	if err != nil || n != 0 {
		t.Errorf("%d packets with an inside source outside, such as %v; %v", n, sample, err)
	}
}

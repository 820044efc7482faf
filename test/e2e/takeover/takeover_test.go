// Package takeover has two nodes that share a public address, a site with WireGuard lanes to both,
// and a partner that accepts only this address. One node loses its power under load. Of the kernel
// it needs only TUN. Ring: namespace; needs root.
package takeover

import (
	"context"
	"errors"
	"fmt"
	"io"
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
	shared  = "203.0.113.5"
)

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

func begin(t *testing.T) *world {
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
	w.partner.IP("route add %s/32 via %s", shared, address["a"])
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
		w.ok(os.WriteFile(mover, fmt.Appendf(nil, "#!/bin/sh\n[ \"$*\" = 'take %[1]s=%[1]s' ] || exit 1\nexec nsenter --net=/run/netns/%[2]s ip route replace %[1]s/32 via %[3]s\n",
			shared, w.partner.Namespace, address[name]), 0o755))
		nodes[name].Args = []string{"-mover", mover}
	}
	keys := map[string]end{"a": key(t), "b": key(t), "site": key(t)}
	lane := func(me, you string, local string, port int) string {
		return fmt.Sprintf("- {name: tk-%s-%s, inside: [{local: %s}], wireguard: {privateKey: lane, peerPublicKey: %s, endpoint: \"%s:%d\", listenPort: %d}}\n",
			me, you, local, keys[you].public, address[you], port, port)
	}
	egress := `egress:
  pools:
  - name: partner
    addresses: [{address: 203.0.113.5}]
    probes: {targets: ["icmp://198.51.100.7"], interval: 1s, timeout: 1s, rise: 1, fall: 2, holdDown: 0s}
    announce: [198.51.100.0/24]
  policies: [{name: all, sources: [172.16.0.0/12], pool: partner, pickup: true}]
  takeover: {watch: [169.254.82.%d]}
  log: {}
`
	peering := "peers: [{name: site, tunnel: tk-%s-site, asn: 65001, holdTime: 9s, import: {allow: [{prefix: 172.16.1.0/24}]}, export: {allow: [{prefix: 198.51.100.0/24}]}}]\n"
	documents := map[string]string{
		"a": "node: {name: a, asn: 64601}\nunderlay: {interface: wan, address: 192.0.2.100}\ntunnels:\n" +
			lane("a", "site", "169.254.80.0/31", 51820) + lane("a", "b", "169.254.82.0/31", 51822) + fmt.Sprintf(peering, "a") + fmt.Sprintf(egress, 1),
		"b": "node: {name: b, asn: 64602}\nunderlay: {interface: wan, address: 192.0.2.101}\ntunnels:\n" +
			lane("b", "site", "169.254.81.0/31", 51821) + lane("b", "a", "169.254.82.1/31", 51822) + fmt.Sprintf(peering, "b") + fmt.Sprintf(egress, 0),
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

// echo runs the partner's service, which echoes received data, only to the shared address.
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
			if !strings.HasPrefix(c.RemoteAddr().String(), shared+":") {
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

// alive sends data through each flow and returns how many answer.
func alive(conns []net.Conn, within time.Duration) int {
	var n atomic.Int64
	var wg sync.WaitGroup
	deadline := time.Now().Add(within)
	for i, c := range conns {
		wg.Go(func() {
			message := fmt.Appendf(nil, "%08d", i)
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
	out, err := n.CLI(w.Context(), "", "nat", "who", shared+":20007", "--at", at.UTC().Format(time.RFC3339))
	if err != nil || !strings.Contains(out, "172.16.1.17:20007") || !strings.Contains(out, "all") || strings.Contains(out, "172.16.1.18") {
		w.Errorf("who had port 20007 at %v: %v\n%s", at, err, out)
	}
}

func TestPowerOff(t *testing.T) {
	w := begin(t)
	w.leads("tk-site-a")
	w.ok(lab.Until(t.Context(), 30*time.Second, func() error {
		if out := w.cli(w.b, "get", "pools"); !strings.Contains(out, "down") {
			return fmt.Errorf("the address that leads to a is not down at b: %s", out)
		}
		return nil
	}))

	conns := make([]net.Conn, flows)
	for i := range conns {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		c, err := w.dial(ctx, i, 20_000+i)
		cancel()
		w.ok(err)
		defer c.Close()
		conns[i] = c
	}
	if n := alive(conns, 60*time.Second); n != flows {
		t.Fatalf("%d of %d flows answer before anything happened", n, flows)
	}

	before := time.Now()
	w.who(w.a, before)

	// The power fails: at once node a neither sends nor receives.
	ports, err := w.a.Exec(t.Context(), "ip", "link", "set", "wan", "down")
	if err != nil {
		t.Fatal(err, ports)
	}
	start := time.Now()
	w.a.Kill()
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		c, err := w.dial(ctx, 0, 0)
		cancel()
		if err == nil {
			c.Close()
			break
		}
		if time.Since(start) > 30*time.Second {
			t.Fatalf("no new flow: %v\n%s\n%s", err, w.cli(w.b, "get", "status"), w.cli(w.b, "get", "pools"))
		}
	}
	t.Logf("new flows after %v", time.Since(start).Round(10*time.Millisecond))
	survived := alive(conns, 90*time.Second)
	t.Logf("%d of %d flows survived the power-off (%.2f %%)", survived, flows, 100*float64(survived)/flows)
	if survived < flows*99/100 {
		t.Error("fewer than 99 % survived")
	}
	w.who(w.b, time.Now())
	if out := w.cli(w.b, "describe", "node"); !strings.Contains(out, "TookOver") {
		t.Errorf("b does not say that it took over:\n%s", out)
	}

	// The other node comes back. It finds that the address leads elsewhere, and leaves everything
	// as it is.
	if _, err := w.a.Exec(t.Context(), "ip", "link", "set", "wan", "up"); err != nil {
		t.Fatal(err)
	}
	_, err = w.a.Exec(t.Context(), "ip", "route", "replace", "default", "via", "192.0.2.1")
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
	if n := alive(conns, 60*time.Second); n < survived {
		t.Errorf("%d flows were alive, %d are since the other node is back", survived, n)
	}
	n, sample, err := w.leaks.Stop()
	if err != nil || n != 0 {
		t.Errorf("%d packets with an inside source outside, such as %v; %v", n, sample, err)
	}
}

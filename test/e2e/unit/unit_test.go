// Package unit runs isthmusd as its unit does: as a user with the unit's capabilities, before the
// network exists, under a service manager that receives its notifications. It also checks the
// leftovers after the daemon has ended and after -clean. Ring: namespace; needs root.
package unit

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
)

const (
	user     = 65533 // has no name, and nothing in the file system
	patience = 20 * time.Second
)

const document = `node: {name: hub, asn: 64620}
underlay: {interface: wan, address: 192.0.2.100}
attachments:
- {name: lan, interface: lan0, sources: [10.1.0.0/16]}
tunnels:
- {name: lane, wireguard: {privateKey: lane, peerPublicKey: %q, endpoint: "192.0.2.1:51820", listenPort: 51821}, inside: [{local: 169.254.10.1/30}]}
peers:
- {name: far, tunnel: lane, asn: 64621, import: {allow: [{prefix: 10.9.0.0/16}]}, export: {allow: [{prefix: 0.0.0.0/0}]}}
staticRoutes: [{prefix: 10.7.0.0/16, tunnels: [lane]}]
announce: [0.0.0.0/0]
egress:
  pools: [{name: partner, addresses: [{address: 192.0.2.10}, {address: "2001:db8:9::10"}]}]
  policies: [{name: all, sources: [10.0.0.0/8, "2001:db8::/40"], pool: partner}]
`

// unit returns the values of a setting of isthmusd.service.
func unit(t *testing.T, setting string) []string {
	t.Helper()
	text, err := os.ReadFile("../../../image/debian/isthmusd.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^`+setting+`=(.*)$`).FindAllStringSubmatch(string(text), -1)
	if len(m) != 1 {
		t.Fatalf("the unit has %d lines %s", len(m), setting)
	}
	return strings.Fields(m[0][1])
}

// asUnit returns the words before the name of the daemon: the unit's user and capabilities.
func asUnit(t *testing.T) []string {
	t.Helper()
	caps := "-all"
	for _, c := range unit(t, "AmbientCapabilities") {
		caps += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	if !slices.Equal(unit(t, "AmbientCapabilities"), unit(t, "CapabilityBoundingSet")) {
		t.Error("the unit has other ambient capabilities than it may have")
	}
	// udev lets every user open this device (50-udev-default.rules), and this machine may have no
	// udev.
	const tun = `mount --make-rprivate / && mount -t tmpfs none /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec "$@"`
	return []string{"unshare", "--mount", "sh", "-c", tun, "sh", "setpriv", "--reuid", fmt.Sprint(user), "--regid", fmt.Sprint(user), "--clear-groups", "--no-new-privs",
		"--inh-caps", caps, "--ambient-caps", caps, "--bounding-set", caps}
}

// world is a node without a network.
type world struct {
	*testing.T
	hub, outside *daemon.Node
	dir          string
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func begin(t *testing.T) *world {
	w := &world{T: t}
	l, err := lab.New(lab.Options{})
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
	w.ok(os.Chmod(filepath.Dir(bin), 0o755)) // for the daemon's user
	w.ok(os.Chmod(bin, 0o755))
	w.hub, w.outside = daemon.New(l.Node("hub"), bin), daemon.New(l.Node("outside"), bin)
	l.Link(lab.End{Node: w.hub.Node, Name: "spare"}, lab.End{Node: w.outside.Node, Name: "r0"})
	w.ok(l.Up(t.Context()))
	w.dir, err = w.hub.Dir()
	w.ok(err)
	for _, name := range []string{"state", "run"} {
		w.ok(os.Mkdir(filepath.Join(w.dir, name), 0o700))
		w.ok(os.Chown(filepath.Join(w.dir, name), user, user))
	}
	w.hub.Under = asUnit(t)
	return w
}

func (w *world) ip(commands ...string) {
	w.Helper()
	for _, c := range commands {
		if _, err := w.hub.Exec(w.Context(), append([]string{"ip"}, strings.Fields(c)...)...); err != nil {
			w.Fatal(err)
		}
	}
}

// network makes the node's cards and addresses.
func (w *world) network() {
	w.ip("link add wan type veth peer name wan-far", "link add lan0 type veth peer name lan-far",
		"link set wan-far up", "link set lan-far up", "link set wan up", "link set lan0 up",
		"addr add 192.0.2.100/24 dev wan", "addr add 2001:db8:9::100/64 dev wan nodad", "addr add 10.1.0.1/24 dev lan0", "route add default via 192.0.2.1 dev wan")
}

func (w *world) secret() string {
	private, _ := daemon.Key(w)
	_, public := daemon.Key(w)
	_, err := w.hub.CLI(w.Context(), private, "secret", "set", "lane")
	w.ok(err)
	return fmt.Sprintf(document, public)
}

// rules returns nil when the table of rules is in the kernel.
func (w *world) rules() error {
	_, err := w.hub.Exec(w.Context(), "nft", "list", "chain", "inet", "isthmus", "forward")
	if err != nil {
		_, err = w.hub.Exec(w.Context(), "nft", "list", "table", "inet", "isthmus")
	}
	return err
}

// manager receives notifications as a service manager does.
type manager struct {
	conn *net.UnixConn
	said chan string
}

func (w *world) manage(watchdog time.Duration) *manager {
	w.Helper()
	path := filepath.Join(w.dir, "notify")
	os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	w.ok(err)
	w.ok(os.Chmod(path, 0o666))
	m := &manager{conn: conn, said: make(chan string, 1000)}
	go func() {
		buffer := make([]byte, 4096)
		for {
			n, err := conn.Read(buffer)
			if err != nil {
				close(m.said)
				return
			}
			for line := range strings.Lines(string(buffer[:n])) {
				m.said <- strings.TrimSpace(line)
			}
		}
	}()
	w.Cleanup(func() { conn.Close() })
	w.hub.Under = append([]string{"env", "NOTIFY_SOCKET=" + path, fmt.Sprintf("WATCHDOG_USEC=%d", watchdog.Microseconds())}, asUnit(w.T)...)
	return m
}

// await waits for a message with this beginning, and returns it.
func (m *manager) await(t *testing.T, begins string) string {
	t.Helper()
	limit := time.After(3 * patience)
	for {
		select {
		case s, ok := <-m.said:
			if !ok {
				t.Fatal("the service manager's socket is closed")
			}
			if strings.HasPrefix(s, begins) {
				return s
			}
		case <-limit:
			t.Fatalf("the daemon does not send %s", begins)
		}
	}
}

// TestBoot checks that the daemon starts before the network exists, with a document. The guard is
// in the kernel before the daemon reports that it is ready, and when cards and addresses appear,
// the daemon makes all that waited for them. All of it as the unit's user.
func TestBoot(t *testing.T) {
	w := begin(t)
	m := w.manage(2 * time.Second)
	w.hub.Args = []string{"-listen", ":7443"}
	w.hub.Start(t)
	m.await(t, "READY=1")
	m.await(t, "STATUS=no document yet")
	w.network()
	w.certificate("192.0.2.100")
	w.hub.Apply(t, w.secret())
	m.await(t, "STATUS=generation 1, 0 of 1 tunnels up")
	status := &isthmusv1.SystemStatus{}
	w.ok(w.hub.Get(t.Context(), "status", status))
	if status.GetCounters().GetBgpStarts() != 1 {
		t.Errorf("%d BGP processes were started", status.GetCounters().GetBgpStarts())
	}
	w.hub.Process.Stop()
	m.await(t, "STOPPING=1")

	// The machine starts again.
	w.ip("link del wan", "link del lan0")
	_, err := w.hub.Exec(t.Context(), "nft", "flush", "ruleset")
	w.ok(err)
	w.ok(w.hub.Sysctl("ipv4/ip_forward", "0"))
	w.hub.Args = []string{"-listen", "192.0.2.100:7443"} // not there yet
	w.hub.Start(t)
	m.await(t, "READY=1")
	if err := w.rules(); err != nil {
		t.Errorf("ready without rules: %v", err)
	}
	m.await(t, "WATCHDOG=1")
	w.network()
	w.hub.Settled(t)
	w.ok(lab.Until(t.Context(), patience, func() error {
		out, err := w.hub.Exec(t.Context(), "sh", "-c", "ip addr show wan; ip route; cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/wan/send_redirects; ss -ltn")
		if err != nil {
			return err
		}
		for _, part := range []string{"inet 192.0.2.10/32", "2001:db8:9::10/128", "10.7.0.0/16", "\n1\n0\n", "192.0.2.100:7443"} {
			if !strings.Contains(out, part) {
				return fmt.Errorf("no %q in\n%s", part, out)
			}
		}
		return nil
	}))
	// The node can be managed at an address that came after the daemon.
	admin := filepath.Join(w.dir, "state", "admin.yaml")
	_, err = w.hub.Exec(t.Context(), w.hub.Program("isthmus"), "--context", admin, "--address", "192.0.2.100:7443", "get", "status")
	w.ok(err)

	// Only the kernel's objects outlive the daemon.
	w.hub.Kill()
	w.ok(lab.Until(t.Context(), patience, func() error {
		if children, err := confined(); err != nil || len(children) > 0 {
			return fmt.Errorf("the BGP process is still there: %v, %w", children, err)
		}
		return nil
	}))
}

// certificate waits until the server's certificate contains an address.
func (w *world) certificate(address string) {
	w.Helper()
	w.ok(lab.Until(w.Context(), patience, func() error {
		conn, err := w.hub.DialContext(w.Context(), "tcp", address+":7443")
		if err != nil {
			return err
		}
		defer conn.Close()
		var shown *x509.Certificate
		config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, VerifyConnection: func(s tls.ConnectionState) error {
			shown = s.PeerCertificates[0]
			return nil
		}}
		if err := tls.Client(conn, config).HandshakeContext(w.Context()); shown == nil {
			return err
		}
		return shown.VerifyHostname(address)
	}))
}

// confined returns the BGP processes whose daemon is gone.
func confined() (out []string, err error) {
	processes, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return nil, err
	}
	for _, p := range processes {
		text, err := os.ReadFile(p)
		if err == nil && strings.Contains(string(text), "\nUid:\t490179\t") && strings.Contains(string(text), "\nPPid:\t1\n") {
			out = append(out, p)
		}
	}
	return out, nil
}

// snapshot returns the state of a network namespace that isthmus may change.
func (w *world) snapshot() string {
	w.Helper()
	var out strings.Builder
	for _, c := range []string{
		"ip -d link", "ip addr", "ip -4 route show table all", "ip -6 route show table all | sort", "ip rule", "ip -6 rule", "ip nexthop", "ip neigh show nud permanent",
		"nft list ruleset", "grep -rs '' /proc/sys/net | sort",
	} {
		text, err := w.hub.Exec(w.Context(), "sh", "-c", c)
		w.ok(err)
		fmt.Fprintf(&out, "== %s\n%s", c, text)
	}
	return volatile.ReplaceAllString(out.String(), "")
}

// volatile are values that change by themselves.
var volatile = regexp.MustCompile(`(?m)^/proc/sys/net/(netfilter/nf_conntrack_count|netfilter/nf_log|ipv6/conf/[^/]+/stable_secret).*\n|expires \d+sec`)

// TestClean checks that after -clean the namespace is as it was before the first start, with all
// objects of others, which look much like ours.
func TestClean(t *testing.T) {
	w := begin(t)
	w.network()
	w.ip("link add other0 type veth peer name other-far", "link set other0 alias isthmus", "link set other-far up", "link set other0 up", "addr add 198.51.100.5/32 dev other0",
		"route add 203.0.113.0/24 dev other0 proto static", "nexthop add id 7 dev other0", "route add 203.0.114.0/24 nhid 7", "rule add from 10.99.0.0/16 table 99 pref 99")
	_, err := w.hub.ExecInput(t.Context(), "table inet isthmus-other {\n chain c {\n type filter hook input priority 0\n counter accept\n }\n}\ntable ip isthmus {\n set s {\n type ipv4_addr\n }\n}\n", "nft", "-f", "-")
	w.ok(err)
	w.ok(w.hub.Sysctl("ipv4/conf/all/rp_filter", "1"))
	w.ok(w.hub.Sysctl("ipv4/conf/wan/send_redirects", "1"))
	w.ok(lab.Until(t.Context(), patience, func() error {
		if out, _ := w.hub.Exec(t.Context(), "ip", "addr", "show", "tentative"); strings.TrimSpace(out) != "" {
			return errors.New("addresses are tentative")
		}
		return nil
	}))
	counter := regexp.MustCompile(`counter packets \d+ bytes \d+`)
	look := func() string { return counter.ReplaceAllString(w.snapshot(), "counter") }
	before := look()
	if again := look(); again != before {
		t.Fatalf("the snapshot is not steady:\n%s", difference(before, again))
	}

	w.hub.Start(t)
	w.hub.Apply(t, w.secret())
	run := []string{w.hub.Program("isthmusd"), "-clean", "-state", filepath.Join(w.dir, "state"), "-runtime", filepath.Join(w.dir, "run"), "-vici", filepath.Join(w.dir, "no-charon")}
	if out, err := w.hub.Exec(t.Context(), run...); err == nil || !strings.Contains(err.Error(), "isthmusd runs") {
		t.Errorf("cleaning while the daemon runs: %s, %v", out, err)
	}
	for _, end := range []func(){w.hub.Process.Stop, func() { w.hub.Start(t); w.hub.Settled(t); w.hub.Kill() }} {
		end()
		if during := look(); during == before {
			t.Fatal("the daemon has made nothing")
		}
		out, err := w.hub.Exec(t.Context(), run...)
		w.ok(err)
		for _, part := range []string{"cleaned: ", "the table of rules", "2 pool addresses", "kernel parameters"} {
			if !strings.Contains(out, part) {
				t.Errorf("no %q in %s", part, out)
			}
		}
		if after := look(); after != before {
			t.Errorf("not as before:\n%s", difference(before, after))
		}
		out, err = w.hub.Exec(t.Context(), run...)
		w.ok(err)
		if out != "nothing to clean\n" {
			t.Errorf("the second time: %s", out)
		}
		if after := look(); after != before {
			t.Errorf("the second time, not as before:\n%s", difference(before, after))
		}
	}
	// Documents and secrets stay, and the next start makes everything again.
	w.hub.Start(t)
	w.hub.Settled(t)
	w.ok(w.rules())
}

// difference returns the lines that only one of two texts has.
func difference(a, b string) string {
	var out strings.Builder
	for _, d := range []struct {
		sign, from, in string
	}{{"-", a, b}, {"+", b, a}} {
		has := map[string]int{}
		for line := range strings.Lines(d.in) {
			has[line]++
		}
		for s := bufio.NewScanner(strings.NewReader(d.from)); s.Scan(); {
			if has[s.Text()+"\n"]--; has[s.Text()+"\n"] < 0 {
				fmt.Fprintln(&out, d.sign+s.Text())
			}
		}
	}
	return out.String()
}

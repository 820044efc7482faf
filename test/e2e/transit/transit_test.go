// Package transit has a branch whose hosts reach the Internet through a hub: the default route of
// forwarded packets is in the tunnel, and that of the machine stays outside.
package transit

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
)

const branchDocument = `node: {name: branch, asn: 64601}
underlay: {interface: wan, address: 192.0.2.20DEFAULT}
attachments: [{name: lan, interface: lan, sources: [172.16.0.0/24, "2001:db8:16::/64"]}]
tunnels: [{name: hub, wireguard: {privateKey: lane, peerPublicKey: KEY, endpoint: "192.0.2.10:51820", listenPort: 51820}, inside: [{local: 169.254.80.1/31}, {local: "fd00:80::1/127"}]}]
peers:
- {name: hub, tunnel: hub, asn: 64600, holdTime: 9s, import: {allow: [{prefix: 0.0.0.0/0}, {prefix: "::/0"}]}, export: {allow: [{prefix: 172.16.0.0/24}, {prefix: "2001:db8:16::/64"}]}}
announce: [172.16.0.0/24, "2001:db8:16::/64"]
`

const hubDocument = `node: {name: hub, asn: 64600}
underlay: {interface: wan, address: 192.0.2.10}
attachments: [{name: far, interface: far, sources: [198.18.5.0/24, "2001:db8:5::/64"]}]
tunnels: [{name: branch, wireguard: {privateKey: lane, peerPublicKey: KEY, endpoint: "192.0.2.20:51820", listenPort: 51820}, inside: [{local: 169.254.80.0/31}, {local: "fd00:80::/127"}]}]
peers:
- {name: branch, tunnel: branch, asn: 64601, holdTime: 9s, import: {allow: [{prefix: 172.16.0.0/24}, {prefix: "2001:db8:16::/64"}]}, export: {allow: [{prefix: 0.0.0.0/0}, {prefix: "::/0"}]}}
announce: [0.0.0.0/0, "::/0"]
`

// TestDefaultRoute: by default the machine's default route wins, and the status says so. With
// defaultRoute: tunnels, a host of the branch reaches what is behind the hub, the node itself and
// the encrypted packets keep to the underlay, and nothing with an inside address is there. It
// survives kill -9 and hands that delete rules, ends with the field, and with the session.
func TestDefaultRoute(t *testing.T) {
	bin := daemon.Build(t, "../../..")
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	end := func(n *lab.Node, name string, addrs ...string) lab.End {
		return lab.End{Node: n, Name: name, Addrs: daemon.Prefixes(addrs...)}
	}
	hub, branch := daemon.New(l.Node("hub"), bin), daemon.New(l.Node("branch"), bin)
	internet, host, far := l.Node("internet"), l.Node("host"), l.Node("far")
	internet.Bridge("br0", netip.MustParsePrefix("192.0.2.1/24"))
	internet.Port("br0", end(hub.Node, "wan", "192.0.2.10/24"))
	internet.Port("br0", end(branch.Node, "wan", "192.0.2.20/24"))
	l.Link(end(branch.Node, "lan", "172.16.0.1/24", "2001:db8:16::1/64"), end(host, "eth0", "172.16.0.10/24", "2001:db8:16::10/64"))
	l.Link(end(hub.Node, "far", "198.18.5.1/24", "2001:db8:5::1/64"), end(far, "eth0", "198.18.5.10/24", "2001:db8:5::10/64"))
	for n, routes := range map[*lab.Node][]string{
		branch.Node: {"route add default via 192.0.2.1 metric 100"}, hub.Node: {"route add default via 192.0.2.1 metric 100"},
		host: {"route add default via 172.16.0.1", "route add ::/0 via 2001:db8:16::1"}, far: {"route add default via 198.18.5.1", "route add ::/0 via 2001:db8:5::1"},
	} {
		for _, r := range routes {
			n.IP("%s", r)
		}
	}
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	leaks, err := internet.Capture("", daemon.Prefixes("172.16.0.0/24", "198.18.5.0/24", "169.254.80.0/24")...)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[*daemon.Node][2]string{}
	for _, n := range []*daemon.Node{hub, branch} {
		private, public := daemon.Key(t)
		keys[n] = [2]string{private, public}
		n.Start(t)
		if _, err := n.CLI(t.Context(), private, "secret", "set", "lane"); err != nil {
			t.Fatal(err)
		}
	}
	apply := func(n *daemon.Node, document string) {
		t.Helper()
		if out, err := n.CLI(t.Context(), document, "apply", "-f", "-", "--wait", "1m"); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	document := func(field string) string {
		return strings.NewReplacer("KEY", keys[hub][1], "DEFAULT", field).Replace(branchDocument)
	}
	apply(hub, strings.ReplaceAll(hubDocument, "KEY", keys[branch][1]))
	apply(branch, document(""))
	until := func(what string, f func() error) {
		t.Helper()
		if err := lab.Until(t.Context(), 60*time.Second, f); err != nil {
			for _, args := range []string{"status", "get routes", "describe peer hub"} {
				out, _ := branch.CLI(t.Context(), "", strings.Fields(args)...)
				t.Log(out)
			}
			out, _ := branch.Exec(t.Context(), "sh", "-c", "ip rule; ip route; ip route show table 18772")
			log, _ := os.ReadFile(branch.Process.Log)
			t.Fatalf("%s: %v\n%s\n%s", what, err, out, log)
		}
	}
	shows := func(command string, wants ...string) {
		t.Helper()
		until(command, func() error {
			out, err := branch.CLI(t.Context(), "", strings.Fields(command)...)
			if strings.HasPrefix(command, "egress prove") {
				err = nil // it fails if the proof does not hold
			}
			for _, want := range wants {
				without := strings.TrimPrefix(want, "!")
				if err == nil && strings.Contains(out, without) != (without == want) {
					err = fmt.Errorf("%q: %s", want, out)
				}
			}
			return err
		})
	}
	pings := func(addresses ...string) {
		t.Helper()
		for _, a := range addresses {
			until("ping "+a, func() error { _, err := host.Exec(t.Context(), "ping", "-c1", "-W1", a); return err })
		}
	}
	ways := func(forwarded, own string) {
		t.Helper()
		for args, want := range map[string]string{"198.18.5.10 from 172.16.0.10 iif lan": forwarded, "198.18.5.10": own, "192.0.2.10": "dev wan", "172.16.0.10 from 198.18.5.10 iif t-hub": "dev lan"} {
			until(args, func() error {
				out, err := branch.Exec(t.Context(), "sh", "-c", "ip route get "+args)
				if err == nil && !strings.Contains(out, want) {
					err = fmt.Errorf("%s, want %s", out, want)
				}
				return err
			})
		}
	}
	const outranked = "RoutesOutranked"
	shows("status", outranked, "0.0.0.0/0")
	shows("get routes", "outranked")
	ways("dev wan", "dev wan")

	out, _ := branch.CLI(t.Context(), document(", defaultRoute: tunnels"), "plan", "-f", "-")
	if !strings.Contains(out, "defaultRoute: underlay -> tunnels") || !strings.Contains(out, "another default route") {
		t.Errorf("the plan: %s", out)
	}
	apply(branch, document(", defaultRoute: tunnels"))
	for range 2 {
		pings("198.18.5.10", "2001:db8:5::10")
		ways("dev t-hub", "dev wan")
		shows("status", "!"+outranked)
		shows("get routes", "!outranked", "0.0.0.0/0")
		shows("egress prove --from 172.16.0.0/24 --to 198.18.5.0/24", "the route to 0.0.0.0/0 leads inside")
		if _, err := branch.Exec(t.Context(), "ip", "rule", "del", "priority", "20001"); err != nil {
			t.Error(err)
		}
		ways("dev t-hub", "dev wan")
		branch.Kill()
		branch.Start(t)
	}
	pings("198.18.5.10", "2001:db8:5::10")

	// Without the session, the machine's default route is left, and the guard keeps the packets in.
	if _, err := branch.CLI(t.Context(), "", "peer", "disable", "hub", "--wait", "1m"); err != nil {
		t.Fatal(err)
	}
	ways("dev wan", "dev wan")
	if _, err := host.Exec(t.Context(), "ping", "-c2", "-W1", "198.18.5.10"); err == nil {
		t.Error("a host is reached without the session")
	}
	if _, err := branch.CLI(t.Context(), "", "peer", "enable", "hub", "--wait", "1m"); err != nil {
		t.Fatal(err)
	}
	pings("198.18.5.10")

	apply(branch, document(""))
	ways("dev wan", "dev wan")
	shows("status", outranked)
	gone := func() {
		t.Helper()
		until("the rules and their routes are gone", func() error {
			out, err := branch.Exec(t.Context(), "sh", "-c", "ip rule; ip -6 rule; ip route show table all proto 73; ip -6 route show table all proto 73")
			if err == nil && (strings.Contains(out, "18772") || strings.Contains(out, "suppress")) {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
	}
	gone()

	// What the daemon leaves when it is killed, -clean removes.
	apply(branch, document(", defaultRoute: tunnels"))
	ways("dev t-hub", "dev wan")
	branch.Kill()
	dir, err := branch.Dir()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := branch.Exec(t.Context(), branch.Program("isthmusd"), "-clean", "-state", filepath.Join(dir, "state"), "-runtime", filepath.Join(dir, "run"), "-vici", filepath.Join(dir, "no-charon")); err != nil || !strings.Contains(out, "4 routing rules") {
		t.Errorf("%s, %v", out, err)
	}
	gone()
	if n, first, err := leaks.Stop(); err != nil || n != 0 {
		t.Errorf("%d packets with an inside source on the Internet (%v), first: %q", n, err, first)
	}
}

// Package pair has two isthmus nodes with a WireGuard lane between them, IPv4 and IPv6 inside it.
// Of the kernel it needs only TUN, so the embedded device carries the lane where the kernel has no
// WireGuard.
package pair

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
)

type node struct {
	*daemon.Node
	private, public string
}

func TestPair(t *testing.T) {
	bin := daemon.Build(t, "../../..")
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	// A spoke behind each node, and a link between the nodes.
	var nodes [2]*node
	var spokes [2]*lab.Node
	end := func(n *lab.Node, name string, addrs ...string) lab.End {
		e := lab.End{Node: n, Name: name}
		for _, a := range addrs {
			e.Addrs = append(e.Addrs, netip.MustParsePrefix(a))
		}
		return e
	}
	for i := range nodes {
		nodes[i] = &node{Node: daemon.New(l.Node(fmt.Sprintf("node%d", i)), bin)}
		nodes[i].private, nodes[i].public = daemon.Key(t)
		spokes[i] = l.Node(fmt.Sprintf("spoke%d", i))
		l.Link(end(nodes[i].Node.Node, "lan", fmt.Sprintf("172.16.%d.1/24", i), fmt.Sprintf("2001:db8:%d::1/64", i)),
			end(spokes[i], "eth0", fmt.Sprintf("172.16.%d.10/24", i), fmt.Sprintf("2001:db8:%d::10/64", i)))
		spokes[i].IP("route add default via 172.16.%d.1", i)
		spokes[i].IP("route add ::/0 via 2001:db8:%d::1", i)
	}
	l.Link(end(nodes[0].Node.Node, "wan", "192.0.2.100/24"), end(nodes[1].Node.Node, "wan", "192.0.2.101/24"))
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, n := range nodes {
		n.Start(t)
		if _, err := n.CLI(t.Context(), n.private, "secret", "set", "lane"); err != nil {
			t.Fatal(err)
		}
		other := 1 - i
		// Both have a tunnel of one name, and neither sees the other's device.
		document := strings.NewReplacer("ME", fmt.Sprint(i), "YOU", fmt.Sprint(other), "KEY", nodes[other].public).Replace(`
node: {name: nodeME, asn: 6460ME}
underlay: {interface: wan, address: 192.0.2.10ME}
attachments: [{name: spoke, interface: lan, sources: [172.16.ME.0/24, "2001:db8:ME::/64"]}]
tunnels:
- name: lane
  wireguard: {privateKey: lane, peerPublicKey: KEY, endpoint: "192.0.2.10YOU:51820", listenPort: 51820}
  inside: [{local: 169.254.80.ME/31}, {local: "fd00:80::ME/127"}]
peers:
- {name: four, tunnel: lane, asn: 6460YOU, holdTime: 9s, import: {allow: [{prefix: 172.16.YOU.0/24}]}, export: {allow: [{prefix: 172.16.ME.0/24}]}}
- name: six
  tunnel: lane
  asn: 6460YOU
  address: "fd00:80::YOU"
  holdTime: 9s
  import: {allow: [{prefix: "2001:db8:YOU::/64"}]}
  export: {allow: [{prefix: "2001:db8:ME::/64"}]}
announce: [172.16.ME.0/24, "2001:db8:ME::/64"]
`)
		if _, err := n.CLI(t.Context(), document, "apply", "-f", "-"); err != nil {
			t.Fatal(err)
		}
	}
	reachable := func(within time.Duration) {
		t.Helper()
		err := lab.Until(t.Context(), within, func() error {
			for _, a := range []string{"172.16.1.10", "2001:db8:1::10"} {
				if _, err := spokes[0].Exec(t.Context(), "ping", "-c1", "-W1", a); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			for _, n := range nodes {
				for _, noun := range []string{"status", "tunnels", "peers", "routes"} {
					out, _ := n.CLI(t.Context(), "", "get", noun, "-o", "yaml")
					t.Log(out)
				}
				log, _ := os.ReadFile(n.Process.Log)
				t.Logf("%s", log)
			}
			t.Fatal(err)
		}
	}
	reachable(60 * time.Second)
	for _, n := range nodes {
		out, err := n.CLI(t.Context(), "", "get", "peers")
		if err != nil || strings.Count(out, "established") != 2 {
			t.Errorf("%v\n%s", err, out)
		}
		out, err = n.CLI(t.Context(), "", "get", "routes")
		if err != nil || strings.Count(out, " yes ") != 2 {
			t.Errorf("want two installed routes: %v\n%s", err, out)
		}
	}

	// A node pings by the tunnel and by its routes, in both families. The rules let answers pass,
	// also of a host behind the other node.
	for args, want := range map[string]string{
		"169.254.80.1 --tunnel lane": "2 requests, 2 answers", "fd00:80::1 --tunnel lane": "2 requests, 2 answers", "192.0.2.101": "2 requests, 2 answers",
		"172.16.1.10 --tunnel lane": "2 requests, 2 answers", "172.16.1.10": "2 requests, 2 answers", "2001:db8:1::10 --tunnel lane": "2 requests, 2 answers",
		"fd00:80::1 --size 4000": "2 requests, 2 answers", "169.254.80.1 --tunnel lane --size 1412 --dont-fragment": "2 requests, 2 answers",
		"169.254.80.1 --tunnel lane --size 1413 --dont-fragment": "packet too big: the path MTU is 1440",
		"fd00:80::1 --tunnel lane --size 1393 --dont-fragment":   "packet too big: the path MTU is 1440",
	} {
		out, err := nodes[0].CLI(t.Context(), "", append([]string{"ping", "-c", "2", "--interval", "200ms"}, strings.Fields(args)...)...)
		if text := fmt.Sprintf("%s%v", out, err); !strings.Contains(text, want) {
			t.Errorf("ping %s: %s, want %q", args, text, want)
		}
	}

	// tcpdump reads what a node captures: of a tunnel the packets themselves, in both directions,
	// with those that are forwarded, and of the underlay the encrypted ones.
	dir := t.TempDir()
	pings := func() error { // the probes of both nodes pass as well, and BGP
		_, err := nodes[0].CLI(t.Context(), "", "ping", "169.254.80.1", "-c", "10", "--interval", "200ms")
		return err
	}
	for i, k := range []struct {
		args  string
		send  func() error
		wants []string
	}{
		{"--tunnel lane --protocol icmp --host 169.254.80.1 -c 20", pings, []string{"IP 169.254.80.0 > 169.254.80.1: ICMP echo request", "IP 169.254.80.1 > 169.254.80.0: ICMP echo reply"}},
		{"--tunnel lane --host 2001:db8:1::10 -c 2", func() error {
			_, err := spokes[0].Exec(t.Context(), "ping", "-c", "1", "-W", "5", "2001:db8:1::10")
			return err
		}, []string{"IP6 2001:db8::10 > 2001:db8:1::10: ICMP6, echo request", "IP6 2001:db8:1::10 > 2001:db8::10: ICMP6, echo reply"}},
		{"--underlay --protocol udp --host 192.0.2.101 -c 20 --size 64", pings, []string{"IP 192.0.2.100.51820 > 192.0.2.101.51820: UDP, length 128", "IP 192.0.2.101.51820 > 192.0.2.100.51820: UDP, length 128"}},
	} {
		file := filepath.Join(dir, fmt.Sprintf("%d.pcap", i))
		done := make(chan error, 1)
		go func() {
			out, err := nodes[0].CLI(t.Context(), "", append([]string{"capture", "-f", file, "--duration", "1m"}, strings.Fields(k.args)...)...)
			if err != nil {
				err = fmt.Errorf("%w\n%s", err, out)
			}
			done <- err
		}()
		err := lab.Until(t.Context(), 60*time.Second, func() error {
			info, err := os.Stat(file)
			if err == nil && info.Size() < 24 {
				err = errors.New("the capture has not begun")
			}
			return err
		})
		if err == nil {
			err = k.send()
		}
		if err = errors.Join(err, <-done); err != nil {
			t.Errorf("capture %s: %v", k.args, err)
			continue
		}
		out, err := exec.Command("tcpdump", "-nr", file).Output()
		if err != nil {
			t.Errorf("capture %s: %v", k.args, err)
		}
		for _, want := range k.wants {
			if !strings.Contains(string(out), want) {
				t.Errorf("capture %s has\n%swant %q", k.args, out, want)
			}
		}
	}

	// A peer that is shut down says why to the other side, and comes back. So does a tunnel, over a
	// restart of the daemon.
	edit := func(args ...string) {
		t.Helper()
		if out, err := nodes[0].CLI(t.Context(), "", append(args, "--wait", "1m")...); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	until := func(what string, n *node, command string, ok func(string) bool) {
		t.Helper()
		var out string
		err := lab.Until(t.Context(), 60*time.Second, func() (err error) {
			if out, err = n.CLI(t.Context(), "", strings.Fields(command)...); err == nil && !ok(out) {
				err = fmt.Errorf("not yet: %s", what)
			}
			return err
		})
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	edit("peer", "disable", "four", "-m", "NET-1")
	until("shut down", nodes[0], "get peers", func(s string) bool {
		return strings.Contains(s, "disabled in the document") && strings.Count(s, "established") == 1
	})
	until("told to the peer", nodes[1], "get events", func(s string) bool { return strings.Contains(s, "administrative shutdown") })
	until("not an error", nodes[0], "status", func(s string) bool { return !strings.Contains(s, "four") && strings.Contains(s, "1 disabled") })
	edit("peer", "enable", "four")
	reachable(60 * time.Second)
	edit("tunnel", "disable", "lane")
	for range 2 {
		until("shut down", nodes[0], "get tunnels", func(s string) bool { return strings.Contains(s, "disabled in the document") })
		until("sessions in it", nodes[0], "get peers", func(s string) bool { return strings.Count(s, "its tunnel lane is disabled") == 2 })
		if out, err := nodes[0].Exec(t.Context(), "ip", "-br", "link"); err != nil || strings.Contains(out, "t-lane") {
			t.Errorf("the interface is still there: %v\n%s", err, out)
		}
		nodes[0].Kill()
		nodes[0].Start(t)
	}
	edit("tunnel", "enable", "lane")
	reachable(60 * time.Second)

	// A new daemon on one side: with the embedded device the lane is down for a moment, and comes
	// back by itself.
	nodes[1].Kill()
	nodes[1].Start(t)
	reachable(60 * time.Second)

	// Objects that are removed from the document are removed from the kernel.
	if _, err := nodes[0].CLI(t.Context(), "node: {name: node0, asn: 64600}\nunderlay: {interface: wan, address: 192.0.2.100}\n", "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	err = lab.Until(t.Context(), 20*time.Second, func() error {
		links, err := nodes[0].Exec(t.Context(), "ip", "-br", "link")
		if err != nil {
			return err
		}
		routes, err := nodes[0].Exec(t.Context(), "ip", "route", "show", "proto", "73")
		if err == nil && (strings.Contains(links, "t-lane") || routes != "") {
			err = fmt.Errorf("still there: %s %s", links, routes)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

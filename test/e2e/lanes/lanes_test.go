// Package lanes has two isthmus nodes with a link of three lanes between them, a spoke behind each,
// and flows that cross the link while lanes fail. Of the kernel it needs only TUN. Ring: namespace;
// needs root.
package lanes

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
)

// node is a node of the link with its spoke, and the daemon's keys.
type node struct {
	*daemon.Node
	spoke           *lab.Node
	private, public string
}

type world struct {
	*testing.T
	nodes [2]*node
}

const document = `
node: {name: nodeME, asn: 6460ME}
underlay: {interface: wan, address: 192.0.2.10ME}
attachments: [{name: spoke, interface: lan, sources: [172.16.ME.0/24, "2001:db8:ME::/64"]}]
links:
- name: pair
  node: nodeYOU
  lanes: 3
  inside: [169.254.96.0/26, "fd00:96::/122"]
  wireguard: {privateKey: link, peerPublicKey: KEY, endpoint: "192.0.2.10YOU:51900", listenPort: 51900}
peers:
- {name: pair, tunnel: pair, asn: 6460YOU, holdTime: 9s, import: {allow: [{prefix: 172.16.YOU.0/24}, {prefix: "2001:db8:YOU::/64"}]}, export: {allow: [{prefix: 172.16.ME.0/24}, {prefix: "2001:db8:ME::/64"}]}}
announce: [172.16.ME.0/24, "2001:db8:ME::/64"]
`

func begin(t *testing.T) *world {
	w := &world{T: t}
	bin := daemon.Build(t, "../../..")
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range w.nodes {
		n := &node{Node: daemon.New(l.Node(fmt.Sprintf("node%d", i)), bin), spoke: l.Node(fmt.Sprintf("spoke%d", i))}
		n.private, n.public = daemon.Key(t)
		w.nodes[i] = n
		l.Link(lab.End{Node: n.Node.Node, Name: "lan", Addrs: daemon.Prefixes(fmt.Sprintf("172.16.%d.1/24", i), fmt.Sprintf("2001:db8:%d::1/64", i))},
			lab.End{Node: n.spoke, Name: "eth0", Addrs: daemon.Prefixes(fmt.Sprintf("172.16.%d.10/24", i), fmt.Sprintf("2001:db8:%d::10/64", i))})
		n.spoke.IP("route add default via 172.16.%d.1", i)
		n.spoke.IP("route add ::/0 via 2001:db8:%d::1", i)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for i, n := range w.nodes {
				if n.Process == nil {
					continue
				}
				for _, noun := range []string{"status", "links", "tunnels", "peers", "routes"} {
					t.Logf("node%d: %s", i, w.cli(n, "get", noun))
				}
				log, _ := os.ReadFile(n.Process.Log)
				t.Logf("node%d: %s", i, log)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	l.Link(lab.End{Node: w.nodes[0].Node.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")}, lab.End{Node: w.nodes[1].Node.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.101/24")})
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, n := range w.nodes {
		n.Start(t)
		if _, err := n.CLI(t.Context(), n.private, "secret", "set", "link"); err != nil {
			t.Fatal(err)
		}
		n.Apply(t, strings.NewReplacer("ME", fmt.Sprint(i), "YOU", fmt.Sprint(1-i), "KEY", w.nodes[1-i].public).Replace(document))
	}
	return w
}

func (w *world) cli(n *node, args ...string) string {
	out, err := n.CLI(w.Context(), "", args...)
	if err != nil {
		return err.Error()
	}
	return out
}

// until waits until a command of a node prints what is wanted.
func (w *world) until(n *node, wants func(string) bool, args ...string) {
	w.Helper()
	err := lab.Until(w.Context(), time.Minute, func() error {
		if out := w.cli(n, args...); !wants(out) {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		w.Fatal(err)
	}
}

// TestLink has one session over three lanes, and flows of both families that use all of them.
func TestLink(t *testing.T) {
	w := begin(t)
	for _, n := range w.nodes {
		w.until(n, func(out string) bool { return strings.Count(out, "established") == 1 }, "get", "peers")
		w.until(n, func(out string) bool { return strings.Count(out, "pair-1,pair-2,pair-3") == 4 }, "get", "routes")
	}
	for _, a := range []string{"172.16.1.10", "2001:db8:1::10"} {
		if out, err := w.nodes[0].spoke.Exec(t.Context(), "ping", "-c5", "-i0.2", "-W2", netip.MustParseAddr(a).String()); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
	out, err := w.nodes[0].Exec(t.Context(), "ip", "nexthop", "show")
	if err != nil || strings.Count(out, "type resilient buckets 128") < 2 {
		t.Errorf("want resilient groups of both families: %v\n%s", err, out)
	}
}

// link returns the link of a node, and waits until it is as wanted.
func (w *world) link(n *node, want string, is func(*isthmusv1.LinkStatus) bool) *isthmusv1.LinkStatus {
	w.Helper()
	var all isthmusv1.ListLinksResponse
	err := lab.Until(w.Context(), time.Minute, func() error {
		all.Reset()
		if err := n.Get(w.Context(), "links", &all); err != nil {
			return err
		}
		if len(all.Links) != 1 || !is(all.Links[0]) {
			return fmt.Errorf("not %s: %v", want, all.Links)
		}
		return nil
	})
	if err != nil {
		w.Fatal(err)
	}
	return all.Links[0]
}

func proved(l *isthmusv1.LinkStatus) bool {
	for _, one := range l.Lanes {
		if one.Out.Status != "ok" || one.In.Status != "ok" || one.PathMtu == 0 {
			return false
		}
	}
	return l.Usable == 3
}

// by returns the lane of the packets from a spoke to an address of the other one, 1 to 3.
func (w *world) by(n *node, from, to netip.Addr) int {
	w.Helper()
	out, err := n.Exec(w.Context(), "ip", "route", "get", to.String(), "from", from.String(), "iif", "lan", "ipproto", "icmp")
	if err != nil {
		w.Fatal(err)
	}
	for lane := range 3 {
		if strings.Contains(out, fmt.Sprintf("dev t-pair-%d ", lane+1)) {
			return lane + 1
		}
	}
	w.Fatalf("no lane in %s", out)
	return 0
}

// flow is a flow of echo requests, with the lanes of its two directions.
type flow struct {
	*lab.Pinger
	there, back int
}

// flows begins flows between two addresses that use all lanes.
func (w *world) flows(n int) (all []flow) {
	w.Helper()
	from := netip.MustParseAddr("172.16.0.10")
	for i := range n {
		to := netip.AddrFrom4([4]byte{172, 16, 1, byte(20 + i)})
		p, err := w.nodes[0].spoke.Ping(to, lab.PingOptions{Interval: 20 * time.Millisecond})
		if err != nil {
			w.Fatal(err)
		}
		all = append(all, flow{p, w.by(w.nodes[0], from, to), w.by(w.nodes[1], to, from)})
	}
	return all
}

// TestOneWay cuts one of three lanes in one direction while flows use all of them. Both ends stop to
// use it and name the direction; the flows of the other lanes lose no packet, and the sessions and
// the other lanes do not notice. When the cut ends, the lane returns.
func TestOneWay(t *testing.T) {
	w := begin(t)
	for i := range 24 {
		if out, err := w.nodes[1].spoke.Exec(t.Context(), "ip", "addr", "add", fmt.Sprintf("172.16.1.%d/24", 20+i), "dev", "eth0"); err != nil {
			t.Fatal(err, out)
		}
	}
	for _, n := range w.nodes {
		w.until(n, func(out string) bool { return strings.Count(out, "pair-1,pair-2,pair-3") == 4 }, "get", "routes")
		w.link(n, "proved", proved)
	}
	former := w.link(w.nodes[0], "proved", proved)
	sessions := w.cli(w.nodes[0], "get", "peers", "-o", "jsonpath={.peers[0].since}")
	flows := w.flows(24)
	lanes := map[int]int{}
	for _, f := range flows {
		lanes[f.there]++
	}
	if len(lanes) != 3 {
		t.Fatalf("the flows use the lanes %v", lanes)
	}

	const cut = "table inet cut {\n chain in { type filter hook prerouting priority -400; iifname \"wan\" udp dport 51901 drop; }\n}\n"
	if out, err := w.nodes[1].ExecInput(t.Context(), cut, "nft", "-f", "-"); err != nil {
		t.Fatal(err, out)
	}
	begun := time.Now()
	var took [2]time.Duration
	for i, n := range w.nodes {
		out, in := []string{"dead", "ok"}[i], []string{"ok", "dead"}[i]
		w.link(n, "out of the group", func(l *isthmusv1.LinkStatus) bool {
			two := l.Lanes[1]
			return !two.Usable && two.Out.Status == out && two.In.Status == in && l.Usable == 2
		})
		took[i] = time.Since(begun)
	}
	t.Logf("lane 2 was cut from node0 to node1; they say so after %v and %v", took[0].Round(time.Millisecond), took[1].Round(time.Millisecond))
	w.until(w.nodes[0], func(out string) bool {
		return strings.Contains(out, "LaneDead") && strings.Contains(out, "lane pair-2 is dead to node1 since ")
	}, "describe", "node")
	w.until(w.nodes[1], func(out string) bool {
		return strings.Contains(out, "LaneDead") && strings.Contains(out, "lane pair-2 is dead from node0 since ")
	}, "describe", "node")
	for _, n := range w.nodes {
		w.until(n, func(out string) bool { return strings.Count(out, "pair-1,pair-2 (dead),pair-3") == 4 }, "get", "routes")
		w.link(n, "healed again and again", func(l *isthmusv1.LinkStatus) bool { return l.Lanes[1].Heals >= 3 })
	}
	if out, err := w.nodes[1].Exec(t.Context(), "nft", "delete", "table", "inet", "cut"); err != nil {
		t.Fatal(err, out)
	}
	for _, n := range w.nodes {
		w.link(n, "proved again", proved)
		w.until(n, func(out string) bool { return strings.Count(out, "pair-1,pair-2,pair-3") == 4 }, "get", "routes")
	}
	for _, f := range flows {
		r := f.Stop()
		switch affected := f.there == 2 || f.back == 2; {
		case !affected && r.Lost > 0:
			t.Errorf("a flow by lane %d and back by lane %d: %v", f.there, f.back, r)
		case affected && r.Gap > 2*time.Second:
			t.Errorf("a flow by lane %d and back by lane %d, of which one was cut: %v", f.there, f.back, r)
		case f.there == 2 && r.Lost == 0:
			t.Errorf("a flow by the lane that was cut lost nothing: %v", r)
		}
		t.Logf("by lane %d, back by lane %d: %v", f.there, f.back, r)
	}
	now := w.link(w.nodes[0], "proved", proved)
	for _, i := range []int{0, 2} {
		if now.Lanes[i].In.Since.AsTime() != former.Lanes[i].In.Since.AsTime() || now.Lanes[i].Out.Since.AsTime() != former.Lanes[i].Out.Since.AsTime() || now.Lanes[i].Heals != 0 {
			t.Errorf("lane %d has noticed: %v", i+1, now.Lanes[i])
		}
	}
	if again := w.cli(w.nodes[0], "get", "peers", "-o", "jsonpath={.peers[0].since}"); again != sessions {
		t.Errorf("the session began at %s, and again at %s", sessions, again)
	}
}

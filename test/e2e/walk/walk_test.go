// Package walk has isthmusd follow random documents, faults and restarts in a network namespace,
// and compares the kernel with that of a node that starts with the last document. Ring: namespace;
// needs root.
package walk

import (
	"cmp"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
)

const (
	steps   = 100
	between = 25 // steps from one comparison to the next
)

// document returns a random document of few possible parts, so that parts come, change and go.
func document(r *rand.Rand, public string) string {
	some := func(p float64) bool { return r.Float64() < p }
	var b strings.Builder
	b.WriteString("node: {name: hub, asn: 64620}\nunderlay: {interface: wan, address: 192.0.2.100}\n")
	if some(0.7) {
		b.WriteString("attachments: [{name: lan, interface: lan0, sources: [10.1.0.0/16]")
		if some(0.5) {
			fmt.Fprintf(&b, ", routes: [{prefix: 10.1.%d.0/24, via: 10.1.0.9}]", 5+r.IntN(2))
		}
		b.WriteString("}]\n")
	}
	var names []string
	var tunnels, peers strings.Builder
	for i, name := range []string{"a", "b", "c"} {
		if some(0.4) {
			continue
		}
		names = append(names, name)
		fmt.Fprintf(&tunnels, "- {name: %s, mtu: %d, inside: [{local: 169.254.%d.%d/30}], wireguard: {privateKey: lane, peerPublicKey: %q, listenPort: %d}}\n",
			name, 1400-r.IntN(2), 10+i, 1+r.IntN(2), public, 51820+i+10*r.IntN(2))
		if some(0.7) {
			fmt.Fprintf(&peers, "- {name: p%s, tunnel: %s, asn: %d, import: {allow: [{prefix: 10.9.0.0/16}]}, export: {allow: [{prefix: 0.0.0.0/0}]}}\n", name, name, 65001+r.IntN(2))
		}
	}
	if len(names) > 0 {
		b.WriteString("tunnels:\n" + tunnels.String())
		if some(0.7) {
			fmt.Fprintf(&b, "staticRoutes: [{prefix: 10.%d.0.0/16, tunnels: [%s]}, {prefix: 10.99.0.0/16, blackhole: true}]\n", 7+r.IntN(2), strings.Join(names, ", "))
		}
	}
	if peers.Len() > 0 {
		b.WriteString("peers:\n" + peers.String() + "announce: [0.0.0.0/0]\n")
	}
	if some(0.8) {
		var addresses []string
		for i := range 3 {
			if len(addresses) == 0 || some(0.5) {
				addresses = append(addresses, fmt.Sprintf("{address: %s}", []string{"192.0.2.10", "192.0.2.11", "192.0.2.12", `"2001:db8:9::10"`}[(i+r.IntN(2))%4]))
			}
		}
		slices.Sort(addresses)
		fmt.Fprintf(&b, "egress:\n  pools: [{name: p, addresses: [%s]}]\n  policies: [{name: x, sources: [10.%d.0.0/16], pool: p}", strings.Join(slices.Compact(addresses), ", "), 1+r.IntN(3))
		if some(0.5) {
			b.WriteString(`, {name: y, action: deny, sources: [10.1.0.0/16], destinations: [198.51.100.0/24], protocol: tcp, ports: ["25"]}`)
		}
		b.WriteString("]\n")
	}
	return b.String()
}

// faults are what other processes do to the node. Each may find nothing to break.
var faults = [][]string{
	{"nft", "delete", "table", "inet", "isthmus"},
	{"ip", "route", "flush", "table", "all", "proto", "73"},
	{"ip", "nexthop", "flush", "protocol", "73"},
	{"ip", "addr", "del", "192.0.2.10/32", "dev", "wan"},
	{"ip", "addr", "del", "192.0.2.11/32", "dev", "wan"},
	{"ip", "route", "add", "10.7.0.0/16", "table", "100", "proto", "73", "metric", "2048", "dev", "lan0"},
	{"sysctl", "-qw", "net.ipv4.ip_forward=0"},
}

var (
	numbers  = regexp.MustCompile(`(?m)^\d+: |\\\\ .*| link-netns \S+| link/\S+ .*| nhid \d+|@\S+`)
	link     = regexp.MustCompile(`(?m)^(\d+): ([^:@]+)`)
	elements = regexp.MustCompile(`elements = \{[^}]*\}`)
	number   = regexp.MustCompile(`\b\d+\b`)
	table    = regexp.MustCompile(`(?m)^(table .*|\})$`)
	// the port of the embedded WireGuard devices is any free one
	divert = regexp.MustCompile(`th dport set \d+`)
)

// rules returns the rules without numbers that the kernel chooses: nft shows the index of an
// interface in network byte order where a set has concatenated or anonymous types.
func rules(t *testing.T, n *daemon.Node) string {
	t.Helper()
	links, err := n.Exec(t.Context(), "ip", "-o", "link", "show")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{}
	for _, m := range link.FindAllStringSubmatch(links, -1) {
		i, err := strconv.ParseUint(m[1], 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		names[fmt.Sprint(bits.ReverseBytes32(uint32(i)))] = m[2]
	}
	out, err := n.Exec(t.Context(), "nft", "-s", "list", "ruleset")
	if err != nil {
		t.Fatal(err)
	}
	out = divert.ReplaceAllString(out, "th dport set PORT")
	out = elements.ReplaceAllStringFunc(out, func(s string) string {
		list := strings.Split(strings.TrimSuffix(strings.TrimPrefix(s, "elements = {"), "}"), ",")
		for i, e := range list {
			list[i] = number.ReplaceAllStringFunc(strings.TrimSpace(e), func(n string) string { return cmp.Or(names[n], n) })
		}
		slices.Sort(list)
		return "elements = { " + strings.Join(list, ", ") + " }"
	})
	// Chains and sets are in the order in which they were made.
	blocks := strings.Split(table.ReplaceAllString(out, ""), "\n\t}\n")
	for i := range blocks {
		blocks[i] = strings.TrimSpace(blocks[i])
	}
	slices.Sort(blocks)
	return strings.Join(blocks, "\n\t}\n") + "\n"
}

// kernel returns the state that isthmus makes: rules, routes, next hops, addresses, interfaces and
// sysctls, without numbers that the kernel chooses.
func kernel(t *testing.T, n *daemon.Node) string {
	t.Helper()
	var b strings.Builder
	b.WriteString(rules(t, n))
	for _, command := range []string{
		"ip -4 route show table all proto 73", "ip -6 route show table all proto 73", "ip -o addr show scope global", "ip -o addr show scope link",
		"ip -o link show type tun", "sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.conf.wan.rp_filter",
	} {
		out, err := n.Exec(t.Context(), strings.Fields(command)...)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(numbers.ReplaceAllString(out, ""), "\n")
		for i, line := range lines {
			lines[i] = strings.Join(strings.Fields(line), " ")
		}
		slices.Sort(lines)
		if strings.Contains(command, "scope link") {
			// Those of veth interfaces come from MAC addresses.
			lines = slices.DeleteFunc(lines, func(s string) bool { return strings.Contains(s, " fe80::") })
		}
		fmt.Fprintf(&b, "# %s\n%s\n", command, strings.Join(lines, "\n"))
	}
	return b.String()
}

func TestRandomWalk(t *testing.T) {
	bin := daemon.Build(t, "../../..")
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	n := daemon.New(l.Node("walker"), bin)
	var fresh []*daemon.Node
	for i := range steps / between {
		fresh = append(fresh, daemon.New(l.Node(fmt.Sprint("fresh", i)), bin))
	}
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range append(fresh, n) {
		for _, c := range []string{
			"link add wan type veth peer name wan-far", "link add lan0 type veth peer name lan-far", "link set wan-far up", "link set lan-far up", "link set wan up", "link set lan0 up",
			"addr add 192.0.2.100/24 dev wan", "addr add 2001:db8:9::100/64 dev wan nodad", "addr add 10.1.0.1/24 dev lan0", "route add default via 192.0.2.1 dev wan",
		} {
			if _, err := n.Exec(t.Context(), append([]string{"ip"}, strings.Fields(c)...)...); err != nil {
				t.Fatal(err)
			}
		}
	}
	n.Start(t)
	private, _ := daemon.Key(t)
	_, public := daemon.Key(t)
	if _, err := n.CLI(t.Context(), private, "secret", "set", "lane"); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 11))
	var trail []string
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("last steps:\n%s", strings.Join(trail[max(0, len(trail)-12):], "\n"))
			log, _ := os.ReadFile(n.Process.Log)
			t.Logf("%s", log[max(0, len(log)-8000):])
		}
	})
	for step := range steps {
		what := ""
		switch k := r.IntN(10); {
		case k < 5 || step == 0:
			doc := document(r, public)
			what = "apply " + doc
			if _, err := n.CLI(t.Context(), doc, "apply", "-f", "-"); err != nil {
				t.Fatalf("%v: %s", err, doc)
			}
		case k == 5:
			what = "rollback"
			n.CLI(t.Context(), "", "rollback") // fails without an earlier document
		case k == 6:
			what = "kill"
			n.Kill()
			n.Start(t)
		default:
			c := faults[r.IntN(len(faults))]
			what = strings.Join(c, " ")
			n.Exec(t.Context(), c...)
		}
		trail = append(trail, what)
		if r.IntN(2) == 0 {
			n.Settled(t)
		}
		if step%between == between-1 {
			compare(t, n, fresh[step/between])
		}
	}
}

// compare waits until the kernels of the walker and of a new node with its state are the same.
func compare(t *testing.T, n, fresh *daemon.Node) {
	t.Helper()
	n.Settled(t)
	from, err := n.Dir()
	if err != nil {
		t.Fatal(err)
	}
	to, err := fresh.Dir()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(to, "state"), os.DirFS(filepath.Join(from, "state"))); err != nil {
		t.Fatal(err)
	}
	fresh.Start(t)
	fresh.Settled(t)
	var got, want string
	err = lab.Until(t.Context(), 20*time.Second, func() error {
		if got, want = kernel(t, n), kernel(t, fresh); got != want {
			return fmt.Errorf("the kernels differ")
		}
		return nil
	})
	if err != nil {
		a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
		for _, line := range a {
			if !slices.Contains(b, line) {
				t.Logf("walker has %s", line)
			}
		}
		for _, line := range b {
			if !slices.Contains(a, line) {
				t.Logf("fresh has  %s", line)
			}
		}
		t.Fatal(err)
	}
	if !strings.Contains(want, "chain forward") && !strings.Contains(want, "hook forward") {
		t.Fatalf("the new node has no rules:\n%s", want)
	}
	fresh.Kill()
}

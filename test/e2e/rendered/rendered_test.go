package rendered

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/e2e"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
)

// node is an isthmus node of docs/examples/two-routers.yaml.
type node struct {
	name            string
	public, private netip.Addr
	hub             *e2e.Hub
	router          *e2e.Router
}

var publicKey = regexp.MustCompile(`wireguardPublicKey: \S+`)

// TestTwoRouters checks three clouds around two routers, with each cloud built from the output that
// is rendered for it, and each node from its document.
func TestTwoRouters(t *testing.T) {
	addr := netip.MustParseAddr
	nodes := []*node{{name: "hub-1", public: addr("203.0.113.9"), private: addr("10.9.0.4")}, {name: "hub-2", public: addr("203.0.113.10"), private: addr("10.9.1.4")}}
	w := newWorld(t)
	for k, n := range nodes {
		n.hub = e2e.NewHub(w.lab, w.internet, "nat-"+n.name, n.name, addr(fmt.Sprintf("203.0.113.%d", 200+k)), lab.Pair{Private: n.private, Public: n.public})
	}
	w.ok(w.lab.Up(t.Context()))
	var keys []string
	for _, n := range nodes {
		w.ok(n.hub.Translate(t.Context()))
		var err error
		n.router, err = e2e.StartRouter(t.Context(), n.hub.Node, netip.AddrPortFrom(n.private, 7443), w.bin)
		w.ok(err)
		key, err := n.router.CLI(t.Context(), "secret", "set", "wireguard", "--generate", "wireguard")
		w.ok(err)
		keys = append(keys, strings.TrimSpace(key))
	}
	// The user's own values: the nodes' public keys, the path of the file with a key, and a spoke
	// that is in no group.
	w.example("two-routers.yaml", func(text string) string {
		text = publicKey.ReplaceAllStringFunc(text, func(string) string {
			key := keys[0]
			keys = keys[1:]
			return "wireguardPublicKey: " + key
		})
		return strings.NewReplacer("/etc/isthmus/keys", w.lab.Dir, "\ngroups:", "\n- {name: lab, gateway: gcp, prefixes: [10.0.2.0/24]}\ngroups:").Replace(text)
	})
	w.step("nodes are there")
	// The addresses of Azure and Google are in the topology. AWS chooses its own now.
	azure, google, aws := w.side("azure", "cli", "all"), w.side("gcp", "terraform", "all"), w.side("aws", "terraform", "all")
	w.choose(aws)
	w.build(azure, peer.Config{FRR: true})
	w.build(google, peer.Config{})
	w.build(aws, peer.Config{})
	w.ok(w.lab.Up(t.Context()))
	inside := []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16")}
	leaks, err := w.internet.Node.Capture("", inside...)
	w.ok(err)
	w.startGateways()
	w.step("gateways started")
	for _, n := range nodes {
		document := w.topology("render", "--for", "node/"+n.name)
		n.store(w, document)
		w.ok(n.router.Apply(t.Context(), document))
	}
	w.step("documents applied")
	tables := w.as(map[string][2]int{"aws": {4, 4}, "azure": {4, 4}, "gcp": {4, 4}})
	for _, n := range nodes {
		w.ok(lab.Until(t.Context(), 30*time.Second, func() error { return n.router.Up(t.Context()) }))
		out, err := n.router.CLI(t.Context(), "get", "peers")
		w.ok(err)
		tables += n.name + ":\n" + out
	}
	w.step("every tunnel is up and every session established\n%s", tables)
	// Traffic between spokes behind the same gateway is the cloud's own.
	w.reach(func(a, b string) bool { return a != "lab" && b != "lab" || a == "net-a" || b == "net-a" })
	if n, first, err := leaks.Stop(); err != nil || n != 0 {
		t.Errorf("%d packets with an inside source on the Internet (%v), first: %q", n, err, first)
	}
}

// once matches the commands in the head of a document that store the keys.
var once = regexp.MustCompile(`(?m)^# Once: (.*)$`)

// store runs the commands of a document's head.
func (n *node) store(w *world, document string) {
	w.Helper()
	var script []string
	for _, m := range once.FindAllStringSubmatch(document, -1) {
		script = append(script, m[1])
	}
	cmd := exec.CommandContext(w.Context(), "sh", "-euc", strings.Join(script, "\n"))
	cmd.Env = append(append(os.Environ(), w.environment()...), "PATH="+w.bin+":"+os.Getenv("PATH"), "ISTHMUS_SOCKET="+n.router.Socket())
	w.run(cmd)
}

// TestCloudsOnly is the article "Tunnels Between Clouds": three gateways, and no node between them.
// Azure attempts each connection from both instances. A connection that isthmus topology show calls
// dead stays "Connecting" in the tables of peers, all others are connected.
func TestCloudsOnly(t *testing.T) {
	w := newWorld(t)
	w.example("clouds-only.yaml", func(text string) string { return text })
	for cloud, form := range map[string]string{"azure": "terraform", "gcp": "cli"} {
		w.choose(w.side(cloud, form, "gateways"))
	}
	google := w.side("gcp", "cli", "gateways", "tunnels") // with variables for the addresses of AWS
	aws := w.side("aws", "cli", "all")
	w.choose(aws)
	azure := w.side("azure", "terraform", "gateways", "tunnels")
	w.build(azure, peer.Config{FRR: true})
	w.build(google, peer.Config{FRR: true})
	w.build(aws, peer.Config{FRR: true})
	w.ok(w.lab.Up(t.Context()))
	w.step("built")
	w.startGateways()
	w.step("gateways started")
	want := map[string][2]int{"aws": {8, 8}, "azure": {12, 6}, "gcp": {6, 6}}
	w.as(want)
	w.step("as isthmus topology show says")
	w.reach(func(string, string) bool { return true })
	// Azure keeps trying.
	for _, g := range w.gateways {
		if g.Name == "azure" {
			for _, i := range g.Instances {
				out, err := i.IKE.(*peer.Charon).Swanctl(t.Context(), "--list-sas")
				w.ok(err)
				if n := strings.Count(out, ", CONNECTING,"); n != 3 {
					t.Errorf("%s attempts %d tunnels, want 3:\n%s", i.Node.Name, n, out)
				}
			}
			continue
		}
		n, err := g.StrangersDropped(t.Context())
		w.ok(err)
		w.step("%s has left %d packets of Azure without an answer", g.Name, n)
		if n == 0 {
			t.Errorf("%s: no attempt was dropped", g.Name)
		}
	}
	w.step("still so, after attempts in vain:\n%s", w.as(want))
}

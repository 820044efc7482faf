// Package firstboot starts isthmusd as a cloud starts a new machine: with user-data and without a
// login. The clouds' metadata services are stand-ins at their own addresses. Ring: namespace; needs
// root.
package firstboot

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
)

const (
	patience = 40 * time.Second
	// mark is in a comment of each user-data. The node may not write it anywhere.
	mark   = "WORD-OF-THE-USER-DATA"
	public = "203.0.113.9"
)

const document = `node: {name: hub, asn: 64620}
underlay: {interface: eth0, address: 10.9.0.4, publicAddress: 203.0.113.9}
attachments: [{name: lan, interface: lan0, sources: [10.50.0.0/24]}]
tunnels:
- {name: lane, wireguard: {privateKey: lane, peerPublicKey: %q, endpoint: "198.51.100.130:51820", listenPort: 51820}, inside: [{local: 169.254.10.1/30}]}
egress:
  pools: [{name: partner, addresses: [{address: 10.9.0.5}]}]
  policies: [{name: spokes, sources: [10.50.0.0/24], pool: partner}]
`

// world is a node in a cloud, with a spoke, and an operator on another machine.
type world struct {
	*testing.T
	hub                   *daemon.Node
	wall, operator, spoke *lab.Node
	cloud                 *cloud
	dir, home             string
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func end(n *lab.Node, name string, addrs ...string) lab.End {
	return lab.End{Node: n, Name: name, Addrs: daemon.Prefixes(addrs...)}
}

func begin(t *testing.T, bin, kind string) *world {
	w := &world{T: t, cloud: &cloud{kind: kind, public: public}, home: t.TempDir()}
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
	w.hub, w.wall, w.operator, w.spoke = daemon.New(l.Node("hub"), bin), l.Node("cloud"), l.Node("operator"), l.Node("spoke")
	l.Link(end(w.hub.Node, "eth0", "10.9.0.4/24"), end(w.wall, "vpc", "10.9.0.1/24", "169.254.169.254/32", "168.63.129.16/32"))
	l.Link(end(w.wall, "wan", "198.51.100.1/24"), end(w.operator, "eth0", "198.51.100.130/24"))
	l.Link(end(w.hub.Node, "lan0", "10.50.0.1/24"), end(w.spoke, "eth0", "10.50.0.10/24"))
	w.hub.IP("link set eth0 address 0e:49:61:0f:c3:11")
	w.hub.IP("route replace default via 10.9.0.1")
	w.operator.IP("route replace default via 198.51.100.1")
	w.spoke.IP("route replace default via 10.50.0.1")
	w.ok(l.Up(t.Context()))
	w.ok(w.wall.OneToOne(t.Context(), "wan", lab.Pair{Private: netip.MustParseAddr("10.9.0.4"), Public: netip.MustParseAddr(public)}))
	w.dir, err = w.hub.Dir()
	w.ok(err)
	w.hub.Args = []string{"-listen", ":7443", "-platform", kind}
	// A proxy in the environment would receive all requests to the metadata service.
	w.hub.Under = []string{"env", "http_proxy=http://198.51.100.130:3128", "HTTP_PROXY=http://198.51.100.130:3128"}
	return w
}

// cli runs isthmus as the operator, with only the operator's home directory.
func (w *world) cli(input string, args ...string) (string, error) {
	return w.operator.ExecInput(w.Context(), input, append([]string{"env", "-i", "HOME=" + w.home, w.hub.Program("isthmus")}, args...)...)
}

func (w *world) request(name string) string {
	w.Helper()
	out, err := w.cli("", "client", "request", "--name", name)
	w.ok(err)
	return out
}

// userData writes user-data.
func userData(document, request, more string) string {
	in := func(text string) string {
		return "    " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n    ") + "\n"
	}
	s := "#isthmus\n# " + mark + "\n"
	if document != "" {
		s += "document: |\n" + in(document)
	}
	if request != "" {
		s += "admin:\n  request: |\n" + in(request)
	}
	return s + more
}

func (w *world) consoleFile() string { return filepath.Join(w.dir, "run", "console") }

// console waits until the console's text contains a part.
func (w *world) console(part string) (text string) {
	w.Helper()
	w.ok(lab.Until(w.Context(), patience, func() error {
		data, err := os.ReadFile(w.consoleFile())
		if err == nil && !bytes.Contains(data, []byte(part)) {
			err = fmt.Errorf("no %q in %s", part, data)
		}
		text = string(data)
		return err
	}))
	return text
}

// condition waits for a condition of the node with a part of its message, or with an empty part
// that there is none of the type.
func (w *world) condition(kind, part string) {
	w.Helper()
	w.hub.Status(w, patience, func(s *isthmusv1.SystemStatus) bool {
		has := slices.ContainsFunc(s.Conditions, func(c *isthmusv1.Condition) bool { return c.Type == kind && strings.Contains(c.Message, part) })
		return has == (part != "")
	})
}

// reboot stops the daemon and starts it as after a boot of the machine.
func (w *world) reboot() {
	w.Helper()
	w.hub.Process.Stop()
	w.ok(os.RemoveAll(filepath.Join(w.dir, "run")))
	w.hub.Start(w)
}

// secretive fails when the node has written a part of the user-data that it must not keep.
func (w *world) secretive() {
	w.Helper()
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(mark)) {
			w.Errorf("%s has a part of the user-data", path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		w.Error(err)
	}
	log, err := os.ReadFile(w.hub.Process.Log)
	w.ok(err)
	if bytes.Contains(log, []byte(mark)) {
		w.Error("the log has a part of the user-data")
	}
}

// audited returns who did what by the audit log.
func (w *world) audited() (out []string) {
	w.Helper()
	data, err := os.ReadFile(filepath.Join(w.dir, "state", "audit.log"))
	w.ok(err)
	for line := range bytes.Lines(data) {
		var e struct{ Event, Who, Method, Object, Result string }
		w.ok(json.Unmarshal(line, &e))
		out = append(out, strings.TrimSpace(strings.Join([]string{e.Event, e.Who, e.Method, e.Object, e.Result}, " ")))
	}
	return out
}

// noisy returns a text as a serial console shows it.
func noisy(text string) string {
	var b strings.Builder
	b.WriteString("\x1b[0m\x1b[2J[    0.000000] Linux version 6.12\r\nhub login: -----BEGIN ISTHMUS CONTEXT-----\r\naddress: \"192.0.2.1:7443\"\r\ncertif")
	for i, line := range strings.Split(strings.TrimRight(text, "\n"), "\n") {
		b.WriteString(line + "\r\n")
		switch i % 5 {
		case 1:
			b.WriteString("[   12.345678] IPv6: ADDRCONF(NETDEV_CHANGE): eth0: link becomes ready\r\n")
		case 3:
			b.WriteString("[\x1b[0;32m  OK  \x1b[0m] Started isthmus.\r\n")
		}
	}
	return b.String() + "hub login: "
}

// TestClouds checks that, on each cloud, user-data alone turns a machine into a node that the
// operator manages from another machine. The user-data is used once.
func TestClouds(t *testing.T) {
	bin := daemon.Build(t, "../../..")
	for kind, zone := range map[string]string{"aws": "us-west-2b", "azure": "2", "google": "us-central1-a"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			w := begin(t, bin, kind)
			private, _ := daemon.Key(t)
			_, far := daemon.Key(t)
			w.cloud.userData = userData(fmt.Sprintf(document, far), w.request("alice"), "access: {api: [198.51.100.128/28]}\nhosts: [hub.example]\n")
			w.cloud.serve(t, w.wall)
			w.hub.Start(t)
			shown := w.console("-----END ISTHMUS CONTEXT-----")
			if _, err := w.cli("", "get", "status"); err == nil {
				t.Error("the operator has a context already")
			}
			for what, broken := range map[string]string{"nothing": "", "cut": shown[:len(shown)-200], "with a letter changed": strings.ReplaceAll(shown, "MII", "MIJ")} {
				if _, err := w.cli(broken, "client", "accept"); err == nil {
					t.Errorf("%s: accepted", what)
				}
			}
			_, err := w.cli(noisy(shown), "client", "accept")
			w.ok(err)
			// The address is the public one, from the platform, so the server's certificate
			// contains it.
			out, err := w.cli("", "get", "status", "-o", "wide")
			w.ok(err)
			for _, part := range []string{"hub", kind, zone} {
				if !strings.Contains(out, part) {
					t.Errorf("no %q in\n%s", part, out)
				}
			}
			out, err = w.cli("", "context", "show")
			if err != nil || !strings.Contains(out, "address: "+public+":7443\nname: alice\nrole: admin\n") {
				t.Errorf("%v: %s", err, out)
			}
			status := &isthmusv1.SystemStatus{}
			w.ok(w.hub.Get(t.Context(), "status", status))
			if p := status.GetPlatform(); len(p.GetInterfaces()) != 1 || p.Interfaces[0].Name != "eth0" || p.Interfaces[0].Addresses[0] != "10.9.0.4=203.0.113.9" {
				t.Errorf("platform: %v", p)
			}
			if status.Generation != 1 {
				t.Errorf("generation %d", status.Generation)
			}
			audited := w.audited()
			for _, want := range []string{"end first boot /isthmus.v1.AccessService/IssueClient alice OK", "end first boot /isthmus.v1.SpecService/Apply  OK"} {
				if !slices.Contains(audited, want) {
					t.Errorf("the audit log lacks %q: %q", want, audited)
				}
			}
			// The context that has its key on the node is no longer needed.
			if _, err := os.Lstat(filepath.Join(w.dir, "state", "admin.yaml")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("admin.yaml: %v", err)
			}
			out, err = w.cli("", "client", "list")
			if err != nil || strings.Count(out, "valid") != 1 || strings.Count(out, "revoked") != 1 {
				t.Errorf("%v: %s", err, out)
			}

			// The secret comes over the API, and the tunnel that waits for it is created.
			w.condition("SecretMissing", "tunnels[0].wireguard.privateKey: secret lane is not stored")
			w.hub.Process.Stop()
			w.hub.Start(t)
			w.condition("SecretMissing", "`isthmus secret set lane`")
			_, err = w.cli(private, "secret", "set", "lane")
			w.ok(err)
			w.condition("SecretMissing", "")
			w.hub.Settled(t)

			// A spoke is not the node: its packets to the metadata service are dropped.
			asked := func() int { return w.cloud.count("10.50.0.") + w.cloud.count("10.9.0.5 ") }
			for _, at := range []string{"169.254.169.254", "168.63.129.16"} {
				_, err := w.spoke.Exec(t.Context(), "timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/"+at+"/80")
				if err == nil || asked() > 0 {
					t.Errorf("a spoke reaches %s", at)
				}
			}
			if dropped := drops(t, w); dropped["platform"] == 0 {
				t.Errorf("nothing was dropped as platform: %v", dropped)
			}

			// Other user-data at the next boot is not even read.
			w.ok(lab.Until(t.Context(), patience, func() error {
				w.cloud.mu.Lock()
				defer w.cloud.mu.Unlock()
				if kind == "azure" && w.cloud.reports != 1 {
					return fmt.Errorf("%d reports that the node is ready", w.cloud.reports)
				}
				return nil
			}))
			w.cloud.set(func() {
				w.cloud.asked, w.cloud.userData = nil, userData("node: {name: other}\n", "", "access: {api: [0.0.0.0/0]}\nconsole: shell\n")
			})
			w.reboot()
			w.ok(lab.Until(t.Context(), patience, func() error {
				s := &isthmusv1.SystemStatus{}
				if err := w.hub.Get(t.Context(), "status", s); err != nil || s.GetPlatform().GetInstance() == "" {
					return fmt.Errorf("no facts: %v", err)
				}
				return nil
			}))
			if n := w.cloud.count("user"); n > 0 {
				t.Errorf("user-data was read %d times", n)
			}
			w.hub.Settled(t)
			out, err = w.cli("", "get", "status")
			if err != nil || !strings.Contains(out, "hub") {
				t.Errorf("%v: %s", err, out)
			}
			if text := w.console("-----END ISTHMUS CONTEXT-----"); !strings.Contains(text, "generation 1") {
				t.Errorf("the console after a boot: %s", text)
			}
			if _, err := os.Lstat(filepath.Join(w.dir, "run", "console-shell")); err == nil {
				t.Error("the console has a shell")
			}
			w.secretive()
		})
	}
}

// drops returns how many packets were dropped, by reason.
func drops(t *testing.T, w *world) map[string]uint64 {
	t.Helper()
	m := &isthmusv1.ListPoliciesResponse{}
	if err := w.hub.Get(t.Context(), "nat", m); err != nil {
		t.Fatal(err)
	}
	out := map[string]uint64{}
	for _, d := range m.Drops {
		out[d.Reason] = d.Packets
	}
	return out
}

// TestHurdles checks that a failure of the metadata service does not keep a node from serving, is
// reported with the remedy, and ends when the service works. A proxy of the environment and the
// target of a redirect receive nothing.
func TestHurdles(t *testing.T) {
	bin := daemon.Build(t, "../../..")
	for what, h := range hurdles {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w := begin(t, bin, "aws")
			trap := &cloud{}
			for _, at := range []string{"198.51.100.130:80", "198.51.100.130:3128"} {
				listen(t, trap, w.operator, at)
			}
			w.cloud.userData = userData("node: {name: hub}\nunderlay: {interface: eth0, address: 10.9.0.4}\n", "", "")
			w.cloud.hurdle = h.answer
			w.hub.Start(t) // nothing answers yet
			w.condition("FirstBootWaiting", "asking AWS for /latest/api/token: ")
			w.cloud.serve(t, w.wall)
			w.condition("FirstBootWaiting", h.says)
			w.condition("FactsOld", "have never been read")
			if _, err := os.Lstat(filepath.Join(w.dir, "run", "console-shell")); err == nil {
				t.Error("user-data was taken")
			}
			w.cloud.set(func() { w.cloud.hurdle = nil })
			w.hub.Settled(t)
			w.condition("FirstBootWaiting", "")
			w.condition("FactsOld", "")
			if len(trap.asked) > 0 {
				t.Errorf("another server was asked: %q", trap.asked)
			}
			w.secretive()
		})
	}
}

func listen(t *testing.T, c *cloud, n *lab.Node, at string) {
	t.Helper()
	l, err := n.Listen("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: c, ReadHeaderTimeout: 10 * time.Second}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
}

// TestRefused checks that the node uses nothing of wrong user-data, reports every problem, and
// reads other user-data only at the next boot.
func TestRefused(t *testing.T) {
	w := begin(t, daemon.Build(t, "../../.."), "google")
	clients := func() string {
		out, err := w.hub.CLI(t.Context(), "", "client", "list", "-o", "json")
		w.ok(err)
		return out
	}
	good := w.request("alice")
	tampered := strings.Replace(good, "ME", "MF", 1)
	w.cloud.userData = userData("node: {name: hub}\n", tampered, "access: {api: [nowhere]}\nhosts: [\"\\e[31m\"]\nunknown: 1\nconsole: login\n")
	w.cloud.serve(t, w.wall)
	w.hub.Start(t)
	shown := w.console("user-data was refused")
	for _, part := range []string{"access.api[0]", "hosts[0]", "unknown", "console", "admin"} {
		if !strings.Contains(shown, part) {
			t.Errorf("no %q on the console:\n%s", part, shown)
		}
		w.condition("UserDataRefused", part)
	}
	if strings.ContainsFunc(shown, func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }) {
		t.Errorf("the console shows control characters: %q", shown)
	}

	// The daemon restarts within the boot, with other user-data: it is not read again in this boot.
	before := clients()
	wrong := "node: {name: hub}\nunderlay: {interface: eth0, address: 10.9.0.4}\negress: {pools: 7}\n"
	w.cloud.set(func() { w.cloud.userData = userData(wrong, good, "access: {api: [198.51.100.128/28]}\n") })
	w.hub.Process.Stop()
	w.hub.Start(t)
	w.condition("UserDataRefused", "see the console")
	w.reboot()
	w.console("document line 3: egress.pools")
	w.condition("UserDataRefused", "document line 3: egress.pools")
	if got := clients(); got != before {
		t.Errorf("half done: clients were\n%s, and are\n%s", before, got)
	}
	asked := w.cloud.count("user-data")
	w.reboot()
	w.condition("UserDataRefused", "at an earlier boot")
	if w.cloud.count("user-data") == asked {
		t.Error("it was not read again")
	}
	w.cloud.set(func() { w.cloud.userData = "#!/bin/sh\n# " + mark + "\nreboot\n" })
	w.reboot()
	w.condition("UserDataIgnored", "a script")
	w.cloud.set(func() { w.cloud.userData = "" })
	w.reboot()
	w.console("no user-data was given")
	w.condition("UserDataIgnored", "")

	// Without a document the sources of the user-data reach the API, after a boot too, until a
	// document defines others.
	w.cloud.set(func() {
		w.cloud.userData = userData("", good, "access: {api: [198.51.100.128/28]}\nconsole: shell\n")
	})
	w.reboot()
	_, err := w.cli(w.console("-----END ISTHMUS CONTEXT-----"), "client", "accept")
	w.ok(err)
	for range 2 {
		out, err := w.cli("", "get", "status")
		if err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if _, err := os.Lstat(filepath.Join(w.dir, "run", "console-shell")); err != nil {
			t.Errorf("the console has no shell: %v", err)
		}
		w.reboot()
	}
	_, err = w.cli("node: {name: hub}\nunderlay: {interface: eth0, address: 10.9.0.4}\naccess: {api: [192.0.2.0/24]}\n", "apply", "-f", "-")
	w.ok(err)
	w.hub.Settled(t)
	if out, err := w.cli("", "--timeout", "3s", "get", "status"); err == nil {
		t.Errorf("the document does not count: %s", out)
	}
	w.secretive()
}

// TestDocumentURL checks that a document at a URL is used only with its digest, and that the daemon
// waits for it.
func TestDocumentURL(t *testing.T) {
	w := begin(t, daemon.Build(t, "../../.."), "aws")
	text := "node: {name: hub}\nunderlay: {interface: eth0, address: 10.9.0.4}\naccess: {api: [198.51.100.128/28]}\n"
	elsewhere := &cloud{}
	var body atomic.Pointer[string]
	other := strings.Replace(text, "198.51.100.128/28", "0.0.0.0/0", 1)
	body.Store(&other)
	elsewhere.hurdle = func(rw http.ResponseWriter, q *http.Request) {
		if q.URL.Path == "/first" {
			http.Redirect(rw, q, "/second", http.StatusFound)
			return
		}
		io.WriteString(rw, *body.Load())
	}
	listen(t, elsewhere, w.operator, "198.51.100.130:80")
	w.cloud.userData = userData("", "", fmt.Sprintf("documentURL: http://198.51.100.130/first?signature=%s\ndocumentSHA256: %x\n", mark, sha256.Sum256([]byte(text))))
	w.cloud.serve(t, w.wall)
	w.hub.Start(t)
	w.condition("FirstBootWaiting", "instead of documentSHA256")
	body.Store(&text)
	w.hub.Settled(t)
	w.secretive()
}

// TestSeed checks that the daemon finds a NoCloud seed that appears after its start, and that a
// machine without a platform serves.
func TestSeed(t *testing.T) {
	w := begin(t, daemon.Build(t, "../../.."), "auto")
	seed := filepath.Join(w.dir, "seed")
	w.hub.Args = append(w.hub.Args, "-seed", seed)
	w.hub.Start(t)
	w.ok(os.MkdirAll(seed, 0o755))
	w.ok(os.WriteFile(filepath.Join(seed, "meta-data"), []byte("instance-id: one\n"), 0o644))
	w.ok(os.WriteFile(filepath.Join(seed, "user-data"), []byte(userData("node: {name: hub}\nunderlay: {interface: eth0, address: 10.9.0.4}\n", "", "")), 0o644))
	w.hub.Settled(t)
	// A copy of the disk on another machine.
	w.ok(os.WriteFile(filepath.Join(seed, "meta-data"), []byte("instance-id: two\n"), 0o644))
	w.reboot()
	w.condition("InstanceChanged", "instance one and is on two")
	w.reboot()
	w.condition("InstanceChanged", "`isthmus authority renew`")
	_, err := w.hub.CLI(t.Context(), "", "authority", "renew", "--at-once")
	w.ok(err)
	w.reboot()
	w.hub.Status(t, patience, func(s *isthmusv1.SystemStatus) bool { return s.GetPlatform().GetInstance() == "two" })
	w.condition("InstanceChanged", "")
}

// TestAuto checks that a document that leaves its addresses to the platform gets them, follows them
// when they move, and stays as it is when the platform has none or does not answer.
func TestAuto(t *testing.T) {
	w := begin(t, daemon.Build(t, "../../.."), "azure")
	w.hub.Args = append(w.hub.Args, "-platform-refresh", "1s")
	const text = "node: {name: hub}\nunderlay: {interface: eth0, address: auto, publicAddress: auto}\n" +
		"egress: {pools: [{name: own, addresses: [{address: 10.9.0.4, publicAddress: auto}]}], policies: [{name: all, sources: [10.50.0.0/24], pool: own}]}\n"
	w.hub.Start(t)
	_, err := w.hub.CLI(t.Context(), text, "apply", "-f", "-")
	for _, path := range []string{"underlay.address", "underlay.publicAddress", "egress.pools[0].addresses[0].publicAddress"} {
		if err == nil || !strings.Contains(err.Error(), path+`: "auto": is unknown, because no platform reported this machine's addresses`) {
			t.Errorf("without facts: %v; want %s", err, path)
		}
	}
	w.cloud.userData = userData(text, "", "")
	w.cloud.serve(t, w.wall)
	w.hub.Settled(t)
	seen := func(want string) {
		t.Helper()
		w.ok(lab.Until(t.Context(), patience, func() error {
			m := &isthmusv1.ListPoolsResponse{}
			if err := w.hub.Get(t.Context(), "pools", m); err != nil {
				return err
			}
			if got := m.Pools[0].Members[0].PublicAddress; got != want {
				return fmt.Errorf("the pool is seen as %s, want %s", got, want)
			}
			return nil
		}))
	}
	seen(public)
	w.condition("PublicAddressChanged", "")
	w.cloud.set(func() { w.cloud.public = "203.0.113.77" })
	seen("203.0.113.77")
	w.condition("PublicAddressChanged", "they are [10.9.0.4=203.0.113.77], and were [10.9.0.4=203.0.113.9]")

	// The platform does not answer: its last answer stays in use, also after a boot.
	w.cloud.set(func() { w.cloud.hurdle = hurdles["a web page"].answer })
	w.condition("FactsOld", "web page")
	seen("203.0.113.77")
	w.reboot()
	w.hub.Settled(t)
	seen("203.0.113.77")
	w.condition("FactsOld", "have never been read")

	// It no longer has a public address: the running configuration stays.
	w.cloud.set(func() { w.cloud.hurdle, w.cloud.public = nil, "" })
	w.condition("FactsUnusable", "underlay.publicAddress")
	w.condition("FactsOld", "")
	// Repeated reads of the same answer do not end the condition either.
	begun := time.Now()
	w.hub.Status(t, patience, func(s *isthmusv1.SystemStatus) bool {
		if s.GetPlatform().GetRead().AsTime().Sub(begun) < 2*time.Second {
			return false
		}
		if !slices.ContainsFunc(s.Conditions, func(c *isthmusv1.Condition) bool { return c.Type == "FactsUnusable" }) {
			t.Error("FactsUnusable has ended")
		}
		return true
	})
	seen("203.0.113.77")
	w.cloud.set(func() { w.cloud.public = public })
	seen(public)
	w.condition("FactsUnusable", "")
}

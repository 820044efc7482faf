package rendered

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/isthmus-net/isthmus/router/topology"
	"github.com/isthmus-net/isthmus/test/e2e"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/test/rendered"
	"github.com/isthmus-net/isthmus/test/vm"
)

// world is a topology's user, with its file, the keys and the command line, and the clouds that run
// the rendered commands.
type world struct {
	*testing.T
	start    time.Time
	bin      string // directory of the programs
	examples string // directory of the examples
	lab      *lab.Lab
	internet *peer.Internet
	file     string            // with the topology
	keys     map[string]string // environment variables with pre-shared keys
	// outside are the addresses that the clouds chose.
	outside  map[string]netip.Addr
	gateways []*peer.Gateway
	spokes   map[string]e2e.Spoke
}

// newWorld makes a world without clouds.
func newWorld(t *testing.T) *world {
	w := &world{T: t, start: time.Now(), keys: map[string]string{}, outside: map[string]netip.Addr{}, spokes: map[string]e2e.Spoke{}}
	w.bin, w.examples = "../../../bin/e2e", "../../../docs/examples"
	if vm.Inside() {
		w.bin, w.examples = ".", "."
	}
	var err error
	w.bin, err = filepath.Abs(w.bin)
	w.ok(err)
	w.lab, err = lab.New(lab.Options{})
	w.ok(err)
	t.Cleanup(func() {
		if t.Failed() && vm.Inside() {
			w.lab.Save(context.Background(), "/out/"+t.Name())
		}
		if err := w.lab.Close(); err != nil {
			t.Error(err)
		}
	})
	w.internet = peer.NewInternet(w.lab, "internet", netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24"))
	return w
}

// example uses an example of the documentation as the topology, after change has put the user's own
// values into it, makes the keys at the sources that isthmus topology show lists, and records the
// outside addresses in it.
func (w *world) example(name string, change func(text string) string) {
	w.Helper()
	text, err := os.ReadFile(filepath.Join(w.examples, name))
	w.ok(err)
	w.file = filepath.Join(w.lab.Dir, name)
	w.ok(os.WriteFile(w.file, []byte(change(string(text))), 0o600))
	for line := range strings.Lines(w.topology("show")) {
		switch f := strings.Fields(line); {
		case len(f) == 2 && strings.HasPrefix(f[1], "$"):
			w.keys[f[1][1:]] = e2e.PSK()
		case len(f) == 3 && f[1] == "file":
			w.ok(os.WriteFile(f[2], []byte(e2e.PSK()+"\n"), 0o600))
		case len(f) == 3:
			if a, err := netip.ParseAddr(f[2]); err == nil {
				w.outside[f[0]] = a
			}
		}
	}
}

func (w *world) step(format string, args ...any) {
	w.Logf("%6.1f s  %s", time.Since(w.start).Seconds(), fmt.Sprintf(format, args...))
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// topology runs isthmus topology with the file and all known addresses.
func (w *world) topology(verb string, args ...string) string {
	w.Helper()
	argv := []string{"topology", verb, "-f", w.file}
	for name, a := range w.outside {
		argv = append(argv, "--set", name+"="+a.String())
	}
	return w.run(exec.CommandContext(w.Context(), filepath.Join(w.bin, "isthmus"), append(argv, args...)...))
}

func (w *world) run(cmd *exec.Cmd) string {
	w.Helper()
	var problems strings.Builder
	cmd.Stderr = &problems
	out, err := cmd.Output()
	if err != nil {
		w.Fatalf("running %s: %v: %s", cmd, err, &problems)
	}
	return string(out)
}

// pairings are the rows of isthmus topology show, by the two outside addresses of a tunnel, from
// either end.
func (w *world) pairings() map[string]pairing {
	w.Helper()
	var list []pairing
	w.ok(json.Unmarshal([]byte(w.topology("show", "-o", "json")), &list))
	out := map[string]pairing{}
	for _, p := range list {
		out[p.Ends[0].Outside+" "+p.Ends[1].Outside] = p
		out[p.Ends[1].Outside+" "+p.Ends[0].Outside] = p
	}
	return out
}

type pairing struct {
	Name, Dead string
	Ends       [2]struct{ Outside string }
}

// side is a cloud's rendered side, and the gateways that the cloud reads in it.
type side struct {
	form, text string
	gateways   []rendered.Gateway
}

// side renders parts of a cloud's side, which run one after another.
func (w *world) side(cloud, form string, parts ...string) side {
	w.Helper()
	s := side{form: form}
	for _, part := range parts {
		s.text += w.topology("render", "--for", cloud, "--as", form, "--part", part)
	}
	var err error
	s.gateways, err = rendered.Parse(form, s.text)
	w.ok(err)
	return s
}

// printed matches the names that a cloud's side prints at the end, or has as outputs.
var printed = regexp.MustCompile(`(?m)^(?:echo|output) "(\w+)`)

// choose assigns a value to every outside address that a cloud's side prints and that has none yet.
func (w *world) choose(s side) {
	for _, m := range printed.FindAllStringSubmatch(s.text, -1) {
		name := strings.ToUpper(m[1])
		if _, known := w.outside[name]; !known {
			w.outside[name] = netip.AddrFrom4([4]byte{192, 0, 2, byte(10 + len(w.outside))})
		}
	}
}

// address returns the address that a cloud's side names or contains.
func (w *world) address(name string) netip.Addr {
	w.Helper()
	if a, ok := w.outside[name]; ok {
		return a
	}
	a, err := netip.ParseAddr(name)
	w.ok(err)
	return a
}

// head matches the lines before a cloud's side that define the sources of keys; in Terraform they
// are comments.
var head = regexp.MustCompile(`(?m)^(?:# )?(export TF_VAR_\w+=.*|: "\$\{.*|\w+=\$\(cat .*)$`)

// shell returns the values of variables after the head of a cloud's side was run.
func (w *world) shell(text string, variables []string) []string {
	w.Helper()
	script := "set -eu\n"
	for _, m := range head.FindAllStringSubmatch(text, -1) {
		script += m[1] + "\n"
	}
	script += "printf '%s\\n'"
	for _, v := range variables {
		script += ` "$` + v + `"`
	}
	cmd := exec.CommandContext(w.Context(), "sh", "-c", script)
	cmd.Env = append(os.Environ(), w.environment()...)
	values := strings.Fields(w.run(cmd))
	if len(values) != len(variables) {
		w.Fatalf("%d values of %d variables", len(values), len(variables))
	}
	return values
}

func (w *world) environment() (out []string) {
	for k, v := range w.keys {
		out = append(out, k+"="+v)
	}
	for k, v := range w.outside {
		out = append(out, k+"="+v.String())
	}
	return out
}

// build adds the look-alikes of a cloud's side, with a spoke for each network behind them: a cloud
// announces its own networks without configuration, so only these come from the topology itself.
func (w *world) build(s side, c peer.Config) {
	w.Helper()
	source, err := os.ReadFile(w.file)
	w.ok(err)
	top, problems := topology.Read(source, nil)
	if len(problems) > 0 {
		w.Fatal(problems)
	}
	for _, g := range s.gateways {
		of := top.Gateways[slices.IndexFunc(top.Gateways, func(x topology.Gateway) bool { return strings.ReplaceAll(x.Name, "-", "_") == g.Name })]
		c.ASN, c.Announce, c.Peerings = g.ASN, nil, w.peerings(s, g)
		for _, spoke := range of.Spokes {
			c.Announce = append(c.Announce, spoke.Prefixes...)
		}
		dress := map[string]func(*lab.Lab, *peer.Internet, string, peer.Config) *peer.Gateway{"aws": peer.NewAWS, "azure": peer.NewAzure, "gcp": peer.NewGoogle}[g.Cloud]
		x := dress(w.lab, w.internet, of.Name, c)
		w.gateways = append(w.gateways, x)
		var vnet []netip.Addr
		for k, spoke := range of.Spokes {
			host := func(n byte) netip.Prefix {
				a := spoke.Prefixes[0].Addr().As4()
				a[3] = n
				return netip.PrefixFrom(netip.AddrFrom4(a), 24)
			}
			var routers []lab.End
			for j, i := range x.Instances {
				end := lab.End{Node: i.Router, Name: fmt.Sprintf("lan%d", k), Addrs: []netip.Prefix{host(byte(4 + j))}}
				routers = append(routers, end)
				if k == 0 {
					vnet = append(vnet, end.Addrs[0].Addr())
				}
			}
			w.spokes[spoke.Name] = e2e.NewSpoke(w.lab, spoke.Name, host(10), routers...)
		}
		if g.Cloud == "azure" {
			x.JoinVNet(vnet...)
		}
	}
}

// peerings are the tunnels that a cloud reads for one gateway, with the keys and addresses that its
// words stand for.
func (w *world) peerings(s side, g rendered.Gateway) (out []peer.Peering) {
	w.Helper()
	var variables []string
	for _, t := range g.Tunnels {
		if s.form == "terraform" {
			t.PSK = "TF_VAR_" + t.PSK
		}
		variables = append(variables, t.PSK)
	}
	keys := w.shell(s.text, variables)
	for k, t := range g.Tunnels {
		p := peer.Peering{Name: t.Name, Outside: w.address(t.Outside), PeerOutside: w.address(t.PeerOutside), PeerASN: t.PeerASN,
			Inside: t.Inside.Addr(), PeerInside: t.PeerInside, PSK: keys[k], IKE: t.IKE, ESP: t.ESP}
		// both tunnels have the connection's name, and only AWS configures which side initiates
		if g.Cloud == "aws" {
			p.Name = fmt.Sprintf("%s_%d", t.Name, t.Instance)
			p.Start = map[bool]string{true: "start", false: "none"}[t.Start]
		}
		out = append(out, p)
	}
	return out
}

// startGateways starts all look-alikes at the same time.
func (w *world) startGateways() {
	w.Helper()
	errs := make([]error, len(w.gateways))
	var wg sync.WaitGroup
	for k, g := range w.gateways {
		wg.Go(func() { errs[k] = g.Start(w.Context()) })
	}
	wg.Wait()
	for _, err := range errs {
		w.ok(err)
	}
}

// pings has each spoke ping each other one.
func (w *world) pings(interval, length time.Duration) map[[2]string]lab.Report {
	w.Helper()
	pingers := map[[2]string]*lab.Pinger{}
	for a, from := range w.spokes {
		for b, to := range w.spokes {
			if a != b {
				p, err := from.Node.Ping(to.Addr, lab.PingOptions{Interval: interval})
				w.ok(err)
				pingers[[2]string{a, b}] = p
			}
		}
	}
	time.Sleep(length)
	out := map[[2]string]lab.Report{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for k, p := range pingers {
		wg.Go(func() {
			r := p.Stop()
			mu.Lock()
			defer mu.Unlock()
			out[k] = r
		})
	}
	wg.Wait()
	return out
}

// reach waits until spokes that may reach each other answer, and then checks that no packet is lost
// between them, and that none is answered elsewhere.
func (w *world) reach(may func(a, b string) bool) {
	w.Helper()
	w.ok(lab.Until(w.Context(), 60*time.Second, func() error {
		for k, r := range w.pings(100*time.Millisecond, 250*time.Millisecond) {
			if may(k[0], k[1]) && r.Lost > 0 {
				return fmt.Errorf("%s to %s: %v", k[0], k[1], r)
			}
		}
		return nil
	}))
	yes, no := 0, 0
	for k, r := range w.pings(50*time.Millisecond, 2*time.Second) {
		switch {
		case may(k[0], k[1]) && r.Lost > 0:
			w.Errorf("%s to %s: %v", k[0], k[1], r)
		case may(k[0], k[1]):
			yes++
		case r.Sent == 0 || r.Lost < r.Sent:
			w.Errorf("%s may not reach %s: %v", k[0], k[1], r)
		default:
			no++
		}
	}
	w.step("%d ways between spokes without loss, %d shut", yes, no)
}

// peers compares a gateway's tunnels and sessions with isthmus topology show, and returns its table
// of peers, the number of tunnels that it attempts or answers, and how many of them are live.
func (w *world) peers(g *peer.Gateway, pairings map[string]pairing) (table string, all, live int, err error) {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "INSTANCE\tPEER\tASN\tSTATE\tPREFIXES\tSENT\tRECEIVED\tUPTIME\tTUNNEL\tTOPOLOGY SHOW")
	var wrong []error
	for _, i := range g.Instances {
		list, err := i.Speaker.Sessions(w.Context())
		if err != nil {
			return "", 0, 0, err
		}
		children, err := i.IKE.Children(w.Context())
		if err != nil {
			return "", 0, 0, err
		}
		for k, n := range i.BGP.Neighbors {
			at := slices.IndexFunc(list, func(s peer.Session) bool { return s.Remote == n.Remote })
			if at < 0 {
				return "", 0, 0, fmt.Errorf("%s: no session with %s", i.Router.Name, n.Remote)
			}
			s := list[at]
			state, uptime := "Connecting", "-"
			if s.State == "Established" {
				state, uptime = "Connected", time.Since(s.Since).Round(time.Second).String()
			}
			name, says := "the other instance", ""
			if k < len(i.Tunnels) { // the tunnels' neighbours come first
				tu := i.Tunnels[k]
				p, known := pairings[tu.Local.String()+" "+tu.Remote.String()]
				name, says = tu.Name, "live"
				if p.Dead != "" {
					says = "dead by design"
				} else {
					live++
				}
				all++
				if up := s.State == "Established" && children[tu.Name] > 0; !known || up != (p.Dead == "") {
					wrong = append(wrong, fmt.Errorf("%s: %s to %s is %s with %d CHILD SAs, topology show says %s", i.Node.Name, name, tu.Remote, s.State, children[name], says))
				}
			}
			fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%d\t%d\t%d\t%s\t%s\t%s\n", i.Router.Name, n.Remote, n.ASN, state, s.Imported, s.MessagesSent, s.MessagesReceived, uptime, name, says)
		}
	}
	t.Flush()
	return b.String(), all, live, errors.Join(wrong...)
}

// as waits until the tunnels of all gateways are as in isthmus topology show, with the wanted
// numbers of each cloud: all, and live ones. It returns the tables.
func (w *world) as(want map[string][2]int) (tables string) {
	w.Helper()
	pairings := w.pairings()
	w.ok(lab.Until(w.Context(), 90*time.Second, func() error {
		tables = ""
		for _, g := range w.gateways {
			table, all, live, err := w.peers(g, pairings)
			if err == nil && want[g.Name] != [2]int{all, live} {
				err = fmt.Errorf("%s has %d tunnels, %d of them live, want %v", g.Name, all, live, want[g.Name])
			}
			if err != nil {
				return fmt.Errorf("%w\n%s", err, table)
			}
			tables += g.Name + ":\n" + table
		}
		return nil
	}))
	return tables
}

package gobgp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/test/root"
)

// debian returns the Debian tree that contains BIRD and FRR: that of test/vm, or the machine's own
// root.
func debian(t testing.TB) string {
	t.Helper()
	root.Need(t, "network namespaces")
	cache := os.Getenv("ISTHMUS_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(dir, "isthmus")
	}
	trees, _ := filepath.Glob(filepath.Join(cache, "root-*", "tree"))
	for _, tree := range append(trees, "/") {
		if _, err := os.Stat(filepath.Join(tree, "usr/sbin/bird")); err == nil {
			return tree
		}
	}
	t.Fatalf("no BIRD in %s: build the tree of test/vm first", cache)
	return ""
}

// tool returns a command of the tree, run with the tree's own loader and libraries.
func tool(t testing.TB, name string, args ...string) *exec.Cmd {
	tree := debian(t)
	lib := filepath.Join(tree, "usr/lib/x86_64-linux-gnu")
	return exec.Command(filepath.Join(tree, "usr/lib64/ld-linux-x86-64.so.2"),
		append([]string{"--library-path", lib + ":" + lib + "/frr", filepath.Join(tree, name)}, args...)...)
}

// far is a network namespace with a peer's process in it, which disappears together with the
// process.
type far struct {
	t   testing.TB
	cmd *exec.Cmd
	dir string
	log string
}

// startFar starts cmd in a new network namespace at the other end of a veth pair. Our interface is
// called name and has the addresses ours; the peer's is eth0 and has the addresses theirs.
func startFar(t testing.TB, name string, ours, theirs []string, cmd *exec.Cmd, dir string) *far {
	t.Helper()
	root.Need(t, "network namespaces")
	f := &far{t: t, cmd: cmd, dir: dir, log: filepath.Join(dir, "log")}
	out, err := os.Create(f.log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(f.log)
			t.Logf("log of %s:\n%s", name, b[max(0, len(b)-4000):])
		}
	})
	pid := strconv.Itoa(cmd.Process.Pid)
	run(t, "ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", pid)
	t.Cleanup(func() { exec.Command("ip", "link", "del", name).Run() })
	for _, a := range ours {
		run(t, "ip", "addr", "add", a, "dev", name, "nodad")
	}
	run(t, "ip", "link", "set", name, "up")
	in := func(args ...string) { run(t, "nsenter", append([]string{"-t", pid, "-n", "ip"}, args...)...) }
	in("link", "set", "lo", "up")
	for _, a := range theirs {
		in("addr", "add", a, "dev", "eth0", "nodad")
	}
	in("link", "set", "eth0", "up")
	return f
}

func startBIRD(t testing.TB, name string, ours, theirs []string, conf string) *far {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "bird.conf")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	return startFar(t, name, ours, theirs, tool(t, "usr/sbin/bird", "-f", "-c", file, "-s", filepath.Join(dir, "ctl")), dir)
}

func (f *far) birdc(args ...string) string {
	out, err := tool(f.t, "usr/sbin/birdc", append([]string{"-r", "-s", filepath.Join(f.dir, "ctl")}, args...)...).CombinedOutput()
	if err != nil {
		f.t.Fatalf("birdc %v: %v: %s", args, err, out)
	}
	return string(out)
}

// routes returns the routes that BIRD has learnt through a protocol.
func (f *far) routes(protocol string) []string {
	var ps []string
	for _, m := range regexp.MustCompile(`(?m)^([0-9a-f.:]+/\d+) `).FindAllStringSubmatch(f.birdc("show", "route", "protocol", protocol), -1) {
		ps = append(ps, m[1])
	}
	slices.Sort(ps)
	return ps
}

// withdrawals returns how many withdrawals BIRD received through a protocol.
func (f *far) withdrawals(protocol string) string {
	m := regexp.MustCompile(`Import withdraws:\s+(\d+)`).FindStringSubmatch(f.birdc("show", "protocols", "all", protocol))
	if m == nil {
		f.t.Fatal("no count of withdrawals")
	}
	return m[1]
}

const birdConf = `
log stderr all;
router id 169.254.1.2;
protocol device { scan time 1; }
protocol static s4 { ipv4; route 10.1.0.0/16 blackhole; route 10.2.0.0/16 blackhole; route 0.0.0.0/0 blackhole; }
protocol static s6 { ipv6; route 2001:db8:1::/48 blackhole; }
template bgp isthmus {
	graceful restart on; graceful restart time 60; hold time 9; keepalive time 3; debug { events };
}
protocol bgp b4 from isthmus {
	local 169.254.1.2 as 65001; neighbor 169.254.1.1 as 64620;
	connect delay time 1; connect retry time 2;
	password "bird and gobgp";
	ipv4 { import all; export where source = RTS_STATIC; };
}
protocol bgp b6 from isthmus {
	local fd00:1::2 as 65001; neighbor fd00:1::1 as 64620;
	passive;
	ipv6 { import all; export where source = RTS_STATIC; };
}
`

func secrets(values map[string]string) secret.Lookup {
	return func(r secret.Ref) ([]byte, error) {
		if v, ok := values[r.Name]; ok {
			return []byte(v), nil
		}
		return nil, fmt.Errorf("%s: %w", r.Name, secret.ErrNotFound)
	}
}

func linkPeer(name, link, ours, theirs string, asn uint32) bgp.Peer {
	return bgp.Peer{
		Name: name, Tunnel: name, Interface: link, Address: addr(theirs), LocalAddress: addr(ours), ASN: asn,
		HoldTime: 9 * time.Second, Keepalive: 3 * time.Second, TTL: 1, GracefulRestart: 60 * time.Second,
		Import: bgp.Import{Allow: []bgp.Rule{rule("10.0.0.0/8", 8, 32), rule("2001:db8::/32", 32, 64)}},
		Export: bgp.Export{Allow: []bgp.Rule{rule("172.16.0.0/12", 12, 24), rule("2001:db8::/32", 32, 64)}},
	}
}

// TestBIRD has two sessions with BIRD: IPv4 with TCP-MD5 that both sides open, and IPv6 that this
// node opens.
func TestBIRD(t *testing.T) {
	bird := startBIRD(t, "ist-bird", []string{"169.254.1.1/30", "fd00:1::1/64"}, []string{"169.254.1.2/30", "fd00:1::2/64"}, birdConf)
	p4 := linkPeer("b4", "ist-bird", "169.254.1.1", "169.254.1.2", 65001)
	p4.Password = secret.Ref{Name: "md5", Fingerprint: "1"}
	p6 := linkPeer("b6", "ist-bird", "fd00:1::1", "fd00:1::2", 65001)
	c := config(p4, p6)
	c.RouterID = addr("169.254.1.1")
	c.Announce = append(c.Announce, prefix("172.17.0.0/16"), prefix("2001:db8:64::/48"))
	values := map[string]string{"md5": "not this one"}
	n := startNode(t, Options{Secrets: secrets(values)}, c)
	eventually(t, 15*time.Second, "IPv6 session", func() bool { return n.state("b6").State == bgp.Established })
	eventually(t, 5*time.Second, "IPv6 routes", func() bool { return slices.Equal(n.prefixes(), []string{"2001:db8:1::/48"}) })
	eventually(t, 5*time.Second, "IPv6 announcement", func() bool { return slices.Equal(bird.routes("b6"), []string{"2001:db8:64::/48"}) })
	if s := bird.birdc("show", "route", "all", "protocol", "b6"); !strings.Contains(s, "via fd00:1::1") || !strings.Contains(s, "BGP.next_hop: fd00:1::1") && !strings.Contains(s, "bgp_next_hop: fd00:1::1") {
		t.Errorf("IPv6 next hop: %s", s)
	}
	eventually(t, 15*time.Second, "why the session with the wrong password is down", func() bool { return n.state("b4").LastError != "" })
	if s := n.state("b4"); s.State == bgp.Established {
		t.Fatalf("a session with the wrong password: %+v", s)
	} else {
		t.Log(s.LastError)
	}

	values["md5"] = "bird and gobgp"
	p4.Password.Fingerprint = "2"
	c.Peers = []bgp.Peer{p4, p6}
	apply := func() {
		t.Helper()
		if err := n.Apply(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	apply()
	eventually(t, 15*time.Second, "IPv4 session", func() bool { return n.state("b4").State == bgp.Established })
	eventually(t, 5*time.Second, "routes", func() bool {
		return slices.Equal(n.prefixes(), []string{"10.1.0.0/16", "10.2.0.0/16", "2001:db8:1::/48"})
	})
	eventually(t, 5*time.Second, "announcement", func() bool { return slices.Equal(bird.routes("b4"), []string{"172.16.0.0/16", "172.17.0.0/16"}) })

	t.Run("killed", func(t *testing.T) {
		eventually(t, 5*time.Second, "synced", func() bool { return n.recorder.count() == 1 })
		n.process().kill()
		start := time.Now()
		eventually(t, 15*time.Second, "back", func() bool {
			return n.Starts() == 2 && n.state("b4").State == bgp.Established && n.state("b6").State == bgp.Established
		})
		t.Logf("sessions were back after %v", time.Since(start).Round(time.Millisecond))
		eventually(t, 15*time.Second, "synced", func() bool { return n.recorder.count() == 2 })
		eventually(t, 15*time.Second, "BIRD's end of graceful restart", func() bool {
			return !strings.Contains(bird.birdc("show", "route", "all"), "stale") && len(bird.routes("b4")) == 2 && len(bird.routes("b6")) == 1
		})
		for _, p := range []string{"b4", "b6"} {
			if w := bird.withdrawals(p); w != "0" {
				t.Errorf("%s: %s withdrawals", p, w)
			}
		}
		log, _ := os.ReadFile(bird.log)
		if c := strings.Count(string(log), "Neighbor graceful restart detected"); c != 2 {
			t.Errorf("BIRD detected %d graceful restarts", c)
		}
	})

	c.Peers[0].Export.Allow = []bgp.Rule{rule("172.16.0.0/16")}
	apply()
	eventually(t, 5*time.Second, "a tightened export policy withdraws", func() bool { return slices.Equal(bird.routes("b4"), []string{"172.16.0.0/16"}) })
	c.Announce = c.Announce[1:]
	apply()
	eventually(t, 5*time.Second, "no announcement", func() bool { return len(bird.routes("b4")) == 0 })

	// The session ends with the link: GoBGP notices when the hold timer expires, and keeps no
	// paths of a silent peer.
	run(t, "ip", "link", "set", "ist-bird", "down")
	eventually(t, 15*time.Second, "down", func() bool { s := n.state("b4"); return s.State != bgp.Established && !s.Restarting })
	eventually(t, 5*time.Second, "no routes", func() bool { return len(n.prefixes()) == 0 })
	if s := n.state("b4"); !strings.Contains(s.LastError, "hold timer") && !strings.Contains(s.LastError, "connecting") {
		t.Errorf("last error %q", s.LastError)
	}
}

// TestBothFamilies has an IPv4 session with a BIRD that carries IPv6 too, and one with a BIRD that
// does not.
func TestBothFamilies(t *testing.T) {
	const head = `
log stderr all;
router id 169.254.5.%d;
protocol device { scan time 1; }
protocol static s4 { ipv4; route 10.%d.0.0/16 blackhole; }
protocol static s6 { ipv6; route 2001:db8:%d::/48 blackhole; }
protocol bgp both {
	graceful restart on; graceful restart time 60; hold time 9; keepalive time 3; connect delay time 1; connect retry time 2;
	local 169.254.5.%d as 6500%d; neighbor 169.254.5.%d as 64620;
	ipv4 { import all; export where source = RTS_STATIC; };
`
	two := startBIRD(t, "ist-two", []string{"169.254.5.1/30", "fd00:5::1/126"}, []string{"169.254.5.2/30", "fd00:5::2/126"},
		fmt.Sprintf(head, 2, 1, 1, 2, 1, 1)+"	ipv6 { import all; export where source = RTS_STATIC; next hop address fd00:5::2; };\n}\n")
	one := startBIRD(t, "ist-one", []string{"169.254.5.5/30", "fd00:5::5/126"}, []string{"169.254.5.6/30", "fd00:5::6/126"},
		fmt.Sprintf(head, 6, 2, 2, 6, 2, 5)+"}\n")
	p2, p1 := linkPeer("two", "ist-two", "169.254.5.1", "169.254.5.2", 65001), linkPeer("one", "ist-one", "169.254.5.5", "169.254.5.6", 65002)
	p2.OtherLocal, p1.OtherLocal = addr("fd00:5::1"), addr("fd00:5::5")
	for _, p := range []*bgp.Peer{&p2, &p1} {
		p.Export.Allow = append(p.Export.Allow, rule("10.0.0.0/8", 8, 16))
	}
	c := config(p2, p1)
	c.RouterID = addr("169.254.5.1")
	c.Announce = append(c.Announce, prefix("2001:db8:64::/48"))
	n := startNode(t, Options{}, c)
	exchanged := func() {
		t.Helper()
		eventually(t, 20*time.Second, "sessions", func() bool {
			return n.state("two").State == bgp.Established && n.state("one").State == bgp.Established && n.state("two").BothFamilies
		})
		if n.state("one").BothFamilies {
			t.Error("both families with a peer that offers one")
		}
		eventually(t, 20*time.Second, "routes", func() bool {
			return slices.Equal(n.prefixes(), []string{"10.1.0.0/16", "10.2.0.0/16", "2001:db8:1::/48"})
		})
		eventually(t, 20*time.Second, "announcements", func() bool {
			return slices.Equal(two.routes("both"), []string{"10.2.0.0/16", "172.16.0.0/16", "2001:db8:64::/48"}) && slices.Equal(one.routes("both"), []string{"10.1.0.0/16", "172.16.0.0/16"})
		})
	}
	exchanged()
	if s := two.birdc("show", "route", "2001:db8:64::/48", "all"); !strings.Contains(s, "via fd00:5::1 ") {
		t.Errorf("the next hop is another one:\n%s", s)
	}
	hop := func(view bgp.View, want map[string]string) {
		t.Helper()
		page, err := n.List(t.Context(), bgp.Query{Peer: "two", View: view, Limit: 100})
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, e := range page.Entries {
			got[e.Prefix.String()] = e.NextHop.String()
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", view, got, want)
		}
	}
	hop(bgp.Accepted, map[string]string{"10.1.0.0/16": "169.254.5.2", "2001:db8:1::/48": "fd00:5::2"})
	hop(bgp.Advertised, map[string]string{"10.2.0.0/16": "169.254.5.1", "172.16.0.0/16": "169.254.5.1", "2001:db8:64::/48": "fd00:5::1"})
	if page, err := n.LookUp(t.Context(), prefix("2001:db8:1::/48")); err != nil || len(page.Entries) != 1 || !page.Entries[0].Used {
		t.Errorf("look-up: %+v, %v", page, err)
	}

	for p, want := range map[string]string{
		"2001:db8:1::/48": "one family, two from-there", "10.1.0.0/16": "one , two from-there", "10.2.0.0/16": "one from-there, two ",
		"172.16.0.0/16": "one , two ", "2001:db8:64::/48": "one family, two ",
	} {
		page, err := n.LookUp(t.Context(), prefix(p))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, o := range page.Offers {
			got = append(got, o.Peer+" "+string(o.Reason))
			if (o.Reason == "") != (o.Text == "") {
				t.Errorf("%s: %+v", p, o)
			}
		}
		if strings.Join(got, ", ") != want {
			t.Errorf("%s is announced to: %q, want %q", p, got, want)
		}
	}

	eventually(t, 20*time.Second, "synced", func() bool { return n.recorder.count() == 1 })
	n.process().kill()
	eventually(t, 20*time.Second, "a new process", func() bool { return n.Starts() == 2 })
	exchanged()
	eventually(t, 20*time.Second, "synced", func() bool { return n.recorder.count() == 2 })
	if w := two.withdrawals("both"); w != "0" {
		t.Errorf("%s withdrawals of IPv4 across the restart", w)
	}
	eventually(t, 20*time.Second, "the end of the graceful restart", func() bool { return !strings.Contains(two.birdc("show", "route", "all"), "stale") })

	// The limit is of both families together.
	c.Peers[0].MaxPrefixes = 1
	if err := n.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "the limit", func() bool { return n.state("two").State == bgp.PrefixLimit })
	eventually(t, 20*time.Second, "the routes of the other peer alone", func() bool { return slices.Equal(n.prefixes(), []string{"10.2.0.0/16"}) })
}

// TestWrongAS has a session with BIRD that has another AS than this node expects, and one that
// expects another AS of this node: each side refuses the other's OPEN before a session is there.
func TestWrongAS(t *testing.T) {
	startBIRD(t, "ist-was", []string{"169.254.4.1/30", "fd00:4::1/64"}, []string{"169.254.4.2/30", "fd00:4::2/64"}, `
log stderr all;
router id 169.254.4.2;
protocol device { scan time 1; }
protocol bgp theirs { local 169.254.4.2 as 65009; neighbor 169.254.4.1 as 64620; hold time 9; connect delay time 1; connect retry time 2; error wait time 1, 2; ipv4 { import all; export none; }; }
protocol bgp ours { local fd00:4::2 as 65001; neighbor fd00:4::1 as 64999; hold time 9; connect delay time 1; connect retry time 2; error wait time 1, 2; ipv6 { import all; export none; }; }
`)
	n := startNode(t, Options{}, config(linkPeer("theirs", "ist-was", "169.254.4.1", "169.254.4.2", 65001), linkPeer("ours", "ist-was", "fd00:4::1", "fd00:4::2", 65001)))
	for name, want := range map[string]string{
		"theirs": "this node refused the peer (NOTIFICATION code 2(open) subcode 2(bad peer as)): the peer has AS 65009, and the document says 65001",
		"ours":   "the peer refused this node (NOTIFICATION code 2(open) subcode 2(bad peer as)): it expects another AS than 64620 (node.asn)",
	} {
		eventually(t, 20*time.Second, "why session "+name+" is down", func() bool {
			s := n.state(name)
			return strings.HasPrefix(s.LastError, want) && !s.LastErrorAt.IsZero()
		})
	}
}

// TestLinkLocal has two sessions with BIRD over link-local addresses, one opened by each side.
func TestLinkLocal(t *testing.T) {
	const conf = `
log stderr all;
router id 169.254.3.%d;
protocol device { scan time 1; }
protocol static s6 { ipv6; route 2001:db8:%d::/48 blackhole; }
protocol bgp b6 {
	graceful restart on; hold time 9; keepalive time 3; connect delay time 1; connect retry time 2; %s
	local fe80::%d as 6500%d; neighbor fe80::1%%eth0 as 64620;
	ipv6 { import all; export where source = RTS_STATIC; };
}
`
	var birds [2]*far
	c := config()
	c.Announce = []netip.Prefix{prefix("2001:db8:64::/48")}
	for i, passive := range []string{"", "passive;"} {
		name := fmt.Sprintf("ist-ll%d", i)
		birds[i] = startBIRD(t, name, []string{"fe80::1/64"}, []string{fmt.Sprintf("fe80::%d/64", i+2)}, fmt.Sprintf(conf, i+2, i+1, passive, i+2, i+1))
		p := linkPeer(name, name, "fe80::1", fmt.Sprintf("fe80::%d", i+2), 65001+uint32(i))
		p.Passive = passive == ""
		c.Peers = append(c.Peers, p)
	}
	n := startNode(t, Options{}, c)
	eventually(t, 20*time.Second, "both sessions", func() bool {
		return n.state("ist-ll0").State == bgp.Established && n.state("ist-ll1").State == bgp.Established
	})
	eventually(t, 20*time.Second, "routes", func() bool {
		return slices.Equal(n.prefixes(), []string{"2001:db8:1::/48", "2001:db8:2::/48"})
	})
	n.get(func() {
		if p := n.routes[prefix("2001:db8:1::/48")]; len(p) != 1 || p[0].Peer != "ist-ll0" || p[0].NextHop != addr("fe80::2") {
			t.Errorf("path %+v", p)
		}
	})
	for i, bird := range birds {
		want := []string{"2001:db8:64::/48", fmt.Sprintf("2001:db8:%d::/48", 2-i)}
		slices.Sort(want)
		eventually(t, 20*time.Second, "announcements", func() bool { return slices.Equal(bird.routes("b6"), want) })
		if s := bird.birdc("show", "route", "all", "protocol", "b6"); !strings.Contains(s, "via fe80::1 on eth0") || strings.Contains(s, "100::") {
			t.Errorf("next hop: %s", s)
		}
	}
	n.process().kill()
	eventually(t, 20*time.Second, "back", func() bool {
		return n.Starts() == 2 && n.state("ist-ll0").State == bgp.Established && n.state("ist-ll1").State == bgp.Established
	})
}

// TestPasswordGoes checks that a removed password, also one removed by a rollback, is removed from
// the sockets.
func TestPasswordGoes(t *testing.T) {
	a := newSpeaker(t, "169.254.0.11", 65001, nil)
	p := loPeer("a", "169.254.0.11", 65001)
	n := startNode(t, Options{Secrets: secrets(map[string]string{"md5": "key"})}, config(p))
	up := func() {
		t.Helper()
		sessions := a.count()
		eventually(t, 20*time.Second, "a session without a password", func() bool {
			return n.state("a").State == bgp.Established && a.count() >= max(sessions, 1)
		})
	}
	up()
	for range 2 {
		with := p
		with.Password = secret.Ref{Name: "md5", Fingerprint: "1"}
		if err := n.Apply(t.Context(), config(with)); err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, "no session", func() bool { return n.state("a").State != bgp.Established })
		if err := n.Apply(t.Context(), config(p)); err != nil {
			t.Fatal(err)
		}
		up()
	}
	if n.Starts() != 1 {
		t.Errorf("%d starts", n.Starts())
	}
}

// process returns the running process.
func (n *node) process() *process { n.Driver.mu.Lock(); defer n.Driver.mu.Unlock(); return n.proc }

// TestFRR has a session with FRR over two hops of TTL, which FRR opens.
func TestFRR(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "bgpd.conf")
	if err := os.WriteFile(file, []byte(`
router bgp 65002
 bgp router-id 169.254.2.2
 no bgp ebgp-requires-policy
 no bgp network import-check
 bgp graceful-restart
 neighbor 169.254.2.1 remote-as 64620
 neighbor 169.254.2.1 ebgp-multihop 2
 neighbor 169.254.2.1 timers 3 9
 neighbor 169.254.2.1 timers connect 1
 address-family ipv4 unicast
  network 10.1.0.0/16
  network 192.168.0.0/16
`), 0o600); err != nil {
		t.Fatal(err)
	}
	// The directory of the vty socket belongs to the instance. FRR runs as the user of the test.
	startFar(t, "ist-frr", []string{"169.254.2.1/30"}, []string{"169.254.2.2/30"}, tool(t, "usr/lib/frr/bgpd",
		"--log", "stdout", "-Z", "-S", "-f", file, "-i", filepath.Join(dir, "pid"), "--vty_socket", dir), dir)
	// The vty protocol of vtysh: a command and NUL; the answer, three NULs and a status. vtysh
	// itself needs PAM.
	vty := func(command string) string {
		conn, err := net.Dial("unix", filepath.Join(dir, "bgpd.vty"))
		if err != nil {
			return ""
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(time.Minute))
		r := bufio.NewReader(conn)
		var out []byte
		for _, c := range []string{"enable", command} {
			fmt.Fprintf(conn, "%s\x00", c)
			for out = nil; !bytes.HasSuffix(out, []byte{0, 0, 0}); {
				b, err := r.ReadByte()
				if err != nil {
					return ""
				}
				out = append(out, b)
			}
			r.ReadByte()
		}
		return string(bytes.Trim(out, "\x00"))
	}
	told := func() []string {
		var v struct {
			Routes map[string]any
		}
		eventually(t, 10*time.Second, "an answer", func() bool {
			return json.Unmarshal([]byte(vty("show bgp ipv4 unicast neighbors 169.254.2.1 routes json")), &v) == nil
		})
		return slices.Sorted(maps.Keys(v.Routes))
	}
	p := linkPeer("frr", "ist-frr", "169.254.2.1", "169.254.2.2", 65002)
	p.TTL, p.Passive = 2, true
	c := config(p)
	c.RouterID = addr("169.254.2.1")
	c.Announce = append(c.Announce, prefix("172.17.0.0/16"))
	n := startNode(t, Options{}, c)
	eventually(t, 30*time.Second, "session", func() bool { return n.state("frr").State == bgp.Established })
	eventually(t, 5*time.Second, "routes", func() bool { return slices.Equal(n.prefixes(), []string{"10.1.0.0/16"}) })
	eventually(t, 5*time.Second, "announcements", func() bool { return slices.Equal(told(), []string{"172.16.0.0/16", "172.17.0.0/16"}) })
	eventually(t, 10*time.Second, "synced", func() bool { return n.recorder.count() == 1 })

	n.process().kill()
	start := time.Now()
	eventually(t, 15*time.Second, "back", func() bool {
		if got := told(); len(got) != 2 {
			t.Fatalf("routes withdrawn: %v", got)
		}
		return n.Starts() == 2 && n.state("frr").State == bgp.Established
	})
	t.Logf("the session was back after %v", time.Since(start).Round(time.Millisecond))
	eventually(t, 15*time.Second, "synced", func() bool { return n.recorder.count() == 2 })
	if got := told(); len(got) != 2 {
		t.Errorf("routes withdrawn: %v", got)
	}

	p.Export.Allow = []bgp.Rule{rule("172.17.0.0/16")}
	c.Peers = []bgp.Peer{p}
	if err := n.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, "a tightened export policy withdraws", func() bool { return slices.Equal(told(), []string{"172.17.0.0/16"}) })
}

package ipsec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/link/linktest"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Ring: VM. Two charons, ours here and the peer's in the namespace ist-far, with xfrm interfaces
// and traffic.

func TestMain(m *testing.M) { linktest.Main(m) }

const (
	ourAddress   = "192.0.2.1"
	peerAddress  = "192.0.2.2"
	ourAddress6  = "2001:db8::1"
	peerAddress6 = "2001:db8::2"
	ourPublic    = "198.51.100.1" // the identity differs from the address, as behind 1:1 NAT
	preshared    = "0123456789abcdefghijklmnopqrstuv"
	ourConnected = "169.254.64.2"
	peerInside   = "169.254.64.1"
)

// needCharon skips a test on a kernel or machine that cannot run it. In the guest, whose purpose
// is to run it, that is a failure.
func needCharon(t *testing.T) {
	t.Helper()
	skipf := t.Skipf
	if os.Getenv("ISTHMUS_VM") == "1" {
		skipf = t.Fatalf
	}
	if _, err := os.Stat("/usr/sbin/charon-systemd"); err != nil {
		skipf("no charon-systemd here; the VM ring runs this test")
	}
	if out, err := exec.Command("ip", "link", "add", "ist-probe", "type", "xfrm", "if_id", "4242").CombinedOutput(); err != nil {
		skipf("this kernel has no xfrm interfaces; the VM ring runs this test: %s", out)
	}
	linktest.Run(t, "ip", "link", "del", "ist-probe")
}

// charon is a running charon in a namespace ("" for ours).
type charon struct {
	t      *testing.T
	ns     string
	dir    string
	socket string
	cmd    *exec.Cmd
}

func newCharon(t *testing.T, ns string) *charon {
	dir := filepath.Join(t.TempDir(), "charon")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c := &charon{t: t, ns: ns, dir: dir, socket: filepath.Join("/run", fmt.Sprintf("ist-%s.vici", ns))}
	dropIn := "isthmus.conf" // next to the test binary in the VM
	if _, err := os.Stat(dropIn); err != nil {
		dropIn = "../../image/debian/strongswan.d/isthmus.conf"
	}
	shipped, err := os.ReadFile(dropIn)
	if err != nil {
		t.Fatal(err)
	}
	// Our charon gives up soon, because some tests wait for that. The peer has the default
	// timeout: on a busy machine a killed charon takes longer to come back than 0.5 s and four
	// retransmissions, and a peer that has ended its SAs by then drops the packets on them.
	patience := ""
	if ns == "" {
		patience = "retransmit_timeout = 0.5"
	}
	conf := string(shipped) + fmt.Sprintf(`
charon {
	%s
	plugins { vici { socket = unix://%s } }
	journal { default = -1 }
	filelog { f {
		path = %s/log
		flush_line = yes
		time_format = %%T
		time_add_ms = yes
		default = 1
	} }
}
`, patience, c.socket, dir)
	if err := os.WriteFile(filepath.Join(dir, "strongswan.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	c.start()
	t.Cleanup(func() {
		c.kill()
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, "log"))
			if len(log) > 12000 {
				log = log[len(log)-12000:]
			}
			t.Logf("log of charon in %q:\n%s", ns, log)
		}
	})
	return c
}

func (c *charon) start() {
	c.t.Helper()
	os.Remove(c.socket)
	arg := []string{"/usr/sbin/charon-systemd"}
	if c.ns != "" {
		arg = append([]string{"ip", "netns", "exec", c.ns}, arg...)
	}
	c.cmd = exec.Command(arg[0], arg[1:]...)
	c.cmd.Env = append(os.Environ(), "STRONGSWAN_CONF="+filepath.Join(c.dir, "strongswan.conf"))
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := c.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	until(c.t, 60*time.Second, "charon listens", func() bool { _, err := os.Stat(c.socket); return err == nil })
}

// kill ends charon with SIGKILL.
func (c *charon) kill() {
	_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
	_ = c.cmd.Wait()
}

func (c *charon) swanctl(arg ...string) string {
	c.t.Helper()
	arg = append(arg, "--uri", "unix://"+c.socket)
	cmd := exec.Command("swanctl", arg...)
	cmd.Env = append(os.Environ(), "STRONGSWAN_CONF="+filepath.Join(c.dir, "strongswan.conf"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("swanctl %v: %v\n%s", arg, err, out)
	}
	return string(out)
}

// peerConn is the peer's side of a tunnel in swanctl.conf.
type peerConn struct {
	name, ike, esp, psk string
	id                  uint32
	ours, theirs        string // identities
	ts                  string
	unique              string
	local, remote       string // outside addresses
}

func (c *charon) load(conns ...peerConn) {
	c.t.Helper()
	var b strings.Builder
	for _, p := range conns {
		fmt.Fprintf(&b, `
connections { %[1]s {
	version = 2
	local_addrs = %[9]s
	remote_addrs = %[10]s
	proposals = %[2]s
	dpd_delay = 5s
	rekey_time = 4h
	mobike = no
	unique = %[11]s
	local { auth = psk
		id = %[7]s }
	remote { auth = psk
		id = %[6]s }
	children { %[1]s {
		local_ts = %[8]s
		remote_ts = %[8]s
		if_id_in = %[5]d
		if_id_out = %[5]d
		esp_proposals = %[3]s
		rekey_time = 1h
	} } } }
secrets { ike-%[1]s {
	id1 = %[6]s
	id2 = %[7]s
	secret = "%[4]s" } }
`, p.name, p.ike, p.esp, p.psk, p.id, p.ours, p.theirs, p.ts, p.local, p.remote, p.unique)
	}
	file := filepath.Join(c.dir, "swanctl.conf")
	if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.swanctl("--load-all", "--clear", "--noprompt", "--file", file)
}

// bench is the topology: ist-u here, and ist-u with the peer's addresses in ist-far.
type bench struct {
	t         *testing.T
	near, far *charon
	d         *Driver
	links     *link.Links
	dir       string
	cancel    context.CancelFunc
	running   chan error

	mu      sync.Mutex
	states  []tunnel.State
	secrets map[string]string
}

func newBench(t *testing.T) *bench {
	needCharon(t)
	linktest.Namespace(t, "ist-far")
	linktest.Run(t, "ip", "link", "add", "ist-u", "type", "veth", "peer", "ist-u", "netns", "ist-far")
	t.Cleanup(func() { linktest.Run(t, "ip", "link", "del", "ist-u") })
	linktest.Run(t, "ip", "addr", "add", ourAddress+"/24", "dev", "ist-u")
	linktest.Run(t, "ip", "addr", "add", ourAddress6+"/64", "dev", "ist-u", "nodad")
	linktest.Run(t, "ip", "link", "set", "ist-u", "up")
	linktest.Run(t, "ip", "-n", "ist-far", "addr", "add", peerAddress+"/24", "dev", "ist-u")
	linktest.Run(t, "ip", "-n", "ist-far", "addr", "add", peerAddress6+"/64", "dev", "ist-u", "nodad")
	linktest.Run(t, "ip", "-n", "ist-far", "link", "set", "ist-u", "up")
	b := &bench{t: t, dir: t.TempDir(), secrets: map[string]string{"psk": preshared}}
	b.far = newCharon(t, "ist-far")
	b.near = newCharon(t, "")
	b.start()
	t.Cleanup(func() {
		if b.cancel != nil {
			b.stop()
		}
	})
	return b
}

// start runs a new driver, as a new isthmusd would.
func (b *bench) start() {
	b.t.Helper()
	links, err := link.Open()
	if err != nil {
		b.t.Fatal(err)
	}
	b.links = links
	lookup := func(r secret.Ref) ([]byte, error) {
		if v, ok := b.secrets[r.Name]; ok {
			return []byte(v), nil
		}
		return nil, secret.ErrNotFound
	}
	log := slog.New(slog.NewTextHandler(testLog{b.t}, nil))
	b.d = New(Options{Socket: b.near.socket, Secrets: lookup, Links: links, RuntimeDir: b.dir, Log: log})
	var ctx context.Context
	ctx, b.cancel = context.WithCancel(context.Background())
	b.running = make(chan error, 1)
	go func() {
		b.running <- b.d.Run(ctx, func(s tunnel.State) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.states = append(b.states, s)
		})
	}()
}

func (b *bench) stop() {
	b.t.Helper()
	b.cancel()
	b.cancel = nil
	if err := <-b.running; err != nil {
		b.t.Error(err)
	}
	b.d.Close()
	b.links.Close()
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// one returns tunnel number n of the bench; the first is 1.
func one(n int) (tunnel.Config, peerConn) {
	c := tunnel.Config{
		Name: fmt.Sprintf("t%d", n), ID: uint32(100 + n), Interface: fmt.Sprintf("ist-t%d", n), Underlay: "ist-u", MTU: 1400,
		Inside: []tunnel.Inside{{
			Local:  netip.MustParsePrefix(fmt.Sprintf("169.254.%d.2/30", 63+n)),
			Remote: netip.MustParseAddr(fmt.Sprintf("169.254.%d.1", 63+n)),
		}},
		IPsec: &tunnel.IPsec{
			LocalAddress: netip.MustParseAddr(ourAddress), RemoteAddress: netip.MustParseAddr(peerAddress),
			LocalIdentity: ourPublic, RemoteIdentity: fmt.Sprintf("198.51.100.%d", 100+n),
			PSK:          secret.Ref{Name: "psk", Fingerprint: "1"},
			IKEProposals: []string{"aes256gcm16-prfsha256-ecp256"}, ESPProposals: []string{"aes256gcm16-ecp256"},
			IKERekey: 4 * time.Hour, ChildRekey: time.Hour, DPDDelay: 5 * time.Second, ReplayWindow: 1024,
		},
	}
	p := peerConn{
		name: c.Name, id: c.ID, ike: c.IPsec.IKEProposals[0], esp: c.IPsec.ESPProposals[0], psk: preshared,
		ours: ourPublic, theirs: c.IPsec.RemoteIdentity, ts: "0.0.0.0/0", unique: "never", local: peerAddress, remote: ourAddress,
	}
	return c, p
}

// farInterface creates the peer's xfrm interface of a tunnel.
func (b *bench) farInterface(c tunnel.Config) {
	b.t.Helper()
	linktest.Run(b.t, "ip", "-n", "ist-far", "link", "add", c.Interface, "type", "xfrm", "dev", "ist-u", "if_id", fmt.Sprint(c.ID))
	linktest.Run(b.t, "ip", "-n", "ist-far", "addr", "add", fmt.Sprintf("%s/30", c.Inside[0].Remote), "dev", c.Interface)
	linktest.Run(b.t, "ip", "-n", "ist-far", "link", "set", c.Interface, "up")
}

func (b *bench) apply(c tunnel.Config) {
	b.t.Helper()
	if err := b.d.Apply(b.t.Context(), c); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) state(name string) tunnel.State {
	b.t.Helper()
	all, err := b.d.Observe(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	for _, s := range all {
		if s.Name == name {
			return s
		}
	}
	return tunnel.State{}
}

func (b *bench) await(name string, status tunnel.Status) tunnel.State {
	b.t.Helper()
	until(b.t, 60*time.Second, fmt.Sprintf("%s is %s", name, status), func() bool { return b.state(name).Status == status })
	return b.state(name)
}

// until waits for a condition that must hold within the limit. A machine without CPU time to spare
// gets three times as long.
func until(t *testing.T, limit time.Duration, what string, is func() bool) time.Duration {
	t.Helper()
	limit *= 3
	began := time.Now()
	for !is() {
		if time.Since(began) > limit {
			t.Fatalf("waited %v without success: %s", limit, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(began)
}

// traffic sends 100 packets a second until the returned function is called. That function returns
// how many were sent and lost. Packets after the last answer do not count, because they were still
// in transit.
func traffic(t *testing.T, to string) (stop func() (sent, lost int)) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command("ping", "-n", "-i", "0.01", "-s", "64", to)
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() (int, int) {
		_ = cmd.Process.Signal(syscall.SIGINT)
		_ = cmd.Wait()
		seen := map[int]bool{}
		last := 0
		for _, m := range regexp.MustCompile(`bytes from .* icmp_seq=(\d+) `).FindAllStringSubmatch(out.String(), -1) {
			n, _ := strconv.Atoi(m[1])
			seen[n] = true
			last = max(last, n)
		}
		if last == 0 {
			t.Fatalf("no traffic at all:\n%s", out.String())
		}
		return last, last - len(seen)
	}
}

// without runs f under traffic, and fails when a packet is lost.
func (b *bench) without(loss, to string, f func()) {
	b.t.Helper()
	stop := traffic(b.t, to)
	time.Sleep(500 * time.Millisecond)
	f()
	time.Sleep(500 * time.Millisecond)
	sent, lost := stop()
	b.t.Logf("%s: %d packets, %d lost", loss, sent, lost)
	if lost != 0 {
		b.t.Errorf("%s lost %d of %d packets", loss, lost, sent)
	}
}

func TestTunnel(t *testing.T) {
	b := newBench(t)
	c1, p1 := one(1)
	c2, p2 := one(2)
	p2.unique = "replace"
	b.far.load(p1, p2)
	b.farInterface(c1)
	b.farInterface(c2)
	b.apply(c1)
	b.apply(c2)
	b.await("t1", tunnel.Up)
	b.await("t2", tunnel.Up)
	s := b.state("t1")
	t.Logf("up: %+v", s)
	if s.Remote.Addr().String() != peerAddress || s.Established.IsZero() || s.Keyed.IsZero() || s.TimesUp != 1 {
		t.Errorf("state %+v", s)
	}
	linktest.Run(t, "ping", "-c2", "-i0.1", "-W5", peerInside)
	if c, err := b.d.Conditions(t.Context()); err != nil || len(c) != 0 {
		t.Errorf("conditions %q, %v", c, err)
	}

	t.Run("again", func(t *testing.T) {
		v, l := b.d.Writes(), b.links.Writes()
		b.apply(c1)
		b.apply(c2)
		time.Sleep(time.Second)
		if b.d.Writes() != v || b.links.Writes() != l {
			t.Errorf("%d vici and %d link writes for existing objects", b.d.Writes()-v, b.links.Writes()-l)
		}
	})
	other := func() (uint64, uint64) { // changes of t1 must not affect t2
		sas, err := b.d.client.listSAs(context.Background(), connection("t2"))
		if err != nil || len(sas[connection("t2")]) != 1 {
			t.Fatalf("t2: %+v, %v", sas, err)
		}
		s := sas[connection("t2")][0]
		return uint64(s.ID), uint64(s.Children[0].ID)
	}
	ike2, child2 := other()
	t.Run("rekey", func(t *testing.T) {
		for i := range 3 {
			b.without(fmt.Sprintf("our CHILD rekey %d", i), peerInside, func() { b.near.swanctl("--rekey", "--child", connection("t1")) })
			b.without(fmt.Sprintf("our IKE rekey %d", i), peerInside, func() { b.near.swanctl("--rekey", "--ike", connection("t1")) })
			b.without(fmt.Sprintf("peer's CHILD rekey %d", i), peerInside, func() { b.far.swanctl("--rekey", "--child", "t1") })
			b.without(fmt.Sprintf("peer's IKE rekey %d", i), peerInside, func() { b.far.swanctl("--rekey", "--ike", "t1") })
		}
		if s := b.state("t1"); s.TimesUp != 1 || s.Status != tunnel.Up {
			t.Errorf("rekeying shows as a loss: %+v", s)
		}
	})
	t.Run("restart of the daemon", func(t *testing.T) {
		before := b.state("t1")
		b.without("restart", peerInside, func() {
			b.stop()
			b.start()
			b.apply(c1)
			b.apply(c2)
			b.await("t1", tunnel.Up)
			b.await("t2", tunnel.Up)
		})
		time.Sleep(time.Second)
		if n := b.d.Writes() + b.links.Writes(); n != 0 {
			t.Errorf("%d writes to adopt", n)
		}
		if s := b.state("t1"); s.Keyed.Sub(before.Keyed).Abs() > 2*time.Second || s.Established.Sub(before.Established).Abs() > 2*time.Second {
			t.Errorf("another SA: %+v, before %+v", s, before)
		}
	})
	t.Run("edit", func(t *testing.T) {
		before := b.state("t1")
		c1.IPsec.ChildRekey, c1.IPsec.DPDDelay = 50*time.Minute, 7*time.Second
		c1.IPsec.PSK.Fingerprint = "2"
		b.without("edit", peerInside, func() { b.apply(c1) })
		if s := b.state("t1"); s.Established != before.Established || s.Keyed != before.Keyed || s.TimesUp != before.TimesUp {
			t.Errorf("another SA: %+v, before %+v", s, before)
		}
	})
	t.Run("another identity", func(t *testing.T) {
		c1.IPsec.RemoteIdentity, p1.theirs = "198.51.100.200", "198.51.100.200"
		b.far.load(p1, p2)
		before := b.state("t1")
		b.without("another identity", peerInside, func() {
			b.apply(c1)
			until(t, 30*time.Second, "the new SAs alone", func() bool {
				sas, err := b.d.client.listSAs(context.Background(), connection("t1"))
				if err != nil {
					t.Fatal(err)
				}
				all := sas[connection("t1")]
				return len(all) == 1 && all[0].Established.After(before.Established) && len(all[0].Children) == 1
			})
		})
		if s := b.state("t1"); s.Status != tunnel.Up || s.TimesUp != before.TimesUp {
			t.Errorf("%+v, before %+v", s, before)
		}
	})
	t.Run("CHILD SA deleted", func(t *testing.T) {
		before := b.state("t1").TimesUp
		began := time.Now()
		b.near.swanctl("--terminate", "--child", connection("t1"))
		until(t, 20*time.Second, "up again", func() bool { s := b.state("t1"); return s.Status == tunnel.Up && s.TimesUp > before })
		t.Logf("back after %v", time.Since(began))
		linktest.Run(t, "ping", "-c1", "-W5", peerInside)
	})
	t.Run("peer deletes the IKE SA", func(t *testing.T) {
		before := b.state("t1").TimesUp
		began := time.Now()
		b.far.swanctl("--terminate", "--ike", "t1")
		until(t, 20*time.Second, "up again", func() bool { s := b.state("t1"); return s.Status == tunnel.Up && s.TimesUp > before })
		t.Logf("back after %v: %s", time.Since(began), b.state("t1").LastError)
		linktest.Run(t, "ping", "-c1", "-W5", peerInside)
	})
	t.Run("interface deleted", func(t *testing.T) {
		v := b.d.Writes()
		began := time.Now()
		linktest.Run(t, "ip", "link", "del", "ist-t1")
		until(t, 20*time.Second, "traffic", func() bool { return exec.Command("ping", "-c1", "-W1", peerInside).Run() == nil })
		t.Logf("back after %v", time.Since(began))
		if b.d.Writes() != v {
			t.Error("SAs were touched")
		}
	})
	t.Run("duplicate", func(t *testing.T) {
		// charon refuses a second CHILD SA under one IKE SA, but not one under a second IKE SA.
		time.Sleep(apart + time.Second)
		again := p1
		again.name, again.unique = "again", "no" // an equal one would use the same IKE SA
		b.far.load(p1, p2, again)
		b.far.swanctl("--initiate", "--child", "again", "--timeout", "10")
		count := func() (n int) {
			sas, err := b.d.client.listSAs(context.Background(), connection("t1"))
			if err != nil {
				t.Fatal(err)
			}
			for _, ike := range sas[connection("t1")] {
				for _, c := range ike.Children {
					if c.live() {
						n++
					}
				}
			}
			return n
		}
		if count() != 2 {
			t.Fatalf("%d CHILD SAs; the test made no duplicate", count())
		}
		b.without("healing a duplicate", peerInside, func() {
			until(t, 20*time.Second, "one CHILD SA", func() bool { return count() == 1 })
		})
	})
	if ike, child := other(); ike != ike2 || child != child2 {
		t.Errorf("t2 was touched: IKE SA %d to %d, CHILD SA %d to %d", ike2, ike, child2, child)
	}
	t.Run("charon killed", func(t *testing.T) {
		for i := range 3 {
			before := b.state("t1").TimesUp
			second := traffic(t, "169.254.65.1")
			b.without(fmt.Sprintf("kill -9 of charon, %d", i), peerInside, func() {
				b.near.kill()
				until(t, 5*time.Second, "unknown", func() bool { return b.state("t1").Status == tunnel.Unknown })
				time.Sleep(500 * time.Millisecond)
				b.near.start()
				began := time.Now()
				until(t, 60*time.Second, "up again", func() bool { s := b.state("t1"); return s.Status == tunnel.Up && s.TimesUp > before })
				t.Logf("new SAs after %v", time.Since(began))
				b.await("t2", tunnel.Up)
			})
			if sent, lost := second(); lost != 0 {
				t.Errorf("t2 lost %d of %d packets", lost, sent)
			}
		}
		b.mu.Lock()
		for _, s := range b.states[len(b.states)-12:] {
			if s.Status == tunnel.Down {
				t.Errorf("reported down while the kernel carried the traffic: %+v", s)
			}
		}
		b.mu.Unlock()
		b.without("removal of the orphans", peerInside, func() {
			until(t, 60*time.Second, "two SAs per tunnel in the kernel", func() bool {
				sas, err := b.d.o.Links.SAs()
				return err == nil && len(sas) == 4
			})
		})
	})
	t.Run("remove", func(t *testing.T) {
		b.without("removing the other tunnel", peerInside, func() {
			if err := errors.Join(b.d.Remove(t.Context(), "t2"), b.d.Remove(t.Context(), "t2")); err != nil {
				t.Fatal(err)
			}
		})
		if s := b.state("t2"); s != (tunnel.State{}) {
			t.Errorf("still there: %+v", s)
		}
		if _, err := b.d.o.Links.Get("ist-t2"); !errors.Is(err, link.ErrNotFound) {
			t.Errorf("interface: %v", err)
		}
	})
}

// TestTunnel6 checks that between IPv6 outside addresses no packet is lost when SAs are renewed or
// charon is killed. After a kill the peer sends on SAs whose keys this node does not have yet.
func TestTunnel6(t *testing.T) {
	b := newBench(t)
	c, p := one(1)
	c.IPsec.LocalAddress, c.IPsec.RemoteAddress = netip.MustParseAddr(ourAddress6), netip.MustParseAddr(peerAddress6)
	p.local, p.remote = peerAddress6, ourAddress6
	b.far.load(p)
	b.farInterface(c)
	b.apply(c)
	if s := b.await("t1", tunnel.Up); s.Remote.Addr() != c.IPsec.RemoteAddress {
		t.Errorf("state %+v", s)
	}
	b.without("our CHILD rekey", peerInside, func() { b.near.swanctl("--rekey", "--child", connection("t1")) })
	b.without("our IKE rekey", peerInside, func() { b.near.swanctl("--rekey", "--ike", connection("t1")) })
	b.without("peer's CHILD rekey", peerInside, func() { b.far.swanctl("--rekey", "--child", "t1") })
	for i := range 5 {
		before := b.state("t1").TimesUp
		b.without(fmt.Sprintf("kill -9 of charon, %d", i), peerInside, func() {
			b.near.kill()
			until(t, 5*time.Second, "unknown", func() bool { return b.state("t1").Status == tunnel.Unknown })
			b.near.start()
			until(t, 60*time.Second, "up again", func() bool { s := b.state("t1"); return s.Status == tunnel.Up && s.TimesUp > before })
		})
	}
}

// TestTunnelClear checks that nothing of a tunnel is left in charon and in the kernel, whether
// charon runs or was killed, and that objects of others stay.
func TestTunnelClear(t *testing.T) {
	b := newBench(t)
	c, p := one(1)
	b.far.load(p)
	b.farInterface(c)
	ip := func(words string) string { return linktest.Run(t, "ip", strings.Fields(words)...) }
	ip("xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x77 mode tunnel if_id 0x7 aead rfc4106(gcm(aes)) 0x0102030405060708090a0b0c0d0e0f1011121314 128")
	ip("xfrm policy add src 10.77.0.0/16 dst 10.78.0.0/16 dir out if_id 0x7 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel")
	ours := fmt.Sprintf("if_id 0x%x", c.ID)
	for _, killed := range []bool{false, true} {
		b.apply(c)
		b.await("t1", tunnel.Up)
		b.stop()
		if out := ip("xfrm state") + ip("xfrm policy"); !strings.Contains(out, ours) {
			t.Fatalf("no state of ours:\n%s", out)
		}
		if killed {
			b.near.kill()
		}
		links, err := link.Open()
		if err != nil {
			t.Fatal(err)
		}
		d := New(Options{Socket: b.near.socket, Links: links})
		n, err := d.Clear(t.Context())
		if d.Close(); killed != errors.Is(err, ErrNoCharon) || !killed && (n != 2 || err != nil) {
			t.Errorf("killed %v: %d removed from charon, %v", killed, n, err)
		}
		if n, err := links.ClearLinks(tunnel.Mark); err != nil || killed && n != 1 {
			t.Errorf("killed %v: %d interfaces removed, %v", killed, n, err)
		}
		if n, err := links.ClearIPsec(c.ID, c.ID); err != nil || killed && n < 5 {
			t.Errorf("killed %v: %d states and policies removed, %v", killed, n, err)
		}
		if n, err := links.ClearIPsec(c.ID, c.ID); n != 0 || err != nil {
			t.Errorf("killed %v, the second time: %d removed, %v", killed, n, err)
		}
		links.Close()
		out := ip("xfrm state") + ip("xfrm policy") + ip("-d link")
		if strings.Contains(out, ours) || strings.Contains(out, tunnel.Mark) || strings.Count(out, "if_id 0x7") != 2 {
			t.Errorf("killed %v: there is\n%s", killed, out)
		}
		if killed {
			b.near.start()
		} else if out := b.near.swanctl("--list-conns") + b.near.swanctl("--list-sas"); strings.Contains(out, tunnel.Mark) {
			t.Errorf("charon has\n%s", out)
		}
		b.start()
	}
}

func TestReasons(t *testing.T) {
	b := newBench(t)
	c, good := one(1)
	b.farInterface(c)
	narrow := good
	narrow.ts = "10.9.9.0/24"
	b.far.load(narrow)
	b.apply(c)
	if s := b.await("t1", tunnel.Up); !strings.Contains(s.LastError, "narrowed our traffic selectors 0.0.0.0/0 to 10.9.9.0/24") {
		t.Errorf("narrowed: %+v", s)
	}
	if err := b.d.Remove(t.Context(), "t1"); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(*peerConn)
		want   string
	}{
		{"wrong PSK", func(p *peerConn) { p.psk = "another" }, "AUTHENTICATION_FAILED"},
		{"no IKE proposal", func(p *peerConn) { p.ike = "aes128-sha1-modp2048" }, "none of our IKE proposals"},
		{"no ESP proposal", func(p *peerConn) { p.esp = "aes128-sha1" }, "none of our ESP proposals"},
		{"traffic selectors", func(p *peerConn) { p.ts = "fd00::/8" }, "TS_UNACCEPTABLE"},
		{"another identity", func(p *peerConn) { p.theirs = "198.51.100.77" }, "AUTHENTICATION_FAILED"},
	} {
		bad := good
		tt.change(&bad)
		b.far.load(bad)
		b.apply(c)
		until(t, 30*time.Second, tt.name+": "+tt.want, func() bool { return strings.Contains(b.state("t1").LastError, tt.want) })
		if s := b.state("t1"); s.Status == tunnel.Up || s.Status == tunnel.Down && s.NextTry.IsZero() {
			t.Errorf("%s: %+v", tt.name, s)
		}
		t.Logf("%s: %s", tt.name, b.state("t1").LastError)
		if err := b.d.Remove(t.Context(), "t1"); err != nil {
			t.Fatal(err)
		}
	}
	b.far.kill()
	b.apply(c)
	until(t, 30*time.Second, "no answer", func() bool { return b.state("t1").LastError == "no answer from 192.0.2.2" })
	b.far.start()
	b.far.load(good)
	b.await("t1", tunnel.Up)
}

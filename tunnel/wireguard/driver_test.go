package wireguard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/link/linktest"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/test/root"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Ring: namespace for the embedded device, VM for the kernel's. The far end is a separate process
// in its own namespace, and also runs this driver.

const farEnd = "ISTHMUS_TEST_FAR_END"

type end struct {
	Config    tunnel.Config
	Secrets   map[string][]byte
	Userspace bool
}

func TestMain(m *testing.M) {
	text := os.Getenv(farEnd)
	if text == "" {
		linktest.Main(m)
		return
	}
	var e end
	err := json.Unmarshal([]byte(text), &e)
	if err == nil {
		var d *Driver
		if d, err = e.driver(); err == nil {
			if err = d.Apply(context.Background(), e.Config); err == nil {
				fmt.Println("ready")
				err = d.Run(context.Background(), func(tunnel.State) {})
			}
		}
	}
	fmt.Fprintln(os.Stderr, "far end:", err)
	os.Exit(1)
}

func (e end) driver() (*Driver, error) {
	links, err := link.Open()
	if err != nil {
		return nil, err
	}
	lookup := func(r secret.Ref) ([]byte, error) {
		if v, ok := e.Secrets[r.Name]; ok {
			return v, nil
		}
		return nil, secret.ErrNotFound
	}
	return New(Options{Links: links, Secrets: lookup, Userspace: e.Userspace}), nil
}

func TestEmbedded(t *testing.T) { conformance(t, true) }

// TestOwnKeyAsPeer checks that the driver refuses this side's own public key as the peer's. The
// device would silently drop the peer.
func TestOwnKeyAsPeer(t *testing.T) {
	own, _ := wgtypes.GeneratePrivateKey()
	d := New(Options{Secrets: func(secret.Ref) ([]byte, error) { return own[:], nil }})
	_, err := d.keys(&tunnel.WireGuard{PrivateKey: secret.Ref{Name: "key"}, PeerPublicKey: own.PublicKey()})
	if err == nil || !strings.Contains(err.Error(), "peerPublicKey is the public key of this side") || strings.Contains(err.Error(), own.String()) {
		t.Errorf("own key: %v", err)
	}
	other, _ := wgtypes.GeneratePrivateKey()
	if _, err := d.keys(&tunnel.WireGuard{PrivateKey: secret.Ref{Name: "key"}, PeerPublicKey: other.PublicKey()}); err != nil {
		t.Error(err)
	}
}

func TestKernel(t *testing.T) {
	if out, err := exec.Command("ip", "link", "add", "ist-probe", "type", "wireguard").CombinedOutput(); err != nil {
		if os.Getenv("ISTHMUS_VM") == "1" {
			t.Fatalf("the guest, whose purpose is to run this test, has no WireGuard: %s", out)
		}
		t.Skipf("this kernel has no WireGuard; the VM ring runs this test: %s", out)
	}
	linktest.Run(t, "ip", "link", "del", "ist-probe")
	conformance(t, false)
}

func conformance(t *testing.T, userspace bool) {
	linktest.Namespace(t, "ist-far")
	linktest.Run(t, "ip", "link", "add", "ist-u", "type", "veth", "peer", "ist-u", "netns", "ist-far")
	t.Cleanup(func() { linktest.Run(t, "ip", "link", "del", "ist-u") })
	for _, ns := range []string{"", "ist-far"} {
		addr, cmd := "192.0.2.1/24", []string{}
		if ns != "" {
			addr, cmd = "192.0.2.2/24", []string{"-n", ns}
		}
		linktest.Run(t, "ip", append(cmd, "addr", "add", addr, "dev", "ist-u")...)
		linktest.Run(t, "ip", append(cmd, "link", "set", "ist-u", "up")...)
	}
	a, _ := wgtypes.GeneratePrivateKey()
	b, _ := wgtypes.GeneratePrivateKey()
	psk, _ := wgtypes.GenerateKey()
	near := end{Userspace: userspace, Secrets: map[string][]byte{"key": []byte(a.String()), "psk": []byte(psk.String())}}
	near.Config = config("near", "169.254.64.1", "169.254.64.2", "fd64::1", "fd64::2", 51820)
	near.Config.WireGuard.PeerPublicKey = b.PublicKey()
	near.Config.WireGuard.Endpoint = netip.MustParseAddrPort("192.0.2.2:51821")
	// With the same name, as on two nodes on one machine: neither must see the other's device.
	far := end{Userspace: userspace, Secrets: map[string][]byte{"key": b[:], "psk": psk[:]}}
	far.Config = config("near", "169.254.64.2", "169.254.64.1", "fd64::2", "fd64::1", 51821)
	far.Config.WireGuard.PeerPublicKey = a.PublicKey()

	d, err := near.driver()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(d.Remove(context.Background(), "near"), d.Remove(context.Background(), "near")); err != nil {
			t.Error(err)
		}
		if _, err := d.o.Links.Get("ist-near"); !errors.Is(err, link.ErrNotFound) {
			t.Errorf("after Remove: %v", err)
		}
	})
	states := make(chan tunnel.State, 100)
	ctx, cancel := context.WithCancel(t.Context())
	running := make(chan error, 1)
	go func() { running <- d.Run(ctx, func(s tunnel.State) { states <- s }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-running; err != nil {
			t.Error(err)
		}
	})

	if err := d.Apply(ctx, near.Config); err != nil {
		t.Fatal(err)
	}
	s := await(t, states, tunnel.Connecting)
	if !strings.Contains(s.LastError, "no answer from 192.0.2.2:51821") {
		t.Errorf("while the peer is away: %q", s.LastError)
	}
	if d := s.Device; d.PublicKey != a.PublicKey() || d.PeerPublicKey != b.PublicKey() || !d.Preshared || d.Embedded != userspace || d.Keepalive != time.Second {
		t.Errorf("the device is %+v", d)
	}
	if userspace {
		t.Run("strangers", func(t *testing.T) { strangers(t, d, far) })
	}
	stop := start(t, far)
	await(t, states, tunnel.Up)
	ping(t, "169.254.64.2")
	ping(t, "fd64::2")

	t.Run("again", func(t *testing.T) {
		dev, link := d.Writes(), d.o.Links.Writes()
		if err := d.Apply(ctx, near.Config); err != nil {
			t.Fatal(err)
		}
		if d.Writes() != dev || d.o.Links.Writes() != link {
			t.Errorf("%d device and %d link writes for existing objects", d.Writes()-dev, d.o.Links.Writes()-link)
		}
	})
	if !userspace { // an embedded device ends with its process
		t.Run("adopt", func(t *testing.T) {
			next, err := near.driver()
			if err != nil {
				t.Fatal(err)
			}
			if err := next.Apply(ctx, near.Config); err != nil {
				t.Fatal(err)
			}
			if next.Writes()+next.o.Links.Writes() != 0 {
				t.Errorf("%d device and %d link writes to adopt", next.Writes(), next.o.Links.Writes())
			}
		})
	}
	t.Run("edit", func(t *testing.T) {
		before := observe(t, d)
		near.Config.WireGuard.Keepalive = 7 * time.Second
		near.Config.MTU = 1300
		if err := d.Apply(ctx, near.Config); err != nil {
			t.Fatal(err)
		}
		if after := observe(t, d); after.Keyed != before.Keyed || after.Status != tunnel.Up {
			t.Errorf("the session did not survive a change of the keepalive: %+v", after)
		}
		ping(t, "169.254.64.2")
	})
	t.Run("reset", func(t *testing.T) {
		before := observe(t, d)
		// A peer without an endpoint in the document is called where it was last seen.
		roaming := near.Config
		w := *roaming.WireGuard
		w.Endpoint = netip.AddrPort{}
		roaming.WireGuard = &w
		for _, c := range []tunnel.Config{near.Config, roaming, near.Config} {
			if err := d.Apply(ctx, c); err != nil {
				t.Fatal(err)
			}
			if err := d.Reset(ctx, "near"); err != nil {
				t.Fatal(err)
			}
			if s := observe(t, d); !s.Remote.IsValid() || s.Remote.Port() != 51821 {
				t.Errorf("after a reset the peer is at %v", s.Remote)
			}
			until(t, "a new handshake", func() bool {
				s := observe(t, d)
				return s.Status == tunnel.Up && s.Keyed.After(before.Keyed)
			})
			before = observe(t, d)
			ping(t, "169.254.64.2")
		}
		if err := d.Reset(ctx, "x"); !errors.Is(err, tunnel.ErrNotFound) {
			t.Errorf("an unknown tunnel: %v", err)
		}
	})
	t.Run("interface deleted", func(t *testing.T) {
		for range 5 { // an embedded device notices this a little later
			linktest.Run(t, "ip", "link", "del", "ist-near")
			if err := d.Apply(ctx, near.Config); err != nil {
				t.Fatal(err)
			}
		}
		linktest.Run(t, "ip", "link", "del", "ist-near")
		made := func() bool {
			link, err := d.o.Links.Get("ist-near")
			return err == nil && link.Up && link.MTU == 1300
		}
		until(t, "the interface is made again", made)
		traffic := func() bool { return exec.Command("ping", "-c1", "-W1", "169.254.64.2").Run() == nil }
		until(t, "traffic", traffic)

		// While the interface cannot be created again, the tunnel is down, and it comes back
		// without an event that names it.
		batch := exec.Command("ip", "-batch", "-")
		batch.Stdin = strings.NewReader("link del ist-near\nlink add ist-near type veth peer name ist-peer\n")
		d.mu.Lock() // so that the interface is not created again in between
		out, err := batch.CombinedOutput()
		d.mu.Unlock()
		if err != nil {
			t.Fatalf("putting another interface in its place: %v\n%s", err, out)
		}
		until(t, "the tunnel is down", func() bool { return observe(t, d).Status == tunnel.Down })
		linktest.Run(t, "ip", "link", "del", "ist-near")
		until(t, "the interface is made again", made)
		until(t, "traffic", traffic)
	})
	t.Run("peer roams", func(t *testing.T) {
		stop()
		linktest.Run(t, "ip", "-n", "ist-far", "addr", "del", "192.0.2.2/24", "dev", "ist-u")
		linktest.Run(t, "ip", "-n", "ist-far", "addr", "add", "192.0.2.3/24", "dev", "ist-u")
		far.Config.WireGuard.Endpoint = netip.MustParseAddrPort("192.0.2.1:51820")
		start(t, far)
		until(t, "the peer is seen where it roamed to", func() bool {
			return observe(t, d).Remote.Addr() == netip.MustParseAddr("192.0.2.3")
		})
		writes := d.Writes()
		if err := d.Apply(ctx, near.Config); err != nil || d.Writes() != writes {
			t.Errorf("applying again moved the peer back: %v", err)
		}
		ping(t, "169.254.64.2")
	})
}

// strangers has the far end call with keys that do not match. The texts of the library's log, from
// which the driver knows them, may change with its version.
func strangers(t *testing.T, d *Driver, far end) {
	other, _ := wgtypes.GeneratePrivateKey()
	call := func(change func(*end)) tunnel.Device {
		e := far
		w := *far.Config.WireGuard
		w.Endpoint = netip.MustParseAddrPort("192.0.2.1:51820")
		e.Config.WireGuard = &w
		change(&e)
		stop := start(t, e)
		defer stop()
		for _, u := range d.embedded {
			u.stranger.Store(nil)
		}
		until(t, "the device drops a handshake", func() bool { return !observe(t, d).Device.StrangerAt.IsZero() })
		return observe(t, d).Device
	}
	if got := call(func(e *end) { e.Secrets = map[string][]byte{"key": other[:], "psk": far.Secrets["psk"]} }); got.OtherKey || got.Stranger.Addr().String() != "192.0.2.2" {
		t.Errorf("with another private key: %+v", got)
	}
	if got := call(func(e *end) { e.Config.WireGuard.PeerPublicKey = other.PublicKey() }); !got.OtherKey {
		t.Errorf("with another key of this side: %+v", got)
	}
}

func config(name, local4, remote4, local6, remote6 string, port uint16) tunnel.Config {
	one := func(s string) netip.Prefix { a := netip.MustParseAddr(s); return netip.PrefixFrom(a, a.BitLen()) }
	return tunnel.Config{
		Name: name, ID: 1, Interface: "ist-" + name, Underlay: "ist-u", MTU: 1400,
		Inside: []tunnel.Inside{
			{Local: one(local4), Remote: netip.MustParseAddr(remote4)},
			{Local: one(local6), Remote: netip.MustParseAddr(remote6)},
		},
		WireGuard: &tunnel.WireGuard{
			PrivateKey: secret.Ref{Name: "key"}, PresharedKey: secret.Ref{Name: "psk"},
			ListenPort: port, Keepalive: time.Second,
		},
	}
}

// limit is for operations that may take long on a busy machine; a lost handshake alone costs 5 s.
const limit = time.Minute

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// start runs the far end until the test ends or the returned function is called.
func start(t *testing.T, e end) (stop func()) {
	t.Helper()
	text, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", "ist-far", os.Args[0])
	cmd.Env = append(os.Environ(), farEnd+"="+string(text))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			_ = cmd.Wait()
			// a kernel device outlives the process
			_ = exec.Command("ip", "-n", "ist-far", "link", "del", "ist-near").Run()
		}
	}
	t.Cleanup(stop)
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatalf("the far end did not start: %v", err)
	}
	return stop
}

func await(t *testing.T, states chan tunnel.State, want tunnel.Status) tunnel.State {
	t.Helper()
	timeout := time.After(limit)
	var last tunnel.State
	for {
		select {
		case last = <-states:
			if last.Status == want {
				return last
			}
		case <-timeout:
			t.Fatalf("never %s; last: %+v", want, last)
		}
	}
}

func observe(t *testing.T, d *Driver) tunnel.State {
	t.Helper()
	all, err := d.Observe(t.Context())
	if err != nil || len(all) != 1 {
		t.Fatalf("observed %+v, %v", all, err)
	}
	return all[0]
}

func ping(t *testing.T, to string) {
	t.Helper()
	linktest.Run(t, "ping", "-c3", "-i0.2", "-w60", to) // until three answers have arrived
}

// TestEmbeddedThatNeverWorked removes a tunnel whose port another socket had.
func TestEmbeddedThatNeverWorked(t *testing.T) {
	root.Need(t, "a TUN device")
	taken, err := net.ListenPacket("udp", ":51829")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	key, _ := wgtypes.GeneratePrivateKey()
	other, _ := wgtypes.GeneratePrivateKey()
	e := end{Userspace: true, Secrets: map[string][]byte{"key": key[:], "psk": other[:]}}
	d, err := e.driver()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	c := config("unlucky", "169.254.64.1", "169.254.64.2", "fd64::1", "fd64::2", 51829)
	c.WireGuard.PeerPublicKey = other.PublicKey()
	for range 2 { // the error is returned each time
		if err := d.Apply(t.Context(), c); !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatalf("got %v, want %v", err, syscall.EADDRINUSE)
		}
	}
	taken.Close()
	if err := d.Apply(t.Context(), c); err != nil {
		t.Errorf("when the port is free: %v", err)
	}
	if err := d.Remove(t.Context(), "unlucky"); err != nil {
		t.Fatal(err)
	}
	if len(d.embedded) > 0 {
		t.Errorf("%d embedded devices are left", len(d.embedded))
	}
}

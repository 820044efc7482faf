package gobgp

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/bgp"
	"github.com/isthmus-net/isthmus/test/root"
)

// TestMain runs the tests in their own network namespace, so that they may listen on port 179 and
// create interfaces. The namespace and everything in it disappear with the process, even if it is
// killed. Ring: namespace; needs root.
func TestMain(m *testing.M) {
	RunIfChild()
	if os.Getenv(inNamespace) == "" && os.Geteuid() == 0 && os.Getenv("ISTHMUS_UNIT") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), inNamespace+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		// for the child, which would inherit ignored signals
		signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGTERM)
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(inNamespace) != "" {
		for _, c := range [][]string{{"link", "set", "lo", "up"}, {"route", "replace", "local", "169.254.0.0/24", "dev", "lo"}} {
			if out, err := exec.Command("ip", c...).CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "ip %v: %v: %s", c, err, out)
				os.Exit(1)
			}
		}
	}
	os.Exit(m.Run())
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// recorder is a bgp.Reporter that stores what is reported.
type recorder struct {
	mu        sync.Mutex
	peers     map[string]bgp.PeerState
	history   []bgp.PeerState
	routes    map[netip.Prefix][]bgp.Path
	updates   int
	restarted int
	synced    int
}

func newRecorder() *recorder {
	return &recorder{peers: map[string]bgp.PeerState{}, routes: map[netip.Prefix][]bgp.Path{}}
}

func (r *recorder) Peer(s bgp.PeerState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.peers[s.Name] = s
	r.history = append(r.history, s)
}

func (r *recorder) Paths(us []bgp.Update) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.updates += len(us)
	for _, u := range us {
		if len(u.Paths) == 0 {
			delete(r.routes, u.Prefix)
		} else {
			r.routes[u.Prefix] = u.Paths
		}
	}
}

func (r *recorder) Restarted() { r.mu.Lock(); r.restarted++; r.mu.Unlock() }
func (r *recorder) Synced()    { r.mu.Lock(); r.synced++; r.mu.Unlock() }

func (r *recorder) prefixes() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var s []string
	for p := range maps.Keys(r.routes) {
		s = append(s, p.String())
	}
	slices.Sort(s)
	return s
}

func (r *recorder) get(f func()) { r.mu.Lock(); f(); r.mu.Unlock() }

// node is a running Driver.
type node struct {
	*Driver
	*recorder
	stop func()
}

// inNamespace is set in the environment of the process that runs in the namespace.
const inNamespace = "ISTHMUS_TEST_NETNS"

// needConfined skips the test where the BGP process cannot be confined. In the namespace it can,
// also as another user with the capabilities.
func needConfined(t testing.TB) {
	t.Helper()
	if os.Getenv(inNamespace) == "" {
		root.Need(t, "confining the BGP process")
	}
}

func startNode(t testing.TB, o Options, c bgp.Config) *node {
	t.Helper()
	needConfined(t)
	o.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	d := New(o)
	if err := d.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	n := &node{Driver: d, recorder: newRecorder()}
	go func() { done <- d.Run(ctx, n.recorder) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(n.stop)
	return n
}

// state returns the driver's state of a peer.
func (n *node) state(name string) bgp.PeerState {
	for _, s := range n.Peers() {
		if s.Name == name {
			return s
		}
	}
	return bgp.PeerState{}
}

// eventually waits until ok returns true. within is the time that an idle machine needs; the test
// fails only after three times as much, and not before a minute.
func eventually(t testing.TB, within time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	within = max(3*within, time.Minute)
	start := time.Now()
	for !ok() {
		if time.Since(start) > within {
			t.Fatalf("not within %v: %s", within, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(start)
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }

func rule(s string, r ...uint8) bgp.Rule {
	p := prefix(s)
	x := bgp.Rule{Prefix: p, Min: uint8(p.Bits()), Max: uint8(p.Bits())}
	if len(r) == 2 {
		x.Min, x.Max = r[0], r[1]
	}
	return x
}

const nodeASN = 64620

// loPeer returns a peer on the loopback interface, where both ends cannot listen on one port.
func loPeer(name, address string, asn uint32) bgp.Peer {
	return bgp.Peer{
		Name: name, Tunnel: name, Interface: "lo",
		Address: addr(address), LocalAddress: addr("169.254.0.1"), ASN: asn, Passive: true,
		HoldTime: 9 * time.Second, Keepalive: 3 * time.Second, TTL: 1,
		Import:          bgp.Import{Allow: []bgp.Rule{rule("10.0.0.0/8", 8, 32)}},
		Export:          bgp.Export{Allow: []bgp.Rule{rule("10.0.0.0/8", 8, 32), rule("172.16.0.0/16")}},
		GracefulRestart: 120 * time.Second,
	}
}

func config(peers ...bgp.Peer) bgp.Config {
	return bgp.Config{ASN: nodeASN, RouterID: addr("169.254.0.1"), Peers: peers, Announce: []netip.Prefix{prefix("172.16.0.0/16")}}
}

// count returns how often Synced was called.
func (r *recorder) count() (n int) { r.get(func() { n = r.synced }); return n }

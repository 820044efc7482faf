package host

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/netns"
	"github.com/isthmus-net/isthmus/test/root"
)

// Ring: namespace.

func TestProbe(t *testing.T) {
	root.Need(t, "network namespaces")
	before, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	results, err := Probe()
	if err != nil {
		t.Fatal(err)
	}
	ns := netns.New(t)
	for _, r := range results {
		t.Logf("%s: %v", r.Capability, r.Err)
		// The probe must find what iproute2 and nft can create here, and nothing else.
		commands := map[Capability]string{
			XFRMInterface: "ip link add x type xfrm if_id 7",
			WireGuard:     "ip link add x type wireguard",
			VRF:           "ip link add x type vrf table 7",
			NextHops:      "ip nexthop add id 1 blackhole",
			NextHopGroups: "ip nexthop add id 2 group 1",
			NFTables:      "nft add table inet x",
			NAT:           "nft add chain inet x y {type\u00a0nat hook postrouting priority 100 ; }",
			TUN:           "ip tuntap add mode tun name y",
			ESP:           "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x100 mode tunnel aead rfc4106(gcm(aes)) 0x0000000000000000000000000000000000000000000000000000000000000000abcdef01 128",
		}
		_, err := ns.Try(strings.ReplaceAll(commands[r.Capability], "\u00a0", " "))
		if (err == nil) != (r.Err == nil) {
			t.Errorf("%s: the probe returns %v, and the command %v", r.Capability, r.Err, err)
		}
		ns.Try("ip link del x")
	}
	if len(results) != len(probes) {
		t.Errorf("%d results, want %d", len(results), len(probes))
	}
	names := Names(results)
	// without these, the test covers nothing here
	for _, c := range []Capability{NextHops, NextHopGroups, NFTables, NAT} {
		if !slices.Contains(names, string(c)) {
			t.Errorf("%s is missing", c)
		}
	}
	after, err := os.ReadFile("/proc/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(after), "probe") && !strings.Contains(string(before), "probe") {
		t.Error("an interface is left in this namespace")
	}
}

// TestOwnThread runs often enough on all threads to include the first one.
func TestOwnThread(t *testing.T) {
	for range 200 {
		onOwnThread(func() {
			if unix.Gettid() == unix.Getpid() {
				t.Error("on the first thread")
			}
		})
	}
}

// TestRestore checks that Restore resets parameters to their values before the first change,
// whatever was changed since.
func TestRestore(t *testing.T) {
	ns := netns.New(t)
	netns.Veth(ns, "up0", ns, "far0")
	const all = "net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.conf.all.accept_redirects net.ipv4.conf.all.rp_filter net.ipv4.conf.up0.send_redirects net.ipv6.conf.up0.accept_ra net.ipv6.conf.far0.forwarding"
	read := func() string { return strings.Join(strings.Fields(ns.Run("sysctl -n "+all)), " ") }
	ns.Run("sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.all.accept_redirects=1")
	was := read()
	file := filepath.Join(t.TempDir(), "kept")
	m := NewMachine(file)
	do := func(f func() error) {
		t.Helper()
		var err error
		if ns.Do(func() { err = f() }); err != nil {
			t.Error(err)
		}
	}
	run := func() {
		do(func() error { return m.Prepare("up0", nil, time.Hour) })
		do(func() error { return m.Forward(true) })
	}
	run()
	ns.Run("sysctl -qw net.ipv4.conf.all.rp_filter=0")
	run() // by a later daemon
	if read() == was {
		t.Fatalf("nothing was changed: %s", was)
	}
	do(func() error {
		if n, err := Restore(file); n == 0 || err != nil {
			return fmt.Errorf("%d written: %w", n, err)
		}
		return nil
	})
	if now := read(); now != was {
		t.Errorf("%s\n%s, want %s", all, now, was)
	}
	do(func() error {
		if n, err := Restore(file); n != 0 || err != nil {
			return fmt.Errorf("the second time: %d written, %w", n, err)
		}
		return nil
	})

	// The file is written by the daemon. It cannot make root do more than the daemon may do itself.
	if err := os.WriteFile(file, []byte(`{"kernel/panic": "1", "net/../kernel/panic": "1"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := Restore(file); n != 0 || err == nil {
		t.Errorf("%d written, %v", n, err)
	}
	// A place where no file can be written does not keep parameters from being set.
	m.kept = filepath.Join(t.TempDir(), "gone", "kept")
	ns.Do(func() {
		if err := m.Forward(true); err == nil {
			t.Error("no error although the former values cannot be stored")
		}
	})
	if out := strings.TrimSpace(ns.Run("sysctl -n net.ipv4.ip_forward")); out != "1" {
		t.Errorf("forwarding is %s", out)
	}
}

func TestTune(t *testing.T) {
	ns := netns.New(t)
	netns.Veth(ns, "up0", ns, "far0")
	netns.Veth(ns, "lan0", ns, "far1")
	want := slices.Concat(Sysctls("up0", []string{"lan0"}), Forwarding(true), Conntrack(4<<30))
	tune := func(want []Sysctl) (n int, err error) {
		ns.Do(func() { n, err = Tune(want) })
		return n, err
	}
	n, err := tune(want)
	if err != nil || n == 0 {
		t.Fatalf("%d written, %v", n, err)
	}
	for _, s := range want {
		ns.Do(func() {
			have, err := os.ReadFile("/proc/sys/" + s.Path)
			// which the first namespace sets
			elsewhere := strings.HasSuffix(s.Path, "conntrack_max") || strings.HasSuffix(s.Path, "conntrack_buckets")
			if err == nil && !s.meets(strings.TrimSpace(string(have))) && !elsewhere || err != nil && !s.Optional {
				t.Errorf("%s: %s, %v", s.Path, have, err)
			}
		})
	}
	if n, err := tune(want); n != 0 || err != nil {
		t.Errorf("the second time: %d written, %v", n, err)
	}
	ns.Run("sysctl -qw net.ipv4.ip_forward=0")
	if n, err := tune(want); n < 1 || err != nil {
		t.Errorf("after a change by hand: %d written, %v", n, err)
	}
	broken := []Sysctl{{Path: "net/ipv4/no_such", Value: "1"}, {Path: "net/ipv4/ip_forward", Value: "0"}}
	if n, err := tune(broken); n != 1 || err == nil || !strings.Contains(err.Error(), "net/ipv4/no_such") {
		t.Errorf("a missing parameter: %d written, %v", n, err)
	}
	// The machine's own value returns when a document no longer gives one, also under another
	// daemon.
	ns.Run("sysctl -eqw net.netfilter.nf_conntrack_generic_timeout=700")
	m := NewMachine(filepath.Join(t.TempDir(), "kept"))
	for _, k := range []struct {
		portless time.Duration
		want     string
	}{{time.Hour, "3600 3600 3600"}, {2 * time.Hour, "7200 7200 7200"}, {0, "700 30 180"}, {0, "700 30 180"}} {
		var err error
		ns.Do(func() { err = m.Prepare("up0", nil, k.portless) })
		have := strings.Fields(ns.Run("sysctl -en net.netfilter.nf_conntrack_generic_timeout net.netfilter.nf_conntrack_gre_timeout net.netfilter.nf_conntrack_gre_timeout_stream"))
		if err != nil || !strings.HasPrefix(k.want, strings.Join(have, " ")) || len(have) == 0 {
			t.Errorf("flows without ports for %v: %v, %v; want %s", k.portless, have, err, k.want)
		}
	}
	if n, err := tune(Forwarding(false)); n < 1 || err != nil || strings.Join(strings.Fields(ns.Run("sysctl -n net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.conf.all.accept_redirects")), "") != "000" {
		t.Errorf("forwarding is not off: %d written, %v", n, err)
	}
}

// TestTuneLeaves checks that Tune keeps values of others that serve as well, and that the node
// ignores router advertisements of hosts behind an attachment.
func TestTuneLeaves(t *testing.T) {
	ns := netns.New(t)
	netns.Veth(ns, "up0", ns, "far0")
	netns.Veth(ns, "lan0", ns, "far1")
	tune := func() {
		t.Helper()
		var err error
		if ns.Do(func() { _, err = Tune(Sysctls("up0", []string{"lan0"})) }); err != nil {
			t.Error(err)
		}
	}
	read := func() string {
		return strings.Join(strings.Fields(ns.Run("sysctl -n net.ipv6.conf.up0.accept_ra net.ipv6.conf.lan0.accept_ra net.ipv6.conf.far0.accept_ra net.ipv4.conf.lan0.send_redirects")), " ")
	}
	ns.Run("sysctl -qw net.ipv6.conf.up0.accept_ra=0")
	tune()
	if got := read(); got != "0 0 1 0" {
		t.Errorf("without advertisements: %s", got)
	}
	ns.Run("sysctl -qw net.ipv6.conf.up0.accept_ra=1")
	tune()
	tune()
	if got := read(); got != "2 0 1 0" {
		t.Errorf("with advertisements: %s", got)
	}

	for _, k := range []struct {
		s    Sysctl
		have string
		want bool
	}{
		{Sysctl{Value: "8192", AtLeast: true}, "8192", true},
		{Sysctl{Value: "8192", AtLeast: true}, "100000", true},
		{Sysctl{Value: "8192", AtLeast: true}, "1024", false},
		{Sysctl{Value: "8192", AtLeast: true}, "nonsense", false},
		{Sysctl{Value: "2"}, "3", false},
	} {
		if k.s.meets(k.have) != k.want {
			t.Errorf("%+v and %s: %v", k.s, k.have, !k.want)
		}
	}
	for memory, want := range map[uint64]string{0: "65536", 512 << 20: "65536", 2 << 30: "131072", 8 << 30: "524288", 1 << 40: "2097152"} {
		for _, s := range Conntrack(memory) {
			if s.Value != want {
				t.Errorf("%d bytes: %s is %s, want %s", memory, s.Path, s.Value, want)
			}
		}
	}
}

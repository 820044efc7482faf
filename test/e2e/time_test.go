package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/e2e/faults"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/test/vm"
)

// TestFaultsInVM makes the faults that need IPsec, or a clock that may be set. The tests of package
// faults make the others. It is in the last file, so that the tests before it share a topology.
func TestFaultsInVM(t *testing.T) {
	if !vm.Inside() {
		vm.InGuest(t, payload...) // the clock of this machine stays as it is
		return
	}
	// Its peers refuse the WireGuard handshakes of a clock that was set back, for as long as it was
	// ahead, so that no topology outlives this test.
	if kept != nil {
		if err := kept.c.Close(); err != nil {
			t.Error(err)
		}
		kept = nil
	}
	ctx := t.Context()
	l, err := lab.New(lab.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	self, other := netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("198.51.100.11")
	internet := peer.NewInternet(l, "faults-net", netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24"))
	node, site := l.Node("faults-node"), l.Node("faults-site")
	internet.Node.Port("br0", lab.End{Node: node, Name: "wan", Addrs: []netip.Prefix{netip.PrefixFrom(self, 24)}})
	node.IP("route add default via 192.0.2.1 dev wan onlink")
	internet.Node.Port("br0", lab.End{Node: site, Name: "wan", Addrs: []netip.Prefix{netip.PrefixFrom(other, 24)}})
	site.IP("route add default via 198.51.100.1 dev wan onlink")
	psk := PSK()
	tunnel := peer.Tunnel{Name: "lane", Local: other, Remote: self, PSK: psk, IfID: 1, IKE: "aes256gcm16-prfsha384-ecp384", ESP: "aes256gcm16-ecp384", Start: "none"}
	tunnel.Interface(site, netip.MustParsePrefix("169.254.70.1/30"))
	const document = `node: {name: n, asn: 64620}
underlay: {interface: wan, address: 192.0.2.10}
tunnels: [{name: lane, inside: [{local: 169.254.70.2/30}], ipsec: {remoteAddress: 198.51.100.11, psk: k}}]
`
	if err := l.Up(ctx); err != nil {
		t.Fatal(err)
	}
	charon, err := peer.StartCharon(ctx, site, peer.CharonOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := StartRouter(ctx, node, netip.AddrPortFrom(self, 7443), programs())
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, r: r, start: time.Now()}
	b.ok(charon.Load(ctx, tunnel))
	b.ok(r.SetSecret(ctx, "k", psk))
	b.ok(r.Apply(ctx, document))

	issue := func(name, lifetime string) string {
		out, err := r.CLI(ctx, "client", "issue", name, "--role", "reader", "--lifetime", lifetime, "--endpoint", r.api.String(), "-o", "-")
		b.ok(err)
		return out
	}
	scraper, err := daemon.NewScraper(node.DialContext, r.api.String(), []byte(issue("prometheus", "87600h")))
	b.ok(err)
	seen := faults.Node{CLI: r.CLI, Metrics: scraper.Scrape}
	filter := func(rules string) {
		_, err := internet.Node.ExecInput(ctx, "table inet faults\ndelete table inet faults\ntable inet faults {\n chain f {\n type filter hook forward priority 0\n"+rules+" }\n}\n", "nft", "-f", "-")
		b.ok(err)
	}
	again := func() { // the node refuses it a few seconds after the last one
		b.until(time.Minute, func() error { _, err := r.CLI(ctx, "reset", "tunnel", "lane"); return err })
	}
	load := func(change func(*peer.Tunnel)) {
		other := tunnel
		change(&other)
		b.ok(charon.Load(ctx, other))
	}
	ping := func() {
		_, err := node.Exec(ctx, "ping", "-c", "3", "-w", "60", "169.254.70.1")
		b.ok(err)
	}
	// clock changes the clock of the VM. The other tests there get it as it was.
	var off time.Duration
	clock := func(by time.Duration) {
		off += by
		at := unix.NsecToTimespec(time.Now().Add(by).UnixNano())
		b.ok(unix.ClockSettime(unix.CLOCK_REALTIME, &at))
	}
	t.Cleanup(func() { clock(-off) })
	type action struct{ make, repair func() }
	actions := map[string]action{
		"an IPsec peer has another pre-shared key": {
			func() { load(func(t *peer.Tunnel) { t.PSK = PSK() }); again() },
			func() { load(func(*peer.Tunnel) {}); again() },
		},
		"an IPsec peer has other IKE proposals": {
			func() { load(func(t *peer.Tunnel) { t.IKE = "aes128-sha256-modp2048" }); again() },
			func() { load(func(*peer.Tunnel) {}); again() },
		},
		"ESP is filtered, IKE is not": {
			func() { ping(); filter("ip protocol esp drop\n") },
			func() { filter("") },
		},
		"charon has ended": {
			func() { b.ok(r.Charon.Kill(ctx)) },
			func() { b.ok(r.StartCharon(ctx)) },
		},
		"the clock is two days behind": {
			func() { clock(-48 * time.Hour) },
			func() { clock(48 * time.Hour) },
		},
		"the certificate of a client ends soon": {
			func() { issue("short", "1h"); clock(50 * time.Minute) },
			func() { clock(-50 * time.Minute) },
		},
		"the last certificate of an admin has expired": {
			func() { clock(366 * 24 * time.Hour) },
			func() { clock(-366 * 24 * time.Hour) },
		},
	}
	if len(actions) != len(faults.InVM) {
		t.Errorf("%d faults are made, and %d are listed", len(actions), len(faults.InVM))
	}
	well := func() {
		t.Helper()
		b.until(3*time.Minute, func() error {
			out, err := r.CLI(ctx, "status", "--check")
			if err != nil {
				return fmt.Errorf("status --check: %w: %s", err, out)
			}
			return nil
		})
	}
	well()
	for _, f := range faults.InVM {
		a, ok := actions[f.What]
		if !ok {
			t.Errorf("%s: nothing makes this fault", f.What)
			continue
		}
		b.step("%s", f.What)
		began := time.Now()
		since := began
		if f.Kind == condition.ClockWrong {
			since = since.Add(-49 * time.Hour) // its event has the time of that clock
		}
		a.make()
		// A command takes a second in a VM that is emulated.
		if err := lab.Until(ctx, 30*time.Second, func() error { return seen.Named(ctx, f) }); err != nil {
			t.Errorf("%s: %v", f.What, err)
		}
		t.Logf("%5.1f s  %s", time.Since(began).Seconds(), f.Kind.Name)
		shows := func(over bool) {
			if err := lab.Until(ctx, time.Minute, func() error {
				return errors.Join(seen.Recorded(ctx, f, since, over), seen.Measured(ctx, f, over))
			}); err != nil {
				t.Errorf("%s: %v", f.What, err)
			}
		}
		shows(false)
		a.repair()
		well()
		shows(true)
	}
}

package appliance

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/e2e"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/test/vm"
)

var (
	// operator is the Internet's own address, from which the command line is used.
	operator = e2e.Operator.String()
	// public is the machine's address on the Internet.
	public = e2e.NodePublic.String()
	// neighbour is a host on the machine's own network. The cloud's route table routes its packets
	// to the spokes through the machine.
	neighbour = netip.MustParsePrefix("10.99.0.30/24")
)

const (
	// mac is that of QEMU's first card, by which the cloud selects the address that it assigns.
	mac = "52:54:00:12:34:56"
	// vpc is the bridge that is the machine's network.
	vpc = "vpc"
)

// world is the environment of the machine, in network namespaces: a network with DHCP behind 1:1
// NAT, as a cloud has it, with one other host; and on the Internet the operator, a partner, and
// AWS's gateway with a spoke behind it.
type world struct {
	t         *testing.T
	lab       *lab.Lab
	internet  *peer.Internet
	cloud     *e2e.Hub
	neighbour *lab.Node
	aws       *peer.Gateway
	spoke     e2e.Spoke
	partner   *peer.Server
	servers   map[*lab.Node]*peer.Server
	leaks     *lab.Capture
	dhcp      *lab.Process
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	guest, err := vm.Build(t.Context(), t.Output())
	ok(err)
	l, err := lab.New(lab.Options{Root: guest.Tree()})
	ok(err)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{t: t, lab: l, servers: map[*lab.Node]*peer.Server{}}
	w.internet = peer.NewInternet(l, "internet", netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("192.0.2.0/24"))
	w.cloud = e2e.NewNAT(l, w.internet, "cloud", netip.MustParseAddr("198.51.100.2"),
		lab.Pair{Private: e2e.NodePrivate.Addr(), Public: e2e.NodePublic}, lab.Pair{Private: e2e.EgressPrivate.Addr(), Public: e2e.EgressPublic})
	w.cloud.NAT.Bridge(vpc, w.cloud.Gateway())
	w.neighbour = l.Node("neighbour")
	w.cloud.NAT.Port(vpc, lab.End{Node: w.neighbour, Name: "eth0", Addrs: []netip.Prefix{neighbour}})
	w.neighbour.IP("route add %s via %s", e2e.VPC, e2e.NodePrivate.Addr())
	w.aws = peer.NewAWS(l, w.internet, "aws", peer.Config{ASN: e2e.AWSASN, Router: e2e.NodePublic, RouterASN: e2e.NodeASN, Announce: []netip.Prefix{e2e.VPC}, Userland: true,
		Peerings: []peer.Peering{{Outside: netip.MustParseAddr("203.0.113.11"), Inside: netip.MustParseAddr("169.254.64.1"), PeerInside: netip.MustParseAddr("169.254.64.2"), PSK: e2e.PSK()}}})
	w.spoke = e2e.NewSpoke(l, "spoke", netip.MustParsePrefix("172.16.1.10/24"),
		lab.End{Node: w.aws.Instances[0].Router, Name: "lan", Addrs: []netip.Prefix{netip.MustParsePrefix("172.16.1.1/24")}})
	partner := l.Node("partner")
	w.internet.Node.Port("br0", lab.End{Node: partner, Name: "eth0", Addrs: []netip.Prefix{netip.PrefixFrom(e2e.PartnerAddr, 24)}})
	partner.IP("route add default via 192.0.2.1")
	ok(l.Up(t.Context()))
	ok(w.cloud.Translate(t.Context()))
	w.leaks, err = w.internet.Node.Capture("", e2e.VPC, netip.MustParsePrefix("169.254.0.0/16"), netip.PrefixFrom(neighbour.Addr(), 32))
	ok(err)
	for n, a := range map[*lab.Node]netip.Addr{partner: e2e.PartnerAddr, w.spoke.Node: w.spoke.Addr, w.neighbour: neighbour.Addr()} {
		w.servers[n], err = peer.StartServer(n, a)
		ok(err)
		t.Cleanup(func() { w.servers[n].Close() })
	}
	w.partner = w.servers[partner]
	w.dhcp, err = w.cloud.NAT.Start("dnsmasq", "dnsmasq", "--keep-in-foreground", "--log-facility=-", "--conf-file=/dev/null", "--port=0", "--interface="+vpc, "--bind-interfaces", "--leasefile-ro", "--no-ping", "--pid-file=", "--user=root",
		"--dhcp-authoritative", "--dhcp-range="+e2e.NodePrivate.Masked().Addr().String()+",static,1h", "--dhcp-host="+mac+","+e2e.NodePrivate.Addr().String(), "--dhcp-option=option:ntp-server,"+w.cloud.Gateway().Addr().String())
	ok(err)
	return w
}

// leases counts how often the machine received its address.
func (w *world) leases() int {
	w.t.Helper()
	log, err := os.ReadFile(w.dhcp.Log)
	if err != nil {
		w.t.Fatal(err)
	}
	return strings.Count(string(log), "DHCPACK")
}

// mainJob is a document with a tunnel to AWS, BGP in it, the neighbour's network, and one address
// toward the Internet.
func (w *world) mainJob() string {
	p := w.aws.Config.Peerings[0]
	return first + fmt.Sprintf(`attachments: [{name: vpc, interface: eth0, sources: [%[1]s/32]}]
tunnels: [{name: aws-0, cloud: aws, ipsec: {remoteAddress: %[2]s, psk: aws-0}, inside: [{local: %[3]s/30}]}]
peers: [{name: aws-0, tunnel: aws-0, asn: %[4]d, import: {allow: [{prefix: %[5]s, le: 24}]}, export: {allow: [{prefix: 0.0.0.0/0}]}}]
announce: [0.0.0.0/0]
egress:
  pools: [{name: partner, addresses: [{address: %[6]s, publicAddress: %[7]s}]}]
  policies: [{name: spokes, sources: [%[5]s], pool: partner}]
`, neighbour.Addr(), p.Outside, p.PeerInside, e2e.AWSASN, e2e.VPC, e2e.EgressPrivate.Addr(), e2e.EgressPublic)
}

// row returns the row of a name in the output of a command, as words; nil: it has none.
func row(out, name string) []string {
	for line := range strings.Lines(out) {
		if words := strings.Fields(line); len(words) > 0 && words[0] == name {
			return words
		}
	}
	return nil
}

// carries waits until tunnel and session are up, checks the traffic over them, and returns how many
// seconds after power on the tunnel was up.
func (b *bench) carries() (up float64) {
	b.t.Helper()
	w := b.w
	b.ok(lab.Until(b.t.Context(), bootLimit/3, func() error {
		tunnels, err := b.quiet("get", "tunnels")
		if err != nil || !slices.Contains(row(tunnels, "aws-0"), "up") {
			return fmt.Errorf("tunnel aws-0 is not up: %v: %s", err, tunnels)
		}
		return nil
	}))
	up = b.m.Since().Seconds()
	b.t.Logf("the tunnel was up %.0f s after power on", up)
	b.ok(lab.Until(b.t.Context(), bootLimit/3, func() error {
		peers, err := b.quiet("get", "peers")
		if err != nil || !slices.Contains(row(peers, "aws-0"), "established") {
			return fmt.Errorf("peer aws-0 is not established: %v: %s", err, peers)
		}
		return w.aws.Established(b.t.Context())
	}))
	b.t.Logf("the session was established %.0f s after power on", b.m.Since().Seconds())
	for _, way := range []struct {
		from *lab.Node
		to   netip.Addr
		as   netip.Addr
	}{
		{w.spoke.Node, neighbour.Addr(), w.spoke.Addr},
		{w.neighbour, w.spoke.Addr, neighbour.Addr()},
		{w.spoke.Node, e2e.PartnerAddr, e2e.EgressPublic},
	} {
		b.ok(lab.Until(b.t.Context(), bootLimit/3, func() error {
			seen, err := peer.Ask(b.t.Context(), way.from, way.to)
			if err == nil && seen != way.as {
				b.t.Fatalf("%s saw %s as %s, want %s", way.to, way.from.Name, seen, way.as)
			}
			return err
		}))
		p, err := way.from.Ping(way.to, lab.PingOptions{Interval: 50 * time.Millisecond, Size: 1200})
		b.ok(err)
		time.Sleep(time.Second)
		if r := p.Stop(); r.Sent < 2 || r.Lost > 0 {
			b.t.Errorf("ping from %s to %s: %v", way.from.Name, way.to, r)
		}
	}
	b.t.Logf("traffic went both ways %.0f s after power on", b.m.Since().Seconds())
	for _, a := range w.partner.Sources() {
		if a != e2e.EgressPublic {
			b.t.Errorf("the partner saw %s", a)
		}
	}
	if n, packets, err := w.leaks.Count(); n > 0 || err != nil {
		b.t.Errorf("%d packets with an inside source were on the Internet, %v: %q", n, err, packets)
	}
	return up
}

// job applies the document of the main job, and checks that the machine's own kernel does it.
func (b *bench) job() {
	b.t.Helper()
	b.ok(b.w.aws.Start(b.t.Context()))
	psk := filepath.Join(b.dir, "psk")
	b.ok(os.WriteFile(psk, []byte(b.w.aws.Config.Peerings[0].PSK), 0o600))
	if out, err := b.cliInput(psk, "secret", "set", "aws-0"); err != nil {
		b.t.Fatal(out, err)
	}
	b.apply(b.w.mainJob())
	b.carries()
	if out, err := b.cli("egress", "prove", "--to", netip.PrefixFrom(e2e.PartnerAddr, 24).Masked().String(), "--expect", e2e.EgressPublic.String()); err != nil || !strings.Contains(out, "HOLDS") {
		b.t.Error(out, err)
	}
	if out, err := b.cli("get", "routes"); err != nil || !strings.Contains(out, e2e.VPC.String()) {
		b.t.Error(out, err)
	}
	for command, want := range map[string]string{
		"ip xfrm state | grep -c 'encap type espinudp'":                                           "2",
		"ip -o link show type xfrm | grep -c t-aws-0":                                             "1",
		"lsmod | grep -c '^esp4 '":                                                                "1",
		"grep -h NoNewPrivs: /proc/$(systemctl show -P MainPID strongswan)/status | grep -o '.$'": "1",
		"ip rule | grep -vc 'lookup \\(local\\|main\\|default\\)' || true":                        "0",
	} {
		if got := b.run(command); got != want {
			b.t.Errorf("%s: %q, want %q", command, got, want)
		}
	}
}

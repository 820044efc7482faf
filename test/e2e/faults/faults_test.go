package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/golden"
	"github.com/isthmus-net/isthmus/test/lab"
)

// world is a node, its peer behind a router, and the keys of the lane between them.
type world struct {
	*testing.T
	hub, site     *daemon.Node
	net           *lab.Node
	hubDoc, site0 string
	taken         net.PacketConn
	seen          Node // hub
	// disk is the directory of the hub's state: a small file system in a mount namespace of its own.
	disk string
	// endKilling ends what keepKilling began.
	endKilling func()
}

// keepKilling kills each child of the hub's daemon with a name, until the fault is repaired: the
// daemon starts another one, and events and metrics follow the condition.
func (w *world) keepKilling(name string) {
	ctx, cancel := context.WithCancel(w.Context())
	var killer sync.WaitGroup
	killer.Go(func() {
		for ctx.Err() == nil {
			_ = exec.CommandContext(ctx, "pkill", "-KILL", "-P", fmt.Sprint(w.hub.Process.Pid()), "-f", name).Run() // 1: no such process at present
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	w.endKilling = func() { cancel(); killer.Wait() }
}

// api is the address of the hub's API.
const api = "127.0.0.1:7443"

// onDisk runs a command where the hub's disk is.
func (w *world) onDisk(command string) string {
	w.Helper()
	out, err := w.hub.Exec(w.Context(), slices.Concat(w.hub.Under, []string{"sh", "-c", command})...)
	w.ok(err)
	return out
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// apply applies a document with some parts replaced.
func (w *world) apply(n *daemon.Node, document string, replace ...string) {
	w.Helper()
	for i := 0; i < len(replace); i += 2 {
		if !strings.Contains(document, replace[i]) {
			w.Fatalf("the document has no %q", replace[i])
		}
	}
	_, err := n.CLI(w.Context(), strings.NewReplacer(replace...).Replace(document), "apply", "-f", "-")
	w.ok(err)
}

// filter drops what the rules say between the two nodes.
func (w *world) filter(rules string) {
	w.Helper()
	_, err := w.net.ExecInput(w.Context(), "table inet faults\ndelete table inet faults\ntable inet faults {\n chain f {\n type filter hook forward priority 0\n"+rules+" }\n}\n", "nft", "-f", "-")
	w.ok(err)
}

func (w *world) run(n *lab.Node, command string) {
	w.Helper()
	_, err := n.Exec(w.Context(), strings.Fields(command)...)
	w.ok(err)
}

// fault is a Fault with what makes and repairs it.
type fault struct {
	what   string
	make   func(*world)
	repair func(*world) // nil: the documents are applied again
	kind   *condition.Kind
	words  []string
}

// wireGuard is the first message about a WireGuard tunnel whose peer has become silent. It has all
// causes, until the device tries a handshake after 15 s (WireGuard paper, section 6.5).
var wireGuard = Fault{Kind: condition.TunnelSuspect, Words: []string{"nothing has come since", "the peer is down, UDP is filtered on the path, or the keys of the two sides do not match"}}

// early has the message that the status shows within 10 s of a fault, where a later message, that
// of the fault itself, is more precise.
var early = map[string]Fault{
	otherPrivate: {Kind: condition.TunnelDown, Words: []string{"no handshake yet", "the keys of the two sides do not match"}},
	otherPublic:  wireGuard, otherPSK: wireGuard, noUDP: wireGuard, noData: wireGuard, peerGone: wireGuard,
}

const (
	otherPrivate = "the peer has another private key than the document expects"
	otherPublic  = "the peer has another public key of this node"
	otherPSK     = "the pre-shared keys differ"
	noUDP        = "UDP is filtered"
	noData       = "the data of the tunnel is filtered, handshakes are not"
	peerGone     = "the peer is gone"
)

func (f fault) shown() Fault { return Fault{f.what, f.kind, f.words} }

const hubDocument = `node: {name: hub, asn: 64600}
underlay: {interface: wan, address: 192.0.2.100, mtu: 1500}
tunnels:
- {name: lane, inside: [{local: 169.254.80.0/31}], wireguard: {privateKey: lane, presharedKey: psk, peerPublicKey: SITE, endpoint: "198.51.100.101:51820", listenPort: 51820, keepalive: 5s}}
peers:
- {name: site, tunnel: lane, asn: 64601, holdTime: 9s, import: {allow: [{prefix: 172.16.0.0/16, le: 24}]}, export: {allow: [{prefix: 0.0.0.0/0}]}}
egress:
  pools: [{name: partner, addresses: [{address: 192.0.2.110}], probes: {targets: ["icmp://203.0.113.1"], interval: 1s, timeout: 1s, rise: 1, fall: 2, holdDown: 0s}}]
  policies: [{name: spokes, sources: [172.16.0.0/16], pool: partner}]
`

const lanAttachment = "attachments: [{name: lan, interface: lan, sources: [10.50.0.0/24]}]\n"

const siteDocument = `node: {name: site, asn: 64601}
underlay: {interface: wan, address: 198.51.100.101}
tunnels:
- {name: lane, inside: [{local: 169.254.80.1/31}], sources: [0.0.0.0/0], wireguard: {privateKey: lane, presharedKey: psk, peerPublicKey: HUB, endpoint: "192.0.2.100:51820", listenPort: 51820, keepalive: 5s}}
peers:
- {name: hub, tunnel: lane, asn: 64600, holdTime: 9s, export: {allow: [{prefix: 172.16.0.0/16, le: 24}]}}
announce: [172.16.1.0/24, 172.16.2.0/24]
`

var faults = []fault{
	{otherPrivate, func(w *world) {
		w.apply(w.hub, w.hubDoc, keyOf(w.hubDoc), otherKey)
	}, nil, condition.TunnelDown, []string{"with another key than the peer's came from 198.51.100.101"}},
	{otherPublic, func(w *world) {
		w.apply(w.site, w.site0, keyOf(w.site0), otherKey)
	}, nil, condition.TunnelDown, []string{"set this node's public key at the peer"}},
	{otherPSK, func(w *world) {
		w.secret(w.site, "psk", otherKey)
		w.site.Kill() // else the present keys stay in use for up to three minutes
		w.site.Start(w.T)
	}, func(w *world) { w.secret(w.site, "psk", samePSK) }, condition.TunnelDown, []string{"keys of the two sides do not match"}},
	{noUDP, func(w *world) { w.filter("udp dport 51820 drop\n") }, func(w *world) { w.filter("") },
		condition.TunnelDown, []string{"no packet from 198.51.100.101:51820 since", "UDP is filtered on the path"}},
	{noData, func(w *world) { w.filter("udp dport 51820 @th,64,8 4 drop\n") }, func(w *world) { w.filter("") },
		condition.TunnelSuspect, []string{"no data has come since", "lets handshakes pass"}},
	{"the data of the tunnel is filtered in one direction", func(w *world) { w.filter("ip saddr 192.0.2.100 udp dport 51820 @th,64,8 4 drop\n") }, func(w *world) { w.filter("") },
		condition.TunnelSuspect, nil},
	{"the peer has another ASN", func(w *world) { w.apply(w.site, w.site0, "asn: 64601", "asn: 64999") }, nil,
		condition.SessionDown, []string{"the peer has AS 64999, and the document says 64601"}},
	{"the peer expects another ASN of this node", func(w *world) { w.apply(w.site, w.site0, "asn: 64600", "asn: 64998") }, nil,
		condition.SessionDown, []string{"it expects another AS than 64600 (node.asn)"}},
	{"both sides of a session wait for the other", func(w *world) { w.apply(w.hub, w.hubDoc, "holdTime: 9s", "holdTime: 9s, passive: true") }, nil,
		condition.SessionDown, []string{"waits for the peer to connect"}},
	{"only one side has a TCP MD5 password", func(w *world) { w.apply(w.hub, w.hubDoc, "holdTime: 9s", "holdTime: 9s, password: md5") }, nil,
		condition.SessionDown, []string{"password"}},
	{"the peer announces more prefixes than maxPrefixes", func(w *world) { w.apply(w.hub, w.hubDoc, "holdTime: 9s", "holdTime: 9s, maxPrefixes: 1") },
		func(w *world) {
			w.apply(w.hub, w.hubDoc)
			_, err := w.hub.CLI(w.Context(), "", "reset", "peer", "site")
			w.ok(err)
		}, condition.PrefixLimit, []string{"more than 1 prefixes", "raise maxPrefixes"}},
	{peerGone, func(w *world) { w.site.Kill() }, func(w *world) { w.site.Start(w.T) },
		condition.TunnelDown, []string{"no packet from"}},
	{"no target of a pool's probes answers", func(w *world) { w.run(w.net, "ip addr del 203.0.113.1/32 dev lo") }, func(w *world) { w.run(w.net, "ip addr add 203.0.113.1/32 dev lo") },
		condition.PoolDown, []string{"pool partner", "203.0.113.1"}},
	{"the underlay interface lost its address", func(w *world) { w.run(w.hub.Node, "ip addr del 192.0.2.100/24 dev wan") },
		func(w *world) {
			w.run(w.hub.Node, "ip addr add 192.0.2.100/24 dev wan")
			w.run(w.hub.Node, "ip route replace default via 192.0.2.1")
		}, condition.NoUnderlayAddress, []string{"does not have underlay.address 192.0.2.100"}},
	{"the MTU of the underlay is smaller than the document says", func(w *world) { w.run(w.hub.Node, "ip link set wan mtu 1400") }, func(w *world) { w.run(w.hub.Node, "ip link set wan mtu 1500") },
		condition.UnderlayMTU, []string{"MTU of 1400", "set underlay.mtu to 1400"}},
	{"a route of the machine leads to the peer by another interface", func(w *world) { w.run(w.hub.Node, "ip route add 198.51.100.101/32 dev lan") }, func(w *world) { w.run(w.hub.Node, "ip route del 198.51.100.101/32 dev lan") },
		condition.NotByUnderlay, []string{"by interface lan"}},
	{"a change waits for its confirmation", func(w *world) {
		_, err := w.hub.CLI(w.Context(), w.hubDoc+"announce: [10.1.0.0/16]\n", "apply", "-f", "-", "--confirm-within", "1h")
		w.ok(err)
	}, nil, condition.NotConfirmed, []string{"unless `isthmus confirm"}},
	{"a route of the machine wins over a learned one", func(w *world) { w.run(w.hub.Node, "ip route add 172.16.1.0/24 via 192.0.2.1 metric 100") }, func(w *world) { w.run(w.hub.Node, "ip route del 172.16.1.0/24 via 192.0.2.1 metric 100") },
		condition.RoutesOutranked, []string{"172.16.1.0/24 by interface wan with the metric 100"}},
	{"the peer announces the network of the underlay", func(w *world) {
		w.apply(w.hub, w.hubDoc, "le: 24}]}, export", "le: 24}, {prefix: 192.0.2.0/24}]}, export")
		w.apply(w.site, w.site0, "le: 24}]}", "le: 24}, {prefix: 192.0.2.0/24}]}", "[172.16.1.0/24,", "[192.0.2.0/24, 172.16.1.0/24,")
	}, nil, condition.RoutesWithheld, []string{"1 learned routes are not installed"}},
	{"one address of a pool does not reach the partner", func(w *world) {
		w.run(w.net, "ip route add blackhole 192.0.2.111/32")
		w.apply(w.hub, w.hubDoc, "[{address: 192.0.2.110}]", "[{address: 192.0.2.110}, {address: 192.0.2.111}]")
	}, func(w *world) { w.run(w.net, "ip route del blackhole 192.0.2.111/32"); w.apply(w.hub, w.hubDoc) }, condition.PoolDegraded, []string{"pool partner", "192.0.2.111"}},
	{"the proxy of a policy does not answer", func(w *world) {
		w.apply(w.hub, w.hubDoc, "pool: partner}]", "pool: partner}, {name: web, sources: [172.16.0.0/16], action: redirect, protocol: tcp, ports: [\"80\"], to: \"10.50.0.2:8080\", probes: {interval: 1s, timeout: 1s, fall: 1, targets: [\"tcp://10.50.0.2:8080\"]}}]")
	}, nil, condition.ProxyDown, []string{"proxy 10.50.0.2 of policy web", "refused"}},
	{"the resolver does not answer", func(w *world) {
		w.apply(w.hub, w.hubDoc+"  resolvers: [192.0.2.1]\n", "pool: partner}]", "pool: partner}, {name: api, sources: [172.16.0.0/16], names: [api.partner.example], pool: partner}]")
	}, nil, condition.NameUnresolved, []string{"api.partner.example", "192.0.2.1"}},
	{"another program has the port of a tunnel", func(w *world) {
		w.ok(w.hub.Do(func() (err error) { w.taken, err = net.ListenPacket("udp4", ":51830"); return err }))
		w.apply(w.hub, w.hubDoc, "peers:", "- {name: second, inside: [{local: 169.254.80.4/31}], sources: [10.7.0.0/16], wireguard: {privateKey: lane, peerPublicKey: \""+otherKey+"\", listenPort: 51830}}\npeers:")
	}, func(w *world) { w.taken.Close(); w.apply(w.hub, w.hubDoc) }, condition.NotApplied, []string{"tunnel/second", "address already in use"}},
	{"the interface of a LAN is set down", func(w *world) {
		w.apply(w.hub, w.hubDoc+lanAttachment)
		w.run(w.hub.Node, "ip link set lan down")
	}, func(w *world) { w.run(w.hub.Node, "ip link set lan up"); w.apply(w.hub, w.hubDoc) }, condition.InterfaceDown, []string{"interface lan of attachment lan is down"}},
	{"the interface of a LAN is not there", func(w *world) {
		w.apply(w.hub, w.hubDoc+strings.Replace(lanAttachment, "interface: lan", "interface: lan9", 1))
	}, nil,
		condition.InterfaceMissing, []string{"interface lan9 of attachment lan is not on this machine"}},
	{"the disk of the state is full", func(w *world) { w.onDisk("! cat /dev/zero > " + w.disk + "/filler 2>&1") }, func(w *world) { w.onDisk("rm " + w.disk + "/filler") },
		condition.StateFull, []string{"free"}},
	{"the BGP process ends again and again", func(w *world) { w.keepKilling("isthmusd-bgp") }, func(w *world) { w.endKilling() },
		condition.BGPDown, []string{"the BGP process does not run"}},
	{"the audit log is moved away", func(w *world) { w.onDisk("mv " + w.disk + "/audit.log " + w.disk + "/audit.old") }, unbroken,
		condition.AuditLogReplaced, []string{"audit.log"}},
	{"another program flushes the ruleset", func(w *world) { w.run(w.hub.Node, "nft flush ruleset") }, unbroken,
		condition.GuardWasMissing, []string{"another process removed the rules"}},
}

// unbroken stands for a fault that has already ended when its condition is seen.
func unbroken(*world) {}

const (
	otherKey = "uxKtjSR/HgPr5/2mKg3++n6zfPx6H2aGymuvit1Nxn8="
	samePSK  = "sZkhevoqPVLyCseHy755vObBmOP/NXRtsRaLyQB5oHc="
)

// keyOf returns the public key of the peer in a document.
func keyOf(document string) string {
	_, rest, _ := strings.Cut(document, "peerPublicKey: ")
	key, _, _ := strings.Cut(rest, ",")
	return key
}

func (w *world) secret(n *daemon.Node, name, value string) {
	w.Helper()
	_, err := n.CLI(w.Context(), value, "secret", "set", name)
	w.ok(err)
}

func begin(t *testing.T) *world {
	w := &world{T: t}
	l, err := lab.New(lab.Options{})
	w.ok(err)
	t.Cleanup(func() {
		if t.Failed() && w.hub.Process != nil {
			log, _ := os.ReadFile(w.hub.Process.Log)
			t.Logf("%s", log)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	bin := daemon.Build(t, "../../..")
	w.hub, w.site, w.net = daemon.New(l.Node("hub"), bin), daemon.New(l.Node("site"), bin), l.Node("net")
	l.Link(lab.End{Node: w.net, Name: "hub", Addrs: daemon.Prefixes("192.0.2.1/24")}, lab.End{Node: w.hub.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")})
	l.Link(lab.End{Node: w.net, Name: "site", Addrs: daemon.Prefixes("198.51.100.1/24")}, lab.End{Node: w.site.Node, Name: "wan", Addrs: daemon.Prefixes("198.51.100.101/24")})
	l.Link(lab.End{Node: l.Node("lan"), Name: "eth0", Addrs: daemon.Prefixes("10.50.0.2/24")}, lab.End{Node: w.hub.Node, Name: "lan", Addrs: daemon.Prefixes("10.50.0.1/24")})
	dir, err := w.hub.Dir()
	w.ok(err)
	w.disk = filepath.Join(dir, "disk")
	w.hub.Args = []string{"-listen", api, "-state", w.disk}
	w.hub.IP("route add default via 192.0.2.1")
	w.site.IP("route add default via 198.51.100.1")
	w.net.IP("addr add 203.0.113.1/32 dev lo")
	w.ok(l.Up(t.Context()))
	holder, err := w.hub.Node.Start("disk", "unshare", "--mount", "sh", "-c", "mkdir "+w.disk+" && mount -t tmpfs -o size=32m disk "+w.disk+" && exec sleep 3600")
	w.ok(err)
	w.hub.Under = []string{"nsenter", "--mount", "--target", fmt.Sprint(holder.Pid())}
	w.ok(lab.Until(t.Context(), time.Minute, func() error {
		_, err := w.hub.Exec(t.Context(), slices.Concat(w.hub.Under, []string{"mountpoint", "-q", w.disk})...)
		return err
	}))
	hubPrivate, hubPublic := daemon.Key(t)
	sitePrivate, sitePublic := daemon.Key(t)
	w.hubDoc, w.site0 = strings.Replace(hubDocument, "SITE", sitePublic, 1), strings.Replace(siteDocument, "HUB", hubPublic, 1)
	for _, n := range []*daemon.Node{w.hub, w.site} {
		n.Start(t)
		w.secret(n, "psk", samePSK)
		w.secret(n, "md5", "a password")
	}
	scraper, err := daemon.NewScraper(w.hub.DialContext, api, []byte(w.onDisk("cat "+w.disk+"/admin.yaml")))
	w.ok(err)
	w.seen = Node{
		CLI:     func(ctx context.Context, args ...string) (string, error) { return w.hub.CLI(ctx, "", args...) },
		Metrics: scraper.Scrape,
	}
	w.secret(w.hub, "lane", hubPrivate)
	w.secret(w.site, "lane", sitePrivate)
	w.apply(w.hub, w.hubDoc)
	w.apply(w.site, w.site0)
	w.well()
	return w
}

// well waits until the node has no condition.
func (w *world) well() {
	w.Helper()
	w.ok(lab.Until(w.Context(), 2*time.Minute, func() error {
		out, err := w.hub.CLI(w.Context(), "", "status", "--check")
		if err == nil && !strings.HasPrefix(out, "OK: tunnels 1/1 up, peers 1/1 established") {
			err = fmt.Errorf("the node is not well: %s", out)
		}
		return err
	}))
}

// TestFaults makes one fault after another.
func TestFaults(t *testing.T) {
	w := begin(t)
	for _, f := range faults {
		t.Run(f.what, func(t *testing.T) {
			one := *w
			one.T = t
			one.shows(f)
		})
	}
}

// shows makes a fault, waits until the status names it, repairs it, and waits until the node is well.
func (w *world) shows(f fault) {
	began, shown := time.Now(), f.shown()
	f.make(w)
	// Errors are not the end: the repair is tried nevertheless.
	named := func(within time.Duration, accepted ...Fault) {
		err := lab.Until(w.Context(), within, func() (err error) {
			for _, one := range accepted {
				if err = w.seen.Named(w.Context(), one); err == nil {
					w.Logf("%5.1f s  %s  %s", time.Since(began).Seconds(), one.Kind.Name, strings.Join(one.Words, ", "))
					break
				}
			}
			return err
		})
		if err != nil {
			w.Error(err)
		}
	}
	if first, ok := early[f.what]; ok {
		named(10*time.Second, first, shown) // on a loaded machine the second may be there before a look
		named(20*time.Second, shown)
	} else {
		named(10*time.Second, shown)
	}
	if err := lab.Until(w.Context(), 20*time.Second, func() error {
		return errors.Join(w.seen.Recorded(w.Context(), shown, began, false), w.seen.Measured(w.Context(), shown, false))
	}); err != nil {
		w.Error(err)
	}
	if f.repair == nil {
		w.apply(w.hub, w.hubDoc)
		w.apply(w.site, w.site0)
	} else {
		f.repair(w)
	}
	if f.kind != condition.GuardWasMissing && f.kind != condition.AuditLogReplaced {
		w.well()
		w.ok(lab.Until(w.Context(), 20*time.Second, func() error {
			return errors.Join(w.seen.Recorded(w.Context(), shown, began, true), w.seen.Measured(w.Context(), shown, true))
		}))
	}
}

// TestPage keeps the table of the documents current.
func TestPage(t *testing.T) {
	const file, begin, end = "../../../docs/troubleshooting.md", "<!-- faults -->\n", "<!-- end of faults -->"
	var table strings.Builder
	table.WriteString("| what is wrong | condition | the message has |\n| --- | --- | --- |\n")
	row := func(f Fault) {
		name := f.Kind.Name
		fmt.Fprintf(&table, "| %s | [%s](conditions.md#%s) | %s |\n", f.What, name, strings.ToLower(name), strings.Join(f.Words, ", "))
	}
	for _, f := range faults {
		row(f.shown())
	}
	for _, f := range InVM {
		row(f)
	}
	page, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, found := strings.Cut(string(page), begin)
	_, tail, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s has no table of faults", file)
	}
	golden.Check(t, file, head+begin+table.String()+end+tail)
}

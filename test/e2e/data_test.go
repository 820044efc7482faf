package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
)

// TestDataPath filters the data of tunnels, but not IKE and the handshakes of WireGuard: in both
// directions, and in each. No NAT is in between, so that ESP is IP protocol 50.
func TestDataPath(t *testing.T) {
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
	addr := netip.MustParseAddr
	internet := peer.NewInternet(l, "data-net", netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24"))
	node, site := l.Node("data-node"), l.Node("data-site")
	self := addr("192.0.2.10")
	internet.Node.Port("br0", lab.End{Node: node, Name: "wan", Addrs: []netip.Prefix{netip.PrefixFrom(self, 24)}})
	node.IP("route add default via 192.0.2.1 dev wan onlink")
	// Of each tunnel, the name says which of its packets are dropped.
	names := []string{"both", "in", "out", "none"}
	outside := func(i int) netip.Addr { return addr(fmt.Sprintf("198.51.100.%d", 11+i)) }
	inside := func(i, host int) netip.Prefix {
		return netip.MustParsePrefix(fmt.Sprintf("169.254.70.%d/30", 4*i+host))
	}
	var addrs []netip.Prefix
	for i := range names {
		addrs = append(addrs, netip.PrefixFrom(outside(i), 24))
	}
	internet.Node.Port("br0", lab.End{Node: site, Name: "wan", Addrs: addrs})
	site.IP("route add default via 198.51.100.1 dev wan onlink")
	var tunnels []peer.Tunnel
	psk := PSK()
	doc := `node: {name: n, asn: 64620}
underlay: {interface: wan, address: 192.0.2.10}
staticRoutes:
- {prefix: 10.66.0.0/16, tunnels: [both, none]}
- {prefix: 10.67.0.0/16, tunnels: [wg]}
tunnels:
`
	for i, name := range names {
		p := peer.Tunnel{Name: name, Local: outside(i), Remote: self, PSK: psk, IfID: uint32(i + 1), IKE: "aes256gcm16-prfsha384-ecp384", ESP: "aes256gcm16-ecp384", Start: "none"}
		p.Interface(site, inside(i, 1))
		tunnels = append(tunnels, p)
		doc += fmt.Sprintf("- {name: %s, inside: [{local: %s}], ipsec: {remoteAddress: %s, psk: k}}\n", name, inside(i, 2), outside(i))
	}
	ours, err := peer.NewWGKey()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := peer.NewWGKey()
	if err != nil {
		t.Fatal(err)
	}
	doc += fmt.Sprintf("- {name: wg, inside: [{local: %s}], wireguard: {privateKey: wg, peerPublicKey: %s, endpoint: \"198.51.100.11:51820\", listenPort: 51821, keepalive: 5s}}\n", inside(4, 2), theirs.Public)
	if err := l.Up(ctx); err != nil {
		t.Fatal(err)
	}
	charon, err := peer.StartCharon(ctx, site, peer.CharonOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := charon.Load(ctx, tunnels...); err != nil {
		t.Fatal(err)
	}
	device := peer.WGDevice{Name: "wg0", Key: theirs.Private, Port: 51820, Inside: inside(4, 1), Peer: ours.Public, Endpoint: netip.AddrPortFrom(self, 51821)}
	if err := device.Add(ctx, site); err != nil {
		t.Fatal(err)
	}
	r, err := StartRouter(ctx, node, netip.AddrPortFrom(self, 7443), programs())
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, r: r, start: time.Now()}
	b.ok(r.SetSecret(ctx, "k", psk))
	b.ok(r.SetSecret(ctx, "wg", ours.Private))
	b.ok(r.Apply(ctx, doc))
	filter := func(rules string) {
		t.Helper()
		_, err := internet.Node.ExecInput(ctx, "table inet data\ndelete table inet data\ntable inet data {\n chain f {\n type filter hook forward priority 0\n"+rules+" }\n}\n", "nft", "-f", "-")
		b.ok(err)
	}
	up := func() {
		t.Helper()
		b.until(3*time.Minute, func() error {
			if err := r.Up(ctx); err != nil {
				return err
			}
			out, err := r.CLI(ctx, "status", "--check")
			if err != nil || !strings.HasPrefix(out, "OK: tunnels 5/5 up") {
				return fmt.Errorf("status --check: %v: %s", err, out)
			}
			return nil
		})
	}
	up()
	// An echo request of the node itself shows that data passes.
	for i := range 5 {
		_, err := node.Exec(ctx, "ping", "-c", "3", "-w", "60", inside(i, 1).Addr().String())
		b.ok(err)
	}

	b.step("data is filtered")
	// The first byte of a WireGuard message is its type, 4 for data (WireGuard paper, section 5.4).
	const wireguard = "udp sport { 51820, 51821 } @th,64,8 4 drop\n"
	esp := func(what string, i int) string {
		return fmt.Sprintf("ip protocol esp ip %s %s drop\n", what, outside(i))
	}
	filter(esp("saddr", 0) + esp("daddr", 0) + esp("saddr", 1) + esp("daddr", 2) + wireguard)
	words := map[string][]string{
		"both": {"state: suspect", "reason: no-data", "ESP, IP protocol 50, is filtered", "field: tunnels[0].ipsec.udpEncapsulation", "value: always", "type: TunnelSuspect"},
		"in":   {"state: suspect", "reason: no-data", "tunnels[1].ipsec.udpEncapsulation"},
		"out":  {"state: suspect", "reason: ", "tunnels[2].ipsec.udpEncapsulation"},
		"wg":   {"state: suspect", "reason: no-data", "lets handshakes pass"},
		"none": {"state: up"},
	}
	shows := func() error {
		for name, list := range words {
			out, err := r.CLI(ctx, "describe", "tunnel", name)
			if err != nil {
				return err
			}
			for _, w := range list {
				if !strings.Contains(out, w) {
					return fmt.Errorf("describe tunnel %s does not say %q:\n%s", name, w, out)
				}
			}
		}
		return nil
	}
	b.until(2*time.Minute, shows)
	b.Log(b.cli("describe", "tunnel", "both"))
	b.until(time.Minute, func() error { return r.ways(ctx, "10.66.0.0/16", "none") })
	b.until(time.Minute, func() error { return r.ways(ctx, "10.67.0.0/16") })
	out, err := r.CLI(ctx, "status", "--check")
	if err == nil || !strings.Contains(fmt.Sprint(out, err), "4 errors: tunnel ") || !strings.Contains(fmt.Sprint(out, err), "TunnelSuspect") {
		t.Errorf("status --check: %v: %s", err, out)
	}
	b.Log(b.cli("status"))

	b.step("UDP encapsulation is forced")
	doc = strings.Replace(doc, "{name: both, ", "{name: both, probe: true, ", 1)
	b.ok(r.Apply(ctx, strings.Replace(doc, "remoteAddress: 198.51.100.11, ", "remoteAddress: 198.51.100.11, udpEncapsulation: always, ", 1)))
	b.until(2*time.Minute, func() error {
		all, err := r.Tunnels(ctx)
		if s := all["both"]; err == nil && (s.GetState() != "up" || !s.GetNatTraversal() || s.GetProbe() != "answered") {
			err = fmt.Errorf("tunnel both: %v", s)
		}
		return err
	})
	b.until(time.Minute, func() error { return r.ways(ctx, "10.66.0.0/16", "both", "none") })

	b.step("the filters are gone")
	b.ok(r.Apply(ctx, doc))
	filter("")
	up()

	b.step("a WireGuard peer is gone")
	_, err = site.Exec(ctx, "ip", "link", "del", "wg0")
	b.ok(err)
	// Its keys stay valid for 180 s.
	b.until(2*time.Minute, func() error {
		all, err := r.Tunnels(ctx)
		s := all["wg"]
		if err == nil && (s.GetState() != "down" || s.GetExplanation().GetReason() != "no-handshake" || s.GetLastErrorSince() == nil) {
			err = fmt.Errorf("tunnel wg: %v", s)
		}
		if err == nil && s.GetSince().AsTime().Sub(s.GetWireguard().GetLastHandshake().AsTime()) > 170*time.Second {
			t.Errorf("it was not down before its keys were invalid: %v", s)
		}
		return err
	})
	b.ok(device.Add(ctx, site))
	up()
}

// ways returns nil when a route of the kernel uses exactly these tunnels.
func (r *Router) ways(ctx context.Context, prefix string, want ...string) error {
	return r.call(func(conn *grpc.ClientConn) error {
		list, err := isthmusv1.NewRouteServiceClient(conn).ListRoutes(ctx, &isthmusv1.ListRoutesRequest{Within: prefix})
		if err != nil {
			return err
		}
		var have []string
		for _, route := range list.GetRoutes() {
			for _, h := range route.GetNextHops() {
				if route.GetInstalled() && !h.GetDead() {
					have = append(have, h.GetTunnel())
				}
			}
		}
		if !slices.Equal(slices.Sorted(slices.Values(have)), want) {
			return fmt.Errorf("%s is routed by %v, want %v", prefix, have, want)
		}
		return nil
	})
}

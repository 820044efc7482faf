package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/peer"
	"github.com/isthmus-net/isthmus/test/vm"
)

// standIn turns the clouds' node into a router by hand, with strongSwan, BIRD, wg and nft. It sets
// up the same configuration as isthmusd, and so tests the gateways without isthmusd.
func standIn(ctx context.Context, c *Clouds) (*peer.Charon, *peer.BIRD, error) {
	const ike, esp = "aes256gcm16-prfsha384-ecp384", "aes256gcm16-ecp384"
	bgp := peer.BGPConfig{ASN: NodeASN, RouterID: NodePublic, Multipath: true, Announce: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}
	var tunnels []peer.Tunnel
	for _, g := range c.Gateways() {
		for i, p := range g.Config.Peerings {
			t := peer.Tunnel{Name: fmt.Sprintf("%s%d", g.Name, i), Local: NodePrivate.Addr(), LocalID: NodePublic.String(), Remote: p.Outside,
				PSK: p.PSK, IfID: uint32(len(tunnels) + 1), IKE: ike, ESP: esp, Start: "start", DPD: 10 * time.Second, MTU: 1398}
			n := peer.Neighbor{Name: t.Name, Local: p.PeerInside, Remote: p.Inside, ASN: g.Config.ASN, Hold: g.Config.Hold, Transit: true}
			bits := 30
			if g == c.Azure { // it initiates, its addresses are /32
				t.Start, bits, n.Multihop, n.Device = "none", 32, true, t.Device()
			}
			t.Interface(c.Node, netip.PrefixFrom(p.PeerInside, bits))
			if g == c.Azure {
				c.Node.IP("route add %s/32 dev %s src %s", p.Inside, t.Device(), p.PeerInside)
			}
			tunnels, bgp.Neighbors = append(tunnels, t), append(bgp.Neighbors, n)
		}
	}
	if err := c.Lab.Up(ctx); err != nil {
		return nil, nil, err
	}
	wg := peer.WGDevice{Name: "site", Key: c.NodeKey.Private, Port: NodePort, Inside: c.NodeInside, Peer: c.SiteKey.Public, Endpoint: netip.AddrPortFrom(SiteOutside, SitePort)}
	if err := wg.Add(ctx, c.Node); err != nil {
		return nil, nil, err
	}
	bgp.Neighbors = append(bgp.Neighbors, peer.Neighbor{Name: "site", Local: c.NodeInside.Addr(), Remote: c.SiteInside.Addr(), ASN: SiteASN, Hold: 30 * time.Second, Transit: true})
	// A packet that an xfrm interface is about to encrypt passes postrouting a first time with the
	// uplink as its output interface. "rt ipsec missing" leaves it alone.
	rules := fmt.Sprintf(`table inet standin {
	chain post { type nat hook postrouting priority srcnat; oifname %[1]q rt ipsec missing ip saddr { %[2]s, %[3]s, %[4]s, %[5]s } snat ip to %[6]s; }
	chain guard { type filter hook postrouting priority srcnat + 1; oifname %[1]q rt ipsec missing ip saddr { %[2]s, %[3]s, %[4]s, %[5]s, 169.254.0.0/16 } counter drop; }
}`, Uplink, VPC, VNet, Subnet, Office, EgressPrivate.Addr())
	if _, err := c.Node.ExecInput(ctx, rules, "nft", "-f", "-"); err != nil {
		return nil, nil, err
	}
	// Azure's look-alike already initiates. A charon that has no connection yet would refuse it,
	// and it would not initiate again.
	if _, err := c.Node.ExecInput(ctx, "table inet deaf { chain input { type filter hook input priority 0; udp dport { 500, 4500 } drop; }; }", "nft", "-f", "-"); err != nil {
		return nil, nil, err
	}
	charon, err := peer.StartCharon(ctx, c.Node, peer.CharonOptions{})
	if err != nil {
		return nil, nil, err
	}
	if err := charon.Load(ctx, tunnels...); err != nil {
		return nil, nil, err
	}
	if _, err := c.Node.Exec(ctx, "nft", "delete", "table", "inet", "deaf"); err != nil {
		return nil, nil, err
	}
	bird, err := peer.StartBIRD(ctx, c.Node, bgp)
	return charon, bird, err
}

func TestStandIn(t *testing.T) {
	start := time.Now()
	step := func(s string) { t.Logf("%5.1f s  %s", time.Since(start).Seconds(), s) }
	c, err := NewClouds(t.Context(), CloudsOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && vm.Inside() {
			c.Lab.Save(context.Background(), "/out/"+t.Name())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	step("topology up")
	leaks, err := c.Internet.Node.Capture("", Inside...)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	step("gateways started")
	charon, bird, err := standIn(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	step("stand-in started")
	if err := lab.Until(t.Context(), time.Minute, func() error { return c.Established(t.Context()) }); err != nil {
		t.Fatal(err)
	}
	step("all BGP sessions established")
	if err := c.AllReachable(t.Context(), 30*time.Second); err != nil {
		t.Fatal(err)
	}
	step("all spokes reach each other")

	children, err := charon.Children(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(children) != 6 {
		t.Errorf("CHILD_SAs %v, want six tunnels", children)
	}
	// A session is established before its routes are announced.
	err = lab.Until(t.Context(), 30*time.Second, func() error {
		sessions, err := bird.Sessions(t.Context())
		if err != nil {
			return err
		}
		if len(sessions) != 7 {
			return fmt.Errorf("%d sessions, want seven", len(sessions))
		}
		for _, s := range sessions {
			if s.State != "Established" || s.Imported != 1 || time.Since(s.Since) > time.Hour || s.Withdrawals != 0 || !s.Remote.IsValid() {
				return fmt.Errorf("session %+v, want one prefix and no withdrawal", s)
			}
		}
		for _, g := range c.Gateways() {
			for _, i := range g.Instances {
				sessions, err := i.Speaker.Sessions(t.Context())
				if err != nil {
					return err
				}
				for _, s := range sessions {
					if s.Imported == 0 || s.Exported == 0 || s.Since.IsZero() {
						return fmt.Errorf("%s: session %+v", i.Router.Name, s)
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}

	// A guest on a busy host also loses packets, so all must arrive in one of three tries.
	var lost error
	for range 3 {
		m, err := c.PingMesh(40 * time.Millisecond) // 300 packets/s in all
		if err != nil {
			t.Fatal(err)
		}
		for tunnel := range children {
			if err := charon.RekeyChild(t.Context(), tunnel); err != nil {
				t.Error(err)
			}
		}
		lost = nil
		for name, r := range m.Stop() {
			if r.Lost > 0 {
				lost = errors.Join(lost, fmt.Errorf("while rekeying, %s: %v", name, r))
			}
		}
		if lost == nil {
			break
		}
		t.Log(lost)
	}
	if lost != nil {
		t.Error("packets are lost each time")
	}
	step("all tunnels rekeyed")

	for _, s := range c.Spokes {
		if a, err := c.Ask(t.Context(), s); err != nil || a != EgressPublic {
			t.Errorf("from %s the partner saw %v, %v; want %v", s.Node.Name, a, err, EgressPublic)
		}
	}
	step("partner asked")
	if n, first, err := leaks.Stop(); err != nil || n != 0 {
		t.Errorf("%d packets with an inside source on the Internet (%v), first: %q", n, err, first)
	}
}

package ipsec

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/link/linktest"
	"github.com/isthmus-net/isthmus/tunnel"
	"github.com/isthmus-net/isthmus/tunnel/explain"
)

// Ring: VM. The messages that two real charons exchange when they do not agree, and the
// explanations for the user.

// TestExplained initiates from either side, because each learns something else.
func TestExplained(t *testing.T) {
	b := newBench(t)
	c, good := one(1)
	b.farInterface(c)
	call := func(args ...string) { // the result is seen on this side
		args = append(args, "--timeout", "3", "--uri", "unix://"+b.far.socket)
		_ = exec.Command("swanctl", args...).Run()
	}
	explained := func(c tunnel.Config) explain.Explanation {
		d := explain.Document{Public: netip.MustParseAddr(ourPublic), Tunnels: []explain.Tunnel{{Config: c}}}
		e, _ := d.Tunnel(0, b.state(c.Name))
		return e
	}

	// An address without a tunnel.
	b.far.load(good)
	until(t, 30*time.Second, "the driver listens", func() bool {
		call("--initiate", "--child", "t1")
		return len(b.d.Callers()) == 1
	})
	if got := b.d.Callers()[0]; got.Address.String() != peerAddress || got.Attempts == 0 || time.Since(got.Last) > time.Minute {
		t.Errorf("caller %+v", got)
	}

	for _, tt := range []struct {
		name   string
		change func(*peerConn)
		calls  bool // the peer initiates, and this node waits
		rekey  string
		want   tunnel.Reason
		field  string
		value  string
	}{
		{"wrong PSK, we call", func(p *peerConn) { p.psk = "another" }, false, "", tunnel.AuthRefused, "ipsec.psk", ""},
		{"wrong PSK, peer calls", func(p *peerConn) { p.psk = "another" }, true, "", tunnel.KeyDiffers, "ipsec.psk", ""},
		{"peer's identity", func(p *peerConn) { p.theirs = "198.51.100.77" }, true, "", tunnel.Identity, "ipsec.remoteIdentity", "198.51.100.77"},
		{"our identity", func(p *peerConn) { p.ours = "198.51.100.78" }, true, "", tunnel.Identity, "ipsec.localIdentity", "198.51.100.78"},
		{"IKE, we call", func(p *peerConn) { p.ike = "aes128-sha1-modp2048" }, false, "", tunnel.IKERefused, "ipsec.ikeProposals", ""},
		{"IKE, peer calls", func(p *peerConn) { p.ike = "aes128-sha1-modp2048" }, true, "", tunnel.IKEUnacceptable, "ipsec.ikeProposals", "[aes128-sha1-modp2048]"},
		{"ESP, we call", func(p *peerConn) { p.esp = "aes128-sha1" }, false, "", tunnel.ESPRefused, "ipsec.espProposals", ""},
		{"ESP, peer calls", func(p *peerConn) { p.esp = "aes128-sha256" }, true, "", tunnel.ESPUnacceptable, "ipsec.espProposals", "[aes128-sha256]"},
		{"no PFS, we renew", func(p *peerConn) { p.esp = "aes256gcm16" }, false, "near", tunnel.RekeyRefused, "ipsec.espProposals", "[aes256gcm16]"},
		{"another group, peer renews", func(p *peerConn) { p.esp = "aes256gcm16-modp2048" }, true, "far", tunnel.RekeyRefused, "ipsec.espProposals", "[aes256gcm16-modp2048]"},
		{"selectors, we call", func(p *peerConn) { p.ts = "fd00::/8" }, false, "", tunnel.TSRefused, "", ""},
		{"selectors, peer calls", func(p *peerConn) { p.ts = "fd00::/8" }, true, "", tunnel.TSUnacceptable, "", ""},
	} {
		bad := good
		tt.change(&bad)
		b.far.load(bad)
		c.IPsec.RespondOnly = tt.calls
		b.apply(c)
		if tt.calls {
			call("--initiate", "--child", "t1")
		}
		switch tt.rekey {
		case "near":
			b.await("t1", tunnel.Up)
			b.near.swanctl("--rekey", "--child", connection("t1"))
		case "far":
			b.await("t1", tunnel.Up)
			b.far.swanctl("--rekey", "--child", "t1")
		}
		until(t, 30*time.Second, tt.name+": "+string(tt.want), func() bool { return b.state("t1").Failure.Reason == tt.want })
		e := explained(c)
		t.Logf("%s: %s | %s | %s | %s = %s | %s", tt.name, e.What, e.Cause, e.Remedy, e.Field, e.Value, e.There)
		field := "tunnels[0]." + tt.field
		if tt.field == "" {
			field = ""
		}
		if e.Field != field || e.Value != tt.value || e.What == "" || e.Cause == "" {
			t.Errorf("%s: %+v", tt.name, e)
		}
		// the reason from its own attempt has precedence over its vaguer answer to ours
		if tt.name == "peer's identity" {
			c.IPsec.RespondOnly = false
			b.apply(c)
			time.Sleep(3 * time.Second)
			if e := explained(c); e.Reason != tunnel.Identity || e.Value != tt.value {
				t.Errorf("%s, then we initiate: %+v", tt.name, e)
			}
		}
		if err := b.d.Remove(t.Context(), "t1"); err != nil {
			t.Fatal(err)
		}
		call("--terminate", "--ike", "t1")
	}

	// The peer drops incoming packets. Its own packets still arrive here, until it stops sending
	// as well.
	b.far.load(good)
	linktest.Run(t, "ip", "netns", "exec", "ist-far", "nft", "add table inet dropping; add chain inet dropping in { type filter hook input priority 0; }; add rule inet dropping in udp dport { 500, 4500 } drop")
	c.IPsec.RespondOnly = false
	b.apply(c)
	until(t, 30*time.Second, "no answer", func() bool { return b.state("t1").Failure.Reason == tunnel.NoAnswer })
	if e := explained(c); !strings.Contains(e.What, "no IKE packet at all") || e.Field != "tunnels[0].ipsec.remoteAddress" {
		t.Errorf("silent: %+v", e)
	}
	until(t, 30*time.Second, "its packets are noticed", func() bool {
		call("--initiate", "--child", "t1")
		e := explained(c)
		return e.Reason == tunnel.NoAnswer && strings.Contains(e.What, "the last IKE packet from that address came") && e.Field == ""
	})
	t.Logf("dropping: %+v", explained(c))
	linktest.Run(t, "ip", "netns", "exec", "ist-far", "nft", "delete table inet dropping")
	if s := b.await("t1", tunnel.Up); s.Failure.Reason != "" || s.Evidence != (tunnel.Evidence{}) {
		t.Errorf("up: %+v", s)
	}
	if _, left := (explain.Document{Tunnels: []explain.Tunnel{{Config: c}}}).Tunnel(0, b.state("t1")); left {
		t.Error("a tunnel that is up is explained")
	}
}

package peer

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/root"
	"github.com/isthmus-net/isthmus/test/vm"
)

// newLab returns an empty lab whose peers run from the guest's tree, so that this machine needs no
// installed daemon.
func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	root.Need(t, "network namespaces")
	o := lab.Options{}
	if !vm.Inside() {
		img, err := vm.Build(t.Context(), t.Output())
		if err != nil {
			t.Fatal(err)
		}
		o.Root = img.Tree()
	}
	l, err := lab.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// TestSpeakers runs BIRD and FRR against each other, IPv4 and IPv6, with MD5.
func TestSpeakers(t *testing.T) {
	l := newLab(t)
	a, b := l.Node("bird"), l.Node("frr")
	l.Link(lab.End{Node: a, Name: "eth0", Addrs: []netip.Prefix{prefix("169.254.1.1/30"), prefix("fd00:1::1/126")}},
		lab.End{Node: b, Name: "eth0", Addrs: []netip.Prefix{prefix("169.254.1.2/30"), prefix("fd00:1::2/126")}})
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	bird, err := StartBIRD(t.Context(), a, BGPConfig{ASN: 65001, RouterID: addr("10.0.0.1"), Announce: []netip.Prefix{prefix("10.1.0.0/16"), prefix("fd01::/32")}, Neighbors: []Neighbor{
		{Name: "v4", Local: addr("169.254.1.1"), Remote: addr("169.254.1.2"), ASN: 65002, Hold: 30 * time.Second, Password: "md5key"},
		{Name: "v6", Local: addr("fd00:1::1"), Remote: addr("fd00:1::2"), ASN: 65002, Passive: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	frr, err := StartFRR(t.Context(), b, BGPConfig{ASN: 65002, RouterID: addr("10.0.0.2"), Announce: []netip.Prefix{prefix("10.2.0.0/16"), prefix("10.3.0.0/16"), prefix("fd02::/32")}, Neighbors: []Neighbor{
		{Local: addr("169.254.1.2"), Remote: addr("169.254.1.1"), ASN: 65001, Password: "md5key"},
		{Local: addr("fd00:1::2"), Remote: addr("fd00:1::1"), ASN: 65001},
	}})
	if err != nil {
		t.Fatal(err)
	}
	check := func(s Speaker, want map[string][2]int) {
		t.Helper()
		err := lab.Until(t.Context(), 20*time.Second, func() error { return Established(t.Context(), s) })
		if err != nil {
			t.Fatal(err)
		}
		err = lab.Until(t.Context(), 10*time.Second, func() error {
			got, err := s.Sessions(t.Context())
			if err != nil {
				return err
			}
			for _, x := range got {
				if want[x.Remote.String()] != [2]int{x.Imported, x.Exported} {
					return errNotYet
				}
			}
			return nil
		})
		got, _ := s.Sessions(t.Context())
		if err != nil || len(got) != len(want) {
			t.Fatalf("sessions %+v, want %v (remote: imported, exported)", got, want)
		}
		for _, x := range got {
			if x.Since.Before(start.Add(-time.Second)) || x.Since.After(time.Now().Add(time.Second)) {
				t.Errorf("session %s is up since %v, started at %v", x.Name, x.Since, start)
			}
		}
	}
	check(bird, map[string][2]int{"169.254.1.2": {2, 1}, "fd00:1::2": {1, 1}})
	check(frr, map[string][2]int{"169.254.1.1": {1, 2}, "fd00:1::1": {1, 1}})
	for n, route := range map[*lab.Node]string{a: "10.3.0.0/16", b: "10.1.0.0/16"} {
		if out, err := n.Exec(t.Context(), "ip", "route", "show", route); err != nil || !strings.Contains(out, "169.254.1.") {
			t.Errorf("route %s of %s: %q, %v", route, n.Name, out, err)
		}
	}
	if _, err := bird.Command("nonsense"); err == nil {
		t.Error("BIRD's refusal does not return an error")
	}
	// The speaker must report a withdrawal, and the end of a session.
	if _, err := frr.Command("enable", "configure terminal", "router bgp 65002", "address-family ipv4 unicast", "no network 10.3.0.0/16"); err != nil {
		t.Fatal(err)
	}
	err = lab.Until(t.Context(), 10*time.Second, func() error {
		sessions, err := bird.Sessions(t.Context())
		if err == nil && (sessions[0].Withdrawals != 1 || sessions[0].Imported != 1 || sessions[1].Withdrawals != 0) {
			err = fmt.Errorf("sessions %+v: %w", sessions, errNotYet)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	frr.Stop()
	err = lab.Until(t.Context(), 10*time.Second, func() error {
		if Established(t.Context(), bird) == nil {
			return errNotYet
		}
		return nil
	})
	if err != nil {
		t.Errorf("FRR has stopped and BIRD says its sessions are established: %v", err)
	}
}

// TestCharon starts charon where the kernel may lack ESP: it needs none to load.
func TestCharon(t *testing.T) {
	l := newLab(t)
	n := l.Node("ike")
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := StartCharon(t.Context(), n, CharonOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tunnel := Tunnel{Name: "t1", Local: addr("192.0.2.1"), Remote: addr("192.0.2.2"), PSK: "secret", IfID: 7, IKE: AWSIKE, ESP: AWSESP,
		Life: Life{IKERekey: time.Hour, IKEExpire: 2 * time.Hour, ChildRekey: 20 * time.Minute, ChildExpire: 30 * time.Minute, Fuzz: time.Minute, ChildRekeyBytes: 1 << 40, ChildExpireBytes: 1 << 41}}
	google := tunnel
	google.Name, google.IKE, google.ESP = "t2", GoogleIKE, GoogleESP
	azure := tunnel
	azure.Name, azure.IKE, azure.ESP = "t3", AzureDefaultIKE, AzureDefaultESP
	if err := c.Load(t.Context(), tunnel, google, azure); err != nil {
		t.Fatal(err)
	}
	out, err := c.Swanctl(t.Context(), "--list-conns")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"t1: IKEv2", "t2: IKEv2", "t3: IKEv2", "rekeying every 3600s", "rekeying every 1200s"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in the loaded connections:\n%s", want, out)
		}
	}
	bad := tunnel
	bad.IKE = "nonsense"
	if err := c.Load(t.Context(), bad); err == nil {
		t.Error("charon accepts a proposal that does not exist")
	}
	if children, err := c.Children(t.Context()); err != nil || len(children) != 0 {
		t.Errorf("children %v, %v", children, err)
	}
}

// TestResting checks that a tunnel with two IKE_SAs, or with one that is not established, does not
// rest.
func TestResting(t *testing.T) {
	const one = "tunnel: #2, ESTABLISHED, IKEv2, 9eb4cb26fd789148_i* 6579e1638c23d2bc_r\n  tunnel: #6, reqid 1, INSTALLED, TUNNEL, ESP:AES_GCM_16-256\n  tunnel: #7, reqid 1, INSTALLED, TUNNEL, ESP:AES_GCM_16-256\n"
	const other = "tunnel1: #3, ESTABLISHED, IKEv2, c4098725b71e676e_i 5b0574e87f9b3dca_r*\n"
	for out, want := range map[string]string{
		"": "", one: "", one + other: "",
		one + "tunnel: #3, ESTABLISHED, IKEv2, aa_i* bb_r\n":               "tunnel has more than one IKE_SA",
		one + "tunnel1: #3, CONNECTING, IKEv2, aa_i* 0000000000000000_r\n": "tunnel1 is not established: 3, CONNECTING, IKEv2, aa_i* 0000000000000000_r",
		"tunnel: #2, DELETING, IKEv2, aa_i* bb_r\n" + other:                "tunnel is not established: 2, DELETING, IKEv2, aa_i* bb_r",
	} {
		if err := resting(out); fmt.Sprint(err) != want && (err != nil || want != "") {
			t.Errorf("%s: %v, want %q", out, err, want)
		}
	}
}

func TestNewWGKey(t *testing.T) {
	l := newLab(t)
	n := l.Node("wg")
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	k, err := NewWGKey()
	if err != nil {
		t.Fatal(err)
	}
	got, err := n.ExecPeer(context.Background(), "sh", "-c", "echo "+k.Private+" | wg pubkey")
	if err != nil || strings.TrimSpace(got) != k.Public {
		t.Errorf("wg pubkey says %q, %v; we say %q", got, err, k.Public)
	}
}

// TestRawBGP has the raw speaker follow the protocol with BIRD, and then violate it.
func TestRawBGP(t *testing.T) {
	l := newLab(t)
	a, b := l.Node("bird"), l.Node("raw")
	l.Link(lab.End{Node: a, Name: "eth0", Addrs: []netip.Prefix{prefix("169.254.1.1/30")}}, lab.End{Node: b, Name: "eth0", Addrs: []netip.Prefix{prefix("169.254.1.2/30")}})
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	bird, err := StartBIRD(t.Context(), a, BGPConfig{ASN: 65001, RouterID: addr("10.0.0.1"), Announce: []netip.Prefix{prefix("10.1.0.0/16")}, Neighbors: []Neighbor{
		{Name: "raw", Local: addr("169.254.1.1"), Remote: addr("169.254.1.2"), ASN: 4200000001, Passive: true, MaxPrefixes: 3}}})
	if err != nil {
		t.Fatal(err)
	}
	dial := func() (r *RawBGP) {
		t.Helper()
		err := lab.Until(t.Context(), 30*time.Second, func() (err error) {
			r, err = DialRawBGP(t.Context(), b, netip.MustParseAddrPort("169.254.1.1:179"), 4200000001, addr("10.0.0.2"))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	ended := func(r *RawBGP, want string) {
		t.Helper()
		select {
		case <-r.Done():
			if r.Err() == nil || !strings.Contains(r.Err().Error(), want) {
				t.Errorf("the session ended with %v, want %s", r.Err(), want)
			}
		case <-time.After(time.Minute):
			t.Errorf("the session did not end, want %s", want)
		}
		r.Close()
	}
	r := dial()
	if err := r.Announce([]uint32{4200000001}, addr("169.254.1.2"), nil, prefix("10.8.0.0/16"), prefix("10.9.9.0/25")); err != nil {
		t.Fatal(err)
	}
	err = lab.Until(t.Context(), 5*time.Second, func() error {
		s, err := bird.Sessions(t.Context())
		if err == nil && (s[0].Imported != 2 || s[0].State != "Established") {
			err = fmt.Errorf("sessions %+v: %w", s, errNotYet)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if err := r.Write(make([]byte, 19)); err != nil { // no marker
		t.Fatal(err)
	}
	ended(r, "code 1 subcode 1") // message header error, connection not synchronized
	r = dial()
	if err := r.Announce([]uint32{4200000001}, addr("169.254.1.2"), nil, prefix("10.8.0.0/16"), prefix("10.9.0.0/16"), prefix("10.10.0.0/16"), prefix("10.11.0.0/16")); err != nil {
		t.Fatal(err)
	}
	ended(r, "code 6 subcode 1") // cease, maximum number of prefixes
}

// TestUserland joins two gateways whose charon does ESP itself, as a kernel without ESP needs it.
func TestUserland(t *testing.T) {
	l := newLab(t)
	internet := NewInternet(l, "internet", prefix("203.0.113.0/24"))
	gateway := func(name, outside, other, inside, otherInside, start string, asn, otherASN uint32, behind string) *Gateway {
		return NewAWS(l, internet, name, Config{ASN: asn, Router: addr(other), RouterASN: otherASN, Announce: []netip.Prefix{prefix(behind)}, Userland: true, Start: start,
			Peerings: []Peering{{Outside: addr(outside), Inside: addr(inside), PeerInside: addr(otherInside), PSK: "k"}}})
	}
	a := gateway("a", "203.0.113.11", "203.0.113.12", "169.254.64.1", "169.254.64.2", "none", 65001, 65002, "172.16.0.0/16")
	b := gateway("b", "203.0.113.12", "203.0.113.11", "169.254.64.2", "169.254.64.1", "start", 65002, 65001, "172.17.0.0/16")
	host := func(g *Gateway, name, addr, via string) *lab.Node {
		n := l.Node(name)
		l.Link(lab.End{Node: n, Name: "eth0", Addrs: []netip.Prefix{prefix(addr)}}, lab.End{Node: g.Instances[0].Router, Name: "lan", Addrs: []netip.Prefix{prefix(via)}})
		n.IP("route add default via %s", prefix(via).Addr())
		return n
	}
	from, to := host(a, "a-host", "172.16.1.10/24", "172.16.1.1/24"), host(b, "b-host", "172.17.1.10/24", "172.17.1.1/24")
	if err := l.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, g := range []*Gateway{a, b} {
		if err := g.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	err := lab.Until(t.Context(), 60*time.Second, func() error { return a.Established(t.Context()) })
	if err != nil {
		t.Fatal(err)
	}
	server, err := StartServer(to, addr("172.17.1.10"))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	err = lab.Until(t.Context(), 20*time.Second, func() error {
		seen, err := Ask(t.Context(), from, addr("172.17.1.10"))
		if err == nil && seen != addr("172.16.1.10") {
			err = fmt.Errorf("seen as %s", seen)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

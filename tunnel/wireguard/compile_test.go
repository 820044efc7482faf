package wireguard

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Ring: pure.

func TestCompile(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	want := tunnel.WireGuard{
		PeerPublicKey: [32]byte{1}, Endpoint: netip.MustParseAddrPort("192.0.2.1:51820"),
		ListenPort: 51821, Keepalive: 25 * time.Second,
	}
	k := keys{private: wgtypes.Key{7}, preshared: wgtypes.Key{8}}
	device := func(change func(*wgtypes.Device)) *wgtypes.Device {
		d := &wgtypes.Device{
			PrivateKey: wgtypes.Key{7}, ListenPort: 51821,
			Peers: []wgtypes.Peer{{
				PublicKey: wgtypes.Key{1}, PresharedKey: wgtypes.Key{8}, PersistentKeepaliveInterval: 25 * time.Second,
				Endpoint:   net.UDPAddrFromAddrPort(want.Endpoint),
				AllowedIPs: []net.IPNet{everything[1], everything[0]}, LastHandshakeTime: now.Add(-time.Minute),
			}},
		}
		change(d)
		return d
	}
	elsewhere := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("192.0.2.99:1024"))
	for _, tt := range []struct {
		name   string
		change func(*wgtypes.Device)
		former string // former endpoint
		want   string // what the change affects
	}{
		{"same", func(*wgtypes.Device) {}, "", ""},
		{"another private key", func(d *wgtypes.Device) { d.PrivateKey = wgtypes.Key{9} }, "", "private"},
		{"another port", func(d *wgtypes.Device) { d.ListenPort = 1 }, "", "port"},
		{"another preshared key", func(d *wgtypes.Device) { d.Peers[0].PresharedKey = wgtypes.Key{} }, "", "peer(update psk)"},
		{"another keepalive", func(d *wgtypes.Device) { d.Peers[0].PersistentKeepaliveInterval = 0 }, "", "peer(update keepalive)"},
		{"a network missing", func(d *wgtypes.Device) { d.Peers[0].AllowedIPs = everything[:1] }, "", "peer(update nets)"},
		{"roamed", func(d *wgtypes.Device) { d.Peers[0].Endpoint = elsewhere }, "", ""},
		{"roamed, applied again", func(d *wgtypes.Device) { d.Peers[0].Endpoint = elsewhere }, "192.0.2.1:51820", ""},
		{"roamed and silent", func(d *wgtypes.Device) {
			d.Peers[0].Endpoint, d.Peers[0].LastHandshakeTime = elsewhere, now.Add(-stale-1)
		}, "", "peer(update endpoint)"},
		{"endpoint edited", func(d *wgtypes.Device) { d.Peers[0].Endpoint = elsewhere }, "192.0.2.2:1", "peer(update endpoint)"},
		{"a second peer", func(d *wgtypes.Device) { d.Peers = append(d.Peers, wgtypes.Peer{}) }, "", "remove"},
		{"empty", func(d *wgtypes.Device) { *d = wgtypes.Device{} }, "", "private port peer( psk keepalive nets endpoint)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			former, _ := netip.ParseAddrPort(tt.former)
			c, differs := compile(device(tt.change), want, k, former, now)
			if got := touches(c); got != tt.want || differs != (got != "") {
				t.Errorf("changes %q (%v), want %q", got, differs, tt.want)
			}
			if c.ReplacePeers {
				t.Error("peers are replaced, which ends their sessions")
			}
		})
	}
}

func touches(c wgtypes.Config) string {
	s := ""
	add := func(is bool, what string) {
		if is {
			if s != "" && s[len(s)-1] != '(' {
				s += " "
			}
			s += what
		}
	}
	add(c.PrivateKey != nil, "private")
	add(c.ListenPort != nil, "port")
	for _, p := range c.Peers {
		if p.Remove {
			add(true, "remove")
			continue
		}
		add(true, "peer(")
		if p.UpdateOnly {
			s += "update"
		}
		for _, f := range []struct {
			is   bool
			what string
		}{
			{p.PresharedKey != nil, " psk"},
			{p.PersistentKeepaliveInterval != nil, " keepalive"},
			{p.ReplaceAllowedIPs, " nets"},
			{p.Endpoint != nil, " endpoint"},
		} {
			if f.is {
				s += f.what
			}
		}
		s += ")"
	}
	return s
}

func TestDecode(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	at := &net.UDPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 5}
	link := link.Link{Name: "wg0", Alias: tunnel.Mark + "lane", Up: true, RxBytes: 9}
	for _, tt := range []struct {
		name   string
		up     bool
		dev    *wgtypes.Device
		status tunnel.Status
		err    string
		reason tunnel.Reason
	}{
		{"unreadable", true, nil, tunnel.Unknown, "", ""},
		{"no peer", true, &wgtypes.Device{}, tunnel.Down, "no peer is configured", ""},
		{"fresh", true, peer(wgtypes.Peer{Endpoint: at, LastHandshakeTime: now.Add(-stale + 1)}), tunnel.Up, "", ""},
		{"interface down", false, peer(wgtypes.Peer{Endpoint: at, LastHandshakeTime: now}), tunnel.Down, "the interface is down", ""},
		{"never", true, peer(wgtypes.Peer{Endpoint: at}), tunnel.Connecting, "no handshake yet: no answer from 192.0.2.1:5", tunnel.NoHandshake},
		{"passive", true, peer(wgtypes.Peer{}), tunnel.Down, "waiting for the peer to connect: its endpoint is not known", tunnel.NoEndpoint},
		{"stale", true, peer(wgtypes.Peer{Endpoint: at, LastHandshakeTime: now.Add(-stale)}), tunnel.Down,
			"no handshake since 2026-01-02T03:01:05Z: no answer from 192.0.2.1:5", tunnel.NoHandshake},
	} {
		t.Run(tt.name, func(t *testing.T) {
			link := link
			link.Up = tt.up
			s := decode(link, tt.dev, now)
			if s.Status != tt.status || s.LastError != tt.err || s.Failure.Reason != tt.reason || s.Name != "lane" || s.RxBytes != 9 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestHistory checks that a tunnel that is up shows no error of the past, and that the time of an
// error is that of its beginning.
func TestHistory(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	down := tunnel.State{Status: tunnel.Connecting, LastError: "no handshake yet", Failure: tunnel.Failure{Reason: tunnel.NoHandshake}}
	s, changed := history(tunnel.State{}, down, at)
	if !changed || s.Failure.Since != at {
		t.Errorf("%+v", s)
	}
	if s, changed = history(s, down, at.Add(time.Minute)); changed || s.Failure.Since != at {
		t.Errorf("%v, %+v", changed, s)
	}
	s, changed = history(s, tunnel.State{Status: tunnel.Up}, at.Add(time.Hour))
	if !changed || s.LastError != "" || s.Failure != (tunnel.Failure{}) || s.TimesUp != 1 {
		t.Errorf("%v, %+v", changed, s)
	}
}

// TestStranger checks the conclusions from the log of an embedded device. TestEmbedded compares the
// texts with those of a device.
func TestStranger(t *testing.T) {
	u := &userspace{}
	u.note("%v - Receiving keepalive packet", "peer")
	if u.stranger.Load() != nil {
		t.Error("a keepalive is a stranger")
	}
	u.note(unknownKey, "192.0.2.1:5")
	if s := u.stranger.Load(); s == nil || s.address.String() != "192.0.2.1:5" || s.otherKey {
		t.Errorf("%+v", s)
	}
	u.note(otherKey)
	if s := u.stranger.Load(); s.address.IsValid() || !s.otherKey || s.at.IsZero() {
		t.Errorf("%+v", s)
	}
}

func peer(p wgtypes.Peer) *wgtypes.Device { return &wgtypes.Device{Peers: []wgtypes.Peer{p}} }

func TestKeysDoNotPrint(t *testing.T) {
	k := keys{private: wgtypes.Key{1, 2, 3}}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(verb, k); got != "(keys)" {
			t.Errorf("%s prints %s", verb, got)
		}
	}
	raw := k.private[:]
	for _, text := range []string{string(raw), k.private.String(), k.private.String() + "\n"} {
		if got, err := parseKey([]byte(text)); err != nil || got != k.private {
			t.Errorf("parsing %q: %v", text, err)
		}
	}
	if _, err := parseKey([]byte("short")); err == nil || len(err.Error()) == 0 {
		t.Error("a short key was accepted")
	}
}

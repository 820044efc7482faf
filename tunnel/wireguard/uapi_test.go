package wireguard

import (
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun/tuntest"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// TestText writes a device in text form and reads it back.
func TestText(t *testing.T) {
	u := &userspace{dev: device.NewDevice(tuntest.NewChannelTUN().TUN(), conn.NewDefaultBind(), device.NewLogger(device.LogLevelSilent, ""))}
	defer u.close()
	private, _ := wgtypes.GeneratePrivateKey()
	psk, _ := wgtypes.GenerateKey()
	other, _ := wgtypes.GeneratePrivateKey()
	keepalive, port := 25*time.Second, 51828
	peer := wgtypes.PeerConfig{
		PublicKey: other.PublicKey(), PresharedKey: &psk, PersistentKeepaliveInterval: &keepalive,
		Endpoint:          net.UDPAddrFromAddrPort(netip.MustParseAddrPort("[2001:db8::1]:51820")),
		ReplaceAllowedIPs: true, AllowedIPs: everything,
	}
	if err := u.configure(wgtypes.Config{PrivateKey: &private, ListenPort: &port, Peers: []wgtypes.PeerConfig{peer}}); err != nil {
		t.Fatal(err)
	}
	got, err := u.read()
	if err != nil {
		t.Fatal(err)
	}
	if got.PrivateKey != private || got.PublicKey != private.PublicKey() || got.ListenPort != port || len(got.Peers) != 1 {
		t.Fatalf("read %+v", got)
	}
	p := got.Peers[0]
	if p.PublicKey != other.PublicKey() || p.PresharedKey != psk || p.PersistentKeepaliveInterval != keepalive ||
		p.Endpoint.String() != "[2001:db8::1]:51820" || !p.LastHandshakeTime.IsZero() || !sameNets(p.AllowedIPs, everything) {
		t.Errorf("read %+v", p)
	}
	// An update does not create a missing peer, and a removal removes one.
	stranger, _ := wgtypes.GenerateKey()
	if err := u.configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{
		{PublicKey: stranger, UpdateOnly: true}, {PublicKey: other.PublicKey(), Remove: true},
	}}); err != nil {
		t.Fatal(err)
	}
	if got, err := u.read(); err != nil || len(got.Peers) != 0 {
		t.Errorf("read %+v, %v", got, err)
	}
}

func TestParseDevice(t *testing.T) {
	const key = "0101010101010101010101010101010101010101010101010101010101010101"
	d, err := parseDevice("future=1\npublic_key=" + key + "\nlast_handshake_time_sec=7\nlast_handshake_time_nsec=9\nfuture=1\npublic_key=" + key + "\nlast_handshake_time_sec=0\n")
	if err != nil || len(d.Peers) != 2 || !d.Peers[0].LastHandshakeTime.Equal(time.Unix(7, 9)) || !reflect.DeepEqual(d.Peers[1], wgtypes.Peer{PublicKey: d.Peers[0].PublicKey}) {
		t.Errorf("got %+v, %v", d, err)
	}
	for _, text := range []string{
		"private_key=c0ffee", "private_key=" + key + "00", "listen_port=x", "public_key=", "public_key=" + key + "\nendpoint=1.2.3.4",
		"public_key=" + key + "\nallowed_ip=0.0.0.0", "public_key=" + key + "\nlast_handshake_time_sec=-", "public_key=" + key + "\npreshared_key=zz",
	} {
		if _, err := parseDevice(text); err == nil || strings.Contains(err.Error(), "c0ffee") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

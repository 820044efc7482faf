package wireguard

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// The embedded device is read and written in WireGuard's cross-platform configuration protocol
// (https://www.wireguard.com/xplatform/). Lines with other keys than these are skipped.

// parseDevice parses the text form of a device.
func parseDevice(text string) (*wgtypes.Device, error) {
	d := &wgtypes.Device{Type: wgtypes.Userspace}
	var p *wgtypes.Peer // the peer that the lines describe; nil: they describe the device
	var sec, nsec int64
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		var err error
		switch {
		case key == "public_key":
			d.Peers = append(d.Peers, wgtypes.Peer{})
			p, sec, nsec = &d.Peers[len(d.Peers)-1], 0, 0
			p.PublicKey, err = unhex(value)
		case key == "private_key":
			d.PrivateKey, err = unhex(value)
			d.PublicKey = d.PrivateKey.PublicKey()
		case key == "listen_port":
			d.ListenPort, err = strconv.Atoi(value)
		case p == nil:
		case key == "preshared_key":
			p.PresharedKey, err = unhex(value)
		case key == "endpoint":
			var e netip.AddrPort
			e, err = netip.ParseAddrPort(value)
			p.Endpoint = net.UDPAddrFromAddrPort(e)
		case key == "last_handshake_time_sec":
			sec, err = strconv.ParseInt(value, 10, 64)
		case key == "last_handshake_time_nsec":
			nsec, err = strconv.ParseInt(value, 10, 64)
		case key == "persistent_keepalive_interval":
			var n int
			n, err = strconv.Atoi(value)
			p.PersistentKeepaliveInterval = time.Duration(n) * time.Second
		case key == "allowed_ip":
			var n *net.IPNet
			if _, n, err = net.ParseCIDR(value); err == nil {
				p.AllowedIPs = append(p.AllowedIPs, *n)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("parsing %s: %w", key, err) // the value may be a key
		}
		if p != nil && (sec != 0 || nsec != 0) {
			p.LastHandshakeTime = time.Unix(sec, nsec)
		}
	}
	return d, nil
}

// unhex does not repeat the text in its error, because it may be a private key.
func unhex(s string) (k wgtypes.Key, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != wgtypes.KeyLen {
		return k, errors.New("not a key of 32 bytes in hex")
	}
	return wgtypes.Key(b), nil
}

// formatConfig returns the text that makes the changes in c, which compile has returned.
func formatConfig(c wgtypes.Config) string {
	var b strings.Builder
	if c.PrivateKey != nil {
		fmt.Fprintf(&b, "private_key=%x\n", c.PrivateKey[:])
	}
	if c.ListenPort != nil {
		fmt.Fprintf(&b, "listen_port=%d\n", *c.ListenPort)
	}
	for _, p := range c.Peers {
		fmt.Fprintf(&b, "public_key=%x\n", p.PublicKey[:])
		if p.Remove {
			b.WriteString("remove=true\n")
		}
		if p.UpdateOnly {
			b.WriteString("update_only=true\n")
		}
		if p.PresharedKey != nil {
			fmt.Fprintf(&b, "preshared_key=%x\n", p.PresharedKey[:])
		}
		if p.Endpoint != nil {
			fmt.Fprintf(&b, "endpoint=%s\n", p.Endpoint)
		}
		if p.PersistentKeepaliveInterval != nil {
			fmt.Fprintf(&b, "persistent_keepalive_interval=%d\n", *p.PersistentKeepaliveInterval/time.Second)
		}
		if p.ReplaceAllowedIPs {
			b.WriteString("replace_allowed_ips=true\n")
		}
		for _, n := range p.AllowedIPs {
			fmt.Fprintf(&b, "allowed_ip=%s\n", n.String())
		}
	}
	return b.String()
}

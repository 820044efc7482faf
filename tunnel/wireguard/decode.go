package wireguard

import (
	"fmt"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/tunnel"
)

const algorithms = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"

// decode returns the state that the kernel or the embedded device shows. Since and TimesUp, which
// need the previous state, are set by history.
func decode(l link.Link, dev *wgtypes.Device, now time.Time) tunnel.State {
	s := tunnel.State{
		Name:      strings.TrimPrefix(l.Alias, tunnel.Mark),
		Kind:      tunnel.KindWireGuard,
		Interface: l.Name,
		Status:    tunnel.Unknown,
		RxBytes:   l.RxBytes, TxBytes: l.TxBytes,
		RxPackets: l.RxPackets, TxPackets: l.TxPackets,
	}
	if dev == nil {
		return s
	}
	if len(dev.Peers) != 1 {
		s.Status = tunnel.Down
		s.LastError = "no peer is configured"
		return s
	}
	p := dev.Peers[0]
	s.Remote = endpoint(p.Endpoint)
	s.Device = tunnel.Device{
		PublicKey: dev.PublicKey, PeerPublicKey: p.PublicKey, Preshared: p.PresharedKey != wgtypes.Key{},
		Port: uint16(dev.ListenPort), Embedded: l.Kind == link.TUN, Keepalive: p.PersistentKeepaliveInterval,
	}
	s.Keyed = p.LastHandshakeTime
	switch age := now.Sub(p.LastHandshakeTime); {
	case !p.LastHandshakeTime.IsZero() && age < stale && l.Up:
		s.Status = tunnel.Up
		s.Algorithms = algorithms
	case !l.Up:
		s.Status = tunnel.Down
		s.LastError = "the interface is down"
	case !s.Remote.IsValid():
		s.Status = tunnel.Down
		s.LastError = "waiting for the peer to connect: its endpoint is not known"
		s.Failure.Reason = tunnel.NoEndpoint
	case p.LastHandshakeTime.IsZero():
		s.Status = tunnel.Connecting
		s.LastError = fmt.Sprintf("no handshake yet: no answer from %s", s.Remote)
		s.Failure.Reason = tunnel.NoHandshake
	default:
		s.Status = tunnel.Down
		s.LastError = fmt.Sprintf("no handshake since %s: no answer from %s",
			p.LastHandshakeTime.UTC().Format(time.RFC3339), s.Remote)
		s.Failure.Reason = tunnel.NoHandshake
	}
	return s
}

// history completes a state by the previous one, and reports whether anything but counters has
// changed.
func history(former, s tunnel.State, now time.Time) (tunnel.State, bool) {
	s.TimesUp = former.TimesUp
	s.Since = former.Since
	if s.Status != former.Status {
		s.Since = now
		if s.Status == tunnel.Up {
			s.TimesUp++
		}
	}
	if s.Failure.Reason != "" {
		s.Failure.Since = s.Since
		if s.Failure.Reason == former.Failure.Reason && !former.Failure.Since.IsZero() {
			s.Failure.Since = former.Failure.Since
		}
	}
	changed := s.Status != former.Status || s.Remote != former.Remote || s.LastError != former.LastError ||
		s.Keyed != former.Keyed || s.Interface != former.Interface || s.Device != former.Device
	return s, changed
}

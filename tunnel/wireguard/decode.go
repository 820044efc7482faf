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
func decode(link link.Link, dev *wgtypes.Device, now time.Time) tunnel.State {
	s := tunnel.State{
		Name:      strings.TrimPrefix(link.Alias, tunnel.Mark),
		Kind:      tunnel.KindWireGuard,
		Interface: link.Name,
		Status:    tunnel.Unknown,
		RxBytes:   link.RxBytes, TxBytes: link.TxBytes,
		RxPackets: link.RxPackets, TxPackets: link.TxPackets,
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
	s.Keyed = p.LastHandshakeTime
	switch age := now.Sub(p.LastHandshakeTime); {
	case !p.LastHandshakeTime.IsZero() && age < stale && link.Up:
		s.Status = tunnel.Up
		s.Algorithms = algorithms
	case !link.Up:
		s.Status = tunnel.Down
		s.LastError = "the interface is down"
	case !s.Remote.IsValid():
		s.Status = tunnel.Down
		s.LastError = "waiting for the peer to connect: its endpoint is not known"
	case p.LastHandshakeTime.IsZero():
		s.Status = tunnel.Connecting
		s.LastError = fmt.Sprintf("no handshake yet: no answer from %s", s.Remote)
	default:
		s.Status = tunnel.Down
		s.LastError = fmt.Sprintf("no handshake since %s: no answer from %s",
			p.LastHandshakeTime.UTC().Format(time.RFC3339), s.Remote)
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
	if s.LastError == "" {
		s.LastError = former.LastError // the reason why it was last down
	}
	changed := s.Status != former.Status || s.Remote != former.Remote || s.LastError != former.LastError ||
		s.Keyed != former.Keyed || s.Interface != former.Interface
	return s, changed
}

package wireguard

import (
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// userspace is an embedded WireGuard device on a TUN interface. It is part of this process and
// ends with it. It has no control socket: these are in one directory for all network namespaces of
// a machine, and wgctrl and wg(8) could not distinguish two devices with the same name.
type userspace struct {
	tunnel   string
	dev      *device.Device
	stranger atomic.Pointer[stranger] // nil: none has called
}

// stranger is a caller whose handshakes the device drops.
type stranger struct {
	address  netip.AddrPort // invalid: the device does not say
	at       time.Time
	otherKey bool
}

// Formats of the device's log. It reports dropped handshakes there alone.
const (
	unknownKey = "Received invalid initiation message from %s" // the sender's key is not the peer's
	// The message authentication code is made from the receiver's public key (WireGuard paper,
	// section 5.4.4).
	otherKey = "Received packet with invalid mac1"
)

// note stores the newest handshake that the device drops.
func (u *userspace) note(format string, args ...any) {
	s := &stranger{at: time.Now(), otherKey: format == otherKey}
	switch {
	case format == unknownKey && len(args) == 1:
		s.address, _ = netip.ParseAddrPort(fmt.Sprint(args[0]))
	case !s.otherKey:
		return
	}
	u.stranger.Store(s)
}

// newUserspace creates the TUN interface and a device without key and peer.
func newUserspace(name string, mtu int, log *slog.Logger) (*userspace, error) {
	t, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return nil, fmt.Errorf("creating the TUN device: %w", err)
	}
	u := &userspace{}
	logger := &device.Logger{
		Verbosef: u.note,
		Errorf: func(format string, args ...any) {
			log.Warn("wireguard: "+fmt.Sprintf(format, args...), "interface", name)
		},
	}
	u.dev = device.NewDevice(t, conn.NewDefaultBind(), logger)
	return u, nil
}

// read returns the device's state.
func (u *userspace) read() (*wgtypes.Device, error) {
	text, err := u.dev.IpcGet()
	if err != nil {
		return nil, err
	}
	return parseDevice(text)
}

// configure makes the changes in c.
func (u *userspace) configure(c wgtypes.Config) error {
	err := u.dev.IpcSet(formatConfig(c))
	if err != nil {
		_ = u.dev.Down() // it may be up without a socket, and would not open one again
	}
	return err
}

// up begins to listen on a port, unless the device already does; 0 leaves the choice to the
// device. A device also begins to listen by itself, shortly after its interface is up. If it
// cannot, it reports no error, and loses its port.
func (u *userspace) up(port int) error {
	if err := u.dev.Up(); err != nil {
		return err
	}
	have, err := u.read()
	if err != nil || port == 0 || have.ListenPort == port {
		return err
	}
	return u.configure(wgtypes.Config{ListenPort: &port})
}

func (u *userspace) alive() bool {
	select {
	case <-u.dev.Wait():
		return false
	default:
		return true
	}
}

// close ends the device, which removes its interface.
func (u *userspace) close() {
	u.dev.Close()
}

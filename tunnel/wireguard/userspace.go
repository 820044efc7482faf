package wireguard

import (
	"fmt"
	"log/slog"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// userspace is an embedded WireGuard device on a TUN interface. It lives in this process and ends with it. It has no
// control socket: those lie in one directory for all network namespaces of a machine, and two devices of the same name
// would be one to wgctrl and wg(8).
type userspace struct {
	tunnel string
	dev    *device.Device
}

// newUserspace makes the TUN interface, with a device that has neither key nor peer.
func newUserspace(name string, mtu int, log *slog.Logger) (*userspace, error) {
	t, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return nil, fmt.Errorf("creating the TUN device: %w", err)
	}
	logger := &device.Logger{
		Verbosef: device.DiscardLogf,
		Errorf: func(format string, args ...any) {
			log.Warn("wireguard: "+fmt.Sprintf(format, args...), "interface", name)
		},
	}
	return &userspace{dev: device.NewDevice(t, conn.NewDefaultBind(), logger)}, nil
}

// read returns what the device has.
func (u *userspace) read() (*wgtypes.Device, error) {
	text, err := u.dev.IpcGet()
	if err != nil {
		return nil, err
	}
	return parseDevice(text)
}

// configure changes what is set in c.
func (u *userspace) configure(c wgtypes.Config) error {
	err := u.dev.IpcSet(formatConfig(c))
	if err != nil {
		_ = u.dev.Down() // it may be up without a socket, and would not be given one again
	}
	return err
}

// up begins to listen at a port, unless the device does already; 0 leaves it the choice. A device also begins by itself, a
// little after its interface is up. When it cannot then, it does not tell, and forgets its port.
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

// close ends the device and its interface.
func (u *userspace) close() {
	u.dev.Close()
}

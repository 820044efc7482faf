package wireguard

import (
	"fmt"
	"log/slog"
	"net"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
	"golang.zx2c4.com/wireguard/tun"
)

// maxUserspace bounds the number of embedded devices: one under load was measured at 210 to 310 MB, since its buffer
// pools are unbounded on Linux.
const maxUserspace = 16

// userspace is an embedded WireGuard device on a TUN interface. It lives in this process and ends with it.
type userspace struct {
	tunnel string
	dev    *device.Device
	uapi   net.Listener
}

// newUserspace makes the TUN interface and serves the cross-platform interface of WireGuard for it below
// /var/run/wireguard, so that wgctrl and wg(8) find it as they find a kernel device.
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
	d := device.NewDevice(t, conn.NewDefaultBind(), logger)
	file, err := ipc.UAPIOpen(name)
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("opening the control socket: %w", err)
	}
	l, err := ipc.UAPIListen(name, file)
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("listening on the control socket: %w", err)
	}
	u := &userspace{dev: d, uapi: l}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go d.IpcHandle(c)
		}
	}()
	return u, nil
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
	u.uapi.Close()
	u.dev.Close()
}

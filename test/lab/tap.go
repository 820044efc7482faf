package lab

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Tap makes a tap device in the node, which is up, and a port of the bridge. Packets that are
// written to the file appear there as if they came by the wire, and the device is gone when all
// processes that have the file have closed it. Packets have a virtio-net header, as QEMU's -netdev
// tap,fd= takes them.
func (n *Node) Tap(ctx context.Context, name, bridge string) (*os.File, error) {
	fail := func(err error) (*os.File, error) {
		return nil, fmt.Errorf("making tap device %s in node %s: %w", name, n.Name, err)
	}
	r, err := unix.NewIfreq(name)
	if err != nil {
		return fail(err)
	}
	r.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	var fd int
	if err := n.Do(func() (err error) {
		fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		return err
	}); err != nil {
		return fail(err)
	}
	// Only now a descriptor that can be polled.
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
		unix.Close(fd)
		return fail(err)
	}
	f := os.NewFile(uintptr(fd), name)
	if err := ipBatch(ctx, n.Namespace, []string{fmt.Sprintf("link set %s master %s up", name, bridge)}); err != nil {
		f.Close()
		return fail(err)
	}
	return f, nil
}

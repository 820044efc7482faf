package host

import "golang.org/x/sys/unix"

// MTU returns the MTU of an interface in bytes, 0 if the machine does not have the interface
// (SIOCGIFMTU, netdevice(7)).
func (m *Machine) MTU(iface string) int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq(iface)
	if err != nil || unix.IoctlIfreq(fd, unix.SIOCGIFMTU, request) != nil {
		return 0
	}
	return int(request.Uint32())
}

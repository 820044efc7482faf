package ipsec

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// natPort is where ESP in UDP arrives (RFC 3948).
const natPort = 4500

// encap stands in for charon's sockets while charon is away. The kernel takes ESP out of UDP only on a port that a
// socket with UDP_ENCAP is bound to, and that socket dies with charon: without a stand-in, the tunnels of a node behind
// NAT are deaf until charon is back, although their states are still in the kernel.
//
// Of several sockets with SO_REUSEADDR on a port the kernel gives a packet to the one that was bound last. The stand-in
// is bound when charon has gone, so a new charon takes the port over as soon as it binds it, and IKE goes there.
type encap struct{ fds []int }

// hold binds the port, if that is not done yet.
func (e *encap) hold() error {
	if len(e.fds) > 0 {
		return nil
	}
	var errs []error
	for _, sa := range []unix.Sockaddr{&unix.SockaddrInet4{Port: natPort}, &unix.SockaddrInet6{Port: natPort}} {
		fd, err := bindEncap(sa)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue // no IPv6
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		e.fds = append(e.fds, fd)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("binding UDP port %d while charon is away: %w", natPort, err)
	}
	return nil
}

func bindEncap(sa unix.Sockaddr) (fd int, err error) {
	family := unix.AF_INET
	if _, ok := sa.(*unix.SockaddrInet6); ok {
		family = unix.AF_INET6
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	set := func(level, option, value int) {
		if err == nil {
			err = unix.SetsockoptInt(fd, level, option, value)
		}
	}
	if family == unix.AF_INET6 {
		set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	set(unix.SOL_SOCKET, unix.SO_RCVBUF, 1) // what is not ESP is IKE, which nobody reads here
	set(unix.IPPROTO_UDP, unix.UDP_ENCAP, unix.UDP_ENCAP_ESPINUDP)
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// release gives the port back.
func (e *encap) release() {
	for _, fd := range e.fds {
		unix.Close(fd)
	}
	e.fds = nil
}

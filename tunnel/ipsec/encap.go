package ipsec

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// encap replaces charon's sockets while charon is away. The kernel decapsulates ESP in UDP (RFC
// 3948) only at a port with a socket that has UDP_ENCAP, and charon's socket disappears with
// charon. Without a replacement, the tunnels of a node behind NAT receive nothing until charon is
// back, although their states are still in the kernel.
//
// charon does not share its port, not even with a socket that was there before it. Therefore the
// replacement has another port, to which ESP is diverted. IKE reaches the next charon as soon as
// it listens.
type encap struct {
	divert func(port uint16) error // 0 ends the diversion; nil: no replacement is made
	fds    []int
	clean  bool // nothing is diverted, not even by a former process
}

// begin opens the sockets and starts the diversion, unless that is already done.
func (e *encap) begin() error {
	if e.divert == nil || len(e.fds) > 0 {
		return nil
	}
	e.clean = false
	port := 0
	for _, sa := range []unix.Sockaddr{&unix.SockaddrInet4{}, &unix.SockaddrInet6{}} {
		fd, bound, err := bindEncap(sa, port)
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue // no IPv6
		}
		if err != nil {
			e.end()
			return fmt.Errorf("replacing charon's socket: %w", err)
		}
		e.fds, port = append(e.fds, fd), bound
	}
	if err := e.divert(uint16(port)); err != nil {
		e.end()
		return fmt.Errorf("replacing charon's socket: %w", err)
	}
	return nil
}

// bindEncap opens a socket at which the kernel decapsulates ESP in UDP, at a free port when port
// is 0.
func bindEncap(sa unix.Sockaddr, port int) (fd, bound int, err error) {
	family := unix.AF_INET
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		sa.Port = port
	case *unix.SockaddrInet6:
		family, sa.Port = unix.AF_INET6, port
	}
	fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, 0, err
	}
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_ENCAP, unix.UDP_ENCAP_ESPINUDP)
	}
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err == nil {
		sa, err = unix.Getsockname(fd)
	}
	if err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		bound = sa.Port
	case *unix.SockaddrInet6:
		bound = sa.Port
	}
	return fd, bound, nil
}

// end ends the diversion, and closes the sockets.
func (e *encap) end() {
	if e.divert == nil || e.clean {
		return
	}
	// If this fails, the diversion expires a few seconds later.
	e.clean = e.divert(0) == nil
	for _, fd := range e.fds {
		unix.Close(fd)
	}
	e.fds = nil
}

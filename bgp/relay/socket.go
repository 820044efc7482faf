package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// dialTimeout is how long the peer may take to answer.
const dialTimeout = 4 * time.Second

func network(a netip.Addr) string {
	if a.Is4() {
		return "tcp4"
	}
	return "tcp6"
}

// listen opens a listening socket on an address that need not exist yet.
func listen(ctx context.Context, at endpoint, port int) (*net.TCPListener, error) {
	c := net.ListenConfig{KeepAlive: -1, Control: control(func(fd int) error {
		if at.local.Is4() {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_FREEBIND, 1); err != nil {
				return fmt.Errorf("setting IP_FREEBIND: %w", err)
			}
		} else if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_FREEBIND, 1); err != nil {
			return fmt.Errorf("setting IPV6_FREEBIND: %w", err)
		}
		return bindToDevice(fd, at.iface)
	})}
	c.SetMultipathTCP(false) // TCP-MD5 does not work with MPTCP
	l, err := c.Listen(ctx, network(at.local), netip.AddrPortFrom(at.local, uint16(port)).String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// dialPeer opens a connection to a peer.
func dialPeer(ctx context.Context, p *Peer, port int) (*net.TCPConn, error) {
	d := net.Dialer{
		Timeout:   dialTimeout,
		KeepAlive: -1,
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.Local, 0)),
		Control: control(func(fd int) error {
			if err := bindToDevice(fd, p.Interface); err != nil {
				return err
			}
			if err := setTTL(fd, p); err != nil {
				return err
			}
			if len(p.Key) == 0 {
				return nil
			}
			return md5(fd, p.Address, p.Key)
		}),
	}
	d.SetMultipathTCP(false)
	conn, err := d.DialContext(ctx, network(p.Address), netip.AddrPortFrom(p.Address, uint16(port)).String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

func control(f func(fd int) error) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error { return onSocket(c, f) }
}

func onSocket(c syscall.RawConn, f func(fd int) error) error {
	var inner error
	err := c.Control(func(fd uintptr) { inner = f(int(fd)) })
	return errors.Join(err, inner)
}

func bindToDevice(fd int, iface string) error {
	if iface == "" {
		return nil
	}
	if err := unix.BindToDevice(fd, iface); err != nil {
		return fmt.Errorf("binding to interface %s: %w", iface, err)
	}
	return nil
}

func setTTL(fd int, p *Peer) error {
	if p.TTL == 0 {
		return nil
	}
	level, option := unix.IPPROTO_IP, unix.IP_TTL
	if !p.Address.Is4() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS
	}
	if err := unix.SetsockoptInt(fd, level, option, int(p.TTL)); err != nil {
		return fmt.Errorf("setting the time to live: %w", err)
	}
	return nil
}

// md5 sets the key of a peer (RFC 2385), or removes it when key is empty.
func md5(fd int, peer netip.Addr, key []byte) error {
	var sig unix.TCPMD5Sig
	if len(key) > len(sig.Key) {
		return fmt.Errorf("setting a TCP MD5 key: it has %d bytes, at most %d are allowed", len(key), len(sig.Key))
	}
	if peer.Is4() {
		sig.Addr.Family = unix.AF_INET
		a := peer.As4()
		copy(sig.Addr.Data[2:], a[:]) // after the port
	} else {
		sig.Addr.Family = unix.AF_INET6
		a := peer.As16()
		copy(sig.Addr.Data[6:], a[:]) // after the port and the flow label
	}
	sig.Keylen = uint16(copy(sig.Key[:], key))
	err := unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &sig)
	if err != nil && !(len(key) == 0 && errors.Is(err, unix.ENOENT)) {
		return fmt.Errorf("setting a TCP MD5 key: %w", err)
	}
	return nil
}

func setKey(l *net.TCPListener, peer netip.Addr, key []byte) error {
	c, err := l.SyscallConn()
	if err != nil {
		return err
	}
	return onSocket(c, func(fd int) error { return md5(fd, peer, key) })
}

// interfaceIndex returns the index of an interface, or 0 without a name.
func interfaceIndex(name string) (int, error) {
	if name == "" {
		return 0, nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("reading the index of interface %s: %w", name, err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("reading the index of interface %s: %w", name, err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0, fmt.Errorf("reading the index of interface %s: %w", name, err)
	}
	return int(req.Uint32()), nil
}

// abort closes a connection with a reset, so that nothing of it remains.
func abort(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

// connected reports whether the other side may still send.
func connected(conn *net.TCPConn) bool {
	c, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	open := false
	err = c.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		open = n > 0 || errors.Is(err, unix.EAGAIN)
	})
	return err == nil && open
}

package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
)

// canaryAlias marks the interface of the canary. It has another prefix than the aliases of tunnels,
// whose drivers remove unknown interfaces.
const canaryAlias = "isthmus canary"

// canaryInside is the other end of fib.Canary.
const canaryInside = "canary"

// The link addresses of both ends. They are fixed, because udev replaces addresses that the kernel
// chose, and because each end has a permanent neighbour entry for the other: neither uses ARP or
// ND.
var (
	canaryNear = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	canaryFar  = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

// Canary makes a host with the address from in a separate network namespace, behind the interface
// fib.Canary, with a route to it. The host reaches one address, to. mtu is in bytes; 0: the
// kernel's default. There is only one such host at a time: Canary removes an earlier one. dial
// connects from the host to a TCP port of to. remove deletes everything, after which dial fails; it
// may be called again.
//
// The namespace has no name. It ends with the process, and the interface with it.
func (l *Links) Canary(from, to netip.Addr, mtu int) (dial func(ctx context.Context, port uint16) (net.Conn, error), remove func() error, err error) {
	if err := l.RemoveCanary(); err != nil {
		return nil, nil, err
	}
	n, err := newNamespace()
	if err != nil {
		return nil, nil, fmt.Errorf("making a network namespace: %w", err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	removed := false
	remove = func() error {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			c.Close() // before the interface goes, so that the peer receives the RST
		}
		conns, removed = nil, true
		n.end()
		return l.RemoveCanary()
	}
	if err := l.makeCanary(n, from, to, mtu); err != nil {
		return nil, nil, fmt.Errorf("making interface %s: %w", fib.Canary, errors.Join(err, remove()))
	}
	network := "tcp6"
	if from.Is4() {
		network = "tcp4"
	}
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	dial = func(ctx context.Context, port uint16) (conn net.Conn, err error) {
		ended := n.do(func() {
			// DialContext connects to a single address on the calling goroutine, and so on this
			// thread.
			conn, err = dialer.DialContext(ctx, network, netip.AddrPortFrom(to, port).String())
		})
		if err = errors.Join(err, ended); err != nil {
			return nil, err
		}
		if c, ok := conn.(*net.TCPConn); ok {
			_ = c.SetLinger(0) // a connection in a closing state would keep the namespace
		}
		mu.Lock()
		defer mu.Unlock()
		if removed {
			conn.Close()
			return nil, net.ErrClosed
		}
		conns = append(conns, conn)
		return conn, nil
	}
	return dial, remove, nil
}

// makeCanary makes both ends. The near end has no address, so that it does not make the node
// reachable.
func (l *Links) makeCanary(n *namespace, from, to netip.Addr, mtu int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = fib.Canary, mtu, canaryNear
	err := l.write(l.h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: canaryInside, PeerHardwareAddr: canaryFar, PeerNamespace: netlink.NsFd(n.fd)}))
	if errors.Is(err, unix.EEXIST) {
		return ErrNotOurs
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("kind veth: %w", ErrNoKind)
	}
	if err != nil {
		return err
	}
	near, err := l.Get(fib.Canary)
	if err != nil {
		return err
	}
	if err := l.write(l.h.LinkSetAlias(near.raw, canaryAlias)); err != nil {
		_ = l.delete(near) // without its mark, nothing else would remove it
		return fmt.Errorf("setting the alias: %w", err)
	}
	const none = 1 // IN6_ADDR_GEN_MODE_NONE
	// an error means that IPv6 is off, which is as good
	_ = l.write(l.h.LinkSetIP6AddrGenMode(near.raw, none))
	if err := l.write(l.h.LinkSetUp(near.raw)); err != nil {
		return fmt.Errorf("setting it up: %w", err)
	}
	if err := l.write(l.neighbour(near.Index, from, canaryFar)); err != nil {
		return err
	}

	var inside error
	if err := n.do(func() { inside = makeCanaryInside(from, to) }); err != nil {
		return err
	}
	if inside != nil {
		return inside
	}
	// Last, so that packets to the address do not arrive before the host can receive them.
	if err := l.write(l.linkRoute(near.Index, netip.PrefixFrom(from, from.BitLen()))); err != nil {
		return fmt.Errorf("adding the route to %s: %w", from, err)
	}
	return nil
}

// makeCanaryInside makes the other end, in the namespace of the calling thread.
func makeCanaryInside(from, to netip.Addr) error {
	in, err := Open()
	if err != nil {
		return err
	}
	defer in.Close()
	for _, name := range []string{"lo", canaryInside} {
		link, err := in.Get(name)
		if err != nil {
			return err
		}
		if err := in.h.LinkSetUp(link.raw); err != nil {
			return fmt.Errorf("setting %s up: %w", name, err)
		}
	}
	far, err := in.Get(canaryInside)
	if err != nil {
		return err
	}
	if err := in.changeAddress(unix.RTM_NEWADDR, far.Index, Address{Local: netip.PrefixFrom(from, from.BitLen())}); err != nil {
		return fmt.Errorf("adding address %s: %w", from, err)
	}
	everything := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if from.Is6() {
		everything = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if err := in.linkRoute(far.Index, everything); err != nil {
		return fmt.Errorf("adding a route: %w", err)
	}
	return in.neighbour(far.Index, to, canaryNear)
}

// linkRoute adds a route without a gateway. It does not have isthmus's protocol, because the
// forwarding table would remove it.
func (l *Links) linkRoute(index int, to netip.Prefix) error {
	r := &netlink.Route{LinkIndex: index, Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), to.Addr().BitLen())}, Protocol: unix.RTPROT_STATIC}
	if to.Addr().Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	return l.h.RouteAdd(r)
}

// neighbour adds a permanent neighbour entry.
func (l *Links) neighbour(index int, a netip.Addr, at net.HardwareAddr) error {
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	err := l.h.NeighSet(&netlink.Neigh{LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: at})
	if err != nil {
		return fmt.Errorf("setting the link address of %s: %w", a, err)
	}
	return nil
}

// RemoveCanary removes the interface of the canary, with its routes. A missing or foreign interface
// is not an error.
func (l *Links) RemoveCanary() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	link, err := l.Get(fib.Canary)
	if errors.Is(err, ErrNotFound) || err == nil && !isCanary(link.raw) {
		return nil
	}
	if err == nil {
		err = l.delete(link)
	}
	if err != nil {
		return fmt.Errorf("removing interface %s: %w", fib.Canary, err)
	}
	return nil
}

func isCanary(raw netlink.Link) bool {
	return raw.Attrs().Name == fib.Canary && raw.Attrs().Alias == canaryAlias
}

// namespace is a network namespace, held by a thread of this process.
type namespace struct {
	fd    int
	jobs  chan func()
	ended chan struct{}
	once  sync.Once
}

func newNamespace() (*namespace, error) {
	n := &namespace{jobs: make(chan func()), ended: make(chan struct{})}
	ready := make(chan error)
	go n.hold(ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return n, nil
}

// hold makes the namespace on a locked thread, which ends with the goroutine. The process's first
// thread cannot end before the process, so hold keeps it back until another goroutine has another
// thread.
func (n *namespace) hold(ready chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		found := make(chan error)
		go n.hold(found)
		err := <-found
		runtime.UnlockOSThread()
		ready <- err
		return
	}
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if ready <- err; err != nil {
		return
	}
	defer unix.Close(n.fd)
	for {
		select {
		case job := <-n.jobs:
			job()
		case <-n.ended:
			return
		}
	}
}

// do runs f in the namespace and waits for it. Sockets that f opens stay in the namespace.
func (n *namespace) do(f func()) error {
	done := make(chan struct{})
	select {
	case n.jobs <- func() { defer close(done); f() }:
		<-done
		return nil
	case <-n.ended:
		return net.ErrClosed
	}
}

// end releases the namespace. It does not wait for running functions; their callers do.
func (n *namespace) end() { n.once.Do(func() { close(n.ended) }) }

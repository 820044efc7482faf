// Package kernel writes routes and nexthop objects to Linux over route netlink, in batches, and
// reads them back.
//
// It needs net.ipv4.nexthop_compat_mode=0 to be fast: with the default of 1, the kernel notifies
// about every route of a group that is replaced.
package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/fib"
	"github.com/isthmus-net/isthmus/router/netlink"
	"github.com/isthmus-net/isthmus/router/sockfilter"
)

const (
	// batch is the number of messages in one sendmsg. More than a hundred gain nothing. The buffer
	// for more than this may fail to allocate in the kernel.
	batch = 512
	// sndbuf and rcvbuf are socket buffers in bytes.
	sndbuf = 1 << 20
	rcvbuf = 8 << 20
	// patience is how long the kernel may take to answer. It has taken seconds under memory
	// pressure.
	patience = 30 * time.Second
	// dumps bounds the attempts of a dump that changes interrupt (NLM_F_DUMP_INTR).
	dumps = 20
)

// Driver is a fib.Driver for the network namespace in which it was made.
type Driver struct {
	fd     int
	portID uint32
	seq    uint32
	out    []byte
	in     []byte
	watch  *os.File
	writes atomic.Uint64
}

var _ fib.Driver = (*Driver)(nil)

// New opens the sockets of a Driver. It needs CAP_NET_ADMIN.
func New() (*Driver, error) {
	d := &Driver{seq: 1, in: make([]byte, 1<<18)}
	var err error
	if d.fd, err = socket(0); err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	self, err := unix.Getsockname(d.fd)
	if err == nil {
		d.portID = self.(*unix.SockaddrNetlink).Pid
		err = d.openWatch()
	}
	if err != nil {
		unix.Close(d.fd)
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return d, nil
}

// Close closes the sockets. Routes and nexthop objects stay in the kernel.
func (d *Driver) Close() error {
	return errors.Join(unix.Close(d.fd), d.watch.Close())
}

func socket(flags int) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, err
	}
	patience := unix.NsecToTimeval(patience.Nanoseconds())
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sndbuf),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, rcvbuf),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
	)
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// openWatch opens a socket that receives changes of links, and changes of our routes and nexthop
// objects by others, including the kernel. A socket filter drops the rest, so that our own writes
// wake no listener and cannot overrun the buffer.
func (d *Driver) openWatch() error {
	fd, err := socket(unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	err = sockfilter.Attach(fd, watchFilter(d.portID))
	for _, group := range []int{unix.RTNLGRP_LINK, unix.RTNLGRP_NEXTHOP, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE} {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group))
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	d.watch = os.NewFile(uintptr(fd), "netlink")
	return nil
}

// watchFilter returns a socket filter. It passes links, routes and nexthop objects with our
// protocol that others changed, and routes that replaced another route, which may have been ours.
func watchFilter(self uint32) sockfilter.Program {
	// The filter loads values in network byte order. Netlink has them in host byte order.
	swap16 := func(v uint16) uint32 { return uint32(binary.BigEndian.Uint16(native.AppendUint16(nil, v))) }
	swap32 := func(v uint32) uint32 { return binary.BigEndian.Uint32(native.AppendUint32(nil, v)) }
	kind := bpf.LoadAbsolute{Off: 4, Size: 2} // nlmsg_type
	ours := func(at uint32) (p sockfilter.Program) {
		p.Add(bpf.LoadAbsolute{Off: unix.SizeofNlMsghdr + at, Size: 1})
		p.If(bpf.JumpEqual, fib.Protocol, sockfilter.Pass)
		p.Add(sockfilter.Drop)
		return p
	}
	var p sockfilter.Program
	p.Add(kind)
	p.If(bpf.JumpEqual, swap16(unix.RTM_NEWLINK), sockfilter.Pass)
	p.If(bpf.JumpEqual, swap16(unix.RTM_DELLINK), sockfilter.Pass)
	p.Add(bpf.LoadAbsolute{Off: 12, Size: 4}) // nlmsg_pid
	p.If(bpf.JumpEqual, swap32(self), sockfilter.Drop)
	p.Add(kind)
	p.If(bpf.JumpEqual, swap16(unix.RTM_NEWNEXTHOP), ours(2)...) // nh_protocol
	p.If(bpf.JumpEqual, swap16(unix.RTM_DELNEXTHOP), ours(2)...)
	p.Add(bpf.LoadAbsolute{Off: 6, Size: 2}) // nlmsg_flags of a route
	p.If(bpf.JumpBitsSet, swap16(unix.NLM_F_REPLACE), sockfilter.Pass)
	p.Add(ours(5)...) // rtm_protocol
	return p
}

// Writes returns the number of changes sent to the kernel.
func (d *Driver) Writes() uint64 { return d.writes.Load() }

// Execute makes changes in order. See fib.Driver.
func (d *Driver) Execute(ctx context.Context, ops []fib.Op) []error {
	var errs []error
	for done := 0; done < len(ops); {
		chunk := ops[done:min(done+batch, len(ops))]
		failed := d.send(ctx, chunk)
		if failed != nil && errs == nil {
			errs = make([]error, len(ops))
		}
		for i, err := range failed {
			if err != nil {
				errs[done+i] = fmt.Errorf("%s: %w", describe(chunk[i]), err)
			}
		}
		done += len(chunk)
	}
	return errs
}

// send sends one batch. Only its last message requests an acknowledgement, because the kernel
// reports every failure anyway.
func (d *Driver) send(ctx context.Context, ops []fib.Op) []error {
	all := func(err error) []error {
		errs := make([]error, len(ops))
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	if ctx.Err() != nil {
		return all(ctx.Err())
	}
	first := d.seq
	d.seq += uint32(len(ops))
	d.out = d.out[:0]
	for i, op := range ops {
		var flags uint16
		if i == len(ops)-1 {
			flags = unix.NLM_F_ACK
		}
		var err error
		if d.out, err = compile(d.out, op, first+uint32(i), flags); err != nil {
			return all(err)
		}
	}
	d.writes.Add(uint64(len(ops)))
	if err := unix.Sendto(d.fd, d.out, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return all(err)
	}
	var errs []error
	for {
		ms, err := d.receive()
		if err != nil {
			// The caller reads the state to learn which changes were made.
			return all(fmt.Errorf("waiting for the kernel's answer: %w", err))
		}
		for _, m := range ms {
			i := m.Sequence - first
			if m.Kind != unix.NLMSG_ERROR || i >= uint32(len(ops)) {
				continue // an answer to a former batch
			}
			if err := decodeError(m); err != nil {
				if errs == nil {
					errs = make([]error, len(ops))
				}
				errs[i] = err
			}
			if i == uint32(len(ops)-1) {
				return errs
			}
		}
	}
}

// receive reads one datagram of the kernel.
func (d *Driver) receive() ([]netlink.Message, error) {
	for {
		n, from, err := unix.Recvfrom(d.fd, d.in, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if from, ok := from.(*unix.SockaddrNetlink); ok && from.Pid != 0 {
			continue // from another process, not from the kernel
		}
		return messages(d.in[:n])
	}
}

// dump requests all objects of a kind, and repeats the request when a change interrupted the
// answer.
func (d *Driver) dump(ctx context.Context, request func(seq uint32) []byte, start func(), each func(netlink.Message) error) error {
	for range dumps {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		start()
		seq := d.seq
		d.seq++
		if err := unix.Sendto(d.fd, request(seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		interrupted, err := d.answer(seq, each)
		if err != nil || !interrupted {
			return err
		}
	}
	return fmt.Errorf("interrupted %d times by changes", dumps)
}

func (d *Driver) answer(seq uint32, each func(netlink.Message) error) (interrupted bool, err error) {
	var bad error // reported after the whole answer, so that none of it stays in the socket
	for {
		ms, err := d.receive()
		if err != nil {
			return false, err
		}
		for _, m := range ms {
			if m.Sequence != seq {
				continue
			}
			interrupted = interrupted || m.Flags&unix.NLM_F_DUMP_INTR != 0
			if m.Kind == unix.NLMSG_DONE || m.Kind == unix.NLMSG_ERROR {
				return interrupted, errors.Join(bad, decodeError(m))
			}
			if err := each(m); err != nil && bad == nil {
				bad = err
			}
		}
	}
}

// Links reads the interfaces.
func (d *Driver) Links(ctx context.Context) ([]fib.Link, error) {
	var links []fib.Link
	err := d.dump(ctx, linkDump, func() { links = nil }, func(m netlink.Message) error {
		l, err := decodeLink(m)
		links = append(links, l)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading interfaces: %w", err)
	}
	return links, nil
}

// Observe reads the state. See fib.Driver.
func (d *Driver) Observe(ctx context.Context) (fib.State, error) {
	var s fib.State
	err := d.dump(ctx, nextHopDump, func() { s = fib.State{} }, func(m netlink.Message) error { return decodeNextHop(m, &s) })
	if err != nil {
		return fib.State{}, fmt.Errorf("reading nexthop objects: %w", err)
	}
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		n := len(s.Routes)
		err := d.dump(ctx, func(seq uint32) []byte { return routeDump(seq, family) }, func() { s.Routes = s.Routes[:n] }, func(m netlink.Message) error {
			r, ok, err := decodeRoute(m)
			if ok {
				s.Routes = append(s.Routes, r)
			}
			return err
		})
		// The kernel may have no IPv6.
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
			return fib.State{}, fmt.Errorf("reading routes: %w", err)
		}
	}
	if s.Links, err = d.Links(ctx); err != nil {
		return fib.State{}, err
	}
	return s, nil
}

// Watch reports changes by others until ctx is done. Only one call may run at a time.
func (d *Driver) Watch(ctx context.Context, notify func(fib.Event)) error {
	if err := d.watch.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { d.watch.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	notify(fib.LinkEvent | fib.RouteEvent)
	buffer := make([]byte, 1<<16)
	for {
		n, err := d.watch.Read(buffer)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS):
			notify(fib.LinkEvent | fib.RouteEvent)
			continue
		case err != nil:
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				continue
			}
			return fmt.Errorf("reading netlink events: %w", err)
		}
		ms, err := messages(buffer[:n])
		if err != nil {
			notify(fib.LinkEvent | fib.RouteEvent)
			continue
		}
		var events fib.Event
		for _, m := range ms {
			if m.Kind == unix.RTM_NEWLINK || m.Kind == unix.RTM_DELLINK {
				events |= fib.LinkEvent
			} else {
				events |= fib.RouteEvent
			}
		}
		notify(events)
	}
}

package conntrack

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Events hears of flows that end. Only these are subscribed to: they carry the flow's whole story, and the kernel spends nothing
// on the beginnings that nobody hears of.
type Events struct {
	fd       int
	buffer   []byte
	flow     Flow
	overruns atomic.Uint64
}

// endBuffer is the size in bytes of the buffer for one event, which has some 250.
const endBuffer = 8 << 10

// Hear subscribes to the ends of the flows in the network namespace of the calling thread. The kernel keeps events that wait
// to be read in a buffer of the given size in bytes; each takes about 1 KiB of it. What does not fit is lost, unless Keep was
// asked for. It needs CAP_NET_ADMIN.
func Hear(buffer int) (*Events, error) {
	fd, err := open(buffer)
	if err != nil {
		return nil, err
	}
	e := &Events{fd: fd, buffer: make([]byte, endBuffer)}
	err = errors.Join(unix.SetNonblock(fd, true), unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	if err == nil {
		err = e.Listen(true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("subscribing to the ends of flows: %w", err)
	}
	return e, nil
}

// Listen begins or ends the subscription. While nobody listens, the kernel makes no events.
func (e *Events) Listen(listen bool) error {
	option := unix.NETLINK_DROP_MEMBERSHIP
	if listen {
		option = unix.NETLINK_ADD_MEMBERSHIP
	}
	return unix.SetsockoptInt(e.fd, unix.SOL_NETLINK, option, unix.NFNLGRP_CONNTRACK_DESTROY)
}

// Close ends the subscription. No other method may run or be called afterwards.
func (e *Events) Close() error { return unix.Close(e.fd) }

// Keep says whether the kernel keeps a flow that has ended until its event has been taken (NETLINK_BROADCAST_ERROR), so that an
// overrun delays events and loses none. Such flows still fill the table: whoever keeps must go on reading.
func (e *Events) Keep(keep bool) error {
	v := 0
	if keep {
		v = 1
	}
	if err := unix.SetsockoptInt(e.fd, unix.SOL_NETLINK, unix.NETLINK_BROADCAST_ERROR, v); err != nil {
		return fmt.Errorf("choosing what happens to events that find no room: %w", err)
	}
	return nil
}

// Overruns counts how often the buffer was found to have been too small.
func (e *Events) Overruns() uint64 { return e.overruns.Load() }

// Read calls f with every flow that has ended and waits for nothing. f must not keep the Flow. A reader that comes
// ten times a second costs less than one that is woken for every event.
func (e *Events) Read(f func(*Flow)) error {
	for {
		n, err := unix.Read(e.fd, e.buffer)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.ENOBUFS):
			e.overruns.Add(1)
			continue
		case err != nil:
			return fmt.Errorf("reading ends of flows: %w", err)
		}
		for b := e.buffer[:n]; len(b) > 0; {
			m, rest, err := split(b)
			if err != nil {
				return fmt.Errorf("reading ends of flows: %w", err)
			}
			b = rest
			if m.kind != subsystem|messageDelete {
				continue
			}
			body, err := m.body()
			if err == nil {
				err = decode(body, &e.flow)
			}
			if err != nil {
				return fmt.Errorf("reading ends of flows: %w", err)
			}
			f(&e.flow)
		}
	}
}

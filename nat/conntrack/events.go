package conntrack

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/netlink"
	"github.com/isthmus-net/isthmus/router/sockfilter"
)

// Events hears of flows with source NAT that end. Only ends are subscribed to: they carry the flow's whole story, and the kernel
// spends nothing on the beginnings of flows, to which it does not subscribe.
type Events struct {
	fd       int
	buffers  [eventBatch][eventSize]byte
	places   [eventBatch]unix.Iovec
	headers  [eventBatch]mmsghdr
	flow     Flow
	overruns atomic.Uint64
	damaged  atomic.Uint64
}

const (
	// eventBatch is how many events one system call takes at most.
	eventBatch = 64
	// eventSize is the room in bytes for one event, which has some 250.
	eventSize = 2 << 10
)

// mmsghdr is the kernel's struct mmsghdr: where a datagram goes, and how long it was.
type mmsghdr struct {
	unix.Msghdr
	size uint32
}

// translated returns a socket filter that lets through what has SourceNAT in its status, and what
// has no status: that is for the reader to judge.
func translated() sockfilter.Program {
	var p sockfilter.Program
	// A becomes the place of attribute X, looked for from A on.
	p.Add(
		bpf.LoadConstant{Dst: bpf.RegA, Val: headerSize},
		bpf.LoadConstant{Dst: bpf.RegX, Val: attrStatus},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr})
	p.If(bpf.JumpEqual, 0, sockfilter.Pass)
	p.Add(bpf.TAX{}, bpf.LoadIndirect{Off: unix.SizeofNlAttr, Size: 4})
	p.If(bpf.JumpBitsSet, uint32(SourceNAT), sockfilter.Pass)
	p.Add(sockfilter.Drop)
	return p
}

// Hear subscribes to the ends of the flows in the network namespace of the calling thread. The kernel keeps events that wait
// to be read in a buffer of the given size in bytes; each takes about 1 KiB of it. What does not fit is lost, unless Keep was
// asked for. It needs CAP_NET_ADMIN.
func Hear(buffer int) (*Events, error) {
	fd, err := open(buffer)
	if err != nil {
		return nil, err
	}
	e := &Events{fd: fd}
	for i := range e.headers {
		e.places[i].Base = &e.buffers[i][0]
		e.places[i].SetLen(eventSize)
		e.headers[i].Iov = &e.places[i]
		e.headers[i].SetIovlen(1)
	}
	err = errors.Join(
		unix.SetNonblock(fd, true),
		sockfilter.Attach(fd, translated()),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	if err == nil {
		err = e.Listen(true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("subscribing to the ends of flows: %w", err)
	}
	return e, nil
}

// Listen begins or ends the subscription. Without a subscription the kernel makes no events.
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

// Damaged counts what came and could not be read as the end of a flow.
func (e *Events) Damaged() uint64 { return e.damaged.Load() }

// Read takes up to 64 events that wait, and calls f with every flow that has ended. It waits for nothing, and says whether more may
// be there. f must not keep the Flow. What cannot be read as an event is passed over, and counted by Damaged. A reader that comes
// some times a second, and reads until there is no more, costs less than one that is woken for every event.
func (e *Events) Read(f func(*Flow)) (more bool, err error) {
	n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(e.fd), uintptr(unsafe.Pointer(&e.headers)), eventBatch, unix.MSG_DONTWAIT, 0, 0)
	switch errno {
	case 0:
	case unix.EINTR:
		return true, nil
	case unix.EAGAIN:
		return false, nil
	case unix.ENOBUFS:
		e.overruns.Add(1)
		return true, nil
	default:
		return false, fmt.Errorf("reading ends of flows: %w", errno)
	}
	for i := range e.headers[:n] {
		e.take(e.buffers[i][:e.headers[i].size], f) // what was longer than the buffer says so, and is damaged
	}
	return true, nil
}

// take calls f with the flows of a datagram.
func (e *Events) take(b []byte, f func(*Flow)) {
	for len(b) > 0 {
		m, rest, ok := netlink.Next(b)
		b = rest
		if ok {
			attributes, err := body(m)
			ok = err == nil && m.Kind == subsystem|messageDelete && decode(attributes, &e.flow) == nil
		}
		if !ok {
			e.damaged.Add(1)
			continue
		}
		f(&e.flow)
	}
}

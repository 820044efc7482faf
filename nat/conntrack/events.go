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

// Events receives the ends of flows with source NAT. It subscribes only to ends: they have all
// data of the flow, and without a subscription the kernel spends nothing on the beginnings of
// flows.
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
	// eventBatch is the maximum number of events per system call.
	eventBatch = 64
	// eventSize is the room in bytes for one event, which has about 250.
	eventSize = 2 << 10
)

// mmsghdr is the kernel's struct mmsghdr: the buffers of a datagram, and its size.
type mmsghdr struct {
	unix.Msghdr
	size uint32
}

// translated returns a socket filter that passes messages with SourceNAT in their status, and
// those without a status, which the reader must check.
func translated() sockfilter.Program {
	var p sockfilter.Program
	// A becomes the offset of attribute X, searched from A on.
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

// Subscribe subscribes to the ends of the flows in the network namespace of the calling thread.
// The kernel queues unread events in a buffer of the given size in bytes; each takes about 1 KiB
// of it. Events that do not fit are lost, unless Keep is on. It needs CAP_NET_ADMIN.
func Subscribe(buffer int) (*Events, error) {
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

// Listen begins or ends the subscription. Without a subscription the kernel creates no events.
func (e *Events) Listen(listen bool) error {
	option := unix.NETLINK_DROP_MEMBERSHIP
	if listen {
		option = unix.NETLINK_ADD_MEMBERSHIP
	}
	return unix.SetsockoptInt(e.fd, unix.SOL_NETLINK, option, unix.NFNLGRP_CONNTRACK_DESTROY)
}

// Close ends the subscription. No other method may run during or after it.
func (e *Events) Close() error { return unix.Close(e.fd) }

// Keep sets whether the kernel keeps an ended flow until its event has been queued
// (NETLINK_BROADCAST_ERROR), so that an overrun delays events and loses none. Such flows still
// take room in the table, so the caller must go on reading.
func (e *Events) Keep(keep bool) error {
	v := 0
	if keep {
		v = 1
	}
	if err := unix.SetsockoptInt(e.fd, unix.SOL_NETLINK, unix.NETLINK_BROADCAST_ERROR, v); err != nil {
		return fmt.Errorf("setting NETLINK_BROADCAST_ERROR: %w", err)
	}
	return nil
}

// Overruns counts how often the buffer was too small.
func (e *Events) Overruns() uint64 { return e.overruns.Load() }

// Damaged counts messages that could not be decoded as the end of a flow.
func (e *Events) Damaged() uint64 { return e.damaged.Load() }

// Read reads up to 64 queued events, and calls f with every flow that has ended. It never blocks,
// and reports whether there may be more. f must not keep the Flow. A message that cannot be
// decoded is skipped, and counted by Damaged. Reading a few times a second until none is left
// costs less than waking up for every event.
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
		// a datagram larger than the buffer has a larger size in its header, and counts as damaged
		e.take(e.buffers[i][:e.headers[i].size], f)
	}
	return true, nil
}

// take calls f with the flows in a datagram.
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

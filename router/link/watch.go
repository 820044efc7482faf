package link

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Change is a hint that something about an interface may have changed. Read the interface again.
type Change struct {
	Name    string // empty: notifications were lost, and anything may have changed
	Alias   string
	Deleted bool
}

// Around calls changed when addresses, interfaces, rules, or routes that are not isthmus's may have
// changed, until ctx is done.
func (l *Links) Around(ctx context.Context, changed func()) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("watching the machine: %w", err)
	}
	f := os.NewFile(uintptr(fd), "rtnetlink")
	defer f.Close()
	// The kernel skips sockets without a port ID in multicasts.
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	for _, group := range []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE} {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group))
	}
	if err != nil {
		return fmt.Errorf("watching the machine: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("watching the machine: %w", err)
		}
		msgs, parseErr := syscall.ParseNetlinkMessage(buf[:max(0, n)])
		if err != nil || parseErr != nil || slices.ContainsFunc(msgs, isForeign) {
			changed()
		}
	}
}

// isForeign reports whether a message is about anything except a route of isthmus.
func isForeign(m syscall.NetlinkMessage) bool {
	const protocol = 5 // of struct rtmsg
	route := m.Header.Type == unix.RTM_NEWROUTE || m.Header.Type == unix.RTM_DELROUTE
	return !route || len(m.Data) <= protocol || m.Data[protocol] != Protocol
}

// Watch calls notify for each change of a link in the calling thread's network namespace until ctx
// is done. It begins with a Change without a name, so that a reader that acts on every Change
// misses nothing.
func (l *Links) Watch(ctx context.Context, notify func(Change)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("watching links: %w", err)
	}
	f := os.NewFile(uintptr(fd), "rtnetlink")
	defer f.Close()
	// without CAP_NET_ADMIN, the default is kept
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	groups := 1<<(unix.RTNLGRP_LINK-1) | 1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: uint32(groups)}); err != nil {
		return fmt.Errorf("watching links: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	notify(Change{})
	names := map[uint32]Change{} // name and alias by index, which address messages lack
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, unix.ENOBUFS) {
			notify(Change{})
			continue
		}
		if err != nil {
			return fmt.Errorf("watching links: %w", err)
		}
		msgs, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			notify(Change{})
			continue
		}
		for _, m := range msgs {
			if c, ok := decodeChange(m, names); ok {
				notify(c)
			}
		}
	}
}

func decodeChange(m syscall.NetlinkMessage, names map[uint32]Change) (Change, bool) {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(m.Data) < unix.SizeofIfInfomsg {
			return Change{}, true
		}
		header := unix.NlMsghdr(m.Header)
		link, err := netlink.LinkDeserialize(&header, m.Data)
		if err != nil {
			return Change{}, true
		}
		a := link.Attrs()
		c := Change{Name: a.Name, Alias: a.Alias, Deleted: m.Header.Type == unix.RTM_DELLINK}
		if c.Deleted {
			delete(names, uint32(a.Index))
		} else {
			names[uint32(a.Index)] = c
		}
		return c, true
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		_, index, err := parseAddress(m.Data)
		if err != nil {
			return Change{}, true
		}
		c, known := names[uint32(index)]
		if !known && m.Header.Type == unix.RTM_DELADDR {
			return Change{}, true
		}
		return c, known
	}
	return Change{}, false
}

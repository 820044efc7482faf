package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/test/lab"
)

// This file reads a kernel's forwarding table without isthmus's code, and in the same way for every
// contender: notifications show when the table is full, look-ups as the kernel makes them for a
// packet show which way one would go, and a dump shows whether that was all.

const rtaNHID = 30

var native = binary.NativeEndian

func netlinkSocket(n *lab.Node, family int, groups uint32) (fd int, err error) {
	err = n.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, family)
		return err
	})
	if err != nil {
		return 0, err
	}
	patience := unix.NsecToTimeval(int64(50 * time.Millisecond))
	return fd, errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}))
}

// messages calls f for each netlink message in b.
func messages(b []byte, f func(kind uint16, body []byte)) {
	for len(b) >= unix.SizeofNlMsghdr {
		n := int(native.Uint32(b))
		if n < unix.SizeofNlMsghdr || n > len(b) {
			return
		}
		f(native.Uint16(b[4:]), b[unix.SizeofNlMsghdr:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

func attributes(b []byte, f func(kind uint16, value []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		n := int(native.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return
		}
		f(native.Uint16(b[2:])&^unix.NLA_F_NESTED, b[unix.SizeofRtAttr:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

// index returns which prefix of the table an RTM_NEWROUTE or RTM_DELROUTE is about, or -1.
func index(body []byte) int {
	if len(body) < unix.SizeofRtMsg || body[1] != 24 {
		return -1
	}
	at := -1
	attributes(body[unix.SizeofRtMsg:], func(kind uint16, value []byte) {
		if kind == unix.RTA_DST && len(value) == 4 {
			if a := binary.BigEndian.Uint32(value); a >= firstPrefix {
				at = int(a-firstPrefix) >> 8
			}
		}
	})
	return at
}

// watch counts the prefixes of the table that a node's kernel has, by its notifications.
type watch struct {
	fd   int
	done chan struct{}

	mu      sync.Mutex
	have    []bool
	count   int
	changed time.Time
	err     error
}

func newWatch(n *lab.Node, size int) (*watch, error) {
	fd, err := netlinkSocket(n, unix.NETLINK_ROUTE, 1<<(unix.RTNLGRP_IPV4_ROUTE-1))
	if err != nil {
		return nil, fmt.Errorf("watching routes: %w", err)
	}
	w := &watch{fd: fd, done: make(chan struct{}), have: make([]bool, size), changed: time.Now()}
	go w.run()
	return w, nil
}

func (w *watch) run() {
	buf := make([]byte, 1<<20)
	for {
		n, _, err := unix.Recvfrom(w.fd, buf, 0)
		select {
		case <-w.done:
			unix.Close(w.fd)
			return
		default:
		}
		if err == unix.EAGAIN || err == unix.EINTR {
			continue
		}
		w.mu.Lock()
		if err != nil { // ENOBUFS: some were lost, so the count is wrong from now on
			w.err = err
		}
		w.changed = time.Now()
		messages(buf[:max(n, 0)], func(kind uint16, body []byte) {
			i := index(body)
			if i < 0 || i >= len(w.have) {
				return
			}
			if is := kind == unix.RTM_NEWROUTE; is != w.have[i] {
				w.have[i] = is
				if is {
					w.count++
				} else {
					w.count--
				}
			}
		})
		w.mu.Unlock()
	}
}

func (w *watch) close() { close(w.done) }

// until waits until the kernel has so many of the prefixes, and returns when that was.
func (w *watch) until(count int, limit time.Duration) (time.Time, error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(200 * time.Microsecond) {
		w.mu.Lock()
		have, at, err := w.count, w.changed, w.err
		w.mu.Unlock()
		switch {
		case err != nil:
			return at, fmt.Errorf("watching routes: %w", err)
		case have == count:
			return at, nil
		case time.Now().After(deadline):
			return at, fmt.Errorf("the kernel has %d of %d routes after %v", have, count, limit)
		}
	}
}

// quiet waits until nothing has been written for a while.
func (w *watch) quiet(d time.Duration) {
	for {
		w.mu.Lock()
		since := time.Since(w.changed)
		w.mu.Unlock()
		if since > d {
			return
		}
		time.Sleep(d - since + time.Millisecond)
	}
}

// lookup queries a kernel for the way that packets would go.
type lookup struct {
	fd  int
	buf []byte
}

func newLookup(n *lab.Node) (*lookup, error) {
	fd, err := netlinkSocket(n, unix.NETLINK_ROUTE, 0)
	if err != nil {
		return nil, fmt.Errorf("opening a look-up socket: %w", err)
	}
	return &lookup{fd, make([]byte, 1<<18)}, nil
}

func (l *lookup) close() { unix.Close(l.fd) }

func attr(b []byte, kind uint16, value []byte) []byte {
	b = native.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = native.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, -len(value)&3)...)
}

func request(kind, flags uint16, body []byte) []byte {
	b := native.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(body)))
	b = native.AppendUint16(b, kind)
	b = native.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	b = append(b, make([]byte, 8)...)
	return append(b, body...)
}

// way returns the interface by which a UDP packet with this source port would leave to the address,
// 0 for none.
func (l *lookup) way(to netip.Addr, port uint16) (oif uint32, err error) {
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1] = unix.AF_INET, 32
	body = attr(body, unix.RTA_DST, to.AsSlice())
	body = attr(body, unix.RTA_IP_PROTO, []byte{unix.IPPROTO_UDP})
	body = attr(body, unix.RTA_SPORT, binary.BigEndian.AppendUint16(nil, port))
	body = attr(body, unix.RTA_DPORT, []byte{0, 53})
	if err := unix.Sendto(l.fd, request(unix.RTM_GETROUTE, 0, body), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, err
	}
	n, _, err := unix.Recvfrom(l.fd, l.buf, 0)
	if err != nil {
		return 0, err
	}
	messages(l.buf[:n], func(kind uint16, body []byte) {
		if kind == unix.RTM_NEWROUTE {
			attributes(body[unix.SizeofRtMsg:], func(kind uint16, value []byte) {
				if kind == unix.RTA_OIF {
					oif = native.Uint32(value)
				}
			})
		}
	})
	return oif, nil
}

// ports are tried for each address: with two equal paths, one of 256 addresses would show only one
// of them.
const ports = 8

// uses reports whether some packet to the address would leave by the interface.
func (l *lookup) uses(to netip.Addr, oif uint32) (bool, error) {
	for p := range uint16(ports) {
		if by, err := l.way(to, 40_000+p); err != nil || by == oif {
			return by == oif, err
		}
	}
	return false, nil
}

func (l *lookup) dump(kind uint16, body []byte, f func(body []byte)) error {
	if err := unix.Sendto(l.fd, request(kind, unix.NLM_F_DUMP, body), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for last := false; !last; {
		n, _, err := unix.Recvfrom(l.fd, l.buf, 0)
		if err != nil {
			return err
		}
		messages(l.buf[:n], func(kind uint16, body []byte) {
			if kind == unix.NLMSG_DONE || kind == unix.NLMSG_ERROR {
				if code := int32(native.Uint32(body)); code < 0 {
					err = unix.Errno(-code)
				}
				last = true
				return
			}
			f(body)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// count dumps the table and returns how many of its first n prefixes use each interface.
func (l *lookup) count(n int) (map[uint32]int, error) {
	for range 100 {
		// A route may lead to a next hop that was not there yet when those were dumped.
		if used, whole, err := l.countOnce(n); err != nil || whole {
			return used, err
		}
	}
	return nil, errors.New("dumping routes: next hops change faster than they can be read")
}

func (l *lookup) countOnce(n int) (used map[uint32]int, whole bool, err error) {
	direct, groups := map[uint32]uint32{}, map[uint32][]uint32{}
	err = l.dump(unix.RTM_GETNEXTHOP, make([]byte, 8), func(body []byte) {
		var id, oif uint32
		var members []uint32
		attributes(body[8:], func(kind uint16, value []byte) {
			switch kind {
			case unix.NHA_ID:
				id = native.Uint32(value)
			case unix.NHA_OIF:
				oif = native.Uint32(value)
			case unix.NHA_GROUP:
				for ; len(value) >= 8; value = value[8:] {
					members = append(members, native.Uint32(value))
				}
			}
		})
		direct[id], groups[id] = oif, members
	})
	if err != nil {
		return nil, false, fmt.Errorf("dumping next hops: %w", err)
	}
	used, whole = map[uint32]int{}, true
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[4] = unix.AF_INET, unix.RT_TABLE_MAIN
	err = l.dump(unix.RTM_GETROUTE, body, func(body []byte) {
		if i := index(body); i < 0 || i >= n {
			return
		}
		var ways []uint32
		attributes(body[unix.SizeofRtMsg:], func(kind uint16, value []byte) {
			switch kind {
			case unix.RTA_OIF:
				ways = append(ways, native.Uint32(value))
			case rtaNHID:
				id := native.Uint32(value)
				if _, known := direct[id]; !known {
					whole = false
				}
				if len(groups[id]) == 0 {
					ways = append(ways, direct[id])
				}
				for _, m := range groups[id] {
					ways = append(ways, direct[m])
				}
			case unix.RTA_MULTIPATH:
				for len(value) >= unix.SizeofRtNexthop {
					ways = append(ways, native.Uint32(value[4:]))
					value = value[min(max(int(native.Uint16(value)+3)&^3, unix.SizeofRtNexthop), len(value)):]
				}
			}
		})
		for _, w := range ways {
			used[w]++
		}
	})
	if err != nil {
		return nil, false, fmt.Errorf("dumping routes: %w", err)
	}
	return used, whole, nil
}

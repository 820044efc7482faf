package nftables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/isthmus-net/isthmus/router/netlink"
	"golang.org/x/sys/unix"
)

// Watch implements nat.Driver. For each transaction the kernel sends its messages and, at the end,
// the new generation number of the ruleset with the process that made it (NFT_MSG_NEWGEN).
// Transactions of this process are ignored.
func (d *Driver) Watch(ctx context.Context, changed func(present bool)) error {
	fd, err := openSocket(d.options.NetNS, unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	// without CAP_NET_ADMIN the default stays
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)}); err != nil {
		unix.Close(fd)
		return fmt.Errorf("watching rules: %w", err)
	}
	socket := os.NewFile(uintptr(fd), "nftables events")
	stop := context.AfterFunc(ctx, func() { socket.Close() })
	defer func() {
		if stop() {
			socket.Close()
		}
	}()
	report := func() error {
		g, err := openGeneration(d.options.NetNS)
		if err != nil {
			return err
		}
		defer unix.Close(g.fd)
		present, err := g.hasTable(tableName)
		if err != nil {
			return fmt.Errorf("reading the table: %w", err)
		}
		changed(present)
		return nil
	}
	if err := report(); err != nil {
		return err
	}
	buffer := make([]byte, 1<<16)
	for {
		n, err := socket.Read(buffer)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // messages were lost
		case err != nil:
			return fmt.Errorf("watching rules: %w", err)
		case !foreign(buffer[:n], uint32(os.Getpid())):
			continue
		}
		if err := report(); err != nil {
			return err
		}
	}
}

// foreign reports whether a datagram of events ends a transaction of another process.
func foreign(b []byte, pid uint32) bool {
	for len(b) >= unix.SizeofNlMsghdr {
		m, rest, ok := netlink.Next(b)
		if !ok {
			return true // an unreadable message may be anything
		}
		b = rest
		if m.Kind != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN {
			continue
		}
		maker := uint32(0)
		for kind, value := range netlink.Attributes(m.Body[min(4, len(m.Body)):]) {
			if kind == unix.NFTA_GEN_PROC_PID && len(value) == 4 {
				maker = binary.BigEndian.Uint32(value)
			}
		}
		if maker != pid {
			return true
		}
	}
	return false
}

// hasTable reports whether a table of family inet exists and is not dormant.
func (g *generation) hasTable(name string) (bool, error) {
	answer, err := g.ask(unix.NFT_MSG_GETTABLE, unix.NFPROTO_INET, netlink.NewText(unix.NFTA_TABLE_NAME, name))
	if err != nil {
		return false, err
	}
	b, err := body(answer, unix.NFT_MSG_NEWTABLE)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	working := err == nil
	for kind, value := range netlink.Attributes(b) {
		if kind == unix.NFTA_TABLE_FLAGS && len(value) == 4 && binary.BigEndian.Uint32(value) != 0 {
			working = false // dormant
		}
	}
	return working, err
}

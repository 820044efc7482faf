package nftables

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/netlink"
)

// kernel returns a generation whose requests get the answers of a function, which returns
// datagrams. Ring: fake.
func kernel(t *testing.T, answer func(request netlink.Message) [][]byte) *generation {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buffer := make([]byte, 4096)
		for {
			n, err := unix.Read(pair[1], buffer)
			if err != nil || n == 0 {
				return
			}
			request, _, _ := netlink.Next(buffer[:n])
			for _, b := range answer(request) {
				unix.Write(pair[1], b)
			}
		}
	}()
	t.Cleanup(func() {
		unix.Close(pair[0])
		<-ended
		unix.Close(pair[1])
	})
	g := &generation{fd: pair[0]}
	waits(t, g, time.Minute)
	return g
}

// waits sets how long a generation waits for an answer.
func waits(t *testing.T, g *generation, limit time.Duration) {
	t.Helper()
	v := unix.NsecToTimeval(limit.Nanoseconds())
	if err := unix.SetsockoptTimeval(g.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &v); err != nil {
		t.Fatal(err)
	}
}

// TestLateAnswer checks that a request to which no answer comes ends, and that its answer is not
// taken for that to the next request.
func TestLateAnswer(t *testing.T) {
	number := func(r netlink.Message) []byte {
		id := netlink.New(unix.NFTA_GEN_ID, binary.BigEndian.AppendUint32(nil, 100+r.Sequence)...)
		return netlink.Request(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN, 0, r.Sequence, make([]byte, 4), id)
	}
	var late [][]byte
	g := kernel(t, func(r netlink.Message) [][]byte {
		late = append(late, number(r))
		if r.Sequence < 3 {
			return nil
		}
		return late
	})
	waits(t, g, 20*time.Millisecond)
	for range 2 {
		if n, err := g.read(); err == nil || !strings.Contains(err.Error(), "has not answered") {
			t.Errorf("%d, %v without an answer", n, err)
		}
	}
	waits(t, g, time.Minute)
	if n, err := g.read(); n != 103 || err != nil {
		t.Errorf("%d, %v, want 103", n, err)
	}
	// the sockets of the driver have a timeout
	g, err := openGeneration(0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(g.fd)
	if wait, err := unix.GetsockoptTimeval(g.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO); err != nil || wait.Nano() != patience.Nanoseconds() {
		t.Errorf("timeout %v, %v", wait, err)
	}
}

// TestInterruptedDump checks that a dump which a transaction interrupted is repeated, and that
// nothing of it is kept.
func TestInterruptedDump(t *testing.T) {
	for _, interrupted := range []int{0, 1, dumps - 1, dumps} {
		asked := 0
		g := kernel(t, func(r netlink.Message) [][]byte {
			asked++
			var flags uint16
			name := "whole"
			if asked <= interrupted {
				flags, name = unix.NLM_F_DUMP_INTR, "half"
			}
			object := netlink.Request(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE, flags, r.Sequence, []byte{2, 0, 0, 0}, []byte(name))
			return [][]byte{slices.Concat(object, make([]byte, -len(object)&3), object), netlink.Request(unix.NLMSG_DONE, 0, r.Sequence, make([]byte, 4))}
		})
		found, err := dump(t.Context(), g, unix.NFT_MSG_GETRULE, func(_ byte, attrs []byte) string { return string(attrs) })
		if interrupted == dumps {
			if err == nil || asked != dumps {
				t.Errorf("%q, %v after %d dumps that were all interrupted", found, err, asked)
			}
		} else if err != nil || !slices.Equal(found, []string{"whole"}) || asked != interrupted+1 {
			t.Errorf("%d interrupted: %q, %v after %d dumps", interrupted, found, err, asked)
		}
	}
	g := kernel(t, func(r netlink.Message) [][]byte {
		return [][]byte{netlink.Request(unix.NLMSG_ERROR, 0, r.Sequence, binary.NativeEndian.AppendUint32(nil, ^uint32(unix.EPERM)+1))}
	})
	if _, err := dump(t.Context(), g, unix.NFT_MSG_GETRULE, judge); !errors.Is(err, unix.EPERM) {
		t.Errorf("%v, want EPERM", err)
	}
}

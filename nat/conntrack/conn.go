package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/netlink"
)

// receiveBuffer is the size in bytes of one read. The kernel uses up to 32 KiB of it.
const receiveBuffer = 64 << 10

// answerTime bounds the wait for an answer of the kernel.
const answerTime = 10 * time.Second

// ErrInterrupted means that the table changed during a dump in such a way that flows which existed
// all the time may be missing from it.
var ErrInterrupted = errors.New("the connection table changed during the dump")

// Conn queries the table of a network namespace. Its methods may be called from several
// goroutines; requests are sent one at a time.
type Conn struct {
	mu       sync.Mutex
	fd       int
	sequence uint32
	buffer   []byte
}

// Open returns a Conn for the network namespace of the calling thread; later calls may come from
// any thread. It needs CAP_NET_ADMIN.
func Open() (*Conn, error) {
	fd, err := open(receiveBuffer * 16)
	if err != nil {
		return nil, err
	}
	return &Conn{fd: fd, buffer: make([]byte, receiveBuffer)}, nil
}

// open opens a netlink socket with a receive buffer of the given size in bytes.
func open(buffer int) (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, fmt.Errorf("opening a netlink socket: %w", err)
	}
	timeout := unix.NsecToTimeval(answerTime.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer),
	)
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("preparing a netlink socket: %w", err)
	}
	return fd, nil
}

// Close closes the connection. No other method may run during or after it.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// Dump calls f with every flow of a family (unix.AF_INET, unix.AF_INET6; unix.AF_UNSPEC: both)
// until f returns false. f must not keep the Flow, nor call methods of c.
//
// The table changes meanwhile: flows that begin or end during the dump may be missing, and a flow
// may come twice. If others may be missing too, Dump returns ErrInterrupted at the end.
func (c *Conn) Dump(ctx context.Context, family uint8, f func(*Flow) bool) error {
	return c.walk(ctx, family, func(flow *Flow, _ netlink.Message) bool { return f(flow) })
}

// walk is Dump, and also passes the message that a flow was read from.
func (c *Conn) walk(ctx context.Context, family uint8, f func(*Flow, netlink.Message) bool) error {
	var flow Flow
	wanted := true
	err := c.ask(messageGet, family, unix.NLM_F_DUMP, func(m netlink.Message) error {
		if !wanted || m.Kind != subsystem|messageNew {
			return nil // the socket must be drained, even if nothing more is needed
		}
		b, err := body(m)
		if err == nil {
			err = decode(b, &flow)
		}
		if err == nil {
			wanted = ctx.Err() == nil && f(&flow, m)
		}
		return err
	})
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("reading the connection table: %w", err)
	}
	return nil
}

// End deletes the flows of a family for which f returns true, and returns how many. f must not
// keep the Flow, nor call methods of c. A later packet of a deleted flow begins a new one.
// ErrInterrupted means that End may have missed flows.
func (c *Conn) End(ctx context.Context, family uint8, f func(*Flow) bool) (ended int, err error) {
	var requests []byte
	var ends []int // the end of each request
	missed := c.walk(ctx, family, func(flow *Flow, m netlink.Message) bool {
		if f(flow) {
			requests = appendDeletion(requests, m)
			ends = append(ends, len(requests))
		}
		return true
	})
	const batch = 100
	for from := 0; len(ends) > 0 && err == nil; {
		n := min(batch, len(ends))
		if err = ctx.Err(); err == nil {
			err = c.send(requests[from:ends[n-1]], n, &ended)
		}
		from, ends = ends[n-1], ends[n:]
	}
	if err = errors.Join(missed, err); err != nil {
		return ended, fmt.Errorf("ending flows: %w", err)
	}
	return ended, nil
}

// send sends n requests for an acknowledgement, reads all acknowledgements, and adds the number of
// successful requests to done. A missing object (ENOENT) is not an error.
func (c *Conn) send(requests []byte, n int, done *int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	former, all := c.sequence, uint32(n)
	for b := requests; len(b) > 0; b = b[binary.NativeEndian.Uint32(b):] {
		c.sequence++
		binary.NativeEndian.PutUint32(b[8:], c.sequence)
	}
	if err := unix.Sendto(c.fd, requests, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	var failed error
	for n > 0 {
		size, _, err := unix.Recvfrom(c.fd, c.buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for b := c.buffer[:size]; len(b) > 0; {
			m, rest, ok := netlink.Next(b)
			if !ok {
				return errDamaged
			}
			b = rest
			if m.Sequence-former-1 >= all {
				continue // the rest of an abandoned answer
			}
			n--
			if err := failure(m); err == nil {
				*done++
			} else if !errors.Is(err, unix.ENOENT) {
				failed = err
			}
		}
	}
	return failed
}

// Stats returns the table's statistics.
func (c *Conn) Stats(ctx context.Context) (s Stats, err error) {
	if err = ctx.Err(); err == nil {
		read := func(m netlink.Message) error { return decodeStats(m, &s) }
		err = errors.Join(c.ask(messageStats, unix.AF_UNSPEC, 0, read), c.ask(messageStatsCPU, unix.AF_UNSPEC, unix.NLM_F_DUMP, read))
		s.correct()
	}
	if err != nil {
		return s, fmt.Errorf("reading the statistics of the connection table: %w", err)
	}
	return s, nil
}

// ask sends a request, reads the whole answer, and calls f with each of its messages. It returns
// the first error.
func (c *Conn) ask(kind uint16, family uint8, flags uint16, f func(netlink.Message) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sequence++
	request := netlink.Request(subsystem|kind, unix.NLM_F_ACK|flags, c.sequence, []byte{family, unix.NFNETLINK_V0, 0, 0})
	if err := unix.Sendto(c.fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	var failed error
	fail := func(err error) {
		if failed == nil {
			failed = err
		}
	}
	answer := netlink.Answer{Sequence: c.sequence}
	for !answer.Ended {
		n, _, err := unix.Recvfrom(c.fd, c.buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		ok := answer.Read(c.buffer[:n], func(m netlink.Message) {
			if err := f(m); err != nil {
				fail(err)
			}
		})
		if !ok {
			return errDamaged
		}
		if answer.Interrupted {
			fail(ErrInterrupted)
		}
	}
	fail(failure(answer.End))
	return failed
}

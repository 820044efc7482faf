// Package packets copies the IP packets that pass an interface.
package packets

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/sockfilter"
)

// Errors about the interface of a capture.
var (
	ErrNoInterface = errors.New("no such interface")
	ErrDown        = errors.New("no packets pass")
)

// MaxBytes is how many bytes of packets a capture returns before it ends.
const MaxBytes = 64 << 20

// Request describes a capture.
type Request struct {
	Interface string
	Filter    Filter
	Count     int           // of packets
	Duration  time.Duration // from the beginning
	Size      int           // bytes of each packet to return, 1 to 65535
}

// Packet is an IP packet. Data is its beginning, of Length bytes in all.
type Packet struct {
	Time    time.Time
	Leaving bool // it leaves the machine; else it arrives
	Length  int
	Data    []byte
}

// End is why a capture has ended.
type End string

// The ends, apart from errors.
const (
	Counted  End = "count"    // Request.Count packets have passed
	TimeOver End = "duration" // Request.Duration is over
	Full     End = "bytes"    // MaxBytes have been returned
)

const (
	// Packets are passed on together: at most so many, or so many bytes, or those of this time.
	batchPackets = 64
	batchBytes   = 256 << 10
	batchTime    = 200 * time.Millisecond
	// queueBytes is the room for packets that wait.
	queueBytes = 8 << 20
)

// Capture calls a function with the packets that pass an interface, some at a time, and with the
// number of those that were lost so far because the function was slow. The first call, without
// packets, comes when the capture has begun; the packets are valid until the function returns. The
// error is about the socket, or is that of the function or of ctx.
func Capture(ctx context.Context, q Request, each func(all []Packet, lost int) error) (End, error) {
	end := time.Now().Add(q.Duration)
	c, err := open(q)
	if err != nil {
		return "", err
	}
	defer c.file.Close()
	// A deadline in the past ends a read.
	defer context.AfterFunc(ctx, func() { _ = c.file.SetReadDeadline(time.Unix(1, 0)) })()
	if err := each(nil, 0); err != nil {
		return "", err
	}
	count, bytes := 0, 0
	for {
		err := c.batch(ctx, end, min(batchPackets, q.Count-count), min(batchBytes, MaxBytes-bytes))
		over := errors.Is(err, os.ErrDeadlineExceeded)
		if len(c.all) > 0 {
			// Those before an error are passed on.
			err := each(c.all, c.lost())
			if err != nil {
				return "", err
			}
		}
		count += len(c.all)
		bytes += len(c.room)
		switch {
		case ctx.Err() != nil:
			return "", ctx.Err()
		case err != nil && !over:
			return "", err
		case count >= q.Count:
			return Counted, nil
		case bytes >= MaxBytes:
			return Full, nil
		case !time.Now().Before(end):
			return TimeOver, nil
		}
	}
}

// capture is a capture that is under way.
type capture struct {
	Request
	file    *os.File
	index   int
	all     []Packet
	room    []byte // their data
	control []byte
	missing int // packets that the kernel has dropped so far
}

func open(q Request) (*capture, error) {
	i, err := net.InterfaceByName(q.Interface)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", q.Interface, ErrNoInterface)
	}
	// Protocol 0 receives nothing until the socket is bound. The kernel removes the link-layer header
	// (packet(7)).
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening a packet socket: %w", err)
	}
	c := &capture{Request: q, file: os.NewFile(uintptr(fd), "packets"), index: i.Index, control: make([]byte, 256)}
	// without CAP_NET_ADMIN the default stays
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, queueBytes)
	err = errors.Join(
		sockfilter.Attach(fd, q.Filter.program()),
		os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS_NEW, 1)),
		// Only sockets for all protocols receive the packets that leave.
		os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: allProtocols, Ifindex: i.Index})),
	)
	if errors.Is(err, unix.ENODEV) {
		err = fmt.Errorf("interface %s: %w", q.Interface, ErrNoInterface)
	}
	if err != nil {
		c.file.Close()
		return nil, fmt.Errorf("setting a packet socket up: %w", err)
	}
	return c, nil
}

// allProtocols is ETH_P_ALL in network byte order.
var allProtocols = binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))

// batch reads packets until some are there for a moment, or until the end.
func (c *capture) batch(ctx context.Context, end time.Time, packets, bytes int) error {
	c.all, c.room = c.all[:0], c.room[:0]
	if err := c.file.SetReadDeadline(end); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil { // it may have ended before the deadline was set
		return err
	}
	raw, err := c.file.SyscallConn()
	if err != nil {
		return err
	}
	var soon time.Time
	for len(c.all) < packets && len(c.room) < bytes {
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			failed = c.receive(int(fd))
			return failed != unix.EAGAIN && failed != unix.EINTR
		})
		if err := errors.Join(err, c.explained(failed)); err != nil {
			return err
		}
		if soon.IsZero() {
			if soon = time.Now().Add(batchTime); soon.After(end) {
				soon = end
			}
			if err := c.file.SetReadDeadline(soon); err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		if time.Now().After(soon) { // a read of what is there does not end with the deadline
			return nil
		}
	}
	return nil
}

// explained describes an error of receiving.
func (c *capture) explained(err error) error {
	if err == unix.ENETDOWN {
		return fmt.Errorf("%w: interface %s is down or was removed", ErrDown, c.Interface)
	}
	return os.NewSyscallError("recvmsg", err)
}

// receive reads a packet.
func (c *capture) receive(fd int) error {
	at := len(c.room)
	if need := at + c.Size; cap(c.room) < need {
		// The packets before keep the former array.
		c.room = append(make([]byte, 0, need+batchBytes), c.room...)
	}
	n, controls, _, from, err := unix.Recvmsg(fd, c.room[at:at+c.Size], c.control, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
	if err != nil {
		return err
	}
	link, ok := from.(*unix.SockaddrLinklayer)
	if !ok || link.Ifindex != c.index {
		return nil
	}
	p := Packet{Time: stamp(c.control[:controls]), Leaving: link.Pkttype == unix.PACKET_OUTGOING, Length: n}
	c.room = c.room[:at+min(n, c.Size)]
	p.Data = c.room[at:len(c.room):len(c.room)]
	c.all = append(c.all, p)
	return nil
}

// stamp returns the time in the control messages of a packet, else the present one.
func stamp(control []byte) time.Time {
	messages, _ := unix.ParseSocketControlMessage(control)
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SO_TIMESTAMPNS_NEW && len(m.Data) >= 16 {
			return time.Unix(int64(binary.NativeEndian.Uint64(m.Data)), int64(binary.NativeEndian.Uint64(m.Data[8:])))
		}
	}
	return time.Now()
}

// lost returns how many packets had no room so far.
func (c *capture) lost() int {
	raw, err := c.file.SyscallConn()
	if err != nil {
		return c.missing
	}
	_ = raw.Control(func(fd uintptr) {
		// Reading it sets it to zero (packet(7)).
		if s, err := unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			c.missing += int(s.Drops)
		}
	})
	return c.missing
}

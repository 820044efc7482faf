package echo

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// TokenSize is the smallest size of the data of a request, in bytes: it is a random token, by which
// a reply is known to be from a host that received the request.
const TokenSize = 8

// Wait is how long a ping waits for an answer.
const Wait = time.Second

// ErrNoInterface means that the machine does not have the interface of a ping.
var ErrNoInterface = errors.New("no such interface")

// Request describes a ping.
type Request struct {
	To netip.Addr
	// From is the source of the packets. Not valid: the kernel chooses.
	From netip.Addr
	// Interface is the name of the interface by which the packets leave and the replies come.
	// Empty: the kernel's routes decide.
	Interface string
	Count     int
	// Interval is the time between two requests. A request follows the answer to the one before it,
	// or Wait.
	Interval     time.Duration
	Size         int // of the data, at least TokenSize
	DontFragment bool
}

// Result is the end of one request. Err is nil for an answer.
type Result struct {
	Sequence int // from 1
	// From is the address that answered, or the router that reported the error; not valid: neither
	// did.
	From      netip.Addr
	RoundTrip time.Duration
	Err       error
}

// Ping sends echo requests and calls a function with the result of each, until the function or ctx
// returns an error. The error is about the socket, or is that of the function or of ctx.
func Ping(ctx context.Context, q Request, each func(Result) error) error {
	p, err := open(q)
	if err != nil {
		return err
	}
	defer p.socket.Close()
	// A deadline in the past ends a read.
	defer context.AfterFunc(ctx, func() { _ = p.socket.file.SetReadDeadline(time.Unix(1, 0)) })()
	for n := 1; ; n++ {
		begun := time.Now()
		r, err := p.one(ctx, n)
		if err != nil {
			return err
		}
		if err := each(r); err != nil || n == q.Count {
			return err
		}
		select {
		case <-time.After(time.Until(begun.Add(q.Interval))):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

const (
	// maxHeaders is the size of the headers of a reply (RFC 791 section 3.1, RFC 792).
	maxHeaders = 60 + headerSize
	// maxQueued bounds the errors that are read in a row, because a stranger may send them.
	maxQueued = 10_000
	// maxResent bounds how often a request is sent again, when one link after another of the path
	// has a smaller MTU.
	maxResent = 8
)

// pinger is a ping that is under way.
type pinger struct {
	Request
	socket *Socket
	// first is random: an ICMP error need not quote the data of a request, and is matched by 32
	// bits, this and the identifier.
	first                uint16
	buffer, quote, extra []byte
}

func open(q Request) (*pinger, error) {
	p := &pinger{Request: q, buffer: make([]byte, maxHeaders+q.Size+1), quote: make([]byte, headerSize+TokenSize), extra: make([]byte, 512)}
	var random [2]byte
	rand.Read(random[:])
	p.first = binary.BigEndian.Uint16(random[:])
	var err error
	if p.socket, err = Open(q.To.Is6()); err != nil {
		return nil, err
	}
	var failed error
	err = p.socket.raw.Control(func(fd uintptr) { failed = p.set(int(fd)) })
	if err = errors.Join(err, failed); err != nil {
		p.socket.Close()
		return nil, fmt.Errorf("setting a raw socket up: %w", err)
	}
	return p, nil
}

// set sets the options of the socket: errors are queued with their reasons, and packets have the
// flag that was asked for.
func (p *pinger) set(fd int) error {
	var errs []error
	option := func(level, name, value int) {
		errs = append(errs, os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, name, value)))
	}
	if p.Interface != "" {
		// Packets leave by the interface alone, and the socket receives no others. With an index in
		// IPV6_PKTINFO instead, a packet may leave by another one (ip6_route_output_flags).
		err := unix.BindToDevice(fd, p.Interface)
		if errors.Is(err, unix.ENODEV) {
			err = ErrNoInterface
		}
		errs = append(errs, err)
	}
	if p.To.Is6() {
		option(unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		mode := unix.IPV6_PMTUDISC_DONT
		if p.DontFragment {
			mode = unix.IPV6_PMTUDISC_DO
		}
		option(unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, mode)
	} else {
		option(unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		mode := unix.IP_PMTUDISC_DONT
		if p.DontFragment {
			mode = unix.IP_PMTUDISC_DO
		}
		option(unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, mode)
	}
	return errors.Join(errs...)
}

// one sends a request and waits for its end. The error is that of ctx or of the socket.
func (p *pinger) one(ctx context.Context, n int) (Result, error) {
	r := Result{Sequence: n}
	data := make([]byte, p.Size)
	rand.Read(data)
	sequence := p.first + uint16(n)
	packet, err := p.socket.request(sequence, data)
	if err != nil {
		return r, err
	}
	begun := time.Now()
	if err := p.socket.file.SetReadDeadline(begun.Add(Wait)); err != nil {
		return r, err
	}
	if err := ctx.Err(); err != nil { // it may have ended before the deadline was set
		return r, err
	}
	p.drain()
	sent := p.socket.send(0, p.From, p.To, packet)
	if sent != nil {
		// An error of an earlier packet, which arrived after drain, is reported once in place of
		// sending (sock_alloc_send_skb).
		p.drain()
		sent = p.socket.send(0, p.From, p.To, packet)
	}
	if sent != nil {
		r.Err = p.refused(sent)
		return r, nil
	}
	done, at, resent := false, begun, 0
	for !done {
		// A read ends with the deadline, although a stranger sends replies and errors without a
		// pause, since each takes one.
		err := p.socket.raw.Read(func(fd uintptr) bool {
			e, quote, queued := p.queued(int(fd))
			switch {
			case !queued || !e.ends(quote, packet):
			case e.tooBig() && !p.DontFragment && resent < maxResent:
				// A router does not make fragments of IPv6 packets. The kernel has the path MTU
				// now, and makes them.
				resent, at = resent+1, time.Now()
				if sent := p.socket.send(0, p.From, p.To, packet); sent != nil {
					done, r.Err = true, p.refused(sent)
				}
			default:
				done, r.From, r.Err = true, e.from, e.reason()
			}
			if done {
				return true
			}
			reply, ok, err := p.socket.receive(int(fd), p.buffer, p.extra)
			// Another error was pending for the socket, and its reason is in the queue.
			if err == nil && ok && p.answers(reply, sequence, data) {
				done, r.From, r.RoundTrip = true, reply.From, time.Since(at)
			}
			return err != unix.EAGAIN || queued
		})
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return r, ctx.Err()
		case errors.Is(err, os.ErrDeadlineExceeded):
			r.Err = fmt.Errorf("no answer within %v", Wait)
			return r, nil
		default:
			return r, err
		}
	}
	return r, nil
}

// answers reports whether a reply is the answer to a request.
func (p *pinger) answers(r Reply, sequence uint16, data []byte) bool {
	return r.From == p.To && r.Sequence == sequence && string(r.Data) == string(data)
}

// drain removes the errors of earlier packets.
func (p *pinger) drain() {
	_ = p.socket.raw.Control(func(fd uintptr) {
		for range maxQueued {
			if _, _, ok := p.queued(int(fd)); !ok {
				break
			}
		}
		_, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	})
}

// refused describes an error of sending, which the kernel queues with the MTU if a packet is too
// big.
func (p *pinger) refused(err error) error {
	switch {
	case errors.Is(err, unix.EMSGSIZE):
		var mtu uint32
		_ = p.socket.raw.Control(func(fd uintptr) {
			for range maxQueued {
				e, _, ok := p.queued(int(fd))
				if !ok {
					return
				}
				if e.tooBigHere() {
					mtu = e.Info
				}
			}
		})
		return tooBig(mtu)
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH):
		from := ""
		if p.From.IsValid() {
			// The address may be missing, or the interface down.
			from = fmt.Sprintf(" from %v", p.From)
		}
		return fmt.Errorf("destination unreachable: this node has no route to it%s", from)
	case errors.Is(err, unix.EPERM):
		return errors.New("a rule of this node drops the request")
	case errors.Is(err, unix.EACCES):
		return errors.New("it is a broadcast address, or a route of this node prohibits it")
	}
	if p.From.IsValid() && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		return fmt.Errorf("this node does not have the source address %v", p.From)
	}
	return fmt.Errorf("sending the request: %w", err)
}

func tooBig(mtu uint32) error {
	if mtu == 0 {
		return errors.New("packet too big: the path MTU is unknown")
	}
	return fmt.Errorf("packet too big: the path MTU is %d", mtu)
}

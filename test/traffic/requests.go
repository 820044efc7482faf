// Package traffic makes tens of thousands of flows, and packets whose sources and fate are known
// exactly.
package traffic

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a request waits for its answer before it is repeated. tries is how often it
// is sent.
const (
	patience = time.Second
	tries    = 5
)

// Outcome counts the results of requests.
type Outcome struct {
	// First were answered without a repetition; they are among Answered. Refused ones received an
	// ICMP error, Lost ones nothing.
	First, Answered, Refused, Lost int
	Elapsed                        time.Duration
}

// String returns the counts in words.
func (o Outcome) String() string {
	return fmt.Sprintf("%d answered (%d at once), %d refused, %d lost, in %v", o.Answered, o.First, o.Refused, o.Lost, o.Elapsed.Round(time.Millisecond))
}

// Ends returns the source and the destination of the request with a number, over IPv4.
type Ends func(i int) (from, to netip.AddrPort)

// request waits for its answer.
type request struct {
	fd    int
	tries int
	due   time.Time
}

// Ask sends n requests over UDP, from the network namespace of the calling thread, each with a
// socket that lives until the answer is there. One that is not answered is repeated every second,
// four times.
func Ask(n int, ends Ends) (o Outcome, err error) {
	start := time.Now()
	var waiting []request
	defer func() {
		for _, r := range waiting {
			unix.Close(r.fd)
		}
	}()
	for i := 0; i < n || len(waiting) > 0; i++ {
		if i < n {
			fd, err := Begin(ends(i))
			if err != nil {
				return o, err
			}
			waiting = append(waiting, request{fd, 1, time.Now().Add(patience)})
		}
		if i%64 == 0 || i >= n {
			waiting = o.collect(waiting)
		}
		if i >= n || len(waiting) > 15_000 {
			time.Sleep(time.Millisecond)
		}
	}
	o.Elapsed = time.Since(start)
	return o, nil
}

var question = []byte("request")

// Begin sends a request over UDP from a new socket in the network namespace of the calling thread.
func Begin(from, to netip.AddrPort) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrInet4{Addr: from.Addr().As4(), Port: int(from.Port())}),
		unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}),
	)
	if err == nil {
		_, err = unix.Write(fd, question)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("sending from %v to %v: %w", from, to, err)
	}
	return fd, nil
}

// collect counts the requests that are decided, repeats those that are due, and returns those that
// wait on.
func (o *Outcome) collect(waiting []request) (on []request) {
	b := make([]byte, 64)
	now := time.Now()
	for _, r := range waiting {
		_, err := unix.Read(r.fd, b)
		switch {
		case err == nil:
			if o.Answered++; r.tries == 1 {
				o.First++
			}
		case err != unix.EAGAIN:
			o.Refused++
		case now.Before(r.due):
			on = append(on, r)
			continue
		case r.tries < tries:
			r.tries, r.due = r.tries+1, now.Add(patience)
			unix.Write(r.fd, question)
			on = append(on, r)
			continue
		default:
			o.Lost++
		}
		unix.Close(r.fd)
	}
	return on
}

// Held are flows over UDP that stay open.
type Held struct {
	fds  []int
	said int
}

// Hold begins n flows from the network namespace of the calling thread.
func Hold(n int, ends Ends) (*Held, error) {
	h := &Held{}
	for i := range n {
		fd, err := Begin(ends(i))
		if err != nil {
			h.Close()
			return nil, err
		}
		h.fds = append(h.fds, fd)
	}
	return h, nil
}

// Broken sends new data through each flow and returns the number of flows through which it does not
// come back within a minute.
func (h *Held) Broken() int {
	h.said++
	word := fmt.Appendf(nil, "word %d", h.said)
	for _, fd := range h.fds {
		unix.Write(fd, word)
	}
	b := make([]byte, 64)
	silent := h.fds
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		var on []int
		for _, fd := range silent {
			for {
				n, err := unix.Read(fd, b)
				if err == nil && bytes.Equal(b[:n], word) {
					break
				} else if err != nil {
					on = append(on, fd)
					break
				}
			}
		}
		if silent = on; len(silent) == 0 || time.Now().After(deadline) {
			return len(silent)
		}
	}
}

// Close ends the flows at their clients.
func (h *Held) Close() {
	for _, fd := range h.fds {
		unix.Close(fd)
	}
	h.fds = nil
}

// Echo sends every datagram back, until the socket is closed. heard, when it is not nil, is called
// with the source of each.
func Echo(c *net.UDPConn, heard func(netip.AddrPort)) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) }); err != nil || failed != nil {
		return errors.Join(err, failed)
	}
	b := make([]byte, 64)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		if heard != nil {
			heard(from)
		}
		c.WriteToUDPAddrPort(b[:n], from)
	}
}

package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// PingOptions of Ping. The zero value is usable.
type PingOptions struct {
	// Interval between packets, 10 ms if 0.
	Interval time.Duration
	// Source address; the kernel's choice if not valid.
	Source netip.Addr
	// Size of the ICMP messages in bytes, at least 16; 56 if 0.
	Size int
}

// Pinger sends ICMP echo requests at a rate that it never exceeds and remembers each of
// them.
type Pinger struct {
	conn  net.PacketConn
	dst   netip.Addr
	id    uint16
	stop  chan struct{}
	once  sync.Once // closes stop
	ended chan struct{}
	first chan struct{} // closed by the answer to the first packet

	mu       sync.Mutex
	sent     []time.Time
	answered []time.Time // zero: not yet
	doubles  int
	errs     []error // first few send errors
}

// Report of a Pinger. A packet counts as lost if it was not answered within
// two seconds after Stop.
type Report struct {
	Sent, Lost, Duplicates int
	// Longest time without an answer, between two answers or at either end.
	Gap time.Duration
	// MaxRTT is the slowest answer.
	MaxRTT time.Duration
	// FirstLost and LastLost are the times after the start when these were sent.
	FirstLost, LastLost time.Duration
	// Err joins the first few errors of sending; such packets count as lost.
	Err error
}

func (r Report) String() string {
	s := fmt.Sprintf("%d sent, %d lost, %d duplicates, longest gap %v, slowest %v", r.Sent, r.Lost, r.Duplicates, r.Gap.Round(time.Millisecond), r.MaxRTT.Round(time.Millisecond))
	if r.Lost > 0 {
		s += fmt.Sprintf(", lost between %v and %v", r.FirstLost.Round(time.Millisecond), r.LastLost.Round(time.Millisecond))
	}
	if r.Err != nil {
		s += ": " + r.Err.Error()
	}
	return s
}

// Ping starts to ping dst from the node, until Stop. The second packet waits for the answer to the
// first, up to a second.
func (n *Node) Ping(dst netip.Addr, o PingOptions) (*Pinger, error) {
	if o.Interval == 0 {
		o.Interval = 10 * time.Millisecond
	}
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if dst.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	local := ""
	if o.Source.IsValid() {
		local = o.Source.String()
	}
	// A raw socket gets every ICMP packet of the node. While this process does not run, on a busy
	// machine for hundreds of milliseconds, the buffer has to hold them.
	const buffer = 16 << 20
	p := &Pinger{dst: dst, id: uint16(rand.Uint32()), stop: make(chan struct{}), ended: make(chan struct{}), first: make(chan struct{})}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		fail := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer) })
		return errors.Join(fail, err)
	}}
	err := n.Do(func() (err error) { p.conn, err = lc.ListenPacket(context.Background(), network, local); return err })
	if err != nil {
		return nil, fmt.Errorf("pinging %s from %s: %w", dst, n.Name, err)
	}
	go p.receive(reply)
	if o.Size == 0 {
		o.Size = 56
	}
	go p.send(request, o.Interval, o.Size)
	return p, nil
}

func (p *Pinger) send(request byte, every time.Duration, size int) {
	defer close(p.ended)
	addr := &net.IPAddr{IP: p.dst.AsSlice()}
	for next := time.Now(); ; next = next.Add(every) {
		select {
		case <-p.stop:
			return
		case <-time.After(time.Until(next)):
		}
		// After a time without a processor the rate goes on from now: a burst
		// to catch up would overflow a queue that the promised rate does not.
		if late := time.Since(next); late > every {
			next = next.Add(late)
		}
		p.mu.Lock()
		seq := len(p.sent)
		p.sent = append(p.sent, time.Now())
		p.answered = append(p.answered, time.Time{})
		p.mu.Unlock()
		// type, code, checksum, identifier, sequence, and the whole sequence
		// number, because 16 bits wrap after eleven minutes
		b := make([]byte, size)
		b[0] = request
		binary.BigEndian.PutUint16(b[4:], p.id)
		binary.BigEndian.PutUint16(b[6:], uint16(seq))
		binary.BigEndian.PutUint64(b[8:], uint64(seq))
		if request == 8 { // of ICMPv6 the kernel computes it
			binary.BigEndian.PutUint16(b[2:], checksum(b))
		}
		if _, err := p.conn.WriteTo(b, addr); err != nil {
			p.mu.Lock()
			if len(p.errs) < 3 {
				p.errs = append(p.errs, err)
			}
			p.mu.Unlock()
		}
		// When connection tracking handles two packets of a flow that it does not have yet at the
		// same time, it drops the second (allow_clash; ICMP has it since Linux 6.19). Tunnels make
		// that likely: they deliver several packets at once.
		if seq == 0 {
			select {
			case <-p.stop:
			case <-p.first:
			case <-time.After(time.Second):
			}
		}
	}
}

func (p *Pinger) receive(reply byte) {
	b := make([]byte, 2048)
	for {
		k, _, err := p.conn.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || k < 16 || b[0] != reply || binary.BigEndian.Uint16(b[4:]) != p.id {
			continue
		}
		seq := binary.BigEndian.Uint64(b[8:])
		p.mu.Lock()
		switch {
		case seq >= uint64(len(p.sent)):
		case p.answered[seq].IsZero():
			p.answered[seq] = time.Now()
			if seq == 0 {
				close(p.first)
			}
		default:
			p.doubles++
		}
		p.mu.Unlock()
	}
}

// Stop ends the sending, waits up to two seconds for answers still under way,
// and reports. Later calls report the same.
func (p *Pinger) Stop() Report {
	p.once.Do(func() { close(p.stop) })
	<-p.ended
	var r Report
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if r = p.Report(); r.Lost == 0 || time.Now().After(end) {
			break
		}
	}
	p.conn.Close()
	return r
}

// Report returns the report that Stop would return now; packets still under way count as lost.
func (p *Pinger) Report() Report {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := Report{Sent: len(p.sent), Duplicates: p.doubles, Err: errors.Join(p.errs...)}
	if r.Sent == 0 {
		return r
	}
	start := p.sent[0]
	last := start
	for i, t := range p.answered {
		if t.IsZero() {
			if r.Lost++; r.Lost == 1 {
				r.FirstLost = p.sent[i].Sub(start)
			}
			r.LastLost = p.sent[i].Sub(start)
			continue
		}
		r.MaxRTT = max(r.MaxRTT, t.Sub(p.sent[i]))
		r.Gap = max(r.Gap, t.Sub(last))
		last = t
	}
	r.Gap = max(r.Gap, p.sent[r.Sent-1].Sub(last))
	return r
}

// checksum of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

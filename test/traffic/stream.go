package traffic

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Serve sends every datagram to an address back, until the test ends.
func Serve(t testing.TB, address netip.AddrPort) error {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(address))
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- Echo(c, nil) }()
	t.Cleanup(func() {
		c.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return nil
}

// The pace of a Stream, and how long it waits for another answer at its end.
const (
	pace   = 20 * time.Millisecond
	latest = 2 * time.Second
)

// Stream is a flow over UDP in which every packet is to come back.
type Stream struct {
	conn     *net.UDPConn
	stop     chan struct{}
	sender   sync.WaitGroup
	receiver sync.WaitGroup
	sent     atomic.Uint64
	answered atomic.Uint64
}

// Start begins a stream from the network namespace of the calling thread.
func Start(ends Ends) (*Stream, error) {
	from, to := ends(0)
	c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(from), net.UDPAddrFromAddrPort(to))
	if err != nil {
		return nil, fmt.Errorf("beginning a stream: %w", err)
	}
	s := &Stream{conn: c, stop: make(chan struct{})}
	s.sender.Go(s.send)
	s.receiver.Go(s.receive)
	return s, nil
}

func (s *Stream) send() {
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-tick.C:
			// An error, as of an ICMP message for an earlier packet, is a packet that is lost.
			n := s.sent.Add(1)
			s.conn.Write(binary.BigEndian.AppendUint64(nil, n))
		}
	}
}

func (s *Stream) receive() {
	seen := map[uint64]bool{}
	b := make([]byte, 64)
	for {
		n, err := s.conn.Read(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil && n == 8 && !seen[binary.BigEndian.Uint64(b)] {
			seen[binary.BigEndian.Uint64(b)] = true
			s.answered.Add(1)
		}
	}
}

// Passes reports whether packets come back within a time.
func (s *Stream) Passes(within time.Duration) bool {
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(pace) {
		if s.answered.Load() > 3 {
			return true
		}
	}
	return false
}

// Stop ends the stream and returns the number of packets that did not come back.
func (s *Stream) Stop() (lost uint64) {
	close(s.stop)
	s.sender.Wait()
	had := s.answered.Load()
	for end := time.Now().Add(latest); had < s.sent.Load() && time.Now().Before(end); time.Sleep(pace) {
		if n := s.answered.Load(); n > had {
			had, end = n, time.Now().Add(latest)
		}
	}
	s.conn.Close()
	s.receiver.Wait()
	return s.sent.Load() - s.answered.Load()
}

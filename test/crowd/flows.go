package crowd

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat/conntrack"
)

// Of returns how many flows there are from a source.
func (c *Crowd) Of(t testing.TB, source string) (n int) {
	t.Helper()
	if err := c.Flows.Dump(context.Background(), unix.AF_INET, func(f *conntrack.Flow) bool {
		if f.Original.Source.Addr() == netip.MustParseAddr(source) && f.Status&conntrack.Dying == 0 {
			n++
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// Ask opens a UDP flow from a source and waits for its answer.
func (c *Crowd) Ask(t testing.TB, source, destination string) {
	t.Helper()
	for limit := time.Now().Add(time.Minute); ; {
		var err error
		c.Client.Do(func() {
			var s net.Conn
			if s, err = (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(source)}}).Dial("udp", destination); err != nil {
				return
			}
			defer s.Close()
			s.SetDeadline(time.Now().Add(time.Second))
			if _, err = s.Write([]byte("request")); err == nil {
				_, err = s.Read(make([]byte, 100))
			}
		})
		if err == nil {
			return
		}
		if time.Now().After(limit) {
			t.Fatal(err)
		}
	}
}

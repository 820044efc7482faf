package crowd

import (
	"net"
	"testing"
	"time"
)

// TCP is a TCP service of the server, on all its addresses.
type TCP struct {
	c *Crowd
	l net.Listener
}

// Connection is both ends of a connection from a client to the service.
type Connection struct{ client, server net.Conn }

// Listen starts a TCP service at a port, such as ":443". It ends with the test.
func (c *Crowd) Listen(t testing.TB, port string) *TCP {
	t.Helper()
	s := &TCP{c: c}
	var err error
	c.Server.Do(func() { s.l, err = net.Listen("tcp", port) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.l.Close() })
	return s
}

// Connect opens a connection from a client's address to an address and port of the service.
func (s *TCP) Connect(t testing.TB, from, to string) Connection {
	t.Helper()
	var k Connection
	var err error
	s.c.Client.Do(func() {
		k.client, err = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: time.Minute}).Dial("tcp", to)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.client.Close() })
	if k.server, err = s.l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.server.Close() })
	return k
}

// Passes reports whether data that the client sends reaches the server within limit.
func (k Connection) Passes(limit time.Duration) bool {
	k.server.SetReadDeadline(time.Now().Add(limit))
	if _, err := k.client.Write([]byte("data")); err != nil {
		return false
	}
	_, err := k.server.Read(make([]byte, 100))
	return err == nil
}

package report

import (
	"errors"
	"net"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/test/crowd"
)

// TestEndFlows ends flows by hand. Ring: namespace.
func TestEndFlows(t *testing.T) {
	c := crowd.New(t, 1)
	ctx := t.Context()
	var l net.Listener
	var err error
	c.Server.Do(func() { l, err = net.Listen("tcp", ":443") })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	connect := func(from, to string) (client, server net.Conn) {
		t.Helper()
		c.Client.Do(func() {
			client, err = (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: time.Minute}).Dial("tcp", to)
		})
		if err == nil {
			server, err = l.Accept()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close(); server.Close() })
		return client, server
	}
	passes := func(from, to net.Conn, limit time.Duration) bool {
		to.SetReadDeadline(time.Now().Add(limit))
		if _, err := from.Write([]byte("data")); err != nil {
			return false
		}
		_, err := to.Read(make([]byte, 100))
		return err == nil
	}
	other, otherAt := connect("10.0.0.6", "198.51.100.1:443")
	c.Ask(t, "10.0.0.6", "198.51.100.1:53")
	if n := c.Of(t, "10.0.0.6"); n != 2 || !passes(other, otherAt, time.Minute) {
		t.Fatalf("%d flows, want 2", n)
	}
	r := New(Options{Flows: c.Flows, Observed: observer(t, machine{}, c.Config)})
	for _, q := range []*isthmusv1.EndFlowsRequest{
		{}, {Source: "10.0.0.6/16"}, {Source: "x"}, {Source: "10.0.0.6", Destination: "2001:db8::1"}, {Source: "10.0.0.6", Protocol: "gre"},
		{Source: "10.0.0.6", Port: 53}, {Source: "10.0.0.6", Protocol: "tcp", Port: 65536},
	} {
		if _, err := r.EndFlows(ctx, q); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("%v: %v", q, err)
		}
	}
	for _, k := range []struct {
		q    *isthmusv1.EndFlowsRequest
		want uint64
	}{
		{&isthmusv1.EndFlowsRequest{Source: "10.0.0.7"}, 0},
		{&isthmusv1.EndFlowsRequest{Source: "10.0.0.6", Destination: "198.51.100.2"}, 0},
		{&isthmusv1.EndFlowsRequest{Source: "10.0.0.6", Protocol: "icmp"}, 0},
		{&isthmusv1.EndFlowsRequest{Source: "10.0.0.6", Protocol: "tcp", Port: 443, Destination: "198.51.100.0/24"}, 1},
		{&isthmusv1.EndFlowsRequest{Source: "10.0.0.6/32"}, 1},
		{&isthmusv1.EndFlowsRequest{Source: "10.0.0.6/32"}, 0},
	} {
		if out, err := r.EndFlows(ctx, k.q); err != nil || out.Flows != k.want {
			t.Errorf("%v: %v %v, want %d", k.q, out, err, k.want)
		}
	}
	if passes(other, otherAt, time.Second) {
		t.Error("a flow that was ended by hand still passes")
	}
}

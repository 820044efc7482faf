package router

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/nat/conntrack"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
)

// of returns how many flows there are from a source.
func (c *crowd) of(source string) (n int) {
	c.t.Helper()
	if err := c.flows.Dump(context.Background(), unix.AF_INET, func(f *conntrack.Flow) bool {
		if f.Original.Source.Addr() == netip.MustParseAddr(source) && f.Status&conntrack.Dying == 0 {
			n++
		}
		return true
	}); err != nil {
		c.t.Fatal(err)
	}
	return n
}

// ask opens a UDP flow from a source and has it answered.
func (c *crowd) ask(source, destination string) {
	c.t.Helper()
	for limit := time.Now().Add(time.Minute); ; {
		var err error
		c.client.Do(func() {
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
			c.t.Fatal(err)
		}
	}
}

// TestFlowsEnd denies a host, with one exception, and ends what another has under way. Ring: namespace.
func TestFlowsEnd(t *testing.T) {
	c := newCrowd(t, 1)
	c.server.Run("ip addr add 198.51.100.2/24 dev lo")
	u := newUnsticker(c.flows, slog.New(slog.NewTextHandler(t.Output(), nil)))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); u.run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	u.use(c.config)

	var l net.Listener
	var err error
	c.server.Do(func() { l, err = net.Listen("tcp", ":443") })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	connect := func(from, to string) (client, server net.Conn) {
		t.Helper()
		c.client.Do(func() {
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
	denied, deniedAt := connect("10.0.0.5", "198.51.100.1:443")
	spared, sparedAt := connect("10.0.0.5", "198.51.100.2:443")
	other, otherAt := connect("10.0.0.6", "198.51.100.1:443")
	c.ask("10.0.0.5", "198.51.100.1:53")
	c.ask("10.0.0.6", "198.51.100.1:53")
	if a, b := c.of("10.0.0.5"), c.of("10.0.0.6"); a != 3 || b != 2 {
		t.Fatalf("%d and %d flows, want 3 and 2", a, b)
	}

	prefix := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	next := c.config
	next.Policies = append(next.Policies[:1:1],
		nat.Policy{Name: "stop", Action: nat.Deny, Sources: prefix("10.0.0.5/32"), Ends: true},
		nat.Policy{Name: "but", Action: nat.SNAT, Sources: prefix("10.0.0.0/16"), Destinations: prefix("198.51.100.2/32"), Pool: "p"})
	endings := nat.Endings(c.config, next)
	if len(endings) != 1 || endings[0].Name != "stop" {
		t.Fatalf("endings: %+v", endings)
	}
	r := &Router{Options: Options{Flows: c.flows}}
	if n, err := r.countFlows(endings); err != nil || n[0] != 2 {
		t.Errorf("the plan counts %v flows (%v), want 2", n, err)
	}
	if err := c.driver.Apply(ctx, next); err != nil {
		t.Fatal(err)
	}
	if !passes(denied, deniedAt, time.Minute) {
		t.Fatal("a flow under way does not pass although nothing has ended it: the test shows nothing")
	}
	u.use(next)
	for limit := time.Now().Add(time.Minute); c.of("10.0.0.5") != 1; {
		if time.Now().After(limit) {
			t.Fatalf("%d flows of the denied host, want the spared one", c.of("10.0.0.5"))
		}
		time.Sleep(10 * time.Millisecond)
	}
	if passes(denied, deniedAt, time.Second) {
		t.Error("the ended flow still passes")
	}
	if !passes(spared, sparedAt, time.Minute) {
		t.Error("the flow of a policy that beats the denial does not pass")
	}
	if !passes(other, otherAt, time.Minute) || c.of("10.0.0.6") != 2 {
		t.Error("a flow of another host does not pass")
	}

	r.around.read = true
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

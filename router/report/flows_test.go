package report

import (
	"errors"
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
	service := c.Listen(t, ":443")
	other := service.Connect(t, "10.0.0.6", "198.51.100.1:443")
	c.Ask(t, "10.0.0.6", "198.51.100.1:53")
	if n := c.Of(t, "10.0.0.6"); n != 2 || !other.Passes(time.Minute) {
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
	if other.Passes(time.Second) {
		t.Error("a flow that was ended by hand still passes")
	}
}

package report

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-net/isthmus/nat"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/fault"
	"github.com/isthmus-net/isthmus/router/packets"
	"github.com/isthmus-net/isthmus/router/plan"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// TestCaptureRequests checks what a request asks of the capture, and how its packets are reported.
func TestCaptureRequests(t *testing.T) {
	o := observer(t, machine{}, nat.Config{})
	target := plan.Target{
		Underlay:    spec.Underlay{Interface: "wan"},
		Tunnels:     []tunnel.Config{{Name: "a", Interface: "t-a"}, {Name: "down", Interface: "t-down"}, {Name: "none", Interface: "t-none"}, {Name: "off", Interface: "t-off", Disabled: true}},
		Attachments: []plan.Attachment{{Name: "lan", Interface: "eth1"}},
	}
	o.Use(nil, target)
	at, data := time.Unix(1_790_000_000, 5), []byte{0x45, 0, 0, 20}
	var got packets.Request
	r := New(Options{Observed: o, Log: slog.New(slog.DiscardHandler), Capture: func(_ context.Context, q packets.Request, each func([]packets.Packet, int) error) (packets.End, error) {
		got = q
		switch q.Interface {
		case "t-none":
			return "", packets.ErrNoInterface
		case "t-down":
			return "", packets.ErrDown
		}
		return packets.TimeOver, errors.Join(each(nil, 0), each([]packets.Packet{{Time: at, Leaving: true, Length: 1420, Data: data}, {Time: at, Length: 4, Data: data}}, 0), each(nil, 3))
	}})
	tunnelA, none := &isthmusv1.CaptureRequest_Tunnel{Tunnel: "a"}, func(*isthmusv1.CaptureReply) error { return nil }
	for _, k := range []struct {
		q    *isthmusv1.CaptureRequest
		want packets.Request
	}{
		{&isthmusv1.CaptureRequest{At: tunnelA}, packets.Request{Interface: "t-a"}},
		{&isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Attachment{Attachment: "lan"}}, packets.Request{Interface: "eth1"}},
		{&isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Underlay{Underlay: true}}, packets.Request{Interface: "wan"}},
		{&isthmusv1.CaptureRequest{At: tunnelA, Host: "10.1.2.3"}, packets.Request{Interface: "t-a", Filter: packets.Filter{Host: netip.MustParseAddr("10.1.2.3")}}},
		{&isthmusv1.CaptureRequest{At: tunnelA, Protocol: "icmp"}, packets.Request{Interface: "t-a", Filter: packets.Filter{Protocols: []uint8{1, 58}}}},
		{&isthmusv1.CaptureRequest{At: tunnelA, Protocol: "esp"}, packets.Request{Interface: "t-a", Filter: packets.Filter{Protocols: []uint8{50}}}},
		{&isthmusv1.CaptureRequest{At: tunnelA, Protocol: "0"}, packets.Request{Interface: "t-a", Filter: packets.Filter{Protocols: []uint8{0}}}},
		{&isthmusv1.CaptureRequest{At: tunnelA, Port: 65535}, packets.Request{Interface: "t-a", Filter: packets.Filter{Port: 65535}}},
		{&isthmusv1.CaptureRequest{At: tunnelA, Port: 53, Protocol: "udp"}, packets.Request{Interface: "t-a", Filter: packets.Filter{Protocols: []uint8{17}, Port: 53}}},
		{&isthmusv1.CaptureRequest{At: tunnelA, Port: 53, Protocol: "6"}, packets.Request{Interface: "t-a", Filter: packets.Filter{Protocols: []uint8{6}, Port: 53}}},
	} {
		k.q.Count, k.q.Size, k.q.Duration = 7, 100, durationpb.New(time.Second)
		k.want.Count, k.want.Size, k.want.Duration = 7, 100, time.Second
		if err := r.Capture(t.Context(), k.q, none); err != nil || !reflect.DeepEqual(got, k.want) {
			t.Errorf("%v: %+v, %v", k.q, got, err)
		}
	}

	var all []*isthmusv1.CaptureReply
	if err := r.Capture(t.Context(), &isthmusv1.CaptureRequest{At: tunnelA}, func(m *isthmusv1.CaptureReply) error { all = append(all, m); return nil }); err != nil {
		t.Fatal(err)
	}
	if len(all) != 4 || all[0].Interface != "t-a" || len(all[0].Packets) != 0 || all[1].Interface != "" || len(all[1].Packets) != 2 || all[2].Missing != 3 || all[3].Missing != 3 || all[3].End != "duration" || all[2].End != "" {
		t.Errorf("%v", all)
	} else if p := all[1].Packets[0]; !p.Time.AsTime().Equal(at) || !p.Leaving || p.Length != 1420 || string(p.Data) != string(data) || all[1].Packets[1].Leaving {
		t.Errorf("%v", all[1])
	}
	stop := errors.New("stop")
	if err := r.Capture(t.Context(), &isthmusv1.CaptureRequest{At: tunnelA}, func(m *isthmusv1.CaptureReply) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("an error of the caller: %v", err)
	}

	refused := func(q *isthmusv1.CaptureRequest, kind error, want string) {
		t.Helper()
		if err := r.Capture(t.Context(), q, none); !errors.Is(err, kind) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", q, err, want)
		}
	}
	by := func(name string) *isthmusv1.CaptureRequest {
		return &isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Tunnel{Tunnel: name}}
	}
	refused(by("b"), fault.ErrNoTunnel, `tunnel "b": not found`)
	refused(by("off"), fault.ErrPrecondition, "disabled in the document; enable it")
	refused(by("none"), fault.ErrPrecondition, "tunnel none: not possible now: the machine does not have its interface t-none")
	refused(by("down"), fault.ErrPrecondition, "tunnel down: not possible now: no packets pass")
	refused(&isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Attachment{Attachment: "wan"}}, fault.ErrNotFound, `attachment "wan": not found`)
	for _, protocol := range []string{"256", "-1", "TCP", "http", " "} {
		refused(&isthmusv1.CaptureRequest{At: tunnelA, Protocol: protocol}, api.ErrInvalid, "is not a protocol; give")
	}
	for _, protocol := range []string{"esp", "icmp", "132"} {
		refused(&isthmusv1.CaptureRequest{At: tunnelA, Protocol: protocol, Port: 443}, api.ErrInvalid, "does not have ports that can be selected")
	}
	target.Underlay.Interface = ""
	o.Use(nil, target)
	refused(&isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Underlay{Underlay: true}}, fault.ErrPrecondition, "does not have a document with an underlay yet")
}

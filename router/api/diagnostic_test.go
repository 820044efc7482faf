package api_test

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/reason"
)

// ping returns all replies to a request.
func ping(ctx context.Context, c isthmusv1.DiagnosticServiceClient, q *isthmusv1.PingRequest) (all []*isthmusv1.PingReply, err error) {
	stream, err := c.Ping(ctx, q)
	if err != nil {
		return nil, err
	}
	for {
		m, err := stream.Recv()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		all = append(all, m)
	}
}

// wantViolation wants an error about a field.
func wantViolation(t *testing.T, what string, err error, field, want string) {
	t.Helper()
	wantTheReason(t, what, err, reason.RequestInvalid)
	if !strings.Contains(status.Convert(err).Message(), want) {
		t.Errorf("%s: %v, want %q", what, err, want)
	}
	got := ""
	for _, d := range status.Convert(err).Details() {
		if b, ok := d.(*errdetails.BadRequest); ok {
			got = b.FieldViolations[0].Field
		}
	}
	if got != field {
		t.Errorf("%s: field %q, want %q", what, got, field)
	}
}

func TestPing(t *testing.T) {
	r := apitest.New(time.Now)
	r.SetTunnels(&isthmusv1.TunnelStatus{Name: "aws-0", State: "up"})
	s := apitest.Serve(t, time.Now, r)
	c := isthmusv1.NewDiagnosticServiceClient(dialRole(t, s, auth.Operator))
	all, err := ping(soon(t), c, &isthmusv1.PingRequest{Address: "10.1.2.3", Tunnel: "aws-0"})
	if err != nil || len(all) != 5 || all[4].Sequence != 5 || all[4].Address != "10.1.2.3" || all[4].RoundTrip.AsDuration() <= 0 || all[4].Error != "" {
		t.Errorf("%v, %v", all, err)
	}
	all, err = ping(soon(t), c, &isthmusv1.PingRequest{Address: "10.1.2.3", Count: 100, Interval: durationpb.New(200 * time.Millisecond), Size: 8972})
	if err != nil || len(all) != 100 {
		t.Errorf("%d replies, %v", len(all), err)
	}
	all, err = ping(soon(t), c, &isthmusv1.PingRequest{Address: apitest.PingNarrow, Size: 1400, DontFragment: true, Count: 1})
	if err != nil || len(all) != 1 || !strings.Contains(all[0].Error, "1400") || all[0].RoundTrip != nil {
		t.Errorf("too big: %v, %v", all, err)
	}

	_, err = ping(soon(t), isthmusv1.NewDiagnosticServiceClient(dialRole(t, s, auth.Reader)), &isthmusv1.PingRequest{Address: "10.1.2.3"})
	wantTheReason(t, "a reader", err, reason.PermissionRole)
	_, err = ping(soon(t), c, &isthmusv1.PingRequest{Address: "10.1.2.3", Tunnel: "aws-1"})
	wantTheReason(t, "an unknown tunnel", err, reason.NotFoundTunnel)

	for _, k := range []struct {
		q           *isthmusv1.PingRequest
		field, want string
	}{
		{&isthmusv1.PingRequest{}, "address", `"" is not a valid address`},
		{&isthmusv1.PingRequest{Address: "example.com"}, "address", `"example.com" is not a valid address`},
		{&isthmusv1.PingRequest{Address: "224.0.0.1"}, "address", "not a unicast address"},
		{&isthmusv1.PingRequest{Address: "ff02::1", Tunnel: "aws-0"}, "address", "not a unicast address"},
		{&isthmusv1.PingRequest{Address: "0.0.0.0"}, "address", "not a unicast address"},
		{&isthmusv1.PingRequest{Address: "0.1.2.3"}, "address", "not a unicast address"},
		{&isthmusv1.PingRequest{Address: "::"}, "address", "not a unicast address"},
		{&isthmusv1.PingRequest{Address: "255.255.255.255"}, "address", "not a unicast address"},
		{&isthmusv1.PingRequest{Address: "::ffff:10.1.2.3"}, "address", "give 10.1.2.3"},
		{&isthmusv1.PingRequest{Address: "fe80::1%eth0"}, "address", "has a zone"},
		{&isthmusv1.PingRequest{Address: "fe80::1"}, "address", "give the tunnel"},
		{&isthmusv1.PingRequest{Address: "10.1.2.3", Count: 101}, "count", "count 101: must be 1 to 100"},
		{&isthmusv1.PingRequest{Address: "10.1.2.3", Interval: durationpb.New(199 * time.Millisecond)}, "interval", "interval 199ms: must be 200ms to 10s"},
		{&isthmusv1.PingRequest{Address: "10.1.2.3", Interval: durationpb.New(10*time.Second + 1)}, "interval", "must be 200ms to 10s"},
		{&isthmusv1.PingRequest{Address: "10.1.2.3", Interval: &durationpb.Duration{Seconds: 1, Nanos: -1}}, "interval", "must be 200ms to 10s"},
		{&isthmusv1.PingRequest{Address: "10.1.2.3", Interval: durationpb.New(0)}, "interval", "interval 0s: must be 200ms to 10s"},
		{&isthmusv1.PingRequest{Address: "10.1.2.3", Size: 7}, "size", "size 7: must be 8 to 8972 bytes"},
		{&isthmusv1.PingRequest{Address: "10.1.2.3", Size: 8973}, "size", "size 8973: must be 8 to 8972 bytes"},
	} {
		_, err := ping(soon(t), c, k.q)
		wantViolation(t, k.q.String(), err, k.field, k.want)
	}

	wantAudited(t, s, "/Ping", "10.1.2.3 by tunnel aws-0")
}

// wantAudited wants the beginning and the good end of a call in the audit log.
func wantAudited(t *testing.T, s *apitest.Server, method, object string) {
	t.Helper()
	var begun, ended bool
	for _, e := range auditLog(t, s) {
		if strings.HasSuffix(e.Method, method) && e.Object == object {
			begun = begun || e.Event == auth.Begin
			ended = ended || e.Event == auth.End && e.Result == "OK"
		}
	}
	if !begun || !ended {
		t.Errorf("the audit log has begun %v, ended %v", begun, ended)
	}
}

// TestPingsAtOnce checks that four pings run at the same time.
func TestPingsAtOnce(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	testAtOnce(t, s, 4, s.Router.Pings, func(ctx context.Context, conn grpc.ClientConnInterface, address string) error {
		_, err := ping(ctx, isthmusv1.NewDiagnosticServiceClient(conn), &isthmusv1.PingRequest{Address: address})
		return err
	}, apitest.PingHangs, apitest.PingHangs)
}

// TestCapturesAtOnce checks that two captures run at the same time.
func TestCapturesAtOnce(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	testAtOnce(t, s, 2, s.Router.Captures, func(ctx context.Context, conn grpc.ClientConnInterface, host string) error {
		_, _, err := capture(ctx, isthmusv1.NewDiagnosticServiceClient(conn), &isthmusv1.CaptureRequest{At: underlay, Host: host})
		return err
	}, apitest.CaptureHangs, "underlay host "+apitest.CaptureHangs)
}

// testAtOnce checks that a number of calls run at the same time and one more is refused, and that a
// call ends with its caller and with the server. The call with the address hangs hangs, and has the
// object in the audit log.
func testAtOnce(t *testing.T, s *apitest.Server, most int, count func() int, call func(ctx context.Context, conn grpc.ClientConnInterface, address string) error, hangs, object string) {
	conn, other := dialRole(t, s, auth.Admin), dialRole(t, s, auth.Admin)
	running := func(n int) {
		t.Helper()
		for end := time.Now().Add(time.Minute); count() != n; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d calls run, want %d", count(), n)
			}
		}
	}
	begin := func(ctx context.Context) <-chan error {
		out := make(chan error, 1)
		go func() { out <- call(ctx, conn, hangs) }()
		return out
	}
	gone, leave := context.WithCancel(t.Context())
	begin(gone)
	var rest []<-chan error
	for n := 1; n < most; n++ {
		running(n)
		rest = append(rest, begin(soon(t)))
	}
	running(most)
	wantTheReason(t, "one more", call(soon(t), other, "10.1.2.3"), reason.TooManyCalls)
	leave()
	running(most - 1)
	// The place is free when the call has ended, which is a moment later.
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := call(soon(t), other, "10.1.2.3")
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after one has gone: %v", err)
		}
	}
	ended := false
	for _, e := range auditLog(t, s) {
		if e.Event == auth.End && e.Object == object {
			if ended = true; e.Result != "Canceled" {
				t.Errorf("the end of a call whose caller is gone: %+v", e)
			}
		}
	}
	if !ended {
		t.Error("the audit log does not have the end of the call whose caller is gone")
	}
	go s.Stop()
	for _, r := range rest {
		wantTheReason(t, "when the server stops", <-r, reason.Stopping)
	}
}

// underlay is the interface of a capture.
var underlay = &isthmusv1.CaptureRequest_Underlay{Underlay: true}

// capture returns all replies to a request, and all packets.
func capture(ctx context.Context, c isthmusv1.DiagnosticServiceClient, q *isthmusv1.CaptureRequest) (all []*isthmusv1.CaptureReply, packets []*isthmusv1.CapturedPacket, err error) {
	stream, err := c.Capture(ctx, q)
	if err != nil {
		return nil, nil, err
	}
	for {
		m, err := stream.Recv()
		if err == io.EOF {
			return all, packets, nil
		}
		if err != nil {
			return all, packets, err
		}
		all, packets = append(all, m), append(packets, m.Packets...)
	}
}

func TestCapture(t *testing.T) {
	r := apitest.New(time.Now)
	r.SetTunnels(&isthmusv1.TunnelStatus{Name: "aws-0", State: "up"})
	s := apitest.Serve(t, time.Now, r)
	c := isthmusv1.NewDiagnosticServiceClient(dialRole(t, s, auth.Admin))
	aws := &isthmusv1.CaptureRequest_Tunnel{Tunnel: "aws-0"}
	all, packets, err := capture(soon(t), c, &isthmusv1.CaptureRequest{At: aws, Host: "10.1.2.3", Protocol: "tcp", Port: 443, Count: 10_000, Duration: durationpb.New(5 * time.Minute), Size: 64})
	if err != nil || len(packets) != 10_000 || all[0].Interface != "t-aws-0" || len(all[0].Packets) != 0 || all[len(all)-1].End != "count" || string(packets[9999].Data) != string(apitest.Packet(9999)) {
		t.Errorf("%d replies with %d packets, %v", len(all), len(packets), err)
	}
	if _, packets, err = capture(soon(t), c, &isthmusv1.CaptureRequest{At: underlay}); err != nil || len(packets) != 1000 {
		t.Errorf("%d packets, %v", len(packets), err)
	}
	_, _, err = capture(soon(t), isthmusv1.NewDiagnosticServiceClient(dialRole(t, s, auth.Operator)), &isthmusv1.CaptureRequest{At: aws})
	wantTheReason(t, "an operator", err, reason.PermissionRole)
	_, _, err = capture(soon(t), c, &isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Tunnel{Tunnel: "aws-1"}})
	wantTheReason(t, "an unknown tunnel", err, reason.NotFoundTunnel)

	for _, k := range []struct {
		q           *isthmusv1.CaptureRequest
		field, want string
	}{
		{&isthmusv1.CaptureRequest{}, "at", "give a tunnel, an attachment or the underlay"},
		{&isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Tunnel{}}, "at", "give a tunnel"},
		{&isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Attachment{}}, "at", "give a tunnel"},
		{&isthmusv1.CaptureRequest{At: &isthmusv1.CaptureRequest_Underlay{}}, "at", "give a tunnel"},
		{&isthmusv1.CaptureRequest{At: aws, Host: "example.com"}, "host", `"example.com" is not a valid address`},
		{&isthmusv1.CaptureRequest{At: aws, Host: "fe80::1%eth0"}, "host", "has a zone"},
		{&isthmusv1.CaptureRequest{At: aws, Host: "::ffff:10.1.2.3"}, "host", "give 10.1.2.3"},
		{&isthmusv1.CaptureRequest{At: aws, Port: 65536}, "port", "port 65536: must be 1 to 65535"},
		{&isthmusv1.CaptureRequest{At: aws, Count: 10_001}, "count", "count 10001: must be 1 to 10000"},
		{&isthmusv1.CaptureRequest{At: aws, Duration: durationpb.New(time.Second - 1)}, "duration", "must be 1s to 5m0s"},
		{&isthmusv1.CaptureRequest{At: aws, Duration: durationpb.New(5*time.Minute + 1)}, "duration", "must be 1s to 5m0s"},
		{&isthmusv1.CaptureRequest{At: aws, Duration: &durationpb.Duration{Seconds: 2, Nanos: -1}}, "duration", "must be 1s to 5m0s"},
		{&isthmusv1.CaptureRequest{At: aws, Size: 63}, "size", "size 63: must be 64 to 65535 bytes"},
		{&isthmusv1.CaptureRequest{At: aws, Size: 65536}, "size", "size 65536: must be 64 to 65535 bytes"},
	} {
		_, _, err := capture(soon(t), c, k.q)
		wantViolation(t, k.q.String(), err, k.field, k.want)
	}

	wantAudited(t, s, "/Capture", "tunnel aws-0 host 10.1.2.3 protocol tcp port 443")
}

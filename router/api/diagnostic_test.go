package api_test

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
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
		wantTheReason(t, k.q.String(), err, reason.RequestInvalid)
		if !strings.Contains(status.Convert(err).Message(), k.want) {
			t.Errorf("%v: %v, want %q", k.q, err, k.want)
		}
		field := ""
		for _, d := range status.Convert(err).Details() {
			if b, ok := d.(*errdetails.BadRequest); ok {
				field = b.FieldViolations[0].Field
			}
		}
		if field != k.field {
			t.Errorf("%v: field %q, want %q", k.q, field, k.field)
		}
	}

	var begun, ended bool
	for _, e := range auditLog(t, s) {
		if strings.HasSuffix(e.Method, "/Ping") && e.Object == "10.1.2.3 by tunnel aws-0" {
			begun = begun || e.Event == auth.Begin
			ended = ended || e.Event == auth.End && e.Result == "OK"
		}
	}
	if !begun || !ended {
		t.Errorf("the audit log has begun %v, ended %v", begun, ended)
	}
}

// TestPingsAtOnce checks that four pings run at the same time and a fifth is refused, and that a
// ping ends with its caller and with the server.
func TestPingsAtOnce(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	c := isthmusv1.NewDiagnosticServiceClient(dialRole(t, s, auth.Operator))
	running := func(n int) {
		t.Helper()
		for end := time.Now().Add(time.Minute); s.Router.Pings() != n; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d pings run, want %d", s.Router.Pings(), n)
			}
		}
	}
	hang := &isthmusv1.PingRequest{Address: apitest.PingHangs}
	begin := func(ctx context.Context) <-chan error {
		out := make(chan error, 1)
		go func() {
			_, err := ping(ctx, c, hang)
			out <- err
		}()
		return out
	}
	gone, leave := context.WithCancel(t.Context())
	begin(gone)
	var rest []<-chan error
	for n := range 3 {
		running(n + 1)
		rest = append(rest, begin(soon(t)))
	}
	running(4)
	other := isthmusv1.NewDiagnosticServiceClient(dialRole(t, s, auth.Admin))
	_, err := ping(soon(t), other, &isthmusv1.PingRequest{Address: "10.1.2.3"})
	wantTheReason(t, "a fifth ping", err, reason.TooManyCalls)
	leave()
	running(3)
	// The place is free when the call has ended, which is a moment later.
	for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err = ping(soon(t), other, &isthmusv1.PingRequest{Address: "10.1.2.3"}); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after one has gone: %v", err)
		}
	}
	for _, e := range auditLog(t, s) {
		if e.Event == auth.End && e.Object == apitest.PingHangs && e.Result != "Canceled" {
			t.Errorf("the end of a ping whose caller is gone: %+v", e)
		}
	}
	go s.Stop()
	for _, r := range rest {
		wantTheReason(t, "when the server stops", <-r, reason.Stopping)
	}
}

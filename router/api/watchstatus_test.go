package api_test

import (
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
)

// TestWatchStatus checks that a change of counters is not sent, and that a token serves on another
// server with the same status.
func TestWatchStatus(t *testing.T) {
	fixed := time.Now()
	now := func() time.Time { return fixed }
	router := apitest.New(now)
	s := apitest.Serve(t, time.Now, router)
	watch := func(token string) grpc.ServerStreamingClient[isthmusv1.WatchStatusResponse] {
		t.Helper()
		stream, err := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader)).WatchStatus(soon(t), &isthmusv1.WatchStatusRequest{ResumeToken: token})
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	next := func(stream grpc.ServerStreamingClient[isthmusv1.WatchStatusResponse], conditions int) string {
		t.Helper()
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if n := len(m.Status.Conditions); n != conditions {
			t.Fatalf("%d conditions, want %d", n, conditions)
		}
		return m.ResumeToken
	}
	one := &isthmusv1.Condition{Type: "PoolDown"}
	stream := watch("")
	well := next(stream, 0)
	router.SetPorts(&isthmusv1.PortUse{Pool: "p", Percent: 50}) // not sent
	router.SetConditions(one)
	ill := next(stream, 1)
	router.SetConditions()
	if next(stream, 0) != well || ill == well {
		t.Error("the token is not that of the status")
	}
	resumed := watch(well)
	router.SetConditions(one, one)
	next(resumed, 2)
	next(watch(well), 2)

	s.Stop()
	_, err := resumed.Recv()
	wantCode(t, "when the server stops", err, codes.Unavailable)
	s = apitest.Serve(t, time.Now, router)
	router.SetConditions()
	resumed = watch(well)
	router.SetConditions(one)
	next(resumed, 1)
}

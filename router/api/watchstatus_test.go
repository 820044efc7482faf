package api_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/reason"
)

// TestWatchStatus checks that a watch sends the status when it has changed, that it does not send a
// change of counters or times, and that a token serves after another start of the node.
func TestWatchStatus(t *testing.T) {
	router := apitest.New(time.Now) // the time of the start differs in each status
	s := apitest.Serve(t, time.Now, router)
	// watch returns when the server has begun.
	watch := func(token string) grpc.ServerStreamingClient[isthmusv1.WatchStatusResponse] {
		t.Helper()
		stream, err := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader)).WatchStatus(soon(t), &isthmusv1.WatchStatusRequest{ResumeToken: token})
		if err != nil {
			t.Fatal(err)
		}
		stream.Header() // an error comes again at Recv
		return stream
	}
	next := func(stream grpc.ServerStreamingClient[isthmusv1.WatchStatusResponse], kinds string) string {
		t.Helper()
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range m.Status.Conditions {
			got = append(got, c.Type)
		}
		if strings.Join(got, " ") != kinds {
			t.Fatalf("conditions %q, want %q", got, kinds)
		}
		return m.ResumeToken
	}
	show := func(kinds ...string) {
		var all []*isthmusv1.Condition
		for _, kind := range kinds {
			all = append(all, &isthmusv1.Condition{Type: kind, Severity: "warning", Since: timestamppb.Now()})
		}
		router.SetConditions(all...)
	}
	// pass waits until the server has looked again. A message that it should not send would come
	// before the next one that it should.
	pass := func() { time.Sleep(2 * time.Second) }

	stream := watch("")
	well := next(stream, "")
	show("A", "B")
	ill := next(stream, "A B")
	router.SetPorts(&isthmusv1.PortUse{Pool: "p", Percent: 50})
	show("B", "A")
	pass()
	show()
	if next(stream, "") != well || ill == well {
		t.Error("the token is not that of the status")
	}
	router.SetQuietly(&isthmusv1.Condition{Type: "C"})
	next(stream, "C")
	resumed := watch(well)
	next(resumed, "C")

	s.Stop()
	_, err := resumed.Recv()
	wantCode(t, "when the server stops", err, codes.Unavailable)
	s = apitest.Serve(t, time.Now, router)
	show("B", "A")
	resumed = watch(ill)
	pass()
	show("D")
	next(resumed, "D")
	for _, token := range []string{"x", "!", ill + "AAAA"} {
		_, err := watch(token).Recv()
		wantTheReason(t, "token "+token, err, reason.PageToken)
	}
}

// TestWatchStatusUnsendable checks that a watch of a status that cannot be encoded ends with an
// error, and is not silent.
func TestWatchStatusUnsendable(t *testing.T) {
	router := apitest.New(time.Now)
	s := apitest.Serve(t, time.Now, router)
	router.SetConditions(&isthmusv1.Condition{Type: "A", Message: "\xff"})
	stream, err := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader)).WatchStatus(soon(t), &isthmusv1.WatchStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = stream.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("a text that is not UTF-8: %v", err)
	}
}

// TestWatchStatusPace checks that a node whose status changes all the time does not send it more
// than once a second.
func TestWatchStatusPace(t *testing.T) {
	router := apitest.New(time.Now)
	s := apitest.Serve(t, time.Now, router)
	stream, err := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader)).WatchStatus(soon(t), &isthmusv1.WatchStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var first time.Time
	for i := range 4 {
		router.SetConditions(&isthmusv1.Condition{Type: strings.Repeat("A", i+1)})
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = time.Now()
		}
	}
	if took := time.Since(first); took < 2500*time.Millisecond {
		t.Errorf("three further messages came within %v", took)
	}
}

// TestPauseAfter checks the pause after reads of a small node, of a large one and of a stuck one.
func TestPauseAfter(t *testing.T) {
	for took, want := range map[time.Duration]time.Duration{
		0: time.Second, 9 * time.Millisecond: time.Second, 30 * time.Millisecond: 3 * time.Second, time.Minute: 10 * time.Second,
	} {
		if got := api.PauseAfter(took); got != want {
			t.Errorf("after %v: %v, want %v", took, got, want)
		}
	}
}

package api_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/reason"
)

func wantTheReason(t *testing.T, what string, err error, want *reason.Reason) {
	t.Helper()
	wantCode(t, what, err, want.Code)
	if reason.Of(err) != want.Name {
		t.Errorf("%s: %v, want the reason %s", what, err, want.Name)
	}
}

type waited struct {
	*isthmusv1.WaitAppliedResponse
	err error
}

// TestWaitApplied checks how a call that waits for a generation ends: when it is carried out, when
// a later one is, at the end of its time, when the node reverts, and when the server stops.
func TestWaitApplied(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	specs := isthmusv1.NewSpecServiceClient(dialRole(t, s, auth.Reader))
	operator := isthmusv1.NewSpecServiceClient(dialRole(t, s, auth.Operator))
	accept := func(text string) {
		t.Helper()
		if _, err := operator.Apply(soon(t), &isthmusv1.ApplyRequest{Source: source(text)}); err != nil {
			t.Fatal(err)
		}
	}
	// begin calls, and returns when the call waits on the server.
	begin := func(ctx context.Context, generation uint64) <-chan waited {
		t.Helper()
		out := make(chan waited, 1)
		before := s.Router.Asked()
		go func() {
			r, err := specs.WaitApplied(ctx, &isthmusv1.WaitAppliedRequest{Generation: generation})
			out <- waited{r, err}
		}()
		for s.Router.Asked() == before {
			time.Sleep(time.Millisecond)
		}
		select {
		case r := <-out:
			t.Fatalf("it does not wait: %v, %v", r.WaitAppliedResponse, r.err)
		case <-time.After(20 * time.Millisecond): // a call that waits passes at any length
		}
		return out
	}

	_, err := specs.WaitApplied(soon(t), &isthmusv1.WaitAppliedRequest{})
	wantTheReason(t, "without a document", err, reason.NotFoundGeneration)
	accept("a")
	r, err := specs.WaitApplied(soon(t), &isthmusv1.WaitAppliedRequest{})
	if err != nil || !r.Applied || r.Generation != 1 || r.AppliedGeneration != 1 {
		t.Errorf("the present generation: %v, %v", r, err)
	}
	_, err = specs.WaitApplied(soon(t), &isthmusv1.WaitAppliedRequest{Generation: 2})
	wantTheReason(t, "a generation that does not exist", err, reason.NotFoundGeneration)
	for _, wrong := range []*durationpb.Duration{durationpb.New(0), durationpb.New(-time.Second), {Seconds: 1, Nanos: -1}} {
		_, err = specs.WaitApplied(soon(t), &isthmusv1.WaitAppliedRequest{MaxWait: wrong})
		wantTheReason(t, "max_wait", err, reason.RequestInvalid)
	}

	s.Router.SetStuck(true)
	accept("a\nb")
	s.Router.SetConditions(&isthmusv1.Condition{Type: "NotApplied", Severity: "error"}, &isthmusv1.Condition{Type: "PoolDegraded", Severity: "warning"})
	r, err = specs.WaitApplied(soon(t), &isthmusv1.WaitAppliedRequest{MaxWait: durationpb.New(100 * time.Millisecond)})
	if err != nil || r.Applied || r.Generation != 2 || r.PresentGeneration != 2 || r.AppliedGeneration != 1 || len(r.Conditions) != 1 || r.Conditions[0].Type != "NotApplied" {
		t.Errorf("at the end of max_wait: %v, %v", r, err)
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = specs.WaitApplied(short, &isthmusv1.WaitAppliedRequest{})
	if status.Code(err) != codes.DeadlineExceeded { // the client may be first, and gives no reason
		t.Errorf("at the deadline of the call: %v", err)
	}

	done := begin(soon(t), 2)
	s.Router.SetStuck(false)
	if w := <-done; w.err != nil || !w.Applied || w.AppliedGeneration != 2 {
		t.Errorf("when it is carried out: %v, %v", w.WaitAppliedResponse, w.err)
	}
	if r, err = specs.WaitApplied(soon(t), &isthmusv1.WaitAppliedRequest{Generation: 1}); err != nil || !r.Applied || r.Generation != 1 || r.AppliedGeneration != 2 {
		t.Errorf("when a later one is carried out: %v, %v", r, err)
	}
	s.Router.SetStuck(true)
	accept("c")
	done = begin(soon(t), 3)
	s.Router.Revert()
	wantTheReason(t, "when the node reverts", (<-done).err, reason.NotConfirmed)

	// Four calls of one client wait, and no more.
	gone, leave := context.WithCancel(t.Context())
	defer leave()
	all := []<-chan waited{begin(gone, 0), begin(soon(t), 0), begin(soon(t), 0), begin(soon(t), 0)}
	_, err = specs.WaitApplied(soon(t), &isthmusv1.WaitAppliedRequest{})
	wantTheReason(t, "a fifth call", err, reason.TooManyCalls)
	leave()
	if err := (<-all[0]).err; status.Code(err) != codes.Canceled {
		t.Errorf("a cancelled call: %v", err)
	}
	s.Stop()
	for _, one := range all[1:] {
		wantTheReason(t, "when the server stops", (<-one).err, reason.Stopping)
	}
}

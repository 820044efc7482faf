package api

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/isthmus-net/isthmus/router/auth"
)

func caller(ctx context.Context, serial string) context.Context {
	return peer.NewContext(ctx, &peer.Peer{AuthInfo: auth.Identity{Name: serial, Serial: serial}})
}

// TestGate checks that one call is in at a time and a bounded number waits, that one client cannot
// take all places, that root is exempt from the total, and that a cancelled call leaves.
func TestGate(t *testing.T) {
	g := newGate("with documents")
	first, err := g.enter(caller(t.Context(), "a"))
	if err != nil {
		t.Fatal(err)
	}
	in := make(chan func(), 2*maxWaiting)
	begin := func(ctx context.Context) {
		before := g.count()
		go func() {
			leave, err := g.enter(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			in <- leave
		}()
		for g.count() == before {
			time.Sleep(time.Millisecond)
		}
	}
	for range maxWaitingPerClient - 1 {
		begin(caller(t.Context(), "a"))
	}
	if _, err := g.enter(caller(t.Context(), "a")); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one call more than a client may have: %v", err)
	}
	for i := maxWaitingPerClient; i < maxWaiting; i++ {
		begin(caller(t.Context(), string(rune('b'+i/2))))
	}
	if _, err := g.enter(caller(t.Context(), "z")); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one call more than all clients may have: %v", err)
	}
	gone, cancel := context.WithCancel(caller(t.Context(), ""))
	cancel()
	if _, err := g.enter(gone); status.Code(err) != codes.Canceled {
		t.Errorf("a cancelled call of root: %v", err)
	}
	begin(caller(t.Context(), ""))
	if len(in) > 0 {
		t.Error("two calls are in")
	}
	for leave := first; ; leave = <-in {
		if leave(); g.count() == 0 {
			break
		}
	}
}

func (g *gate) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.total
}

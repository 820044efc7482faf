package api

import (
	"context"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/isthmus-net/isthmus/router/auth"
)

// Bounds of calls that read a whole document. Each of them may cost a second and some 300 MB.
const (
	// maxWaiting is how many calls wait at a gate, and maxWaitingPerClient how many of them are of one client: one that asks for more
	// keeps no other client out.
	maxWaiting          = 32
	maxWaitingPerClient = 4
)

// gate lets one call in at a time. There are two of them, for calls that read and for those that change something: a reader never holds up an
// operator, and at most two documents are worked on at a time.
type gate struct {
	turn chan struct{} // holds one token

	mu      sync.Mutex
	waiting map[string]int // by the serial of the client, with those that are in; empty: root on the node
	total   int
}

func newGate() *gate {
	g := &gate{turn: make(chan struct{}, 1), waiting: map[string]int{}}
	g.turn <- struct{}{}
	return g
}

// enter waits for the turn of a call, and returns what ends it. The error is a status.
func (g *gate) enter(ctx context.Context) (leave func(), err error) {
	who := auth.FromContext(ctx).Serial
	g.mu.Lock()
	// Root on the node comes in whatever the others do.
	if g.waiting[who] >= maxWaitingPerClient || who != "" && g.total >= maxWaiting {
		g.mu.Unlock()
		return nil, status.Errorf(codes.ResourceExhausted, "%d calls with documents of this client, and %d of all, wait already; try again later", maxWaitingPerClient, maxWaiting)
	}
	g.waiting[who]++
	g.total++
	g.mu.Unlock()
	gone := func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.total--
		if g.waiting[who]--; g.waiting[who] == 0 {
			delete(g.waiting, who)
		}
	}
	select {
	case <-g.turn:
	case <-ctx.Done():
		gone()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return func() {
		g.turn <- struct{}{}
		gone()
	}, nil
}

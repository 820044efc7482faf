package api

import (
	"context"
	"sync"

	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/reason"
)

// Bounds of calls that read a whole document or a table of BGP. Each of them may cost a second, and
// one with a document some 300 MB.
const (
	// maxWaiting bounds the calls at a gate, and maxWaitingPerClient those of one client, so that
	// one client cannot keep the others out.
	maxWaiting          = 32
	maxWaitingPerClient = 4
)

// gate lets one call in at a time. Calls that read, calls that change something, and calls that
// ask the BGP process have a gate each: a reader never delays an operator, at most two documents
// are processed at a time, and a silent BGP process delays no other calls.
type gate struct {
	what string        // describes the calls
	turn chan struct{} // holds one token
	// most bounds the calls, and each those of one client.
	most, each int

	mu sync.Mutex
	// waiting counts the calls by the serial of the client, including the one that is in. The empty
	// serial is root on the node.
	waiting map[string]int
	total   int
}

func newGate(what string) *gate { return newGateFor(what, maxWaiting, maxWaitingPerClient) }

func newGateFor(what string, most, each int) *gate {
	g := &gate{what: what, turn: make(chan struct{}, 1), most: most, each: each, waiting: map[string]int{}}
	g.turn <- struct{}{}
	return g
}

// enter waits for the turn of a call and returns the function that ends it. The error is a status.
func (g *gate) enter(ctx context.Context) (leave func(), err error) {
	gone, err := g.join(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case <-g.turn:
	case <-ctx.Done():
		gone()
		return nil, statusOf(ctx.Err())
	}
	return func() {
		g.turn <- struct{}{}
		gone()
	}, nil
}

// in makes a call when its turn comes. The error is a status.
func in[T any](ctx context.Context, g *gate, call func() (T, error)) (out T, err error) {
	leave, err := g.enter(ctx)
	if err != nil {
		return out, err
	}
	defer leave()
	out, err = call()
	return out, statusOf(err)
}

// join counts a call that waits, for its turn or for something else, until the returned function is
// called. The error is a status.
func (g *gate) join(ctx context.Context) (gone func(), err error) {
	who := auth.FromContext(ctx).Serial
	g.mu.Lock()
	defer g.mu.Unlock()
	// Root on the node is exempt from the total, so that clients cannot lock it out.
	if g.waiting[who] >= g.each || who != "" && g.total >= g.most {
		return nil, reason.TooManyCalls.Errorf("too many calls %s are waiting (at most %d of one client, %d of all clients); try again later", g.what, g.each, g.most)
	}
	g.waiting[who]++
	g.total++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.total--
		if g.waiting[who]--; g.waiting[who] == 0 {
			delete(g.waiting, who)
		}
	}, nil
}

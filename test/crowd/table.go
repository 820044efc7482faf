package crowd

import (
	"context"
	"slices"
	"sync"

	"github.com/isthmus-net/isthmus/nat/conntrack"
)

// Table is a connection table that a test fills.
type Table struct {
	sync.Mutex
	Flows []conntrack.Flow
}

// Dump calls see with every flow until it returns false.
func (t *Table) Dump(_ context.Context, _ uint8, see func(*conntrack.Flow) bool) error {
	t.Lock()
	defer t.Unlock()
	for i := range t.Flows {
		if !see(&t.Flows[i]) {
			break
		}
	}
	return nil
}

// End removes the flows that which selects, and returns their number.
func (t *Table) End(_ context.Context, _ uint8, which func(*conntrack.Flow) bool) (int, error) {
	t.Lock()
	defer t.Unlock()
	before := len(t.Flows)
	t.Flows = slices.DeleteFunc(t.Flows, func(f conntrack.Flow) bool { return which(&f) })
	return before - len(t.Flows), nil
}

// Stats returns the number of flows.
func (t *Table) Stats(context.Context) (conntrack.Stats, error) {
	t.Lock()
	defer t.Unlock()
	return conntrack.Stats{Entries: uint32(len(t.Flows)), Limit: 1 << 18}, nil
}

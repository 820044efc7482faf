// Package translog logs source NAT on disk: which inside source used which outside address and
// port, and with which destination. It writes a record for each flow that ends, from the kernel's
// conntrack events, and answers queries from these records and from the live flows.
package translog

import (
	"net/netip"
	"slices"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

// Record is one translated flow. Times are exact to the millisecond.
type Record struct {
	// Start is zero when unknown: the flow began before conntrack timestamps were enabled.
	Start time.Time
	// End is zero while the flow lives. With Vanished, the flow had ended by this time.
	End      time.Time
	Vanished bool
	// Inside is the source before translation, Outside the source after it, and Destination the
	// remote end. With ICMP, the port of Inside and Outside is the query's identifier.
	Inside, Outside, Destination netip.AddrPort
	Protocol                     uint8  // IP protocol number
	Policy                       string // that translated the flow; empty: unknown
	// Sent counts what left, Received what came back.
	Sent, Received nat.Counter
}

// Query selects the flows that had an outside address and port at a time.
type Query struct {
	Outside     netip.AddrPort
	From, To    time.Time  // both included
	Protocol    uint8      // 0: all
	Destination netip.Addr // not valid: all
	// AnyPort ignores the port of Outside.
	AnyPort bool
	// Limit bounds the number of flows, in no particular order; 0: no limit.
	Limit int
}

// full reports whether n flows are enough.
func (q Query) full(n int) bool { return q.Limit > 0 && n >= q.Limit }

// row is a Record in memory: without pointers, and with indices into the lists of its batch.
type row struct {
	start, end                           int64 // ms since 1970
	sent, received                       nat.Counter
	inside, outside, destination, policy uint32
	insidePort, outsidePort              uint16
	protocol                             uint8
	flags                                uint8
}

const (
	startUnknown = 1 << iota
	vanished
)

// list numbers values.
type list[T comparable] struct {
	values []T
	number map[T]uint32
}

func (l *list[T]) add(v T) uint32 {
	n, ok := l.number[v]
	if !ok {
		if l.number == nil {
			l.number = map[T]uint32{}
		}
		n = uint32(len(l.values))
		l.values = append(l.values, v)
		l.number[v] = n
	}
	return n
}

// names are the lists that the rows of a batch index. A destination is an address and a port.
type names struct {
	outside, inside []netip.Addr
	destinations    []netip.AddrPort
	policies        []string
}

// batch is rows that are still in memory. It only grows, so that earlier views of it stay valid.
type batch struct {
	rows            []row
	outside, inside list[netip.Addr]
	destinations    list[netip.AddrPort]
	policies        list[string]
}

func (b *batch) add(r Record) {
	w := row{
		start: r.Start.UnixMilli(), end: r.End.UnixMilli(), sent: r.Sent, received: r.Received,
		inside: b.inside.add(r.Inside.Addr()), outside: b.outside.add(r.Outside.Addr()), destination: b.destinations.add(r.Destination),
		policy: b.policies.add(r.Policy), insidePort: r.Inside.Port(), outsidePort: r.Outside.Port(), protocol: r.Protocol,
	}
	if r.Start.IsZero() {
		w.start, w.flags = w.end, startUnknown
	}
	if r.Vanished {
		w.flags |= vanished
	}
	if len(b.rows) == cap(b.rows) {
		// Double the capacity: append alone adds a quarter, and would copy every row five times
		// instead of twice.
		b.rows = slices.Grow(b.rows, max(len(b.rows), 1<<10))
	}
	b.rows = append(b.rows, w)
}

func (b *batch) names() names {
	return names{b.outside.values, b.inside.values, b.destinations.values, b.policies.values}
}

// bounds returns the times between which a flow lies. It ends before it starts when the clock was
// set back meanwhile; a query may mean either time then.
func (w *row) bounds() (from, to int64) { return min(w.start, w.end), max(w.start, w.end) }

// matches reports whether a row answers a query, except for its addresses.
func (w *row) matches(q Query) bool {
	from, to := w.bounds()
	return (q.AnyPort || w.outsidePort == q.Outside.Port()) && (q.Protocol == 0 || w.protocol == q.Protocol) &&
		to >= q.From.UnixMilli() && (from <= q.To.UnixMilli() || w.flags&startUnknown != 0)
}

func (n *names) record(w row) Record {
	r := Record{
		Start: time.UnixMilli(w.start), End: time.UnixMilli(w.end), Vanished: w.flags&vanished != 0,
		Inside: netip.AddrPortFrom(n.inside[w.inside], w.insidePort), Outside: netip.AddrPortFrom(n.outside[w.outside], w.outsidePort),
		Destination: n.destinations[w.destination], Protocol: w.protocol, Policy: n.policies[w.policy], Sent: w.sent, Received: w.received,
	}
	if w.flags&startUnknown != 0 {
		r.Start = time.Time{}
	}
	return r
}

// find appends the rows that answer a query.
func (n *names) find(rows []row, q Query, found []Record) []Record {
	for i := range rows {
		if q.full(len(found)) {
			break
		}
		if w := &rows[i]; w.matches(q) && n.outside[w.outside] == q.Outside.Addr() &&
			(!q.Destination.IsValid() || n.destinations[w.destination].Addr() == q.Destination) {
			found = append(found, n.record(*w))
		}
	}
	return found
}

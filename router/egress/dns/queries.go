package dns

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/backoff"
	"github.com/isthmus-net/isthmus/router/egress"
)

// query is the state of one of the two questions of a name: for its IPv4 or for its IPv6 addresses.
type query struct {
	next     time.Time    // when it is due
	asked    time.Time    // since when an answer is pending; zero: none is
	due      time.Time    // when the query that is pending or put off was due; it may be sent late
	failures int          // in a row
	tried    time.Time    // time of the last failure
	failing  time.Time    // since when; zero: it does not fail
	err      string       // of the last failure
	unused   bool         // no policy can use the family, so that it is not queried
	changes  int          // answers in a row with addresses that were new
	changed  time.Time    // when changes reached changing
	refused  []netip.Addr // addresses of the last answer that no name may have
}

// answered stores the answer to a query, which may have no address.
func (t *table) answered(name string, ipv6 bool, addrs []netip.Addr, ttl time.Duration, now time.Time) (news bool) {
	r := t.records[name]
	if r == nil {
		return false // the name was removed meanwhile
	}
	was := &r.queries[b2i(ipv6)]
	q := query{next: now.Add(t.life(ttl)), unused: was.unused}
	had, fresh := false, false // of the family
	for a := range r.entries {
		had = had || a.Is6() == ipv6
	}
	for _, a := range addrs {
		if !t.allowed(a) {
			q.refused = append(q.refused, a)
		} else if r.entries[a] == nil {
			fresh = true
		}
	}
	q.refused = q.refused[:min(len(q.refused), maxRefused)]
	if had && fresh {
		if q.changes, q.changed = min(was.changes+1, changing), was.changed; q.changes == changing && was.changes < changing {
			q.changed = now
		}
	}
	*was = q
	return t.learn("", name, addrs, ttl, now)
}

// differs returns since when each answer to the node has had new addresses, so that clients of
// another resolver receive addresses that are not destinations. Zero: it is not so, or clients use
// the proxy.
func (t *table) differs(r *record, now time.Time) (since time.Time) {
	if !r.proxied.IsZero() && now.Sub(r.proxied) < goneTime {
		return since
	}
	for i := range r.queries {
		if q := &r.queries[i]; q.changes >= changing && (since.IsZero() || q.changed.Before(since)) {
			since = q.changed
		}
	}
	return since
}

// failed stores the failure of a query.
func (t *table) failed(name string, ipv6 bool, err error, now time.Time) {
	r := t.records[name]
	if r == nil {
		return
	}
	q := &r.queries[b2i(ipv6)]
	if q.failing.IsZero() {
		// A query that was sent late, because the machine was paused or busy, counts from when
		// it was due: its addresses were good then, and stay for the grace time.
		q.failing = now
		if !q.asked.IsZero() {
			q.failing = q.asked
			if !q.due.IsZero() && q.due.Before(q.asked) {
				q.failing = q.due
			}
		}
	}
	q.asked, q.due = time.Time{}, time.Time{}
	q.next = now.Add(backoff.Backoff{First: soonest, Last: t.floor}.Delay(q.failures))
	q.failures++
	q.tried = now
	q.err = err.Error()
}

// late returns when an address goes that would go at until, given the failures and the grace time.
func (r *record) late(a netip.Addr, until time.Time, grace time.Duration) time.Time {
	failing := r.queries[b2i(a.Is6())].failing
	if late := failing.Add(grace); !failing.IsZero() && !until.Before(failing) && late.After(until) {
		return late
	}
	return until
}

// ask is a query that is due.
type ask struct {
	name string
	ipv6 bool
}

// due returns the queries to send now, and postpones their next turn beyond askTimeout.
func (t *table) due(now time.Time) (asks []ask) {
	for name, r := range t.records {
		if egress.IsWildcard(name) {
			continue
		}
		for i := range r.queries {
			if q := &r.queries[i]; !q.unused && !q.next.After(now) {
				if q.due.IsZero() { // else it was put off
					q.due = q.next
				}
				q.asked, q.next = now, now.Add(askTimeout+time.Second)
				asks = append(asks, ask{name, i == 1})
			}
		}
	}
	// Failing queries come in the order of their last try, because there may be more than can be
	// sent.
	slices.SortFunc(asks, func(a, b ask) int {
		return cmp.Or(t.query(a).tried.Compare(t.query(b).tried), strings.Compare(a.name, b.name), b2i(a.ipv6)-b2i(b.ipv6))
	})
	return asks
}

// query returns the state of a query of the table.
func (t *table) query(a ask) *query { return &t.records[a.name].queries[b2i(a.ipv6)] }

// fails reports whether the last result of a query was a failure.
func (t *table) fails(a ask) bool { return t.records[a.name] != nil && t.query(a).failures > 0 }

// putOff postpones a due query by soonest.
func (t *table) putOff(a ask, now time.Time) {
	if t.records[a.name] != nil {
		q := t.query(a)
		q.next, q.asked = now.Add(soonest), time.Time{}
	}
}

// next returns when something is due or expires; zero: never.
func (t *table) next() (next time.Time) {
	sooner := func(at time.Time) {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	for name, r := range t.records {
		if !egress.IsWildcard(name) {
			for i := range r.queries {
				if q := &r.queries[i]; !q.unused {
					sooner(q.next)
				}
			}
		}
		for a, e := range r.entries {
			if r.queries[b2i(a.Is6())].asked.IsZero() {
				sooner(r.late(a, t.until(e), t.grace))
			}
		}
	}
	return next
}

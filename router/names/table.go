package names

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/nat"
)

const (
	// maxAddresses is how many addresses one name may have. Those that would go first make room.
	maxAddresses = 4096
	// longest is the longest time to live that counts: nobody may pin an address for years.
	longest = 24 * time.Hour
	// soonest is the time to the first query after a failed one; it doubles up to the floor.
	soonest = time.Second
)

// query is one of the two questions of a name: for its IPv4 or for its IPv6 addresses.
type query struct {
	next     time.Time // when it is due
	asked    time.Time // since when an answer is awaited; zero: none is
	failures int       // in a row
	failing  time.Time // since when; zero: it does not fail
	err      string    // of the last failure
	unused   bool      // no policy can use the family, so that it is not asked for
}

// record is what is known of a name or wildcard.
type record struct {
	until   map[netip.Addr]time.Time // when an address ends to be a destination, unless it is answered again
	queries [2]query                 // for IPv4 and IPv6; unused for a wildcard
}

// table is what is known of all names. It has no clock and does no I/O.
type table struct {
	floor, grace time.Duration
	records      map[string]*record
	inside       func(netip.Addr) bool // which no name may stand for; nil: all may
}

func newTable() *table { return &table{records: map[string]*record{}} }

// set replaces the names. What is known of those that stay is kept; new ones are due at once. It reports whether addresses are gone.
func (t *table) set(names []string, c Config, now time.Time) (gone bool) {
	t.floor, t.grace = c.Floor, c.Grace
	former := t.records
	t.records = make(map[string]*record, len(names))
	for _, n := range names {
		r := former[n]
		if r == nil {
			r = &record{until: map[netip.Addr]time.Time{}}
			for i := range r.queries {
				r.queries[i].next = now
			}
		}
		t.records[n] = r
		delete(former, n)
	}
	for _, r := range former {
		gone = gone || len(r.until) > 0
	}
	return gone
}

// use sets which families are asked for. One that begins to be used is due at once, and nothing of one that is not used fails.
func (t *table) use(unused func(name string, ipv6 bool) bool, now time.Time) {
	for name, r := range t.records {
		for i := range r.queries {
			if q := &r.queries[i]; unused != nil && unused(name, i == 1) {
				*q = query{next: now, unused: true}
			} else {
				q.unused = false
			}
		}
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// life is how long an address may be told on, after which time it is asked for again.
func (t *table) life(ttl time.Duration) time.Duration { return min(max(ttl, t.floor), longest) }

// allowed says whether an address may be a destination: whoever runs a name's zone must not reach into the node or its links by it.
func (t *table) allowed(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !a.Is4In6() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255}) &&
		!nat.PlatformOf(a).IsValid() && (t.inside == nil || !t.inside(a))
}

// learn makes addresses destinations of every name that stands for the one that was asked, for twice the time to live. It reports
// whether there was a new one.
func (t *table) learn(name string, addrs []netip.Addr, ttl time.Duration, now time.Time) (news bool) {
	for pattern, r := range t.records {
		if Matches(pattern, name) {
			news = t.add(r, addrs, now.Add(2*t.life(ttl))) || news
		}
	}
	return news
}

// wants says whether a name or wildcard that was set stands for a name.
func (t *table) wants(name string) bool {
	for pattern := range t.records {
		if Matches(pattern, name) {
			return true
		}
	}
	return false
}

func (t *table) add(r *record, addrs []netip.Addr, until time.Time) (news bool) {
	for _, a := range addrs {
		if !t.allowed(a) {
			continue
		}
		had, ok := r.until[a]
		news = news || !ok
		if until.After(had) {
			r.until[a] = until
		}
	}
	for len(r.until) > maxAddresses {
		var first netip.Addr
		for a, at := range r.until {
			if !first.IsValid() || at.Before(r.until[first]) || at.Equal(r.until[first]) && a.Less(first) {
				first = a
			}
		}
		delete(r.until, first)
	}
	return news
}

// answered takes the answer to a query; there may be no address in it.
func (t *table) answered(name string, ipv6 bool, addrs []netip.Addr, ttl time.Duration, now time.Time) (news bool) {
	r := t.records[name]
	if r == nil {
		return false // nobody wants it any more
	}
	r.queries[b2i(ipv6)] = query{next: now.Add(t.life(ttl)), unused: r.queries[b2i(ipv6)].unused}
	return t.learn(name, addrs, ttl, now)
}

// failed takes the failure of a query.
func (t *table) failed(name string, ipv6 bool, err error, now time.Time) {
	r := t.records[name]
	if r == nil {
		return
	}
	q := &r.queries[b2i(ipv6)]
	if q.failing.IsZero() {
		q.failing = now
		if !q.asked.IsZero() {
			q.failing = q.asked
		}
	}
	q.asked = time.Time{}
	q.next = now.Add(min(soonest<<min(q.failures, 20), t.floor))
	q.failures++
	q.err = err.Error()
}

// expire drops the addresses whose time is over, and reports whether there was one. While an answer is awaited nothing is concluded, and
// while nobody answers, those that were good when that began stay for the grace time.
func (t *table) expire(now time.Time) (gone bool) {
	for _, r := range t.records {
		for a, until := range r.until {
			if !r.queries[b2i(a.Is6())].asked.IsZero() || r.end(a, until, t.grace).After(now) {
				continue
			}
			delete(r.until, a)
			gone = true
		}
	}
	return gone
}

// end returns when an address goes, as things are.
func (r *record) end(a netip.Addr, until time.Time, grace time.Duration) time.Time {
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

// due returns the queries that are to be made now, and puts them off so that they are not returned again before they can be over.
func (t *table) due(now time.Time) (asks []ask) {
	for name, r := range t.records {
		if IsWildcard(name) {
			continue
		}
		for i := range r.queries {
			if q := &r.queries[i]; !q.unused && !q.next.After(now) {
				q.next, q.asked = now.Add(askTimeout+time.Second), now
				asks = append(asks, ask{name, i == 1})
			}
		}
	}
	slices.SortFunc(asks, func(a, b ask) int { return strings.Compare(a.name, b.name)*2 + b2i(a.ipv6) - b2i(b.ipv6) })
	return asks
}

// next returns when something is due or goes; zero: never.
func (t *table) next() (next time.Time) {
	sooner := func(at time.Time) {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	for name, r := range t.records {
		if !IsWildcard(name) {
			for i := range r.queries {
				if q := &r.queries[i]; !q.unused {
					sooner(q.next)
				}
			}
		}
		for a, until := range r.until {
			if r.queries[b2i(a.Is6())].asked.IsZero() {
				sooner(r.end(a, until, t.grace))
			}
		}
	}
	return next
}

// addresses returns the addresses of a name, in order.
func (t *table) addresses(name string) []netip.Addr {
	r := t.records[name]
	if r == nil {
		return nil
	}
	out := make([]netip.Addr, 0, len(r.until))
	for a := range r.until {
		out = append(out, a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// encode returns what a later run must know.
func (t *table) encode() ([]byte, error) {
	out := map[string]map[netip.Addr]time.Time{}
	for name, r := range t.records {
		out[name] = r.until
	}
	return json.Marshal(out)
}

// decode takes what a former run knew. Until a server has answered, that stays for the grace time.
func (t *table) decode(data []byte, now time.Time) error {
	var known map[string]map[netip.Addr]time.Time
	if err := json.Unmarshal(data, &known); err != nil {
		return fmt.Errorf("decoding names: %w", err)
	}
	for name, until := range known {
		if n, err := Parse(name); err != nil || n != name {
			return fmt.Errorf("decoding names: %q is no name", name)
		}
		r := &record{until: map[netip.Addr]time.Time{}}
		for a, at := range until {
			if !IsWildcard(name) && at.Before(now) {
				at = now // it was good when the former run ended
			}
			t.add(r, []netip.Addr{a}, at)
		}
		for i := range r.queries {
			r.queries[i] = query{next: now, failing: now}
		}
		t.records[name] = r
	}
	return nil
}

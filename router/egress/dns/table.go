package dns

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/egress"
)

const (
	// maxAddresses bounds the claims to addresses of one name, and those of one attachment in all
	// names. The claimant with the most makes room, with the claims that would end first.
	maxAddresses = 4096
	// maxGone bounds the addresses that are listed after names have lost them, and goneTime their
	// age.
	maxGone  = 4096
	goneTime = time.Hour
	// maxRefused bounds the refused addresses of an answer that are shown.
	maxRefused = 4
	// changing is how many answers in a row must have new addresses before differs reports the
	// name.
	changing = 4
	// longest caps the time to live, so that a zone cannot pin an address for years.
	longest = 24 * time.Hour
	// soonest is the delay of the first query after a failure; it doubles up to the floor.
	soonest = time.Second
)

// claim records that an attachment, or the node itself, received an address.
type claim struct {
	by    string    // interface of the attachment; empty: the node itself
	until time.Time // twice the time to live after the last answer
	last  time.Time // of the last answer
}

// entry is an address of a name. It is a destination while one of its claims lasts.
type entry struct {
	claims []claim
	used   time.Time // when a flow to it was last seen; zero: none was
}

// record is the state of a name or wildcard.
type record struct {
	entries map[netip.Addr]*entry
	held    map[string]int // number of claims in entries, by claimant
	queries [2]query       // for IPv4 and IPv6; unused for a wildcard
	proxied time.Time      // when a client of the proxy last received an answer for it
}

func newRecord() *record { return &record{entries: map[netip.Addr]*entry{}, held: map[string]int{}} }

// Gone is an address that a name has lost.
type Gone struct {
	Name    string
	Address netip.Addr
	At      time.Time // when it went
}

// table is the state of all names. It has no clock and does no I/O.
type table struct {
	floor, grace time.Duration
	// how long an address stays after it was last received or used; 0: only the time to live counts
	hold    time.Duration
	records map[string]*record
	owned   map[string]int        // claims of all records, by claimant
	gone    []Gone                // in the order in which they went
	inside  func(netip.Addr) bool // addresses that no name may have; nil: none is excluded
}

func newTable() *table { return &table{records: map[string]*record{}, owned: map[string]int{}} }

// set replaces the names. Names that stay keep their state; new ones are due at once. It reports
// whether addresses are gone.
func (t *table) set(names []string, c egress.DNS, now time.Time) (gone bool) {
	t.floor, t.grace, t.hold = c.Floor, c.Grace, c.Hold
	former := t.records
	t.records = make(map[string]*record, len(names))
	for _, n := range names {
		r := former[n]
		if r == nil {
			r = newRecord()
			for i := range r.queries {
				r.queries[i].next = now
			}
		}
		t.records[n] = r
		delete(former, n)
	}
	for _, r := range former {
		gone = gone || len(r.entries) > 0
		for a := range r.entries {
			t.drop(r, a)
		}
	}
	return gone
}

// drop ends all claims to an address.
func (t *table) drop(r *record, a netip.Addr) {
	for _, c := range slices.Clone(r.entries[a].claims) {
		t.unclaim(r, a, c.by)
	}
}

// unclaim ends one claim to an address, and reports whether it was the last.
func (t *table) unclaim(r *record, a netip.Addr, by string) (last bool) {
	e := r.entries[a]
	e.claims = slices.DeleteFunc(e.claims, func(c claim) bool { return c.by == by })
	less := func(held map[string]int) {
		if held[by]--; held[by] == 0 {
			delete(held, by)
		}
	}
	less(r.held)
	less(t.owned)
	if len(e.claims) == 0 {
		delete(r.entries, a)
	}
	return len(e.claims) == 0
}

// use sets which families are queried. A family that becomes used is due at once, and an unused one
// does not fail.
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

// life is how long clients may use an address, after which it is queried again.
func (t *table) life(ttl time.Duration) time.Duration { return min(max(ttl, t.floor), longest) }

// allowed reports whether an address may be a destination. It must not let the owner of a name's
// zone reach into the node or its links.
func (t *table) allowed(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !a.Is4In6() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255}) &&
		!nat.PlatformOf(a).IsValid() && (t.inside == nil || !t.inside(a))
}

// learn makes addresses destinations of every set name that matches, for twice the time to live, or
// longer by hold. by is the receiver of the answer. It reports whether an address is new.
func (t *table) learn(by, name string, addrs []netip.Addr, ttl time.Duration, now time.Time) (news bool) {
	for pattern, r := range t.records {
		if egress.NameMatches(pattern, name) {
			news = t.add(pattern, by, addrs, now.Add(2*t.life(ttl)), now) || news
			if by != "" {
				r.proxied = now
			}
		}
	}
	return news
}

// unknown returns how many addresses would be new to set names that match.
func (t *table) unknown(name string, addrs []netip.Addr) (n int) {
	for pattern, r := range t.records {
		if egress.NameMatches(pattern, name) {
			for _, a := range addrs {
				n += b2i(r.entries[a] == nil && t.allowed(a))
			}
		}
	}
	return n
}

// wants reports whether a set name or wildcard matches a name.
func (t *table) wants(name string) bool {
	for pattern := range t.records {
		if egress.NameMatches(pattern, name) {
			return true
		}
	}
	return false
}

func (t *table) add(name, by string, addrs []netip.Addr, until, now time.Time) (news bool) {
	r := t.records[name]
	for _, a := range addrs {
		if !t.allowed(a) {
			continue
		}
		e := r.entries[a]
		if e == nil {
			e = &entry{}
			r.entries[a] = e
			news = true
		}
		i := slices.IndexFunc(e.claims, func(c claim) bool { return c.by == by })
		if i < 0 {
			i = len(e.claims)
			e.claims = append(e.claims, claim{by: by})
			r.held[by]++
			t.owned[by]++
		}
		c := &e.claims[i]
		c.last = now
		if until.After(c.until) {
			c.until = until
		}
	}
	total := 0
	for _, n := range r.held {
		total += n
	}
	for total > maxAddresses {
		most, n := "", 0
		second := 0
		for by, held := range r.held {
			switch {
			case held > n || held == n && by < most:
				most, n, second = by, held, n
			case held > second:
				second = held
			}
		}
		over := total - maxAddresses
		total -= t.makeRoom(most, map[string]*record{name: r}, max((over+1)/2, min(over, n-second)), now)
	}
	if over := t.owned[by] - maxAddresses; by != "" && over > 0 {
		t.makeRoom(by, t.records, over, now)
	}
	return news
}

// makeRoom ends n claims of one claimant in the given records, those that would end first, and
// returns how many it ended.
func (t *table) makeRoom(by string, records map[string]*record, n int, now time.Time) int {
	type place struct {
		name string
		a    netip.Addr
		end  time.Time
	}
	sooner := func(x, y place) int {
		return cmp.Or(x.end.Compare(y.end), x.a.Compare(y.a), strings.Compare(x.name, y.name))
	}
	var all []place
	for name, r := range records {
		for a, e := range r.entries {
			for _, c := range e.claims {
				if c.by != by {
					continue
				}
				p := place{name, a, t.end(e, c)}
				if n == 1 && len(all) > 0 { // the usual case; sorting costs thirty times as much
					if sooner(p, all[0]) < 0 {
						all[0] = p
					}
					continue
				}
				all = append(all, p)
			}
		}
	}
	slices.SortFunc(all, sooner)
	all = all[:min(n, len(all))]
	for _, p := range all {
		if t.unclaim(records[p.name], p.a, by) {
			t.left(p.name, p.a, now)
		}
	}
	return len(all)
}

// left records that a name has lost an address.
func (t *table) left(name string, a netip.Addr, now time.Time) {
	t.gone = append(t.gone, Gone{name, a, now})
	stale := max(0, len(t.gone)-maxGone)
	for stale < len(t.gone) && now.Sub(t.gone[stale].At) >= goneTime {
		stale++
	}
	t.gone = t.gone[:copy(t.gone, t.gone[stale:])]
}

// lately returns the addresses that names lost within goneTime and do not have now, in the order in
// which they went.
func (t *table) lately(now time.Time) (out []Gone) {
	seen := map[Gone]bool{}
	for _, g := range slices.Backward(t.gone) {
		r := t.records[g.Name]
		key := Gone{Name: g.Name, Address: g.Address}
		if now.Sub(g.At) < goneTime && r != nil && r.entries[g.Address] == nil && !seen[key] {
			seen[key] = true
			out = append(out, g)
		}
	}
	slices.Reverse(out)
	return out
}

// end returns when a claim ends by itself.
func (t *table) end(e *entry, c claim) time.Time {
	end := c.until
	if t.hold > 0 {
		for _, at := range []time.Time{c.last.Add(t.hold), e.used.Add(t.hold)} {
			if at.After(end) {
				end = at
			}
		}
	}
	return end
}

// touch records that a flow to an address of a name lives or has begun lately. It reports whether
// that may extend the life of the address.
func (t *table) touch(name string, a netip.Addr, now time.Time) bool {
	r := t.records[name]
	if t.hold == 0 || r == nil || r.entries[a] == nil {
		return false
	}
	r.entries[a].used = now
	return true
}

// expire drops the addresses whose time is over, and reports whether there were any. Nothing
// expires while an answer is pending. While no resolver answers, addresses that were good when that
// began stay for the grace time.
func (t *table) expire(now time.Time) (gone bool) {
	for name, r := range t.records {
		for a, e := range r.entries {
			if !r.queries[b2i(a.Is6())].asked.IsZero() {
				continue
			}
			for _, c := range slices.Clone(e.claims) {
				if !r.late(a, t.end(e, c), t.grace).After(now) && t.unclaim(r, a, c.by) {
					t.left(name, a, now)
					gone = true
				}
			}
		}
	}
	return gone
}

// until returns when an address goes by itself, unless it is received or used again.
func (t *table) until(e *entry) (until time.Time) {
	for _, c := range e.claims {
		if end := t.end(e, c); end.After(until) {
			until = end
		}
	}
	return until
}

// addresses returns the addresses of a name, in order.
func (t *table) addresses(name string) []netip.Addr {
	r := t.records[name]
	if r == nil {
		return nil
	}
	out := make([]netip.Addr, 0, len(r.entries))
	for a := range r.entries {
		out = append(out, a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

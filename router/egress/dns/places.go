package dns

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// places limit what the clients of an attachment share: pending queries, or connections.
type places struct {
	most, perHost int // of all clients, and of one client
	// time for which a place is kept unless its client has more than others
	patience time.Duration

	mu    sync.Mutex
	taken int
	hosts map[netip.Prefix][]*place // in the order in which they were taken
}

// place is one of places.
type place struct {
	host   netip.Prefix
	since  time.Time
	vacate func() // ends the query or closes the connection
}

// take takes a place for a client, or returns nil if there is none. When there is none left, the
// oldest place of this client makes room if the client has as many as allowed, otherwise the oldest
// place of the client with the most. It makes room only after patience, or when its client would
// still have at least as many as this one. left is the client that lost a place; the zero Prefix:
// none. vacate ends the query or connection that has the place.
func (p *places) take(host netip.Prefix, vacate func()) (got *place, left netip.Prefix) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	from, fair, full := host, false, true
	switch mine := len(p.hosts[host]); {
	case mine < p.perHost && p.taken < p.most:
		full = false
	case mine < p.perHost:
		for h, have := range p.hosts {
			if from == host && mine == 0 || len(have) > len(p.hosts[from]) || len(have) == len(p.hosts[from]) && have[0].since.Before(p.hosts[from][0].since) {
				from = h
			}
		}
		fair = len(p.hosts[from]) > mine+1
	}
	if full {
		oldest := p.hosts[from][0]
		if !fair && now.Sub(oldest.since) < p.patience {
			return nil, netip.Prefix{}
		}
		p.removeLocked(oldest)
		oldest.vacate()
		left = from
	}
	if p.hosts == nil {
		p.hosts = map[netip.Prefix][]*place{}
	}
	got = &place{host, now, vacate}
	p.hosts[host] = append(p.hosts[host], got)
	p.taken++
	return got, left
}

// leave returns a place, unless it was taken away.
func (p *places) leave(had *place) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.removeLocked(had)
}

func (p *places) removeLocked(had *place) {
	have := p.hosts[had.host]
	i := slices.Index(have, had)
	if i < 0 {
		return
	}
	p.taken--
	if have = slices.Delete(have, i, i+1); len(have) == 0 {
		delete(p.hosts, had.host)
		return
	}
	p.hosts[had.host] = have
}

// hostOf returns the network that counts as one client: for IPv6 a /64, because one host has all
// its addresses.
func hostOf(a net.Addr) netip.Prefix {
	at, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Prefix{}
	}
	bits := 32
	if at.Addr().Unmap().Is6() {
		bits = 64
	}
	host, _ := at.Addr().Unmap().WithZone("").Prefix(bits)
	return host
}

// drops counts dropped queries and refused answers of clients.
type drops struct {
	limited   uint64
	limitedAt time.Time
	limitedBy string
	all       uint64
	last      time.Time
	host      netip.Prefix // of the last one
	rebinds   uint64
	refusedAt time.Time
	refused   string // the last name
}

func (r *Resolver) drop(host netip.Prefix) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropped.all++
	r.dropped.last, r.dropped.host = time.Now(), host
}

// Dropped returns how many client queries were dropped since the start because the client or its
// attachment had too many pending, with the time and the client of the last one.
func (r *Resolver) Dropped() (queries uint64, last time.Time, host netip.Prefix) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dropped.all, r.dropped.last, r.dropped.host
}

const (
	// maxFlights bounds the answers that are cached; the attachments have equal shares.
	maxFlights = 4096
	// maxKept is how long an answer or a failure is cached. The times to live in it may be that
	// much too long.
	maxKept = 2 * time.Second
	// maxKeptBytes is the largest answer that is cached.
	maxKeptBytes = 4096
	// newBurst and newRate (per second) limit the new addresses that the names of an attachment may
	// get, because each changes the rules.
	newRate  = 100
	newBurst = 1000
	// newWait is how long an answer with new addresses may wait for that limit. An answer that
	// would have to wait longer is refused.
	newWait = 2 * time.Second
)

// attachment is the state of the proxy for the clients behind an interface.
type attachment struct {
	name    string
	queries places
	streams places
	fresh   *rate.Limiter // limits addresses that are new to names

	// Under the lock of the Resolver:
	listeners int
	kept      []*flight // cached answers to its questions, in the order in which they came
}

func newAttachment(name string) *attachment {
	return &attachment{
		name:    name,
		queries: places{most: maxQueries, perHost: maxPerHost, patience: serverTimeout},
		streams: places{most: maxClients, perHost: maxClients, patience: serverTimeout},
		fresh:   rate.NewLimiter(newRate, newBurst),
	}
}

// flight is a question that is sent once for all clients that ask it (RFC 5452 section 5).
type flight struct {
	key      string
	done     chan struct{}
	cancel   context.CancelFunc
	waiting  int // clients
	response []byte
	err      error
	until    time.Time // end of the time in the cache; zero: not answered yet
}

// once queries servers, or shares the answer to the same question that is pending or cached. The
// caller may change the result. When the last waiting client leaves, the query is cancelled.
func (r *Resolver) once(ctx context.Context, from *attachment, servers []netip.AddrPort, network string, query []byte) ([]byte, error) {
	// The key has everything except the ID, including the case of the name.
	sum := sha256.Sum256(query[2:])
	key := network + string(sum[:])
	r.mu.Lock()
	f := r.flights[key]
	if f != nil && !f.until.IsZero() && time.Now().After(f.until) {
		delete(r.flights, key)
		f = nil
	}
	if f == nil {
		asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), askTimeout)
		f = &flight{key: key, done: make(chan struct{}), cancel: cancel}
		r.flights[key] = f
		go func() {
			defer cancel()
			response, err := r.client.ask(asking, servers, network, query)
			r.mu.Lock()
			f.response, f.err = response, err
			f.until = time.Now().Add(keep(response))
			r.keepLocked(from, f)
			r.mu.Unlock()
			close(f.done)
		}()
	}
	f.waiting++
	r.mu.Unlock()
	select {
	case <-f.done:
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	f.waiting--
	select {
	case <-f.done:
	default:
		if f.waiting == 0 {
			f.cancel()
			r.forgetLocked(f)
		}
		return nil, errSilent
	}
	if f.response == nil {
		return nil, f.err
	}
	response := append([]byte{}, f.response...)
	binary.BigEndian.PutUint16(response, binary.BigEndian.Uint16(query))
	return response, f.err
}

func (r *Resolver) forgetLocked(f *flight) {
	if r.flights[f.key] == f {
		delete(r.flights, f.key)
	}
}

// keepLocked caches an answer within the share of its attachment. It removes the oldest answers
// above the share, and those that have expired.
func (r *Resolver) keepLocked(from *attachment, f *flight) {
	now := time.Now()
	if len(f.response) > maxKeptBytes || r.attachments[from.name] != from {
		r.forgetLocked(f)
	} else if r.flights[f.key] == f {
		from.kept = append(from.kept, f)
	}
	share := maxFlights / max(1, len(r.attachments))
	old := 0
	for old < len(from.kept) && (len(from.kept)-old > share || now.After(from.kept[old].until)) {
		r.forgetLocked(from.kept[old])
		old++
	}
	from.kept = slices.Delete(from.kept, 0, old)
}

// keep returns how long an answer is cached: not longer than its time to live.
func keep(response []byte) time.Duration {
	if response == nil {
		return maxKept
	}
	if a, err := read(response); err == nil && len(a.addrs) > 0 {
		return min(maxKept, a.ttl)
	}
	return maxKept
}

// rebinds reports whether a policy's name has an address that is not allowed as a destination.
func (r *Resolver) rebinds(name string, addrs []netip.Addr) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.table.wants(name) {
		return false
	}
	for _, a := range addrs {
		if !r.table.allowed(a) {
			r.dropped.rebinds++
			r.dropped.refusedAt, r.dropped.refused = time.Now(), name
			return true
		}
	}
	return false
}

// Refused returns how many answers were withheld from clients since the start because they had
// addresses that no name may have, with the time and the name of the last one.
func (r *Resolver) Refused() (answers uint64, last time.Time, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dropped.rebinds, r.dropped.refusedAt, r.dropped.refused
}

// Limited returns how many answers were withheld from clients since the start because their
// attachment had too many new addresses, with the time and the interface of the last one.
func (r *Resolver) Limited() (answers uint64, last time.Time, attachment string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dropped.limited, r.dropped.limitedAt, r.dropped.limitedBy
}

// admit waits until the rate limit of an attachment allows the new addresses of a name, and reports
// whether it does in time.
func (r *Resolver) admit(ctx context.Context, from *attachment, name string, addrs []netip.Addr) bool {
	now := time.Now()
	r.mu.Lock()
	n := min(r.table.unknown(name, addrs), newBurst)
	if n == 0 {
		r.mu.Unlock()
		return true
	}
	// Cancelling a reservation does not return all its tokens, so admit makes none that it would
	// cancel.
	if short := float64(n) - from.fresh.TokensAt(now); short > newRate*newWait.Seconds() {
		r.dropped.limited++
		r.dropped.limitedAt, r.dropped.limitedBy = now, from.name
		r.mu.Unlock()
		return false
	}
	wait := from.fresh.ReserveN(now, n).DelayFrom(now)
	r.mu.Unlock()
	select {
	case <-time.After(wait):
		return true
	case <-ctx.Done():
		return false
	}
}

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

// places are what is shared by the clients of an attachment: queries that are worked on, or connections.
type places struct {
	most, perHost int           // places of all clients, and of one
	patience      time.Duration // for which one keeps its place in any case, unless its client has more than others

	mu    sync.Mutex
	taken int
	hosts map[netip.Prefix][]*place // in the order in which they were taken
}

// place is one of places.
type place struct {
	host   netip.Prefix
	since  time.Time
	vacate func() // ends what has the place
}

// take takes a place for a client; nil: there is none. When there is none left, what has waited longest makes room: of this client, when it has as many as one
// may have; of the client with the most, when all are taken. It does so when it has had its time, or when its client keeps more than the other one
// would have. left is whose place was taken away; the zero Prefix: no one's. vacate ends what has the place.
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

// leave gives a place back, unless it was taken away.
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

// hostOf returns who a client is: of IPv6 a network of 64 bits, since one host has all its addresses.
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

// drops counts queries of clients that were dropped, and answers that were refused.
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

// Dropped returns how many queries of clients were dropped since the start because the client or all of a listener had too many under way, when
// that was last, and whose that one was.
func (r *Resolver) Dropped() (queries uint64, last time.Time, host netip.Prefix) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dropped.all, r.dropped.last, r.dropped.host
}

const (
	// maxFlights is how many answers are kept, those to questions of each attachment in equal shares.
	maxFlights = 4096
	// maxKept is how long an answer is kept at most, in which its times to live may be that much too long. A failure is kept as long.
	maxKept = 2 * time.Second
	// maxKeptBytes is the size up to which an answer is kept.
	maxKeptBytes = 4096
	// An attachment may be told newBurst addresses at once that names have not, and then newRate a second: each changes the rules.
	newRate  = 100
	newBurst = 1000
	// newWait is how long an answer with new addresses waits for that; one that would have to wait longer is refused.
	newWait = 2 * time.Second
)

// attachment is what the proxy has for the clients behind an interface.
type attachment struct {
	name    string
	queries places
	streams places
	fresh   *rate.Limiter // addresses that names have not

	// Under the lock of the Resolver:
	listeners int
	kept      []*flight // answers to its questions that may be kept, in the order in which they came
}

func newAttachment(name string) *attachment {
	return &attachment{
		name:    name,
		queries: places{most: maxQueries, perHost: maxPerHost, patience: serverTimeout},
		streams: places{most: maxClients, perHost: maxClients, patience: serverTimeout},
		fresh:   rate.NewLimiter(newRate, newBurst),
	}
}

// flight is a question that is asked once, however many clients ask it (RFC 5452 section 5).
type flight struct {
	key      string
	done     chan struct{}
	cancel   context.CancelFunc
	waiting  int // clients
	response []byte
	err      error
	until    time.Time // for which it is kept, when it is done
}

// once asks servers, or takes the answer of the same question that is under way or that came a moment ago. The caller may change it. What no client waits for any
// more is not asked on.
func (r *Resolver) once(ctx context.Context, from *attachment, servers []netip.AddrPort, network string, query []byte) ([]byte, error) {
	// Everything but the number makes the question, the names' case as well.
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

// keepLocked keeps an answer within the share of an attachment. The oldest ones make room, and those whose time is over.
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

// keep returns how long an answer is kept: no longer than what is in it.
func keep(response []byte) time.Duration {
	if response == nil {
		return maxKept
	}
	if a, err := read(response); err == nil && len(a.addrs) > 0 {
		return min(maxKept, a.ttl)
	}
	return maxKept
}

// rebinds says whether addresses of a policy's name are such as no name may stand for.
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

// Refused returns how many answers clients were not told since the start because they had addresses that no name may stand for, when that was last, and
// the name asked for.
func (r *Resolver) Refused() (answers uint64, last time.Time, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dropped.rebinds, r.dropped.refusedAt, r.dropped.refused
}

// Limited returns how many answers clients were not told since the start because their attachment was told too many addresses that names had not, when that
// was last, and the interface of that attachment.
func (r *Resolver) Limited() (answers uint64, last time.Time, attachment string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dropped.limited, r.dropped.limitedAt, r.dropped.limitedBy
}

// admit waits until an attachment may be told the addresses of a name that are new, and says whether that was in time.
func (r *Resolver) admit(ctx context.Context, from *attachment, name string, addrs []netip.Addr) bool {
	now := time.Now()
	r.mu.Lock()
	n := min(r.table.unknown(name, addrs), newBurst)
	if n == 0 {
		r.mu.Unlock()
		return true
	}
	// A reservation that is cancelled does not give everything back, so that none is made in vain.
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

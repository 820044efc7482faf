package names

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"time"
)

// places are the queries that a listener works on.
type places struct {
	mu    sync.Mutex
	all   int
	hosts map[netip.Prefix]int
}

// take takes a place for a client, unless there is none, or none for it.
func (p *places) take(host netip.Prefix) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all >= maxQueries || p.hosts[host] >= maxPerHost {
		return false
	}
	p.all++
	p.hosts[host]++
	return true
}

func (p *places) leave(host netip.Prefix) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.all--
	if p.hosts[host]--; p.hosts[host] == 0 {
		delete(p.hosts, host)
	}
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
	// maxFlights is how many questions are under way or have an answer that is kept.
	maxFlights = 4096
	// maxKept is how long an answer is kept at most, in which its times to live may be that much too long. A failure is kept as long.
	maxKept = 2 * time.Second
	// maxKeptBytes is the size up to which an answer is kept.
	maxKeptBytes = 4096
)

// flight is a question that is asked once, however many clients ask it (RFC 5452 section 5).
type flight struct {
	done     chan struct{}
	response []byte
	err      error
	until    time.Time // for which it is kept, when it is done
}

// once asks servers, or takes the answer of the same question that is under way or that came a moment ago. The caller may change it.
func (r *Resolver) once(ctx context.Context, servers []netip.AddrPort, network string, query []byte) ([]byte, error) {
	// Everything but the number makes the question, the names' case as well.
	sum := sha256.Sum256(query[2:])
	key := network + string(sum[:])
	now := time.Now()
	r.mu.Lock()
	f := r.flights[key]
	if f != nil && !f.until.IsZero() && now.After(f.until) {
		delete(r.flights, key)
		f = nil
	}
	first := f == nil
	if first {
		if len(r.flights) >= maxFlights {
			for k, old := range r.flights {
				if !old.until.IsZero() && now.After(old.until) {
					delete(r.flights, k)
				}
			}
		}
		f = &flight{done: make(chan struct{})}
		if len(r.flights) < maxFlights {
			r.flights[key] = f
		}
	}
	r.mu.Unlock()
	if first {
		f.response, f.err = r.client.ask(ctx, servers, network, query)
		r.mu.Lock()
		f.until = time.Now().Add(keep(f.response))
		if len(f.response) > maxKeptBytes {
			delete(r.flights, key)
		}
		r.mu.Unlock()
		close(f.done)
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		return nil, errSilent
	}
	if f.response == nil {
		return nil, f.err
	}
	response := append([]byte{}, f.response...)
	binary.BigEndian.PutUint16(response, binary.BigEndian.Uint16(query))
	return response, f.err
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

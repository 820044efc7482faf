package auth

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits of one server. An unfinished handshake costs memory and, for each signature, about 0.1 ms.
// One whose client has not sent its first message costs only some KiB, and there are many places
// for these: a client that sends at once is not cut by those after it.
const (
	maxSilent            = 1024 // at once, of unknown hosts, and as many of known ones
	maxHandshakes        = 256  // whose clients have sent a message, likewise
	maxHandshakesPerHost = 8
	maxKnownHosts        = 256
	firstByte            = 2 * time.Second // a client sends first, and at once
	// from the first byte on; gRPC's ConnectionTimeout bounds all of it
	handshakeTime       = 10 * time.Second
	maxConnsPerClient   = 64
	maxStreamsPerClient = 256 // watches and other streams that are open at once
	lingerTime          = 500 * time.Millisecond
	lingerBytes         = 64 << 10
	callsPerSecond      = 100
	callsBurst          = 200
)

// registry has the open connections and the usage of each client. Clients have a certificate of
// ours, so their number is bounded by the issued certificates.
type registry struct {
	mu         sync.Mutex
	conns      map[string]map[*conn]struct{} // by serial
	usage      map[string]*usage             // by serial
	handshakes []*handshake                  // under way, the oldest first
	// hosts with a recent good handshake, the latest last
	known []netip.Prefix
}

// handshake is an unfinished handshake.
type handshake struct {
	host  netip.Prefix
	known bool // its host had a good one recently
	spoke bool // the client has sent its first message (ClientHello)
	cut   func()
}

type usage struct {
	calls   *rate.Limiter
	streams int
}

func (r *registry) init() {
	r.conns = make(map[string]map[*conn]struct{})
	r.usage = make(map[string]*usage)
}

// cut closes the connections of a client.
func (r *registry) cut(serial string) {
	r.mu.Lock()
	var open []*conn
	for c := range r.conns[serial] {
		open = append(open, c)
	}
	r.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
}

// cutAll closes the connections of all clients with a certificate.
func (r *registry) cutAll() {
	r.mu.Lock()
	serials := slices.Collect(maps.Keys(r.conns))
	r.mu.Unlock()
	for _, serial := range serials {
		if serial != "" {
			r.cut(serial)
		}
	}
}

// add registers a connection, which closes after lifetime if that is not 0.
func (r *registry) add(c *conn, lifetime time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	open := r.conns[c.serial]
	if open == nil {
		open = make(map[*conn]struct{})
		r.conns[c.serial] = open
	}
	if len(open) >= maxConnsPerClient {
		return fmt.Errorf("%d connections are open already", maxConnsPerClient)
	}
	open[c] = struct{}{}
	if lifetime != 0 {
		c.expiry = time.AfterFunc(lifetime, func() { c.Close() })
	}
	return nil
}

func (r *registry) remove(c *conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns[c.serial], c)
	if len(r.conns[c.serial]) == 0 {
		delete(r.conns, c.serial)
	}
}

func (r *registry) usageLocked(serial string) *usage {
	u := r.usage[serial]
	if u == nil {
		u = &usage{calls: rate.NewLimiter(callsPerSecond, callsBurst)}
		r.usage[serial] = u
	}
	return u
}

func (r *registry) allowCall(serial string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.usageLocked(serial).calls.AllowN(now, 1)
}

// openStream returns a function that releases the stream, or false if there are too many.
func (r *registry) openStream(serial string) (func(), bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.usageLocked(serial)
	if u.streams >= maxStreamsPerClient {
		return nil, false
	}
	u.streams++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		u.streams--
	}, true
}

// hostPrefix returns the prefix that counts as one host: an IPv4 address, or the /64 of an IPv6
// address, since a host may use any address of its /64.
func hostPrefix(addr net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return netip.Prefix{}
	}
	a, bits := ap.Addr().Unmap().WithZone(""), 64
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits)
	return p
}

// beginHandshake assigns a place to a handshake. If none is free, the oldest handshake is cut:
// unknown hosts can lock out neither each other nor, because known hosts have places of their own,
// a host with a recent good handshake.
func (r *registry) beginHandshake(host netip.Prefix, cut func()) *handshake {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := &handshake{host: host, known: slices.Contains(r.known, host), cut: cut}
	if !r.makeRoomLocked(maxHandshakesPerHost, func(o *handshake) bool { return o.host == host }) {
		r.makeRoomLocked(maxSilent, func(o *handshake) bool { return o.known == h.known && !o.spoke })
	}
	r.handshakes = append(r.handshakes, h)
	return h
}

// makeRoomLocked cuts the oldest of some handshakes if their maximum is reached, and reports
// whether it did.
func (r *registry) makeRoomLocked(most int, of func(*handshake) bool) bool {
	n, oldest := 0, -1
	for i, h := range r.handshakes {
		if of(h) {
			if n++; oldest < 0 {
				oldest = i
			}
		}
	}
	if n < most {
		return false
	}
	r.handshakes[oldest].cut()
	r.handshakes = slices.Delete(r.handshakes, oldest, oldest+1)
	return true
}

// spoke records that the client has sent its first message.
func (r *registry) spoke(h *handshake) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.makeRoomLocked(maxHandshakes, func(o *handshake) bool { return o.known == h.known && o.spoke })
	h.spoke = true
}

// endHandshake releases the place.
func (r *registry) endHandshake(h *handshake, good bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.handshakes, h); i >= 0 {
		r.handshakes = slices.Delete(r.handshakes, i, i+1)
	}
	if !good || !h.host.IsValid() {
		return
	}
	if i := slices.Index(r.known, h.host); i >= 0 {
		r.known = slices.Delete(r.known, i, i+1)
	} else if len(r.known) >= maxKnownHosts {
		r.known = slices.Delete(r.known, 0, 1)
	}
	r.known = append(r.known, h.host)
}

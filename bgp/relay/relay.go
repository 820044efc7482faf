// Package relay holds the TCP connections of BGP sessions for a speaker that has no network.
//
// The speaker listens in an empty network namespace, where both addresses of each session are
// local. For each peer the relay dials and accepts on the tunnel's interface, and keeps one
// connection. It passes the peer's messages through a filter.Filter, and writes the result to a
// connection between the same two addresses inside the namespace. The speaker's messages are sent
// to the peer unchanged, except its OPEN.
package relay

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/bgp/filter"
)

// Peer is one session. The names of simultaneous peers must differ, and so must their addresses.
type Peer struct {
	Name string
	// Address is the peer's, Local ours. The zone of a link-local address is the interface.
	Address, Local netip.Addr
	// Interface is the interface to which the sockets are bound (SO_BINDTODEVICE); empty: none.
	Interface string
	// Inner and InnerLocal are the two addresses inside the namespace. If they differ from Address
	// and Local, the next hop InnerLocal in the speaker's messages is replaced by Local.
	Inner, InnerLocal netip.Addr
	// OtherLocal is our IPv6 address in a session of IPv4 that carries both families; invalid: it
	// carries one. It is the next hop instead of Local, which the speaker maps to IPv6.
	OtherLocal netip.Addr
	// TTL is the time to live or hop limit of the packets; 0: the kernel's default.
	TTL uint8
	// Passive makes the relay wait for the peer to open the connection.
	Passive bool
	// Key is the TCP-MD5 key (RFC 2385); empty: none.
	Key []byte
	// Internal means that the peer is in our own autonomous system.
	Internal bool
	// Counters must not be nil. They outlive the relay.
	Counters *filter.Counters
}

func (p *Peer) equal(q *Peer) bool {
	a, b := *p, *q
	a.Key, b.Key, a.Counters, b.Counters = nil, nil, nil, nil
	return bytes.Equal(p.Key, q.Key) && p.Counters == q.Counters &&
		a.Name == b.Name && a.Address == b.Address && a.Local == b.Local && a.Interface == b.Interface && a.Inner == b.Inner &&
		a.InnerLocal == b.InnerLocal && a.OtherLocal == b.OtherLocal && a.TTL == b.TTL && a.Passive == b.Passive && a.Internal == b.Internal
}

// Options are the parameters of New.
type Options struct {
	// Port is the TCP port for connections that peers open; 0 or less: none.
	Port int
	// RemotePort is the TCP port that is dialled; default 179.
	RemotePort int
	// Identifier is our BGP identifier, which decides collisions.
	Identifier netip.Addr
	// Inner opens a connection to the speaker.
	Inner func(ctx context.Context, from, to netip.Addr) (net.Conn, error)
	// Failed receives why a connection to a peer could not be opened. Ended receives why the relay
	// has ended a session, before the speaker is notified. Both are called from several
	// goroutines.
	Failed func(name string, err error)
	Ended  func(name, reason string)
	// Notified receives the NOTIFICATION messages of connections on which no session came up. Nil:
	// they are not reported.
	Notified func(name string, n Notice)
	Log      *slog.Logger
}

// Notice is a NOTIFICATION message of either side.
type Notice struct {
	Sent          bool // by this node
	Code, Subcode byte
	// AS is the number of the autonomous system in the peer's OPEN; 0: there was none.
	AS uint32
}

// Relay holds the connections of all peers.
type Relay struct {
	o      Options
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex
	sessions  map[string]*session
	listeners map[endpoint]*listener
}

// New returns a Relay without peers. Close ends it.
func New(o Options) *Relay {
	if o.RemotePort == 0 {
		o.RemotePort = 179
	}
	r := &Relay{o: o, sessions: make(map[string]*session), listeners: make(map[endpoint]*listener)}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.wg.Go(r.watch)
	return r
}

// Apply updates the sessions to match peers. A new or changed session waits until Ready. The
// connection of a removed or changed session stays for drainTime, because the speaker still has to
// send its NOTIFICATION. The removed sessions of the peers in shut are ended here instead, with a
// NOTIFICATION that has been written when Apply returns, since their interface may then be removed.
// For them, Apply takes as long as lastWords at most.
func (r *Relay) Apply(peers []Peer, shut map[string]*filter.Notification) {
	var said sync.WaitGroup
	defer said.Wait() // without the lock
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctx.Err() != nil {
		return
	}
	want := make(map[string]*Peer, len(peers))
	for i := range peers {
		want[peers[i].Name] = &peers[i]
	}
	for name, s := range r.sessions {
		if p := want[name]; p == nil || !p.equal(&s.p) {
			if n := shut[name]; n != nil && p == nil {
				said.Add(1)
				r.wg.Go(func() {
					defer said.Done()
					s.shut(n)
				})
			} else {
				s.stop()
			}
			delete(r.sessions, name)
		}
	}
	for name, p := range want {
		if r.sessions[name] == nil {
			s := newSession(r, *p)
			r.sessions[name] = s
			if !p.Passive {
				r.wg.Go(s.dial)
			}
		}
	}
	r.listenLocked()
}

// Ready means that the speaker waits for the connection of a peer. It therefore has none, and an
// existing connection ends: it is closed after drainTime, because the speaker's last message may
// still be in transit. It has no counterpart: a connection that the speaker does not accept is
// tried again later.
func (r *Relay) Ready(name string) {
	r.mu.Lock()
	s := r.sessions[name]
	r.mu.Unlock()
	if s != nil {
		s.setReady()
	}
}

// Passed returns when each peer's last message other than KEEPALIVE was passed on, for peers that
// have sent one.
func (r *Relay) Passed() map[string]time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string]time.Time)
	for name, s := range r.sessions {
		if t := s.passed.Load(); t != nil {
			out[name] = *t
		}
	}
	return out
}

// Note returns why the last malformed UPDATE of a peer was treated as a withdrawal; empty: there
// was none.
func (r *Relay) Note(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.sessions[name]; s != nil {
		if note := s.note.Load(); note != nil {
			return *note
		}
	}
	return ""
}

// Close closes all connections without a NOTIFICATION, and waits until they are closed.
func (r *Relay) Close() {
	r.cancel()
	r.mu.Lock()
	for _, s := range r.sessions {
		s.stop()
	}
	for _, l := range r.listeners {
		l.close()
	}
	r.mu.Unlock()
	r.wg.Wait()
}

package relay

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/isthmus-net/isthmus/bgp/filter"
)

const (
	// The first attempt to connect is made within firstRetry after the speaker is ready, further
	// ones after retry to twice that. The times are random, because two sides that both try could
	// miss each other for long.
	firstRetry = time.Second
	retry      = 5 * time.Second

	// openWait is how long a peer may take to send its OPEN before it gets ours; some peers wait
	// for that.
	openWait = 3 * time.Second
	// readyWait is how long a peer's connection waits for the speaker.
	readyWait = 30 * time.Second
	// innerWait is how long the speaker may take to open a session that it is ready for.
	innerWait = 5 * time.Second
	// drainTime is how long a removed session may still last.
	drainTime = 5 * time.Second
	// lastWords is how long a peer may take to read our NOTIFICATION.
	lastWords = time.Second
)

var errGone = errors.New("the session is gone")

// session holds the connections of one peer: one that leads to the speaker, and those that may
// replace it.
type session struct {
	r      *Relay
	p      Peer
	ctx    context.Context
	cancel context.CancelFunc

	passed atomic.Pointer[time.Time] // time of the last message other than KEEPALIVE
	note   atomic.Pointer[string]

	mu     sync.Mutex
	change chan struct{} // closed and replaced when a field below changes
	ready  bool
	active *leg // leads to the speaker
	in     *leg // the last one that the peer opened; may be active
}

func newSession(r *Relay, p Peer) *session {
	s := &session{r: r, p: p, change: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(r.ctx)
	return s
}

func (s *session) changedLocked() {
	close(s.change)
	s.change = make(chan struct{})
}

func (s *session) setReady() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.active != nil && !s.active.paired.Load() {
		return // it is being paired
	}
	if s.active != nil {
		s.drainLocked(s.active)
		s.active = nil
	}
	s.ready = true
	s.changedLocked()
}

// drainLocked keeps a leg for a while, so that the speaker's last messages are passed on.
func (s *session) drainLocked(l *leg) {
	if s.r.ctx.Err() != nil {
		l.close()
		return
	}
	s.r.wg.Go(func() {
		select {
		case <-l.done:
		case <-s.r.ctx.Done():
		case <-time.After(drainTime):
		}
		l.close()
	})
}

// stop ends the session. The speaker's last messages are still passed on for a while.
func (s *session) stop() {
	s.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changedLocked()
	if s.in != nil && s.in != s.active {
		s.in.close()
	}
	if s.active != nil {
		s.drainLocked(s.active)
	}
}

// shut ends the session with a NOTIFICATION to the peer, which it has written when it returns.
func (s *session) shut(n *filter.Notification) {
	s.mu.Lock()
	active, in := s.active, s.in
	s.mu.Unlock()
	var inner net.Conn
	if active != nil {
		inner = active.notify(n)
	}
	s.cancel()
	s.mu.Lock()
	s.changedLocked()
	s.mu.Unlock()
	if in != nil && in != active {
		in.close()
	}
	if active != nil {
		s.r.wg.Go(func() { active.end(inner) })
	}
}

// dial opens connections to the peer whenever the speaker is ready and has none.
func (s *session) dial() {
	for {
		if s.wait(func() bool { return s.ready && s.active == nil }) != nil {
			return
		}
		for pause := rand.N(firstRetry); ; pause = retry + rand.N(retry) {
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(pause):
			}
			s.mu.Lock()
			needed := s.ready && s.active == nil
			s.mu.Unlock()
			if !needed {
				break
			}
			conn, err := dialPeer(s.ctx, &s.p, s.r.o.RemotePort)
			if s.ctx.Err() != nil {
				if err == nil {
					abort(conn)
				}
				return
			}
			if err == nil {
				newLeg(s, conn, true).run()
				break
			}
			s.r.o.Failed(s.p.Name, err)
		}
	}
}

// wait waits until ok returns true, and returns an error when the session has ended. It calls ok
// with mu held.
func (s *session) wait(ok func() bool) error {
	for {
		s.mu.Lock()
		change, done := s.change, ok()
		s.mu.Unlock()
		if done {
			return s.ctx.Err()
		}
		select {
		case <-change:
		case <-s.ctx.Done():
			return s.ctx.Err()
		}
	}
}

// accept takes a connection that the peer has opened. It replaces one that is not a session yet.
func (s *session) accept(conn *net.TCPConn) {
	l := newLeg(s, conn, false)
	s.mu.Lock()
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		abort(conn)
		return
	}
	old := s.in
	if old == s.active {
		old = nil
	}
	s.in = l
	s.r.wg.Go(l.run)
	s.mu.Unlock()
	if old != nil {
		old.close()
	}
}

// claim makes a leg the one that leads to the speaker, when the speaker is ready. Of two
// connections that are not sessions yet, it keeps the one opened by the side with the higher BGP
// identifier (RFC 4271 section 6.8).
func (s *session) claim(l *leg) error {
	ctx, cancel := context.WithTimeout(s.ctx, readyWait)
	defer cancel()
	alive := time.NewTicker(firstRetry / 4)
	defer alive.Stop()
	for {
		s.mu.Lock()
		change, other := s.change, s.active
		switch {
		case s.ctx.Err() != nil || l.closed.Load():
			s.mu.Unlock()
			return errGone
		case other == nil && s.ready:
			s.active, s.ready = l, false
			s.changedLocked()
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		if other != nil {
			ours := s.r.o.Identifier.Compare(l.filter.Identifier()) > 0
			if other.out == l.out || other.out == ours || !other.yield(filter.Collision) {
				return filter.Collision
			}
		}
		select {
		case <-change:
		case <-ctx.Done():
			return errors.Join(errGone, ctx.Err())
		case <-alive.C:
			if !connected(l.conn) {
				return errGone
			}
		}
	}
}

// release records that a leg no longer leads to the speaker.
func (s *session) release(l *leg) {
	s.mu.Lock()
	if s.active == l {
		s.active = nil
		s.changedLocked()
	}
	if s.in == l {
		s.in = nil
	}
	s.mu.Unlock()
}

// leg is one TCP connection with a peer.
type leg struct {
	s      *session
	conn   *net.TCPConn
	out    bool // opened by this node
	filter *filter.Filter

	done    chan struct{} // closed when run returns
	flushed chan struct{} // closed when all messages of the speaker have been passed on

	paired atomic.Bool // the speaker has sent its OPEN
	up     atomic.Bool // the peer has sent its OPEN and a KEEPALIVE
	closed atomic.Bool
	as     atomic.Uint32 // that of the peer's OPEN

	mu    sync.Mutex // held while a message is written to the peer
	ended bool       // nothing more is written to the peer
	inner net.Conn
}

func newLeg(s *session, conn *net.TCPConn, out bool) *leg {
	f := filter.New(filter.Options{IPv6: !s.p.Address.Is4(), Both: s.p.OtherLocal.IsValid(), Internal: s.p.Internal, Counters: s.p.Counters})
	return &leg{s: s, conn: conn, out: out, filter: f, done: make(chan struct{}), flushed: make(chan struct{})}
}

// close closes both connections.
func (l *leg) close() {
	l.closed.Store(true)
	l.conn.Close()
	l.mu.Lock()
	inner := l.inner
	l.mu.Unlock()
	if inner != nil {
		inner.Close()
	}
}

// refuse ends the connection with a NOTIFICATION, if the peer reads it.
func (l *leg) refuse(n *filter.Notification) { l.end(l.notify(n)) }

// yield ends the connection like refuse, and returns true. If the session is up, it returns false:
// the speaker has, or will have, the peer's KEEPALIVE.
func (l *leg) yield(n *filter.Notification) bool {
	l.mu.Lock()
	if l.up.Load() {
		l.mu.Unlock()
		return false
	}
	inner := l.notifyLocked(n)
	l.mu.Unlock()
	l.end(inner)
	return true
}

// end closes both connections after the last message to the peer.
func (l *leg) end(inner net.Conn) {
	if inner != nil {
		inner.Close()
	}
	l.drain()
	l.close()
}

// establish marks the session as up. It returns false if the connection has been ended: the speaker
// must not see a session come up that is over.
func (l *leg) establish() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.up.Store(true)
	}
	return !l.ended
}

// notify writes a NOTIFICATION to the peer, and nothing after it. It returns the connection to the
// speaker, if there is one.
func (l *leg) notify(n *filter.Notification) net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.notifyLocked(n)
}

func (l *leg) notifyLocked(n *filter.Notification) net.Conn {
	l.conn.SetWriteDeadline(time.Now().Add(lastWords))
	if !l.ended {
		l.ended = true
		_, _ = l.conn.Write(n.Message()) // the connection ends in any case
	}
	return l.inner
}

// drain gives the peer time to read the last message: closing with unread bytes sends a reset,
// which may overtake the message.
func (l *leg) drain() {
	const most = 1 << 20
	l.conn.CloseWrite()
	l.conn.SetReadDeadline(time.Now().Add(lastWords))
	_, _ = io.CopyN(io.Discard, l.conn, most) // it ends in any case
}

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
	// The first attempt to connect comes within firstRetry of the speaker's being ready, the next ones after retry to
	// twice that. The time is random, since two sides that both try can miss each other for long.
	firstRetry = time.Second
	retry      = 5 * time.Second

	// openWait is how long a peer may take to send its OPEN before it gets ours; some wait for that.
	openWait = 3 * time.Second
	// readyWait is how long a connection of a peer waits for the speaker.
	readyWait = 30 * time.Second
	// innerWait is how long the speaker may take to open a session that it is ready for.
	innerWait = 5 * time.Second
	// drainTime is how long a session that is taken away may still last.
	drainTime = 5 * time.Second
	// lastWords is how long a peer may take to read a NOTIFICATION of ours.
	lastWords = time.Second
)

var errGone = errors.New("the session is gone")

// session is one peer's connections: one that leads to the speaker, and those that may in its place.
type session struct {
	r      *Relay
	p      Peer
	ctx    context.Context
	cancel context.CancelFunc

	passed atomic.Pointer[time.Time] // the last message that was no KEEPALIVE
	note   atomic.Pointer[string]

	mu     sync.Mutex
	change chan struct{} // closed, and made again, when something below changes
	ready  bool
	active *leg // leads to the speaker
	in     *leg // the last one that the peer opened; it may be active
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
		return // it is being paired just now
	}
	if s.active != nil {
		s.drainLocked(s.active)
		s.active = nil
	}
	s.ready = true
	s.changedLocked()
}

// drainLocked lets a leg last for a while, for what the speaker still sends.
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

// stop ends the session. What the speaker still sends gets through for a while.
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

// wait waits until ok, which is called with mu held, and returns an error when the session is over.
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

// accept takes a connection that the peer opened. It replaces one that is not yet a session.
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

// claim makes a leg the one that leads to the speaker, when the speaker is ready. Of two that are both no session yet,
// the one stays that was opened by the side with the higher BGP identifier (RFC 4271 section 6.8).
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
			if other.up.Load() || other.out == l.out || other.out == ours {
				return filter.Collision
			}
			other.refuse(filter.Collision)
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

// release says that a leg leads to the speaker no more.
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
	out    bool // we opened it
	filter *filter.Filter

	done    chan struct{} // closed when run returns
	flushed chan struct{} // closed when all that the speaker sent was passed on

	paired atomic.Bool // the speaker has sent its OPEN
	up     atomic.Bool // the peer has sent its OPEN and a KEEPALIVE
	closed atomic.Bool

	mu    sync.Mutex // held while a message is written to the peer
	ended bool       // nothing more is written to the peer
	inner net.Conn
}

func newLeg(s *session, conn *net.TCPConn, out bool) *leg {
	f := filter.New(filter.Options{IPv6: !s.p.Address.Is4(), Internal: s.p.Internal, Counters: s.p.Counters})
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

// refuse ends the connection with a NOTIFICATION, if the peer takes it.
func (l *leg) refuse(n *filter.Notification) {
	if inner := l.say(n); inner != nil {
		inner.Close()
	}
	l.drain()
	l.close()
}

// say writes a NOTIFICATION to the peer, and nothing after it. It returns the connection to the speaker, if there is one.
func (l *leg) say(n *filter.Notification) net.Conn {
	l.conn.SetWriteDeadline(time.Now().Add(lastWords))
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended {
		l.ended = true
		_, _ = l.conn.Write(n.Message()) // the connection ends anyway
	}
	return l.inner
}

// drain lets the peer read what was written last: a close with bytes that were not read is a reset, which may overtake
// it.
func (l *leg) drain() {
	const most = 1 << 20
	l.conn.CloseWrite()
	l.conn.SetReadDeadline(time.Now().Add(lastWords))
	_, _ = io.CopyN(io.Discard, l.conn, most) // it ends either way
}

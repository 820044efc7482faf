package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/isthmus-net/isthmus/bgp/filter"
)

// bufferSize is how much is read at a time from a peer or the speaker, in bytes.
const bufferSize = 64 << 10

// run serves the connection until it ends.
func (l *leg) run() {
	defer close(l.done)
	defer l.s.release(l)
	defer l.close()
	defer context.AfterFunc(l.s.r.ctx, l.close)()
	defer context.AfterFunc(l.s.ctx, func() {
		if !l.paired.Load() {
			l.close()
		}
	})()
	if !l.out {
		c, err := l.conn.SyscallConn()
		if err == nil {
			err = onSocket(c, func(fd int) error { return setTTL(fd, &l.s.p) })
		}
		if err != nil {
			l.s.r.o.Failed(l.s.p.Name, err)
			return
		}
	}
	in := &reader{conn: l.conn, b: make([]byte, bufferSize)}
	// Read the peer's OPEN first, so that one of two connections can be chosen before the speaker
	// sees either.
	l.conn.SetReadDeadline(time.Now().Add(openWait))
	first, err := l.first(in)
	l.conn.SetReadDeadline(time.Time{})
	if err != nil {
		l.fail(err)
		return
	}
	err = l.s.claim(l)
	var inner net.Conn
	for err == nil {
		if inner, err = l.pair(); err == nil {
			break
		}
		if l.closed.Load() || l.s.ctx.Err() != nil {
			return
		}
		// The speaker was not ready after all.
		l.s.unclaim(l)
		err = l.s.claim(l)
	}
	if err != nil {
		l.fail(err)
		return
	}
	l.s.r.wg.Go(func() {
		defer close(l.flushed)
		l.fromSpeaker(inner)
		// the next connection need not wait until the peer has read the last message of this one
		l.s.release(l)
		l.mu.Lock()
		l.ended = true
		l.mu.Unlock()
		l.conn.CloseWrite()
		l.conn.SetReadDeadline(time.Now().Add(lastWords))
	})
	l.toSpeaker(in, inner, first)
}

// unclaim releases the place of a leg, and makes it claimable again after a while.
func (s *session) unclaim(l *leg) {
	s.mu.Lock()
	if s.active == l {
		s.active = nil
	}
	s.mu.Unlock()
	select {
	case <-time.After(firstRetry):
	case <-s.ctx.Done():
	}
	s.mu.Lock()
	if s.active == nil {
		s.ready = true
	}
	s.changedLocked()
	s.mu.Unlock()
}

// fail ends a connection that has not reached the speaker.
func (l *leg) fail(err error) {
	if n, ok := errors.AsType[*filter.Notification](err); ok {
		if n != filter.Collision {
			l.s.r.o.Ended(l.s.p.Name, n.Error())
		}
		l.refuse(n)
	}
}

// first reads the peer's first message, and returns nil if the peer waits for our OPEN.
func (l *leg) first(in *reader) ([]byte, error) {
	m, err := l.next(in)
	if ne, ok := errors.AsType[net.Error](err); ok && ne.Timeout() {
		return nil, nil // the part that was read stays in the reader
	}
	if err != nil {
		return nil, err
	}
	out, err := l.filter.Message(nil, m)
	l.as.Store(l.filter.AS())
	return out, err
}

// next reads one message from the peer.
func (l *leg) next(in *reader) ([]byte, error) {
	head, err := in.peek(filter.HeaderLength)
	if err != nil {
		return nil, err
	}
	n, err := l.filter.Length(head)
	if err != nil {
		return nil, err
	}
	m, err := in.take(n)
	if err == nil {
		l.observe(m, false)
	}
	return m, err
}

// observe reports the NOTIFICATION messages among whole messages, unless the session has come up:
// then the speaker reports its end.
func (l *leg) observe(b []byte, sent bool) {
	for len(b) >= filter.HeaderLength+2 {
		n := int(binary.BigEndian.Uint16(b[16:]))
		collision := b[19] == filter.Collision.Code && b[20] == filter.Collision.Subcode
		if b[18] == filter.NotificationType && !collision && !l.up.Load() && l.s.r.o.Notified != nil {
			l.s.r.o.Notified(l.s.p.Name, Notice{Sent: sent, Code: b[19], Subcode: b[20], AS: l.as.Load()})
		}
		b = b[min(n, len(b)):]
	}
}

// pair opens a connection to the speaker, and passes its OPEN on.
func (l *leg) pair() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(l.s.ctx, innerWait)
	defer cancel()
	inner, err := l.s.r.o.Inner(ctx, l.s.p.Inner, l.s.p.InnerLocal)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.inner = inner
	l.mu.Unlock()
	if l.closed.Load() { // it was closed before inner was set
		inner.Close()
		return nil, errGone
	}
	inner.SetReadDeadline(time.Now().Add(innerWait))
	m, err := readMessage(inner)
	if err == nil {
		var open []byte
		if open, _, err = filter.OwnOpen(m); err == nil {
			l.paired.Store(true)
			err = l.write(open)
		}
	}
	if err != nil {
		inner.Close()
		return nil, err
	}
	return inner, inner.SetReadDeadline(time.Time{})
}

func readMessage(r io.Reader) ([]byte, error) {
	m := make([]byte, filter.HeaderLength, 512)
	if _, err := io.ReadFull(r, m); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(m[16:]))
	if n < filter.HeaderLength || n > filter.MaxLength {
		return nil, fmt.Errorf("reading a message of length %d", n)
	}
	m = append(m, make([]byte, n-len(m))...)
	_, err := io.ReadFull(r, m[filter.HeaderLength:])
	return m, err
}

// write writes whole messages to the peer.
func (l *leg) write(b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return errGone
	}
	_, err := l.conn.Write(b)
	return err
}

// toSpeaker filters the peer's messages until the connection ends.
func (l *leg) toSpeaker(in *reader, inner net.Conn, out []byte) {
	busy := len(out) > 0
	for {
		// Messages that arrived together are written together.
		for in.whole() || len(out) == 0 {
			m, err := l.next(in)
			if err == nil {
				busy = busy || m[18] != filter.Keepalive
				out, err = l.filter.Message(out, m)
				if !l.up.Load() {
					l.as.Store(l.filter.AS())
				}
			}
			if err != nil {
				l.finish(inner, out, err)
				return
			}
			if !l.up.Load() && l.filter.Established() && !l.establish() {
				return
			}
			if note := l.filter.Note(); note != "" && m[18] == filter.Update {
				l.s.note.Store(&note)
			}
			if len(out) >= bufferSize {
				break
			}
		}
		if busy {
			now := time.Now()
			l.s.passed.Store(&now)
			busy = false
		}
		if _, err := inner.Write(out); err != nil {
			// The speaker has ended the session. Its last message may still be in transit to the
			// peer.
			select {
			case <-l.flushed:
				l.drain()
			case <-time.After(lastWords):
			}
			return
		}
		out = out[:0]
	}
}

// finish ends a session after a message that cannot be passed on, or after the end of the peer's
// data.
func (l *leg) finish(inner net.Conn, out []byte, err error) {
	n, ok := errors.AsType[*filter.Notification](err)
	if !ok {
		_, _ = inner.Write(out) // the connection ends in any case
		inner.Close()
		return
	}
	l.s.r.o.Ended(l.s.p.Name, n.Error())
	l.s.release(l)
	l.notify(n) // before the speaker closes its side, after which nothing is written
	now := time.Now()
	l.s.passed.Store(&now)
	// The speaker treats a mere end of the connection as the beginning of a graceful restart.
	inner.SetWriteDeadline(now.Add(lastWords))
	_, _ = inner.Write(append(out, filter.Cease(n.Error())...))
	l.drain()
	select { // the speaker reads it, and closes the connection
	case <-l.flushed:
	case <-time.After(readyWait):
	}
}

// fromSpeaker passes on the speaker's messages, each one whole, until the connection ends.
func (l *leg) fromSpeaker(inner net.Conn) {
	in := &reader{conn: inner, b: make([]byte, bufferSize)}
	from, to := l.s.p.InnerLocal, l.s.p.Local.WithZone("")
	for {
		b, err := in.messages()
		if err != nil {
			return
		}
		if from != to {
			filter.ReplaceNextHop(b, from.As16(), to.As16())
		}
		if l.s.p.OtherLocal.IsValid() {
			filter.ReplaceNextHop(b, from.As16(), l.s.p.OtherLocal.As16())
		}
		if !l.up.Load() {
			l.observe(b, true)
		}
		if err := l.write(b); err != nil {
			if errors.Is(err, errGone) {
				// The speaker still has to read the reason. Closing the connection with unread
				// bytes could overtake it.
				_, _ = io.Copy(io.Discard, inner)
			}
			return
		}
	}
}

// reader reads messages from a connection.
type reader struct {
	conn       net.Conn
	b          []byte
	start, end int
}

// fill reads more data. The buffer is larger than any message.
func (r *reader) fill() error {
	if r.start > 0 {
		r.end = copy(r.b, r.b[r.start:r.end])
		r.start = 0
	}
	n, err := r.conn.Read(r.b[r.end:])
	r.end += n
	if n > 0 {
		return nil
	}
	return err
}

func (r *reader) peek(n int) ([]byte, error) {
	for r.end-r.start < n {
		if err := r.fill(); err != nil {
			return nil, err
		}
	}
	return r.b[r.start : r.start+n], nil
}

func (r *reader) take(n int) ([]byte, error) {
	b, err := r.peek(n)
	if err == nil {
		r.start += n
	}
	return b, err
}

// whole reports whether a whole message is in the buffer.
func (r *reader) whole() bool {
	have := r.b[r.start:r.end]
	return len(have) >= filter.HeaderLength && len(have) >= int(binary.BigEndian.Uint16(have[16:]))
}

// messages returns the whole messages in the buffer, at least one.
func (r *reader) messages() ([]byte, error) {
	if _, err := r.peek(filter.HeaderLength); err != nil {
		return nil, err
	}
	for {
		n := 0
		for have := r.b[r.start:r.end]; len(have) >= filter.HeaderLength; {
			size := int(binary.BigEndian.Uint16(have[16:]))
			if size < filter.HeaderLength || size > filter.MaxLength {
				return nil, fmt.Errorf("reading a message of length %d", size)
			}
			if size > len(have) {
				break
			}
			n, have = n+size, have[size:]
		}
		if n > 0 {
			return r.take(n)
		}
		if err := r.fill(); err != nil {
			return nil, err
		}
	}
}

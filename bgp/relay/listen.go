package relay

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"
)

// rebind is how often listeners are compared with the interfaces that they are bound to. A tunnel
// that was created again has another interface with the same name.
const rebind = time.Second

// endpoint is an address and interface on which connections are accepted.
type endpoint struct {
	local netip.Addr
	iface string
}

// listener is an endpoint with the sessions that share it.
type listener struct {
	at     endpoint
	index  int // of the interface
	l      *net.TCPListener
	keys   map[netip.Addr][]byte // by peer, as set on the socket
	peers  map[netip.Addr]*session
	logged string // the last error, which is not logged again

	strangers int
	quiet     time.Time // until then, connections from strangers are only counted
}

func (l *listener) close() {
	if l.l != nil {
		l.l.Close()
		l.l, l.keys = nil, nil
	}
}

// watch binds listeners to interfaces that appear.
func (r *Relay) watch() {
	t := time.NewTicker(rebind)
	defer t.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
			r.mu.Lock()
			if r.ctx.Err() == nil {
				r.listenLocked()
			}
			r.mu.Unlock()
		}
	}
}

// listenLocked updates the listeners, and their keys, to match the sessions.
func (r *Relay) listenLocked() {
	if r.o.Port <= 0 {
		return
	}
	want := make(map[endpoint]map[netip.Addr]*session)
	for _, s := range r.sessions {
		at := endpoint{s.p.Local, s.p.Interface}
		if want[at] == nil {
			want[at] = make(map[netip.Addr]*session)
		}
		want[at][s.p.Address] = s
	}
	for at, l := range r.listeners {
		if want[at] == nil {
			l.close()
			delete(r.listeners, at)
		}
	}
	for at, peers := range want {
		l := r.listeners[at]
		if l == nil {
			l = &listener{at: at}
			r.listeners[at] = l
		}
		l.peers = peers
		index, err := interfaceIndex(at.iface)
		if err == nil && l.l != nil && l.index == index {
			err = l.setKeys()
		} else {
			l.close()
			if err == nil {
				err = r.openLocked(l, index)
			}
		}
		if err != nil {
			l.close()
			if text := err.Error(); l.logged != text {
				l.logged = text
				r.o.Log.Warn("cannot listen for BGP connections", "address", at.local, "interface", at.iface, "error", err)
			}
		} else {
			l.logged = ""
		}
	}
}

func (r *Relay) openLocked(l *listener, index int) error {
	tcp, err := listen(r.ctx, l.at, r.o.Port)
	if err != nil {
		return err
	}
	l.l, l.index, l.keys = tcp, index, make(map[netip.Addr][]byte)
	if err := l.setKeys(); err != nil {
		return err
	}
	r.wg.Go(func() { r.accept(l, tcp) })
	return nil
}

// setKeys sets the keys that differ, and removes those that are no longer wanted: a listener with
// an old key would refuse the peer forever.
func (l *listener) setKeys() error {
	for a := range l.keys {
		if s := l.peers[a]; s == nil || len(s.p.Key) == 0 {
			if err := setKey(l.l, a, nil); err != nil {
				return err
			}
			delete(l.keys, a)
		}
	}
	for a, s := range l.peers {
		if len(s.p.Key) > 0 && !slices.Equal(l.keys[a], s.p.Key) {
			if err := setKey(l.l, a, s.p.Key); err != nil {
				return err
			}
			l.keys[a] = s.p.Key
		}
	}
	return nil
}

// accept passes connections to the sessions of their peers. Connections from strangers are closed
// at once.
func (r *Relay) accept(l *listener, tcp *net.TCPListener) {
	for {
		conn, err := tcp.AcceptTCP()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			select { // out of descriptors, or the connection has already ended
			case <-r.ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		from := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
		r.mu.Lock()
		s := l.peers[from]
		if s == nil {
			l.strangers++
			if now := time.Now(); now.After(l.quiet) {
				l.quiet = now.Add(time.Minute)
				r.o.Log.Warn("closed a BGP connection from an unknown peer", "from", from, "address", l.at.local, "interface", l.at.iface, "closed", l.strangers)
			}
		}
		r.mu.Unlock()
		if s == nil {
			abort(conn)
			continue
		}
		s.accept(conn)
	}
}

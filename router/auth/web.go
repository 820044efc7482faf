package auth

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// pages has the pages that are served over HTTP/1.1, with the role that each needs. Any other page
// is refused.
var pages = map[string]rule{"/metrics": {role: Reader}}

// Web is the listener for the clients of the API's port that speak HTTP/1.1. Credentials
// authenticates them like all others, and passes their connections on.
type Web struct {
	at     net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

// NewWeb returns a listener for connections that come in at an address.
func NewWeb(at net.Addr) *Web {
	return &Web{at: at, conns: make(chan net.Conn), closed: make(chan struct{})}
}

// Accept implements net.Listener.
func (w *Web) Accept() (net.Conn, error) {
	select {
	case c := <-w.conns:
		return c, nil
	case <-w.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (w *Web) Close() error {
	w.once.Do(func() { close(w.closed) })
	return nil
}

// Addr implements net.Listener.
func (w *Web) Addr() net.Addr { return w.at }

// pass hands a connection over, or closes it if the listener is closed.
func (w *Web) pass(c net.Conn) {
	select {
	case w.conns <- c:
	case <-w.closed:
		c.Close()
	}
}

// webConn is the connection of a client that speaks HTTP/1.1.
type webConn struct {
	*conn
	id Identity
}

// Context returns the context of the requests of a connection from a Web. It has the identity of
// the client; see http.Server.ConnContext.
func (w *Web) Context(ctx context.Context, c net.Conn) context.Context {
	p := &peer.Peer{Addr: c.RemoteAddr()}
	if c, ok := c.(*webConn); ok {
		p.AuthInfo = c.id
	}
	return peer.NewContext(ctx, p)
}

// detach returns another descriptor of a connection, and closes the first one. gRPC sets the
// deadlines of the first one even after it was passed on.
func detach(raw net.Conn) (net.Conn, error) {
	t, ok := raw.(*net.TCPConn)
	if !ok {
		return nil, fmt.Errorf("passing a connection on: it is a %T", raw)
	}
	f, err := t.File()
	if err != nil {
		return nil, fmt.Errorf("passing a connection on: %w", err)
	}
	defer f.Close()
	other, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("passing a connection on: %w", err)
	}
	return other, raw.Close()
}

// Pages returns a handler that admits or refuses requests like calls of the API, and passes the
// admitted ones to next.
func (a *Authority) Pages(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		page, known := pages[r.URL.Path]
		if _, err := a.judge(r.Context(), r.URL.Path, page, known); err != nil {
			http.Error(w, status.Convert(err).Message(), httpStatus(err, known))
			return
		}
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD are allowed", http.StatusMethodNotAllowed)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func httpStatus(err error, known bool) int {
	switch status.Code(err) {
	case codes.Unauthenticated:
		return http.StatusUnauthorized
	case codes.ResourceExhausted:
		return http.StatusTooManyRequests
	}
	if !known {
		return http.StatusNotFound
	}
	return http.StatusForbidden
}

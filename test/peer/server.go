package peer

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// Server is an HTTP server that answers with the address of the client, and records it.
type Server struct {
	server  http.Server
	mu      sync.Mutex
	sources []netip.Addr
}

// StartServer starts one in a node, on port 80 of an address.
func StartServer(n *lab.Node, a netip.Addr) (*Server, error) {
	l, err := n.Listen("tcp", netip.AddrPortFrom(a, 80).String())
	if err != nil {
		return nil, fmt.Errorf("starting a server in %s: %w", n.Name, err)
	}
	s := &Server{}
	s.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		s.mu.Lock()
		s.sources = append(s.sources, a.Addr())
		s.mu.Unlock()
		fmt.Fprintln(w, a.Addr())
	})
	go s.server.Serve(l)
	return s, nil
}

// Sources are the source addresses of all requests so far.
func (s *Server) Sources() []netip.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.sources)
}

// Close ends the server.
func (s *Server) Close() error { return s.server.Close() }

// Ask sends one HTTP request from a node to a Server, and returns the source address that it saw.
func Ask(ctx context.Context, from *lab.Node, server netip.Addr) (netip.Addr, error) {
	fail := func(err error) (netip.Addr, error) {
		return netip.Addr{}, fmt.Errorf("asking %s from %s: %w", server, from.Name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+server.String()+"/", nil)
	if err != nil {
		return fail(err)
	}
	r, err := (&http.Transport{DialContext: from.DialContext, DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return fail(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(io.LimitReader(r.Body, 100))
	if err != nil {
		return fail(err)
	}
	a, err := netip.ParseAddr(string(b[:max(0, len(b)-1)]))
	if err != nil {
		return fail(err)
	}
	return a, nil
}

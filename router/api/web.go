package api

import (
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/isthmus-net/isthmus/router/auth"
)

// Bounds of requests over HTTP/1.1. An answer may have some MB, which a slow client takes from the
// kernel for as long as webWrite allows.
const (
	webHeader = 5 * time.Second // to read the header of a request
	webWrite  = 30 * time.Second
	webIdle   = 3 * time.Minute // between requests; Prometheus asks once a minute by default
	// maxHeader is the largest header in bytes. net/http adds up to webSlack to its own bound: a
	// buffer of 4 KiB, and one more on a connection that is used again.
	maxHeader = 16 << 10
	webSlack  = 8 << 10
	// maxRequests bounds the requests that are answered at a time, and maxRequestsPerClient those
	// of one client, so that one client cannot keep the others out.
	maxRequests          = 4
	maxRequestsPerClient = 2
)

// newWeb returns the server of pages for connections that auth.Web accepts.
func newWeb(a *auth.Authority, web *auth.Web, metrics http.Handler, log *slog.Logger) *http.Server {
	mux := http.NewServeMux()
	mux.Handle("/metrics", metrics)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler:     a.Pages((&turnstile{next: mux, open: map[string]int{}})),
		ConnContext: web.Context, Protocols: protocols,
		ReadHeaderTimeout: webHeader, ReadTimeout: webHeader, WriteTimeout: webWrite, IdleTimeout: webIdle, MaxHeaderBytes: maxHeader - webSlack,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}

// turnstile bounds the requests that are answered at a time, by client.
type turnstile struct {
	next http.Handler

	mu    sync.Mutex
	open  map[string]int // by the serial of the client
	total int
}

func (t *turnstile) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	who := auth.FromContext(r.Context()).Serial
	if !t.enter(who) {
		w.Header().Set("Retry-After", "1")
		http.Error(w, fmt.Sprintf("too many requests at a time (at most %d of one client, %d of all clients)", maxRequestsPerClient, maxRequests), http.StatusServiceUnavailable)
		return
	}
	defer t.leave(who)
	t.next.ServeHTTP(w, r)
}

func (t *turnstile) enter(who string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.total >= maxRequests || t.open[who] >= maxRequestsPerClient {
		return false
	}
	t.total++
	t.open[who]++
	return true
}

func (t *turnstile) leave(who string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.total--
	if t.open[who]--; t.open[who] == 0 {
		delete(t.open, who)
	}
}

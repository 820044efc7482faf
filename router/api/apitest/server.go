package apitest

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/api"
	"github.com/isthmus-net/isthmus/router/auth"
	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/logs"
	"github.com/isthmus-net/isthmus/router/store"
)

// Server is an API server on the loopback address and on a unix socket, with a fake Router and
// Machine.
type Server struct {
	Machine   *Machine
	Router    *Router
	Authority *auth.Authority
	Address   string
	Socket    string
	Context   string // file of the first admin
	Audit     string // file
	Events    *event.Log
	// Logs has the lines that tests write with Log.
	Logs *logs.Log
	Log  *slog.Logger
	// Metrics answers /metrics.
	Metrics *Page
	// Restart stops the server and starts another one, with an empty Logs, at another Address.
	Restart func()
	// Stop stops the server before the end of the test, and waits for it.
	Stop func()
}

// Page is a page that tests change while it is served.
type Page struct {
	answer atomic.Pointer[http.HandlerFunc]
}

// Set sets the function that answers requests.
func (p *Page) Set(f http.HandlerFunc) { p.answer.Store(&f) }

// ServeHTTP implements http.Handler. Without a function it answers with one line.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if f := p.answer.Load(); f != nil {
		(*f)(w, r)
		return
	}
	_, _ = io.WriteString(w, "up 1\n")
}

// Serve starts a server that stops with the test. now is the clock of the certificates and of the
// audit log.
func Serve(t testing.TB, now func() time.Time, router *Router) *Server {
	t.Helper()
	dir := t.TempDir()
	s := &Server{
		Router: router, Machine: NewMachine(), Metrics: &Page{}, Socket: filepath.Join(dir, "api.sock"),
		Context: filepath.Join(dir, "admin.yaml"), Audit: filepath.Join(dir, "audit.log"),
	}
	st, err := store.Open(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	audit, err := auth.OpenAudit(s.Audit, now)
	if err != nil {
		t.Fatal(err)
	}
	if s.Events, err = event.Open(filepath.Join(dir, "events.log"), now); err != nil {
		t.Fatal(err)
	}
	api.ObserveCalls(audit, s.Events)
	// The context needs an address before the listener has one, so it has a placeholder.
	s.Authority, err = auth.New(auth.Options{Store: st, Address: "node-1.example:7443", Bundle: s.Context, Notice: io.Discard, Audit: audit, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	var stop func()
	start := func() {
		s.Logs = logs.New()
		s.Log = slog.New(s.Logs.Handler(slog.NewTextHandler(io.Discard, nil)))
		server, err := api.Listen(api.Options{Router: s.Router, Machine: s.Machine, Authority: s.Authority, Events: s.Events, Logs: s.Logs, Address: "127.0.0.1:0", Socket: s.Socket, Metrics: s.Metrics})
		if err != nil {
			t.Fatal(err)
		}
		s.Address = server.Address().String()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- server.Serve(ctx) }()
		stop = func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("serving: %v", err)
			}
		}
	}
	start()
	s.Restart = func() {
		stop()
		start()
	}
	s.Stop = sync.OnceFunc(func() {
		stop()
		audit.Close()
		s.Events.Close()
		st.Close()
	})
	t.Cleanup(s.Stop)
	return s
}

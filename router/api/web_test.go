package api_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/router/auth"
)

// config is that of a client which offers protocols.
func config(t *testing.T, s *apitest.Server, protocols []string, certs ...tls.Certificate) *tls.Config {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(s.Authority.Certificate())) {
		t.Fatal("the authority's certificate is not valid PEM")
	}
	return &tls.Config{RootCAs: pool, ServerName: auth.ServerName, NextProtos: protocols, Certificates: certs, MinVersion: tls.VersionTLS13}
}

// browser returns a client that offers HTTP/2 and HTTP/1.1, as Prometheus does.
func browser(t *testing.T, s *apitest.Server, certs ...tls.Certificate) *http.Client {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: config(t, s, nil, certs...), ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// ask requests a page and returns the status and the text.
func ask(t *testing.T, c *http.Client, method, url string, header ...string) (int, string, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	answer, err := c.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if answer.ProtoMajor != 1 {
		t.Errorf("%s %s: answered by %s", method, url, answer.Proto)
	}
	return answer.StatusCode, string(text), err
}

// alive checks that a call of gRPC is answered.
func alive(t *testing.T, c isthmusv1.SystemServiceClient) {
	t.Helper()
	if _, err := c.GetStatus(soon(t), &isthmusv1.GetStatusRequest{}); err != nil {
		t.Errorf("a call of gRPC: %v", err)
	}
}

// TestMetricsPage checks what every role may request, next to gRPC on the same port.
func TestMetricsPage(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	url := "https://" + s.Address
	rpc := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader))
	for _, role := range []auth.Role{auth.Reader, auth.Operator, auth.Admin} {
		cert, _ := issued(t, s, "scraper", role, 0)
		c := browser(t, s, cert)
		for _, one := range []struct {
			method, path string
			status       int
			text         string
		}{
			{"GET", "/metrics", 200, "up 1\n"}, {"HEAD", "/metrics", 200, ""}, {"POST", "/metrics", 405, "only GET and HEAD are allowed\n"},
			{"GET", "/", 404, "/ is not allowed\n"}, {"GET", "/metrics/", 404, "/metrics/ is not allowed\n"}, {"GET", "/debug/pprof/", 404, "/debug/pprof/ is not allowed\n"},
		} {
			if status, text, err := ask(t, c, one.method, url+one.path); status != one.status || text != one.text || err != nil {
				t.Errorf("%v: %s %s: status %d, %q, %v", role, one.method, one.path, status, text, err)
			}
		}
		alive(t, rpc)
	}
	refused := 0
	for _, e := range auditLog(t, s) {
		if e.Event == auth.Refused && e.Who == "scraper" && e.Method == "/debug/pprof/" && e.Result == codes.PermissionDenied.String() && e.Address == "127.0.0.1" {
			refused++
		}
	}
	if refused != 3 {
		t.Errorf("%d refusals of a page are in the audit log, want 3", refused)
	}
}

// TestPagesNeedACertificate checks that a client without a valid certificate gets no page.
func TestPagesNeedACertificate(t *testing.T) {
	var offset atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	s := apitest.Serve(t, now, apitest.New(now))
	url := "https://" + s.Address + "/metrics"
	other := apitest.Serve(t, time.Now, apitest.New(time.Now))
	foreign, _ := issued(t, other, "foreign", auth.Admin, 0)
	revoked, serial := issued(t, s, "revoked", auth.Reader, 0)
	open := browser(t, s, revoked)
	if status, _, err := ask(t, open, "GET", url); status != 200 || err != nil {
		t.Fatal(status, err)
	}
	if err := s.Authority.Revoke(serial); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]*http.Client{
		"no certificate": browser(t, s), "of another authority": browser(t, s, foreign), "revoked": browser(t, s, revoked), "revoked, with an open connection": open,
	} {
		if status, text, err := ask(t, c, "GET", url); err == nil {
			t.Errorf("%s: status %d, %q", what, status, text)
		}
	}
	short, _ := issued(t, s, "short", auth.Reader, time.Hour)
	c := browser(t, s, short)
	if status, _, err := ask(t, c, "GET", url); status != 200 || err != nil {
		t.Fatal(status, err)
	}
	offset.Store(int64(2 * time.Hour))
	if status, _, err := ask(t, c, "GET", url); status != http.StatusUnauthorized || err != nil {
		t.Errorf("expired, with an open connection: status %d, %v", status, err)
	}
	if status, _, err := ask(t, browser(t, s, short), "GET", url); err == nil {
		t.Errorf("expired: status %d", status)
	}
}

// TestPagesAreBounded checks that one client has two requests at a time and all have four, and that
// a header has a bound.
func TestPagesAreBounded(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	url := "https://" + s.Address + "/metrics"
	var clients []*http.Client
	for i := range 3 {
		cert, _ := issued(t, s, fmt.Sprint("scraper-", i), auth.Reader, 0)
		clients = append(clients, browser(t, s, cert))
	}
	if status, _, err := ask(t, clients[0], "GET", url, "X-Long", strings.Repeat("x", 11<<10)); status != 200 || err != nil {
		t.Errorf("a header of 11 KiB: status %d, %v", status, err)
	}
	if status, _, err := ask(t, clients[0], "GET", url, "X-Long", strings.Repeat("x", 17<<10)); err == nil && status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of 17 KiB: status %d, %v", status, err)
	}
	entered, leave := make(chan struct{}), make(chan struct{})
	end := sync.OnceFunc(func() { close(leave) })
	t.Cleanup(end)
	s.Metrics.Set(func(http.ResponseWriter, *http.Request) {
		select {
		case entered <- struct{}{}:
			<-leave
		case <-leave:
		}
	})
	var under sync.WaitGroup
	begin := func(c *http.Client) {
		under.Go(func() {
			if status, _, err := ask(t, c, "GET", url); status != 200 || err != nil {
				t.Errorf("a request that was let in: status %d, %v", status, err)
			}
		})
		select {
		case <-entered:
		case <-soon(t).Done():
			t.Fatal("a request was not let in")
		}
	}
	busy := func(what string, c *http.Client) {
		t.Helper()
		if status, _, err := ask(t, c, "GET", url); status != http.StatusServiceUnavailable || err != nil {
			t.Errorf("%s: status %d, %v", what, status, err)
		}
	}
	begin(clients[0])
	begin(clients[0])
	busy("the third of a client", clients[0])
	begin(clients[1])
	begin(clients[1])
	busy("the fifth of all", clients[2])
	alive(t, isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader)))
	end()
	under.Wait()
	s.Metrics.Set(func(http.ResponseWriter, *http.Request) {})
	if status, _, err := ask(t, clients[2], "GET", url); status != 200 || err != nil {
		t.Errorf("after them: status %d, %v", status, err)
	}
}

// TestPanicInAPage checks that a panic ends its request alone.
func TestPanicInAPage(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	cert, _ := issued(t, s, "scraper", auth.Reader, 0)
	c := browser(t, s, cert)
	s.Metrics.Set(func(http.ResponseWriter, *http.Request) { panic("of the test") })
	if status, _, err := ask(t, c, "GET", "https://"+s.Address+"/metrics"); err == nil {
		t.Errorf("status %d", status)
	}
	s.Metrics.Set(func(http.ResponseWriter, *http.Request) {})
	if status, _, err := ask(t, c, "GET", "https://"+s.Address+"/metrics"); status != 200 || err != nil {
		t.Errorf("after it: status %d, %v", status, err)
	}
	alive(t, isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader)))
}

// TestSlowClientsOfPages checks that clients which open as many connections as they may, and send
// nothing, a part of a header, or a body without an end, and those that do not read, keep neither
// gRPC nor pages from others, and that their connections end.
func TestSlowClientsOfPages(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	big := strings.Repeat("x", 32<<20)
	s.Metrics.Set(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Big") != "" {
			_, _ = io.WriteString(w, big)
		}
	})
	cert, _ := issued(t, s, "slow", auth.Reader, 0)
	open := func(cert tls.Certificate) *tls.Conn {
		c, err := (&tls.Dialer{Config: config(t, s, []string{"http/1.1"}, cert)}).DialContext(soon(t), "tcp", s.Address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*tls.Conn)
	}
	var slow []*tls.Conn
	for i := range 60 {
		c := open(cert)
		text := []string{"", "GET /metrics HT", "GET /metrics HTTP/1.1\r\nHost: x\r\nA: ", "POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\nx"}[i%4]
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		slow = append(slow, c)
	}
	for range 2 {
		c := open(cert)
		if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\nX-Big: 1\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
	}
	good, _ := issued(t, s, "good", auth.Reader, 0)
	c := browser(t, s, good)
	rpc := isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader))
	for range 10 {
		if status, _, err := ask(t, c, "GET", "https://"+s.Address+"/metrics"); status != 200 || err != nil {
			t.Errorf("another client: status %d, %v", status, err)
		}
		alive(t, rpc)
	}
	alive(t, isthmusv1.NewSystemServiceClient(dialRole(t, s, auth.Reader)))
	for i, c := range slow {
		// The server ends all of them after the time for a header.
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		_, err := io.Copy(io.Discard, bufio.NewReader(c))
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			t.Fatalf("connection %d stays open: %v", i, err)
		}
	}
	alive(t, rpc)
}

// TestPagesEndWithTheServer checks that a request under way does not keep the server from stopping.
func TestPagesEndWithTheServer(t *testing.T) {
	s := apitest.Serve(t, time.Now, apitest.New(time.Now))
	cert, _ := issued(t, s, "scraper", auth.Reader, 0)
	entered := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel) // runs before the server stops, so that a test that fails ends
	s.Metrics.Set(func(_ http.ResponseWriter, r *http.Request) {
		close(entered)
		select {
		case <-r.Context().Done():
		case <-ctx.Done():
		}
	})
	c := browser(t, s, cert)
	ended := make(chan error, 1)
	go func() {
		_, err := c.Get("https://" + s.Address + "/metrics")
		ended <- err
	}()
	<-entered
	s.Stop()
	var timeout net.Error
	if err := <-ended; err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("the request was answered, or went on: %v", err)
	}
}

package door

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/link/linktest"
	"github.com/isthmus-net/isthmus/test/netns"
)

// Ring: namespace. There are no rules in it, so that the sockets are on their own.

func TestMain(m *testing.M) { linktest.Main(m) }

// world has a node, which is this process, with an interface "in" toward a client, and one "out"
// toward a stranger.
type world struct {
	*testing.T
	doors            *Doors
	client, stranger *netns.NS
}

const address = "10.99.0.1:9100"

var inlet = nat.Inlet{Interface: "in", Address: netip.MustParseAddr("10.99.0.1")}

func from(texts ...string) nat.Metrics {
	m := nat.Metrics{Port: 9100, Inlets: []nat.Inlet{inlet}}
	for _, text := range texts {
		m.From = append(m.From, netip.MustParsePrefix(text))
	}
	return m
}

func begin(t *testing.T, page http.Handler) *world {
	w := &world{T: t, client: netns.New(t), stranger: netns.New(t)}
	w.interfaces()
	w.stranger.Run("ip link add wan type veth peer name out netns 1\nip link set wan up\nip address add 10.98.0.2/24 dev wan\nip address add 10.99.0.2/32 dev wan\nip route add 10.99.0.1 via 10.98.0.1")
	linktest.Run(t, "ip", "link", "set", "out", "up")
	linktest.Run(t, "ip", "address", "add", "10.98.0.1/24", "dev", "out")
	t.Cleanup(func() { linktest.Run(t, "ip", "link", "del", "in"); linktest.Run(t, "ip", "link", "del", "out") })
	w.doors = New(Options{Page: page, Changed: func() {}, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- w.doors.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

// interfaces makes the interface toward the client.
func (w *world) interfaces() {
	w.client.Run("ip link add lan type veth peer name in netns 1\nip link set lan up\nip address add 10.99.0.2/24 dev lan\nip address add 10.99.0.3/24 dev lan")
	linktest.Run(w.T, "ip", "link", "set", "in", "up")
	linktest.Run(w.T, "ip", "address", "add", "10.99.0.1/24", "dev", "in")
}

// dial connects from an address in a namespace.
func dial(n *netns.NS, source string) (c net.Conn, err error) {
	n.Do(func() {
		d := net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
		c, err = d.Dial("tcp", address)
	})
	return c, err
}

// ask sends a request over a connection of its own and returns the answer.
func ask(n *netns.NS, source, request string) (string, error) {
	c, err := dial(n, source)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, request); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(c)
	if err == nil && len(answer) == 0 {
		err = errors.New("closed without an answer")
	}
	return string(answer), err
}

const get = "GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n"

// until waits until f returns nil.
func (w *world) until(f func() error) {
	w.Helper()
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	w.Fatal(err)
}

func (w *world) served(source string) {
	w.Helper()
	w.until(func() error {
		answer, err := ask(w.client, source, get)
		if err == nil && !strings.HasSuffix(answer, "the page") {
			err = fmt.Errorf("the answer is %q", answer)
		}
		return err
	})
}

func (w *world) refused(n *netns.NS, source string) {
	w.Helper()
	if answer, err := ask(n, source, get); err == nil {
		w.Errorf("%s gets %q", source, answer)
	}
}

func text(s string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, s) })
}

// TestSources: without rules too, only sources of the document that come by the interface of the
// address get the page, and they lose it with the document.
func TestSources(t *testing.T) {
	w := begin(t, text("the page"))
	w.doors.Set(from("10.99.0.2/32"))
	w.served("10.99.0.2")
	w.refused(w.client, "10.99.0.3")
	w.refused(w.stranger, "10.98.0.2")
	w.refused(w.stranger, "10.99.0.2")
	w.doors.Set(from("10.99.0.3/32", "10.98.0.0/24"))
	w.served("10.99.0.3")
	w.refused(w.client, "10.99.0.2")
	w.refused(w.stranger, "10.98.0.2")

	held, err := dial(w.client, "10.99.0.3")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	w.doors.Set(nat.Metrics{})
	if _, err := held.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlives the document")
	}
	w.until(func() error {
		if c, err := dial(w.client, "10.99.0.3"); err == nil {
			c.Close()
			return errors.New("the port is still open")
		}
		return nil
	})
}

// TestInterface: the page comes with its address and interface, and comes back with a new one.
func TestInterface(t *testing.T) {
	w := begin(t, text("the page"))
	linktest.Run(t, "ip", "link", "del", "in")
	w.doors.Set(from("10.99.0.0/24"))
	w.until(func() error {
		if at, err, since, n := w.doors.Shut(); n != 1 || at != inlet || err == "" || since.IsZero() {
			return fmt.Errorf("%v, %v, %v, %d", at, err, since, n)
		}
		return nil
	})
	for range 2 {
		w.interfaces()
		w.served("10.99.0.2")
		w.until(func() error {
			if _, err, _, n := w.doors.Shut(); n != 0 {
				return errors.New(err)
			}
			return nil
		})
		linktest.Run(t, "ip", "link", "del", "in")
	}
	w.until(func() error {
		if _, _, _, n := w.doors.Shut(); n != 1 {
			return errors.New("the interface is gone, and nothing says so")
		}
		return nil
	})
	// Another program has the port before the interface comes.
	linktest.Run(t, "ip", "address", "add", "10.99.0.1/32", "dev", "lo")
	defer linktest.Run(t, "ip", "address", "del", "10.99.0.1/32", "dev", "lo")
	other, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	w.interfaces()
	w.until(func() error {
		if _, err, _, n := w.doors.Shut(); n != 1 || !strings.Contains(err, "address already in use") {
			return fmt.Errorf("%s, %d", err, n)
		}
		return nil
	})
}

// TestClients: a host that opens connections and says nothing keeps no other one out, and nothing
// but a GET of the page is answered.
func TestClients(t *testing.T) {
	w := begin(t, text("the page"))
	w.doors.Set(from("10.99.0.0/24"))
	w.served("10.99.0.2")
	var held []net.Conn
	for range maxConns {
		c, err := dial(w.client, "10.99.0.2")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		held = append(held, c)
	}
	// The silent connections are closed only after headerTime: none has made room yet.
	if answer, err := ask(w.client, "10.99.0.3", get); err != nil || !strings.HasSuffix(answer, "the page") {
		t.Errorf("another host gets %q, %v", answer, err)
	}
	if n := w.closed(held); n < maxConns-maxConnsPerHost {
		t.Errorf("%d of %d silent connections of one host were closed, want %d", n, maxConns, maxConns-maxConnsPerHost)
	}
	w.served("10.99.0.2") // the silent ones are closed after a while
	for request, want := range map[string]string{
		"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n":                                       "HTTP/1.1 405 ",
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n":                                                                    "HTTP/1.1 404 ",
		"GET /metrics/../debug HTTP/1.1\r\nHost: x\r\n\r\n":                                                    "HTTP/1.1 3",
		"GET /metrics HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", maxHeader+8<<10) + "\r\n\r\n":          "HTTP/1.1 431 ",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n":                                                                     "HTTP/1.1 ",
		"HEAD /metrics HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nAccept-Encoding: identity\r\n\r\n\r\n": "HTTP/1.1 200 ",
	} {
		if got, _ := ask(w.client, "10.99.0.3", request); !strings.HasPrefix(got, want) || strings.HasPrefix(request, "PRI") && strings.HasPrefix(got, "HTTP/1.1 200") {
			t.Errorf("%.60q: %.80q, want %q", request, got, want)
		}
	}
}

// TestAllClients: there is a bound for all hosts together.
func TestAllClients(t *testing.T) {
	w := begin(t, text("the page"))
	w.doors.Set(from("10.99.0.0/24"))
	w.served("10.99.0.2")
	var held []net.Conn
	for host := range maxConns/maxConnsPerHost + 1 {
		source := fmt.Sprintf("10.99.0.%d", 10+host)
		w.client.Run("ip address add " + source + "/24 dev lan")
		for range maxConnsPerHost {
			c, err := dial(w.client, source)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			held = append(held, c)
		}
	}
	if n := w.closed(held); n < maxConnsPerHost {
		t.Errorf("%d of %d silent connections were closed, want %d", n, len(held), maxConnsPerHost)
	}
}

// closed counts the connections that the node closes well before the time for a header is over.
func (w *world) closed(conns []net.Conn) (n int) {
	w.Helper()
	results := make(chan error)
	for _, c := range conns {
		if err := c.SetReadDeadline(time.Now().Add(headerTime / 2)); err != nil {
			w.Fatal(err)
		}
		go func() {
			_, err := c.Read(make([]byte, 1))
			results <- err
		}()
	}
	for range conns {
		if err := <-results; !errors.Is(err, os.ErrDeadlineExceeded) {
			n++
		}
	}
	return n
}

// TestShared: a page is made once for all clients, and for as long as it takes a tenth of a
// processor; what a client sends does not reach it.
func TestShared(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	var made atomic.Int64
	var takes time.Duration
	s := &shared{now: func() time.Time { return now }, next: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		made.Add(1)
		now = now.Add(takes)
		if len(r.Header) > 1 || r.Header.Get("Accept") != "" || r.Method != http.MethodGet {
			t.Errorf("%s with %v", r.Method, r.Header)
		}
		w.Header().Set("Content-Type", "text/x")
		if r.Header.Get("Accept-Encoding") == "gzip" {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			fmt.Fprint(z, made.Load())
			z.Close()
			return
		}
		fmt.Fprint(w, made.Load())
	})}
	look := func(encoding, want string) {
		t.Helper()
		r := httptest.NewRequest(http.MethodHead, "/metrics", nil)
		r.Header.Set("Accept", "application/openmetrics-text")
		r.Header.Set("Accept-Encoding", encoding)
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		var body io.Reader = w.Body
		if w.Header().Get("Content-Encoding") == "gzip" {
			z, err := gzip.NewReader(body)
			if err != nil {
				t.Fatal(err)
			}
			body = z
		}
		if text, err := io.ReadAll(body); err != nil || string(text) != want || w.Header().Get("Content-Type") != "text/x" || (w.Header().Get("Content-Encoding") != "") != (encoding != "") {
			t.Errorf("%q, %v, %v, want %s", text, err, w.Header(), want)
		}
	}
	look("", "1")
	look("", "1")
	look("gzip, br", "2")
	look("", "1")
	now = now.Add(minKept)
	takes = 2 * time.Second
	look("", "3")
	now = now.Add(17 * time.Second)
	look("", "3")
	now = now.Add(time.Second)
	look("", "4")
}

package main

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// proxy is between the command line and a node, so that the connection can be lost.
type proxy struct {
	address string
	mu      sync.Mutex
	to      string
	conns   []net.Conn
	away    bool
	count   int // of connections that were led on
}

func newProxy(t *testing.T, to string) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p := &proxy{address: l.Addr().String(), to: to}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.mu.Lock()
			far, err := net.Dial("tcp", p.to)
			if err != nil || p.away {
				c.Close()
			} else {
				p.conns = append(p.conns, c, far)
				p.count++
				go func() { io.Copy(c, far); c.Close() }()
				go func() { io.Copy(far, c); far.Close() }()
			}
			p.mu.Unlock()
		}
	}()
	return p
}

// set closes all connections, and with away refuses others.
func (p *proxy) set(away bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns, p.away = nil, away
}

// accepted returns how many connections were led on.
func (p *proxy) accepted() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

// lead has later connections lead to another address.
func (p *proxy) lead(to string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.to = to
}

func fastWatch(t *testing.T) {
	was := watchPace
	watchPace = 50 * time.Millisecond
	t.Cleanup(func() { watchPace = was })
}

// follow runs a command that follows something over a proxy. interrupt ends it, and checks that it
// ends well.
func follow(t *testing.T, args ...string) (w *world, p *proxy, out, errs *syncBuffer, interrupt func()) {
	t.Helper()
	w, out, errs = newWorld(t), &syncBuffer{}, &syncBuffer{}
	p = newProxy(t, w.server.Address)
	ctx, stop := context.WithCancel(t.Context())
	t.Cleanup(stop)
	code := make(chan int, 1)
	go func() {
		code <- w.app(strings.NewReader(""), out, errs).run(ctx, append(args, "--address", p.address))
	}()
	return w, p, out, errs, func() {
		t.Helper()
		stop()
		if c := <-code; c != 0 {
			t.Errorf("an interrupt ends it with %d", c)
		}
	}
}

// TestWatchConnectsAgain: after a restart of the node a watch says so, and prints only what has
// changed.
func TestWatchConnectsAgain(t *testing.T) {
	fastWatch(t)
	for _, command := range []string{"watch tunnels", "get tunnels -w", "watch tunnels -o json"} {
		t.Run(command, func(t *testing.T) {
			w, p, out, errs, interrupt := follow(t, strings.Fields(command)...)
			out.waitFor(t, "vwan-1")
			p.set(true)
			errs.waitFor(t, "12:00:00 the connection to "+p.address+" is lost; connecting again\n")
			before := out.text()
			w.server.Router.SetTunnels(
				&isthmusv1.TunnelStatus{Name: "aws-9", State: "up"},
				&isthmusv1.TunnelStatus{Name: "site-0", Kind: "wireguard", State: "up", Interface: "ist2"},
			)
			p.set(false)
			errs.waitFor(t, "connected again\n")
			out.waitFor(t, "vwan-1") // it was removed
			w.server.Router.SetTunnels(&isthmusv1.TunnelStatus{Name: "final", State: "up"})
			out.waitFor(t, "final")
			interrupt()
			var events []string
			after, _, _ := strings.Cut(strings.TrimPrefix(out.text(), before), "final")
			for line := range strings.Lines(after) {
				for _, change := range []string{"added", "updated", "removed"} {
					for _, name := range []string{"aws-0", "aws-9", "site-0", "vwan-1"} {
						if strings.Contains(strings.ToLower(line), change) && strings.Contains(line, name) {
							events = append(events, change+" "+name)
						}
					}
				}
			}
			got := strings.Join(events, ", ")
			for _, want := range []string{"added aws-9", "updated site-0", "removed aws-0", "removed vwan-1"} {
				if strings.Count(got, want) != 1 {
					t.Errorf("after the restart there is %q, want once %q; all:\n%s", got, want, out.text())
				}
			}
			if heads := strings.Count(out.text(), "TIME "); heads > 1 || strings.Contains(command, "json") && heads > 0 || strings.Count(out.text(), "EVENT_TYPE_MARK") > 1 {
				t.Errorf("the head comes twice:\n%s", out.text())
			}
		})
	}
}

// TestWatchOfNothingNew: the same objects are not printed again, although their counters have
// grown.
func TestWatchOfNothingNew(t *testing.T) {
	fastWatch(t)
	w := newWorld(t)
	p := newProxy(t, w.server.Address)
	tunnel := func(bytes uint64) *isthmusv1.TunnelStatus {
		return &isthmusv1.TunnelStatus{Name: "aws-0", State: "up", RxBytes: bytes}
	}
	w.server.Router.SetTunnels(tunnel(1))
	var out, errs syncBuffer
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan int, 1)
	go func() {
		done <- w.app(nil, &out, &errs).run(ctx, []string{"watch", "tunnel", "aws-0", "other", "--address", p.address})
	}()
	out.waitFor(t, "aws-0")
	p.set(true)
	errs.waitFor(t, "is lost")
	w.server.Router.SetTunnels(tunnel(2))
	p.set(false)
	errs.waitFor(t, "connected again")
	w.server.Router.SetTunnels(tunnel(3), &isthmusv1.TunnelStatus{Name: "not-asked"}, &isthmusv1.TunnelStatus{Name: "other"})
	out.waitFor(t, "other")
	stop()
	<-done
	if text := out.text(); strings.Count(text, "aws-0") != 1 || strings.Contains(text, "not-asked") {
		t.Errorf("printed\n%s", text)
	}
}

// TestWatchEndsWhenRefused: a revoked client does not try forever.
func TestWatchEndsWhenRefused(t *testing.T) {
	fastWatch(t)
	w := newWorld(t)
	file := filepath.Join(w.home, "ann.yaml")
	if _, stderr, code := w.run(t.Context(), "", "client", "issue", "ann", "--role", "reader", "-o", file); code != 0 {
		t.Fatalf("issuing: exit %d, %s", code, stderr)
	}
	var out, errs syncBuffer
	done := make(chan int, 1)
	go func() {
		done <- w.app(nil, &out, &errs).run(t.Context(), []string{"watch", "peers", "--context", file})
	}()
	out.waitFor(t, "azure-0")
	for _, c := range w.server.Authority.Clients() {
		if c.Name == "ann" {
			if _, stderr, code := w.run(t.Context(), "", "client", "revoke", c.Serial); code != 0 {
				t.Fatalf("revoking: exit %d, %s", code, stderr)
			}
		}
	}
	select {
	case code := <-done:
		if code != 1 || !strings.Contains(errs.text(), "certificate") {
			t.Errorf("exit %d, %s", code, errs.text())
		}
	case <-time.After(30 * time.Second):
		t.Errorf("it still tries: %s", errs.text())
	}
}

// TestWatchWithoutNode: a node that was never there ends a watch at once.
func TestWatchWithoutNode(t *testing.T) {
	w := newWorld(t)
	if _, stderr, code := w.run(t.Context(), "", "watch", "peers", "--socket", filepath.Join(w.home, "none")); code != 1 || !strings.Contains(stderr, "cannot be reached") {
		t.Errorf("exit %d, %s", code, stderr)
	}
	if _, stderr, code := w.run(t.Context(), "", "get", "peers", "-w", "-o", "name"); code != 2 {
		t.Errorf("exit %d, %s", code, stderr)
	}
}

// TestStatusWatch: the status is printed again when it is another one, also if that was while the
// connection was lost, and only then.
func TestStatusWatch(t *testing.T) {
	fastWatch(t)
	for _, output := range []string{"table", "json"} {
		t.Run(output, func(t *testing.T) {
			w, p, out, errs, interrupt := follow(t, "status", "--watch", "-o", output)
			out.waitFor(t, "node-1")
			p.set(true)
			errs.waitFor(t, "is lost; connecting again\n")
			p.set(false)
			errs.waitFor(t, "connected again\n")
			p.set(true)
			w.server.Router.SetConditions(&isthmusv1.Condition{Type: "PoolDown", Severity: "error", Since: ago(time.Minute), Message: "no target answers"})
			p.set(false)
			out.waitFor(t, "no target answers")
			interrupt()
			if text := out.text(); strings.Count(text, "node-1") != 2 {
				t.Errorf("printed\n%s", text)
			}
		})
	}
}

package auth

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/isthmus-net/isthmus/test/root"
)

// authorityWithAdmin returns an authority, and the certificate of an admin.
func authorityWithAdmin(t *testing.T) (*Authority, tls.Certificate) {
	t.Helper()
	a, _, _ := setUp(t, t.TempDir(), &clock{time.Now()})
	key, keyPEM, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	text, _, err := a.issue("ann", Admin, key.Public(), 0)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair([]byte(text), []byte(keyPEM))
	if err != nil {
		t.Fatal(err)
	}
	return a, cert
}

// door accepts connections with the credentials of an authority, as gRPC does.
func door(t *testing.T) (*Authority, net.Listener, tls.Certificate) {
	t.Helper()
	a, cert := authorityWithAdmin(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var accepted sync.WaitGroup
	accepted.Add(1)
	t.Cleanup(func() { l.Close(); accepted.Wait() })
	go func() {
		defer accepted.Done()
		for raw, err := l.Accept(); err == nil; raw, err = l.Accept() {
			accepted.Add(1)
			go func() {
				defer accepted.Done()
				raw.SetDeadline(time.Now().Add(time.Minute))
				conn, _, err := a.Credentials(nil).ServerHandshake(raw)
				if err == nil {
					conn.Write([]byte("welcome"))
					conn.Close()
				}
			}()
		}
	}()
	return a, l, cert
}

// enter connects with a certificate and waits until it is let in.
func enter(l net.Listener, a *Authority, cert tls.Certificate) error {
	d := &tls.Dialer{Config: &tls.Config{RootCAs: a.roots(), ServerName: ServerName, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{cert}}}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := d.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	_, err = conn.Read(make([]byte, 7))
	return err
}

// TestIdleConnectionsKeepNobodyOut: connections from many addresses that never speak, opened again
// when they end, take no place from a client that does. A stranger is cut when maxSilent others
// connect before its first message, which takes some 200 ms at the rate of this test. Without a
// rate, the dialers keep the client's goroutine from running for that long.
func TestIdleConnectionsKeepNobodyOut(t *testing.T) {
	for _, idle := range []int{72, 700, 2000}[:root.Count(3, 2)] {
		t.Run(fmt.Sprint(idle), func(t *testing.T) {
			a, l, cert := door(t)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{}, idle)
			pace := rate.NewLimiter(5000, 1)
			for i := range idle {
				go func() {
					defer func() { done <- struct{}{} }()
					d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, byte(1+i>>8), byte(i))}}
					for pace.Wait(ctx) == nil {
						conn, err := d.DialContext(ctx, "tcp", l.Addr().String())
						if err != nil {
							continue
						}
						stop := context.AfterFunc(ctx, func() { conn.Close() })
						conn.Read(make([]byte, 1)) // until the server ends it
						stop()
						conn.Close()
						select { // the attacker of the case file paused as well
						case <-time.After(50 * time.Millisecond):
						case <-ctx.Done():
						}
					}
				}()
			}
			a.clients.await(t, min(idle, maxSilent))
			for range 10 {
				if err := enter(l, a, cert); err != nil {
					t.Error(err)
				}
			}
			a.clients.mu.Lock()
			if n := len(a.clients.handshakes); n > 2*(maxSilent+maxHandshakes) {
				t.Errorf("%d handshakes are under way", n)
			}
			a.clients.mu.Unlock()
			cancel()
			for range idle {
				<-done
			}
		})
	}
}

// await waits until so many handshakes are under way.
func (r *registry) await(t *testing.T, n int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		r.mu.Lock()
		have := len(r.handshakes)
		r.mu.Unlock()
		if have >= n {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d handshakes are under way, want %d", have, n)
		}
	}
}

// TestHandshakePlaces: who makes room for whom.
func TestHandshakePlaces(t *testing.T) {
	var r registry
	r.init()
	cut := map[string]int{}
	host := func(i int) netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32)
	}
	begin := func(i int, speaks bool) *handshake {
		h := r.beginHandshake(host(i), func() { cut[fmt.Sprint(i)]++ })
		if speaks {
			r.spoke(h)
		}
		return h
	}
	good := begin(999, true)
	r.endHandshake(good, true)
	speaker := begin(0, true)
	for i := range maxSilent {
		begin(10_000+i, false)
	}
	known := begin(999, false)
	if len(cut) > 0 {
		t.Errorf("cut %v while there was room", cut)
	}
	for i := range 10 {
		begin(1000+i, false)
	}
	if len(cut) != 10 || cut["10000"] != 1 || cut["10009"] != 1 {
		t.Errorf("cut %v for 10 silent ones", cut)
	}
	for i := range maxHandshakes - 1 {
		begin(2000+i, true)
	}
	if cut["0"] > 0 {
		t.Error("one that speaks was cut while there was room")
	}
	if begin(3000, true); cut["0"] != 1 || cut["999"] > 0 {
		t.Error("the oldest that speaks makes no room, or a known one does")
	}
	r.endHandshake(speaker, false) // late
	for range 3 * maxHandshakesPerHost {
		begin(5000, false)
	}
	of, n := host(5000), 0
	for _, h := range r.handshakes {
		if h.host == of {
			n++
		}
	}
	if n != maxHandshakesPerHost || len(r.handshakes) > 2*(maxSilent+maxHandshakes) {
		t.Errorf("%d of one host, %d of all", n, len(r.handshakes))
	}
	r.endHandshake(known, true)
	for i := range 2 * maxKnownHosts {
		r.endHandshake(begin(6000+i, true), true)
	}
	if len(r.known) != maxKnownHosts {
		t.Errorf("%d hosts are known", len(r.known))
	}
	for text, want := range map[string]string{"[2001:db8:1:2:3::4]:5": "2001:db8:1:2::/64", "192.0.2.7:5": "192.0.2.7/32", "[::ffff:192.0.2.7]:5": "192.0.2.7/32", "[fe80::1%eth0]:5": "fe80::/64"} {
		if got := hostPrefix(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(text))); got.String() != want {
			t.Errorf("%s counts as %v, want %s", text, got, want)
		}
	}
}

// TestSilentClientIsCut: one that says nothing goes soon, long before the handshake would end.
func TestSilentClientIsCut(t *testing.T) {
	_, l, _ := door(t)
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(50 * time.Second)) // door waits for a minute
	if _, err := conn.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("the connection is left open: %v", err)
	}
}

// TestExpiryIsCheckedAtEachCall: whatever became of the timer of the connection.
func TestExpiryIsCheckedAtEachCall(t *testing.T) {
	c := newClock()
	a, _, _ := setUp(t, t.TempDir(), c)
	key, _, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	_, client, err := a.issue("ann", Admin, key.Public(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: &net.TCPAddr{}, AuthInfo: Identity{Name: "ann", Role: Admin, Serial: client.Serial, Expires: client.Expires}})
	if _, err := a.admit(ctx, "/isthmus.v1.SystemService/GetStatus"); err != nil {
		t.Error(err)
	}
	c.Time = c.Add(time.Hour + time.Second)
	if _, err := a.admit(ctx, "/isthmus.v1.SystemService/GetStatus"); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "expired") {
		t.Errorf("got %v", err)
	}
}

// TestStrangersPushNothingOut: what strangers cause is in files of its own, which have a bound.
func TestStrangersPushNothingOut(t *testing.T) {
	c, name := newClock(), filepath.Join(t.TempDir(), "audit.log")
	l, err := OpenAudit(name, c.now)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.other.limit = 1000
	if err := l.write(Entry{Event: End, Who: "ann"}); err != nil {
		t.Fatal(err)
	}
	for range 2000 {
		c.Time = c.Add(refusalsEvery)
		for range 3 {
			if err := l.refuse("", Entry{Address: "192.0.2.1"}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if all := lines(t, name); len(all) != 1 || all[0].Who != "ann" {
		t.Errorf("the log has %d lines", len(all))
	}
	refused := lines(t, RefusedLog(name))
	if last := refused[len(refused)-1]; last.Event != Refused || last.Suppressed != 2 {
		t.Errorf("the last line is %+v", last)
	}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(name), "audit-refused*"))
	if err != nil || len(files) != 1+refusedFiles {
		t.Errorf("files are %v", files)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err != nil || info.Size() > 1000 {
			t.Errorf("%s: %v, %v", f, info.Size(), err)
		}
	}
}

// TestReplacedAuditIsTold: a log that is removed, renamed or replaced loses no further line, and
// that is said in it and by a condition.
func TestReplacedAuditIsTold(t *testing.T) {
	for what, replace := range map[string]func(name string) error{
		"removed":        os.Remove,
		"renamed":        func(name string) error { return os.Rename(name, name+".old") },
		"replaced":       func(name string) error { return os.WriteFile(name+".new", nil, 0o600) },
		"seen by status": func(name string) error { return os.Remove(name) },
	} {
		t.Run(what, func(t *testing.T) {
			c, name := newClock(), filepath.Join(t.TempDir(), "audit.log")
			l, err := OpenAudit(name, c.now)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			if err := l.write(Entry{Event: End, Who: "ann"}); err != nil {
				t.Fatal(err)
			}
			if got := l.Conditions(); len(got) > 0 {
				t.Errorf("before: conditions %v", got)
			}
			if err := replace(name); err != nil {
				t.Fatal(err)
			}
			if what == "replaced" {
				if err := os.Rename(name+".new", name); err != nil {
					t.Fatal(err)
				}
			}
			if what == "seen by status" {
				l.Conditions()
			}
			if err := l.write(Entry{Event: End, Who: "bob"}); err != nil {
				t.Fatal(err)
			}
			if all := lines(t, name); len(all) != 2 || all[0].Event != Replaced || all[1].Who != "bob" {
				t.Errorf("the log is %+v", all)
			}
			if got := l.Conditions(); len(got) != 1 || got[0].Type != "AuditLogReplaced" {
				t.Errorf("conditions %v", got)
			}
			c.Time = c.Add(replacedFor + time.Second)
			if got := l.Conditions(); len(got) != 0 {
				t.Errorf("a day later: conditions %v", got)
			}
		})
	}
}

// TestPassedOn checks that gRPC, which sets a deadline of the connection after it was passed on,
// changes no deadline of the server of pages.
func TestPassedOn(t *testing.T) {
	a, cert := authorityWithAdmin(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	web := NewWeb(l.Addr())
	defer web.Close()
	client := make(chan error, 1)
	go func() {
		c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: a.roots(), ServerName: ServerName, NextProtos: []string{"h2", "http/1.1"}, Certificates: []tls.Certificate{cert}})
		if err == nil {
			_, err = c.Read(make([]byte, 1))
		}
		client <- err
	}()
	raw, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	done, set := make(chan error, 1), make(chan struct{})
	go func() {
		raw.SetDeadline(time.Now().Add(time.Minute))
		_, _, err := a.Credentials(web).ServerHandshake(raw)
		<-set
		raw.SetDeadline(time.Time{})
		done <- err
	}()
	c, err := web.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if id := FromContext(web.Context(t.Context(), c)); id.Name != "ann" || id.Role != Admin {
		t.Errorf("the client is %+v", id)
	}
	c.SetReadDeadline(time.Now().Add(-time.Second))
	close(set)
	if err := <-done; err != credentials.ErrConnDispatched {
		t.Errorf("gRPC gets %v", err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("reading ends with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the deadline of the server of pages is gone")
	}
	c.Close()
	if err := <-client; err == nil {
		t.Error("the client read something")
	}
	a.clients.mu.Lock()
	defer a.clients.mu.Unlock()
	if len(a.clients.conns) > 0 {
		t.Errorf("connections are left: %v", a.clients.conns)
	}
}

package dns

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/test/root"
)

// server is a DNS server whose zone can change.
type server struct {
	at netip.AddrPort

	mu      sync.Mutex
	zone    map[string]func(b *dnsmessage.Builder, q dnsmessage.Question) // by name and type
	code    dnsmessage.RCode
	mangle  func([]byte) [][]byte // returns the UDP packets to send instead of the response
	queries int
	mute    string        // names that contain it have no answer
	slow    time.Duration // delay of answers by UDP
	// every name under any.example has its own address, for a minute
	any   bool
	kinds []dnsmessage.Type         // of the queries
	old   func(query []byte) []byte // returns the answer to a query with an OPT record
}

// samePort listens at the same port in UDP and TCP. Another process may have it in one of them.
func samePort(t *testing.T) (net.PacketConn, net.Listener) {
	for range 100 {
		stream, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		packets, err := net.ListenPacket("udp", stream.Addr().String())
		if err == nil {
			return packets, stream
		}
		t.Cleanup(func() { stream.Close() }) // held until then, so that it is not chosen again
		if !errors.Is(err, unix.EADDRINUSE) {
			t.Fatal(err)
		}
	}
	t.Fatal("no port is free in both protocols")
	return nil, nil
}

func newServer(t *testing.T) *server {
	s := &server{zone: map[string]func(*dnsmessage.Builder, dnsmessage.Question){}}
	packets, stream := samePort(t)
	t.Cleanup(func() { packets.Close(); stream.Close() })
	s.at = netip.MustParseAddrPort(packets.LocalAddr().String())
	go func() {
		for buffer := make([]byte, 65535); ; {
			n, from, err := packets.ReadFrom(buffer)
			if err != nil {
				return
			}
			s.mu.Lock()
			slow := s.slow
			s.mu.Unlock()
			out := s.respond(buffer[:n], "udp")
			time.AfterFunc(slow, func() {
				for _, m := range out {
					packets.WriteTo(m, from)
				}
			})
		}
	}()
	go func() {
		for {
			conn, err := stream.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for buffer := make([]byte, 65535); ; {
					q, err := readTCP(conn, buffer)
					if err != nil {
						return
					}
					for _, m := range s.respond(q, "tcp") {
						writeTCP(conn, m)
					}
				}
			}()
		}
	}()
	return s
}

func (s *server) respond(query []byte, network string) [][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queries++
	h, q, err := question(query)
	if err != nil {
		return nil
	}
	s.kinds = append(s.kinds, q.Type)
	if s.mute != "" && strings.Contains(canonical(q.Name), s.mute) {
		return nil
	}
	if s.old != nil && hasOPT(query) {
		if out := s.old(query); out != nil {
			return [][]byte{out}
		}
		return nil
	}
	records := s.zone[canonical(q.Name)+" "+q.Type.String()]
	if records == nil {
		records = s.zone[canonical(q.Name)+" "+dnsmessage.TypeCNAME.String()]
	}
	if name := canonical(q.Name); s.any && strings.HasSuffix(name, ".any.example") {
		records = func(b *dnsmessage.Builder, _ dnsmessage.Question) {
			sum := sha256.Sum256([]byte(name))
			b.AResource(header(name, 60), dnsmessage.AResource{A: [4]byte{11, sum[0], sum[1], sum[2]}})
		}
	}
	code := s.code
	if records == nil && code == 0 && s.zone[canonical(q.Name)] == nil {
		code = dnsmessage.RCodeNameError
	}
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: h.ID, Response: true, RecursionAvailable: true, RCode: code})
	b.EnableCompression()
	b.StartQuestions()
	b.Question(q)
	b.StartAnswers()
	if records != nil && code == 0 {
		records(&b, q)
	}
	out, err := b.Finish()
	if err != nil {
		panic(err)
	}
	if network == "udp" && len(out) > room(query) {
		out = refuse(h, q, 0, true)
	}
	if network == "udp" && s.mangle != nil {
		return s.mangle(out)
	}
	return [][]byte{out}
}

func header(name string, ttl uint32) dnsmessage.ResourceHeader {
	return dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name + "."), Class: dnsmessage.ClassINET, TTL: ttl}
}

// host replaces the addresses of a name.
func (s *server) host(name string, ttl uint32, list ...netip.Addr) {
	s.set(func() {
		s.zone[name] = func(*dnsmessage.Builder, dnsmessage.Question) {}
		for _, kind := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
			delete(s.zone, name+" "+kind.String())
			if slices.ContainsFunc(list, func(a netip.Addr) bool { return a.Is6() == (kind == dnsmessage.TypeAAAA) }) {
				s.zone[name+" "+kind.String()] = func(b *dnsmessage.Builder, q dnsmessage.Question) {
					for _, a := range list {
						switch {
						case kind == dnsmessage.TypeA && a.Is4():
							b.AResource(header(name, ttl), dnsmessage.AResource{A: a.As4()})
						case kind == dnsmessage.TypeAAAA && a.Is6():
							b.AAAAResource(header(name, ttl), dnsmessage.AAAAResource{AAAA: a.As16()})
						}
					}
				}
			}
		}
	})
}

// alias makes a name an alias of another. With whole, the server adds the records of the other one.
func (s *server) alias(name, other string, ttl uint32, whole bool) {
	s.set(func() {
		s.zone[name+" "+dnsmessage.TypeCNAME.String()] = func(b *dnsmessage.Builder, q dnsmessage.Question) {
			b.CNAMEResource(header(name, ttl), dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(other + ".")})
			for _, kind := range []string{q.Type.String(), dnsmessage.TypeCNAME.String()} {
				if next := s.zone[other+" "+kind]; next != nil && whole {
					next(b, q)
					return
				}
			}
		}
	})
}

func (s *server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func numbered(n int) (out []netip.Addr) {
	for i := range n {
		out = append(out, netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}))
	}
	return out
}

func TestResolve(t *testing.T) {
	s := newServer(t)
	dead := netip.MustParseAddrPort("127.0.0.1:1")
	s.host("a.example", 60, addrs("198.51.100.1", "198.51.100.2", "2001:db8::1")...)
	s.host("four.example", 60, addrs("198.51.100.4")...)
	s.host("many.example", 60, numbered(500)...)
	s.alias("www.example", "cdn.example", 300, true)
	s.alias("cdn.example", "a.example", 20, true)
	s.alias("step.example", "www.example", 10, false)
	s.alias("loop.example", "ring.example", 10, false)
	s.alias("ring.example", "loop.example", 10, false)
	s.alias("whole.example", "whole.example", 10, false)
	s.alias("gone.example", "none.example", 5, false)
	c := client{dial: (&net.Dialer{}).DialContext}
	for _, k := range []struct {
		name string
		ipv6 bool
		want string
		ttl  time.Duration
	}{
		{"a.example", false, "[198.51.100.1 198.51.100.2]", time.Minute},
		{"a.example", true, "[2001:db8::1]", time.Minute},
		{"four.example", true, "[]", 0},
		{"none.example", false, "[]", 0},
		{"many.example", false, fmt.Sprint(numbered(500)), time.Minute},
		{"www.example", false, "[198.51.100.1 198.51.100.2]", 20 * time.Second},
		{"step.example", true, "[2001:db8::1]", 10 * time.Second},
		{"loop.example", false, "the chain of aliases is too long", 0},
		{"whole.example", false, "[]", 0},
		{"gone.example", false, "[]", 0},
	} {
		got, ttl, err := c.resolve(t.Context(), []netip.AddrPort{dead, s.at}, k.name, k.ipv6)
		text := fmt.Sprint(got)
		if err != nil {
			text = err.Error()
		}
		if text != k.want || ttl != k.ttl {
			t.Errorf("%s: %.200s, %v, want %.200s, %v", k.name, text, ttl, k.want, k.ttl)
		}
	}

	// The resolver ignores answers to other questions; the true answer still counts.
	s.set(func() {
		s.mangle = func(m []byte) [][]byte {
			wrong := bytes.Replace(m, []byte{198, 51, 100, 4}, []byte{198, 51, 100, 66}, 1)
			other := bytes.Replace(wrong, []byte("four"), []byte("five"), 2)
			copy(nameIn(other), "\x04five") // in the mixed case of the query
			wrong[0] ^= 0xff
			return [][]byte{wrong, other, {1, 2, 3}, {}, m}
		}
	})
	if got, _, err := c.resolve(t.Context(), []netip.AddrPort{s.at}, "four.example", false); err != nil || fmt.Sprint(got) != "[198.51.100.4]" {
		t.Errorf("%v, %v", got, err)
	}
	s.set(func() { s.mangle = func(m []byte) [][]byte { return [][]byte{m[:len(m)-3]} } })
	if got, _, err := c.resolve(t.Context(), []netip.AddrPort{s.at}, "four.example", false); err == nil {
		t.Errorf("half a message yields %v", got)
	}
	s.set(func() { s.mangle, s.code = nil, dnsmessage.RCodeServerFailure })
	_, _, err := c.resolve(t.Context(), []netip.AddrPort{dead, s.at}, "a.example", false)
	if err == nil || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(err.Error(), "it answers ServerFailure") {
		t.Errorf("%v", err)
	}
}

func TestSystem(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	for text, want := range map[string]string{
		"# me\nsearch example\nnameserver 10.0.0.2\nnameserver 2001:db8::53\noptions edns0\nnameserver nonsense\n": "[10.0.0.2:53 [2001:db8::53]:53] <nil>",
		"search example\n": "[] " + file + " has no nameserver line with an address",
	} {
		os.WriteFile(file, []byte(text), 0o600)
		servers, err := system(file)
		if got := fmt.Sprint(servers, " ", err); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// start runs a resolver of these names.
func start(t *testing.T, c egress.DNS, o Options, names ...string) *Resolver {
	o.Log = slog.New(slog.DiscardHandler)
	if o.Changed == nil {
		o.Changed = func(bool) {}
	}
	r := New(o)
	r.Set(c, names, nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { r.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within a minute: ", what)
		}
	}
}

func TestResolver(t *testing.T) {
	s := newServer(t)
	s.host("a.example", 0, addrs("198.51.100.1")...)
	file := filepath.Join(t.TempDir(), "names.json")
	c := egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: 100 * time.Millisecond, Grace: time.Hour}
	var mu sync.Mutex
	news := 0
	r := start(t, c, Options{File: file, Changed: func(addresses bool) {
		if mu.Lock(); addresses {
			news++
		}
		mu.Unlock()
	}}, "a.example", "none.example")
	has := func(want ...string) func() bool {
		return func() bool { return fmt.Sprint(r.Addresses("a.example")) == fmt.Sprint(addrs(want...)) }
	}
	eventually(t, "resolved", has("198.51.100.1"))
	s.host("a.example", 0, addrs("198.51.100.2", "2001:db8::2")...)
	eventually(t, "the new ones", has("198.51.100.2", "2001:db8::2"))
	if _, err := r.Resolve(t.Context(), "none.example"); err == nil {
		t.Error("a name that does not exist has addresses")
	}
	told := func() int {
		mu.Lock()
		defer mu.Unlock()
		return news
	}
	// The former addresses go sooner or later; then nothing changes.
	eventually(t, "no calls of Changed while nothing changes", func() bool {
		before := told()
		time.Sleep(500 * time.Millisecond)
		return told() == before
	})

	// Setting the same names again does not write the file.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	r.Set(c, []string{"a.example", "none.example"}, nil)
	time.Sleep(100 * time.Millisecond)
	if _, err := os.Stat(file); err == nil {
		t.Error("the file is written although nothing has changed")
	}
	r.mu.Lock()
	r.dirty = true
	r.mu.Unlock()
	r.wake()
	eventually(t, "the file", func() bool { _, err := os.Stat(file); return err == nil })

	// The server fails: everything stays, and the failure is shown.
	s.set(func() { s.code = dnsmessage.RCodeRefused })
	eventually(t, "the failure is shown", func() bool { return strings.Contains(r.State("a.example").LastError, "it answers Refused") })
	time.Sleep(500 * time.Millisecond)
	if !has("198.51.100.2", "2001:db8::2")() {
		t.Error("addresses are gone although no answer said so: ", r.Addresses("a.example"))
	}
	// A new daemon without a server has them, too.
	again := start(t, c, Options{File: file}, "a.example")
	if got := again.Addresses("a.example"); len(got) != 2 {
		t.Errorf("after a restart there is %v", got)
	}
	// NXDOMAIN is an answer.
	s.set(func() { s.code = 0; clear(s.zone) })
	eventually(t, "gone", has())
	if s := r.State("a.example"); s.LastError != "" || !s.Failing.IsZero() {
		t.Errorf("%+v", s)
	}
}

// TestLateQueries has a resolver query an address long after its time to live, and checks that the
// address stays until the answer.
func TestLateQueries(t *testing.T) {
	s := newServer(t)
	s.host("a.example", 60, addrs("198.51.100.1")...)
	told := make(chan bool, 10)
	r := New(Options{Log: slog.New(slog.DiscardHandler), Changed: func(addresses bool) { told <- addresses }})
	r.Set(egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute, Grace: time.Hour}, []string{"a.example"}, nil)
	then := time.Now().Add(-10 * time.Minute)
	for _, ipv6 := range []bool{false, true} {
		r.table.answered("a.example", ipv6, addrs("198.51.100.1"), 0, then)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { r.Run(ctx); close(done) }()
	eventually(t, "asked", func() bool { return r.State("a.example").Next.After(time.Now().Add(20 * time.Second)) })
	cancel()
	<-done
	if len(told) > 0 {
		t.Errorf("Changed was called for unchanged addresses: %v", <-told)
	}
}

// TestLateFailure has a query sent long after it was due, as on a machine that was paused, and
// refused: the address stays for the grace time, counted from when the query was due.
func TestLateFailure(t *testing.T) {
	r := New(Options{Log: slog.New(slog.DiscardHandler), Changed: func(bool) {}})
	r.Set(egress.DNS{Floor: time.Minute, Grace: time.Hour}, []string{"a.example"}, nil)
	then := time.Now()
	r.table.answered("a.example", false, addrs("198.51.100.1"), time.Minute, then)
	late := then.Add(10 * time.Minute)
	if asks := r.table.due(late); len(asks) == 0 {
		t.Fatal("the query is not due")
	}
	r.table.failed("a.example", false, errors.New("refused"), late)
	if r.table.expire(late) || fmt.Sprint(r.table.addresses("a.example")) != "[198.51.100.1]" {
		t.Errorf("the address goes at the first failure: %v", r.table.addresses("a.example"))
	}
	if end := then.Add(time.Minute + time.Hour); r.table.expire(end.Add(-time.Second)) || !r.table.expire(end.Add(time.Second)) {
		t.Errorf("the address does not go at %v", end)
	}
}

// TestProxy queries the proxy on the loopback. Ring: namespace; needs root for port 53.
func TestProxy(t *testing.T) {
	root.Need(t, "port 53")
	s := newServer(t)
	s.host("a.example.com", 60, addrs("198.51.100.1", "2001:db8::1")...)
	s.host("many.example.com", 60, numbered(500)...)
	s.host("other.example", 60, addrs("198.51.100.9")...)
	s.alias("www.example.com", "other.example", 60, true)
	at, elsewhere := netip.MustParseAddr("127.53.53.1"), netip.MustParseAddr("127.53.53.3")
	// Packets to elsewhere arrive on the loopback, not on the interface of its listener.
	ifaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(ifaces, func(i net.Interface) bool { return i.Flags&net.FlagLoopback == 0 })
	if i < 0 {
		t.Fatal("this test needs an interface besides the loopback")
	}
	var r *Resolver
	applied := make(chan []netip.Addr, 100)
	var fail error
	r = start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute, Grace: time.Hour, Proxy: []egress.Listener{{Address: elsewhere, Interface: ifaces[i].Name}, {Address: at, Interface: "lo"}, {Address: netip.MustParseAddr("127.53.53.2"), Interface: "ist-none"}}},
		Options{Apply: func(context.Context) error { applied <- r.Addresses("*.example.com"); return fail }}, "*.example.com")
	c := client{dial: (&net.Dialer{}).DialContext}
	servers := []netip.AddrPort{netip.AddrPortFrom(at, 53)}
	eventually(t, "listening", func() bool { _, _, err := c.resolve(t.Context(), servers, "none.example", false); return err == nil })

	eventually(t, "Deaf returns the listener that does not listen", func() bool {
		l, err, since, n := r.Deaf()
		return n == 1 && l.Interface == "ist-none" && strings.Contains(err, "no such network interface") && !since.IsZero()
	})

	ask := func(name string, ipv6 bool, want string, news bool) {
		t.Helper()
		got, ttl, err := c.resolve(t.Context(), servers, name, ipv6)
		if fmt.Sprint(got) != want || err != nil || ttl != time.Minute {
			t.Errorf("%s: %.100v, %v, %v, want %.100s", name, got, ttl, err, want)
		}
		select {
		case has := <-applied:
			if !news || slices.ContainsFunc(got, func(a netip.Addr) bool { return !slices.Contains(has, a) }) {
				t.Errorf("%s: got %.100v, news %v, destinations were %.100v", name, got, news, has)
			}
		default:
			if news {
				t.Errorf("%s: the client received the addresses before they were destinations", name)
			}
		}
	}
	ask("a.example.com", false, "[198.51.100.1]", true)
	ask("a.example.com", false, "[198.51.100.1]", false)
	ask("a.example.com", true, "[2001:db8::1]", true)
	ask("other.example", false, "[198.51.100.9]", false)
	ask("www.example.com", false, "[198.51.100.9]", true)
	ask("many.example.com", false, fmt.Sprint(numbered(500)), true) // over TCP
	if got := len(r.Addresses("*.example.com")); got != 503 {
		t.Errorf("%d addresses", got)
	}

	// A client that accepts little is sent to TCP, and the response has the ID of its query.
	conn, err := net.Dial("udp", servers[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	query, _ := pack(0x1234, "many.example.com", false)
	conn.Write(query)
	buffer := make([]byte, 65535)
	n, err := conn.Read(buffer)
	if h, _, err2 := question(buffer[:n]); err != nil || err2 != nil || h.ID != 0x1234 || !h.Truncated || n > maxUDP {
		t.Errorf("%d bytes, %+v, %v, %v", n, h, err, err2)
	}
	// Malformed queries have no answer and no effect.
	for _, m := range [][]byte{{}, {1}, bytes.Repeat([]byte{0xff}, 100), make([]byte, 12), append([]byte{0x12, 0x34, 0x80}, query[3:]...)} {
		conn.Write(m)
	}
	query[2] |= 0x10 // another opcode
	conn.Write(query)
	n, err = conn.Read(buffer)
	if h, _, err2 := question(buffer[:n]); err != nil || err2 != nil || h.RCode != dnsmessage.RCodeNotImplemented {
		t.Errorf("%+v, %v, %v", h, err, err2)
	}
	s.set(func() { s.code = dnsmessage.RCodeServerFailure })
	if _, _, err := c.resolve(t.Context(), servers, "fails.example.com", false); err == nil || !strings.Contains(err.Error(), "ServerFailure") {
		t.Errorf("%v", err)
	}
	// A client gets its answer also when the rules cannot be written.
	s.set(func() { s.code = 0 })
	s.host("b.example.com", 60, addrs("198.51.100.77")...)
	fail = errors.New("no rules")
	ask("b.example.com", false, "[198.51.100.77]", true)
	// No packet from another interface is answered, and nothing listens for an interface that does
	// not exist, or after the listener is removed.
	if _, _, err := c.resolve(t.Context(), []netip.AddrPort{netip.AddrPortFrom(elsewhere, 53)}, "a.example.com", false); err == nil {
		t.Error("a query that arrives on another interface is answered")
	}
	if conn, err := net.Dial("tcp", "127.53.53.2:53"); err == nil {
		conn.Close()
		t.Error("an address of a missing interface has a listener")
	}
	r.Set(egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute}, nil, nil)
	eventually(t, "silence", func() bool {
		conn, err := net.Dial("tcp", servers[0].String())
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
}

// TestProxyWaitsForOthers has a second client, and the node itself, query while the rules for the
// first client's answer are being written.
func TestProxyWaitsForOthers(t *testing.T) {
	s := newServer(t)
	s.host("a.example.com", 60, addrs("198.51.100.1")...)
	s.host("b.example", 60, addrs("198.51.100.2")...)
	s.host("c.example.com", 60, addrs("198.51.100.3")...)
	entered, leave := make(chan struct{}, 10), make(chan error)
	changed := make(chan bool, 10)
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute, Grace: time.Hour}, Options{
		Apply:   func(context.Context) error { entered <- struct{}{}; return <-leave },
		Changed: func(addresses bool) { changed <- addresses },
	}, "*.example.com", "b.example")
	ask := func(name string) chan struct{} {
		query, _ := pack(1, name, false)
		told := make(chan struct{})
		go func() { r.respond(context.Background(), r.attach("lo"), "udp", query); close(told) }()
		return told
	}
	waits := func(what string, told chan struct{}) {
		t.Helper()
		select {
		case <-entered:
		case <-told:
			t.Errorf("%s receives an address that is not a destination yet", what)
		case <-time.After(time.Minute):
			t.Fatal("nothing happens")
		}
	}
	eventually(t, "resolved", func() bool { return len(r.Addresses("b.example")) == 1 })
	if !<-changed {
		t.Error("new addresses do not count as new")
	}
	own := ask("b.example")
	waits("a client of a name that the node has just resolved", own)
	first := ask("a.example.com")
	eventually(t, "the first client waits for the next rules", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return r.upcoming != nil })
	second := ask("a.example.com")
	leave <- nil
	<-own
	waits("the first client", first)
	select {
	case <-second:
		t.Error("the second client receives an address that is not a destination yet")
	default:
	}
	if t.Failed() {
		return
	}
	leave <- nil
	<-first
	select {
	case <-second:
	case <-entered: // it came when these rules were being written
		leave <- nil
		<-second
	}
	third := ask("c.example.com")
	waits("the third client", third)
	leave <- errors.New("no rules")
	<-third
	<-ask("a.example.com") // which no longer waits for rules
	for {
		select {
		case again := <-changed:
			if again {
				return
			}
		case <-time.After(time.Minute):
			t.Fatal("rules that could not be written are not retried")
		}
	}
}

// TestRulesAreWrittenForAll checks that clients that arrive while the rules are written share the
// next writing, and that rounds pauses between two of them.
func TestRulesAreWrittenForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const cost = 40 * time.Millisecond
		writings, busy := 0, time.Duration(0)
		r := New(Options{Changed: func(bool) {}, Apply: func(context.Context) error {
			writings++
			busy += cost
			time.Sleep(cost)
			return nil
		}})
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 500 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 4 * time.Millisecond)
				asked := time.Now()
				if err := r.apply(t.Context()); err != nil {
					t.Error(err)
				}
				if took := time.Since(asked); took > 3*cost {
					t.Errorf("a client waited for %v", took)
				}
			})
		}
		wg.Wait()
		if all := time.Since(began); writings < 10 || busy > all/2+cost {
			t.Errorf("%d writings, %v of %v", writings, busy, all)
		}
		time.Sleep(time.Second) // the last pause
	})
}

func FuzzRead(f *testing.F) {
	s := &server{zone: map[string]func(*dnsmessage.Builder, dnsmessage.Question){}}
	s.host("a.example", 60, addrs("198.51.100.1")...)
	s.alias("b.example", "a.example", 60, true)
	for _, name := range []string{"a.example", "b.example", "c.example"} {
		query, _ := pack(1, name, false)
		f.Add(s.respond(query, "tcp")[0])
		f.Add(query)
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		question(message)
		room(message)
		if a, err := read(message); err == nil && a.ttl < 0 {
			t.Errorf("%+v", a)
		}
	})
}

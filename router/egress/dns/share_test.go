package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/test/root"
)

// asked sends a query as a client behind an attachment and returns the addresses and the code of
// the answer.
func asked(t *testing.T, r *Resolver, from *attachment, name string) ([]netip.Addr, dnsmessage.RCode) {
	t.Helper()
	query, err := pack(1, name, false)
	if err != nil {
		t.Fatal(err)
	}
	response := r.respond(t.Context(), from, "udp", query)
	h, _, err := question(response)
	if err != nil {
		t.Fatal(err)
	}
	a, err := read(response)
	if err != nil {
		t.Fatal(err)
	}
	return a.addrs, h.RCode
}

// TestSlowServers checks that a server that is slower than serverTimeout still serves clients,
// whether other servers are queried meanwhile or not, and whether its EDNS support is known or not.
func TestSlowServers(t *testing.T) {
	s, mute := newServer(t), newServer(t)
	s.host("a.example", 60, addrs("198.51.100.1")...)
	s.set(func() { s.slow = serverTimeout + time.Second })
	mute.set(func() { mute.mute = "example" })
	for name, servers := range map[string][]netip.AddrPort{"alone": {s.at}, "first": {s.at, mute.at}, "last": {mute.at, s.at}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, egress.DNS{Resolvers: servers, Floor: time.Minute}, Options{})
			began := time.Now()
			if got, code := asked(t, r, r.attach("one"), "a.example"); !slices.Equal(got, addrs("198.51.100.1")) || code != 0 {
				t.Errorf("%v, %v after %v", got, code, time.Since(began))
			}
			if edns, known := r.client.knows(s.at); !edns || !known {
				t.Error("a server that is slow counts as one without EDNS")
			}
		})
	}
}

// TestClientsLeave checks that a query is cancelled when its last waiting client leaves, and that a
// client that leaves does not affect one that waits.
func TestClientsLeave(t *testing.T) {
	s := newServer(t)
	s.host("a.example", 60, addrs("198.51.100.1")...)
	s.set(func() { s.slow = time.Second })
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute}, Options{})
	from := r.attach("one")
	query, _ := pack(1, "a.example", false)
	ctx, leave := context.WithCancel(t.Context())
	first, second := make(chan []byte, 1), make(chan []byte, 1)
	waiting := func(n int) func() bool {
		return func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			for _, f := range r.flights {
				return f.waiting == n
			}
			return n == 0
		}
	}
	go func() { first <- r.respond(ctx, from, "udp", query) }()
	eventually(t, "the first asks", waiting(1))
	go func() { second <- r.respond(t.Context(), from, "udp", query) }()
	eventually(t, "the second asks", waiting(2))
	leave()
	if h, _, err := question(<-first); err != nil || h.RCode != dnsmessage.RCodeServerFailure {
		t.Errorf("the client that left receives %v, %v", h.RCode, err)
	}
	if a, err := read(<-second); err != nil || !slices.Equal(a.addrs, addrs("198.51.100.1")) {
		t.Errorf("the client that stays receives %v, %v", a.addrs, err)
	}
	s.set(func() { s.mute = "dead" })
	query, _ = pack(1, "dead.example", false)
	ctx, leave = context.WithCancel(t.Context())
	go func() { first <- r.respond(ctx, from, "udp", query) }()
	eventually(t, "asked", func() bool { r.mu.Lock(); defer r.mu.Unlock(); return len(r.flights) == 2 })
	leave()
	<-first
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.flights) > 1 {
		t.Error("the query goes on although no client waits")
	}
}

// TestKeptAnswersAreShared checks that questions of one attachment do not evict cached answers to
// another.
func TestKeptAnswersAreShared(t *testing.T) {
	r := New(Options{})
	greedy, modest := r.attach("greedy"), r.attach("modest")
	keep := func(from *attachment, key string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		f := &flight{key: key, response: []byte{1}, until: time.Now().Add(time.Hour)}
		r.flights[key] = f
		r.keepLocked(from, f)
	}
	for i := range 10 {
		keep(modest, fmt.Sprint("m", i))
	}
	for i := range 2 * maxFlights {
		keep(greedy, fmt.Sprint("g", i))
	}
	for i := range 10 {
		if r.flights[fmt.Sprint("m", i)] == nil {
			t.Fatal("the answer of another attachment is not cached")
		}
	}
	if n := len(r.flights); n != maxFlights/2+10 {
		t.Errorf("%d answers are cached, want %d", n, maxFlights/2+10)
	}
	r.detach(greedy)
	keep(greedy, "late")
	if n := len(r.flights); n != 10 {
		t.Errorf("%d answers are cached after an attachment has gone", n)
	}
}

// rules is a fake of the driver that writes the addresses of names: each writing takes a while, and
// the fake has the addresses of the last one.
type rules struct {
	resolver *Resolver
	cost     time.Duration

	mu       sync.Mutex
	has      map[netip.Addr]bool
	writings int
}

func (f *rules) apply(context.Context) error {
	now := f.resolver.Addresses("*.any.example")
	time.Sleep(f.cost)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writings++
	f.has = map[netip.Addr]bool{}
	for _, a := range now {
		f.has[a] = true
	}
	return nil
}

// TestFloodOfNewNames has one attachment ask for 500 new names a second. Another attachment is
// answered in time, with addresses that are in the rules before the answer and stay there, and the
// rules change little more than the limit of one attachment.
func TestFloodOfNewNames(t *testing.T) {
	root.NeedTime(t)
	s := newServer(t)
	s.set(func() { s.any = true })
	f := &rules{cost: 50 * time.Millisecond}
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute, Grace: time.Hour}, Options{Apply: f.apply}, "*.any.example")
	f.resolver = r
	greedy, modest := r.attach("greedy"), r.attach("modest")
	ctx, stop := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	var sent, told atomic.Int64
	began := time.Now()
	flood.Go(func() {
		for ticker := time.NewTicker(2 * time.Millisecond); ctx.Err() == nil; <-ticker.C {
			respond := r.place(ctx, greedy, netip.MustParsePrefix(fmt.Sprintf("10.0.0.%d/32", sent.Load()%64)))
			query, _ := pack(1, fmt.Sprintf("g%d.any.example", sent.Add(1)), false)
			if respond == nil {
				continue
			}
			flood.Go(func() {
				if a, err := read(respond("udp", query)); err == nil {
					told.Add(int64(len(a.addrs)))
				}
			})
		}
	})
	eventually(t, "the flood is limited", func() bool { n, last, who := r.Limited(); return n > 0 && !last.IsZero() && who == "greedy" })
	var mine []netip.Addr
	var longest time.Duration
	for i := range 40 {
		asking := time.Now()
		got, code := asked(t, r, modest, fmt.Sprintf("m%d.any.example", i))
		longest = max(longest, time.Since(asking))
		f.mu.Lock()
		if len(got) != 1 || code != 0 || !f.has[got[0]] {
			t.Errorf("name %d: %v, %v, in the rules: %v", i, got, code, len(got) > 0 && f.has[got[0]])
		}
		f.mu.Unlock()
		mine = append(mine, got...)
	}
	took := time.Since(began)
	r.mu.Lock()
	if n := r.table.owned["modest"]; n != len(mine) || r.table.owned["greedy"] == 0 {
		t.Errorf("claims %v", r.table.owned)
	}
	r.mu.Unlock()
	stop()
	flood.Wait()
	if err := f.apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range mine {
		if !f.has[a] {
			t.Errorf("%v is no longer in the rules", a)
		}
	}
	t.Logf("in %v: %d queries, %d addresses, %d writings; the other attachment waited for %v at most", took.Round(time.Millisecond), sent.Load(), told.Load(), f.writings, longest.Round(time.Millisecond))
	if most := newBurst + newRate*(took+newWait).Seconds(); float64(told.Load()) > most {
		t.Errorf("%d new addresses in %v, want %.0f at most", told.Load(), took, most)
	}
}

// TestDeadZone has more hosts of one attachment than places ask for names of a zone whose servers
// are silent, over UDP and TCP. Another host of it is answered, and keeps a connection. Ring:
// namespace; needs root for port 53.
func TestDeadZone(t *testing.T) {
	root.Need(t, "port 53")
	s := newServer(t)
	s.host("good.example", 0, addrs("198.51.100.1")...)
	s.set(func() { s.mute = "dead" })
	at := netip.MustParseAddr("127.53.53.10")
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute, Proxy: []egress.Listener{{Address: at, Interface: "lo"}}}, Options{})
	dial := func(network string, host int) (net.Conn, error) {
		ip := net.IPv4(127, 0, 1, byte(host))
		d := net.Dialer{Timeout: 15 * time.Second, LocalAddr: &net.UDPAddr{IP: ip}}
		if network == "tcp" {
			d.LocalAddr = &net.TCPAddr{IP: ip}
		}
		return d.Dial(network, netip.AddrPortFrom(at, 53).String())
	}
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	eventually(t, "listening", func() bool {
		c, err := dial("tcp", 250)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	const hosts = 2 * maxQueries / maxPerHost
	var packets []net.Conn
	for i := range hosts {
		c, err := dial("udp", i+1)
		if err != nil {
			t.Fatal(err)
		}
		packets, conns = append(packets, c), append(conns, c)
		for range 2 * maxClients / hosts {
			if c, err = dial("tcp", i+1); err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
		}
	}
	n := 0
	flood := func() {
		for range maxPerHost {
			for _, c := range packets {
				n++
				query, _ := pack(1, fmt.Sprintf("dead%d.example", n), false)
				_, _ = c.Write(query)
			}
		}
	}
	eventually(t, "queries are dropped", func() bool { flood(); n, _, _ := r.Dropped(); return n > 0 })
	// full reports whether dead names have all places, except the one that an answered query has
	// just left.
	full := func() bool {
		r.mu.Lock()
		a := r.attachments["lo"]
		r.mu.Unlock()
		a.queries.mu.Lock()
		defer a.queries.mu.Unlock()
		return a.queries.taken >= maxQueries-1
	}
	query, _ := pack(5, "good.example", false)
	for _, network := range []string{"udp", "tcp"} {
		c, err := dial(network, 200)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		eventually(t, "another host is answered over "+network, func() bool {
			flood()
			if network == "udp" {
				// The kernel drops the query while the flood fills the socket's buffer. Such a drop
				// is not related to places, so the client retries. The dead names still have their
				// places: they keep them for askTimeout.
				for range 20 {
					if _, err := c.Write(query); err != nil {
						return false
					}
					c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
					if _, err := c.Read(make([]byte, 1000)); err == nil {
						return full()
					}
				}
				return false
			}
			c.SetDeadline(time.Now().Add(askTimeout))
			if err := writeTCP(c, query); err != nil {
				t.Fatalf("its connection is closed: %v", err)
			}
			_, err := readTCP(c, make([]byte, 65535))
			return err == nil && full()
		})
	}
}

// TestSilentNames checks that many names without an answer do not delay another name, neither at
// first nor later, and that each of them is retried. The servers are at the other ends of pipes.
func TestSilentNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		asks := map[string]int{}
		s := &server{zone: map[string]func(*dnsmessage.Builder, dnsmessage.Question){}}
		s.host("z.example", 0, addrs("198.51.100.1")...)
		dial := func(context.Context, string, string) (net.Conn, error) {
			near, far := net.Pipe()
			go func() {
				defer far.Close()
				buffer := make([]byte, 4096)
				n, err := far.Read(buffer)
				if err != nil {
					return
				}
				_, q, err := question(buffer[:n])
				if err != nil {
					return
				}
				mu.Lock()
				asks[canonical(q.Name)]++
				mu.Unlock()
				if canonical(q.Name) == "z.example" {
					_, _ = far.Write(s.respond(buffer[:n], "tcp")[0])
					return
				}
				_, _ = far.Read(buffer) // until the other end closes
			}()
			return near, nil
		}
		asked := func(name string) int {
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			return asks[name]
		}
		const dead = 999
		all := []string{"z.example"}
		for i := range dead {
			all = append(all, fmt.Sprintf("dead%d.example", i))
		}
		r := New(Options{Changed: func(bool) {}, Log: slog.New(slog.DiscardHandler)})
		r.client.dial = dial
		server := netip.MustParseAddrPort("192.0.2.53:53")
		r.client.note(server, true)
		r.Set(egress.DNS{Resolvers: []netip.AddrPort{server}, Floor: time.Second, Grace: time.Hour}, all, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { r.Run(ctx); close(done) }()
		defer func() { cancel(); <-done; time.Sleep(time.Minute) }()
		time.Sleep(30 * time.Second)
		if n := asked("z.example"); n < 2 {
			t.Errorf("after half a minute the name that is answered was queried %d times", n)
		}
		time.Sleep(30 * time.Second)
		before := asked("z.example")
		time.Sleep(time.Minute)
		if n := asked("z.example") - before; n < 118 { // each second, for two families
			t.Errorf("the name that is answered was queried %d times in a minute", n)
		}
		for i := range dead {
			if n := asked(fmt.Sprintf("dead%d.example", i)); n < 6 {
				t.Errorf("a name that fails was queried %d times in two minutes", n)
				break
			}
		}
	})
}

// TestLongPackets checks that an answer by UDP beyond maxPacket is queried again over TCP.
func TestLongPackets(t *testing.T) {
	s := newServer(t)
	s.host("a.example", 60, addrs("198.51.100.1")...)
	s.set(func() { s.mangle = func(m []byte) [][]byte { return [][]byte{append(m, make([]byte, maxPacket)...)} } })
	c := client{dial: (&net.Dialer{}).DialContext}
	got, _, err := c.resolve(t.Context(), []netip.AddrPort{s.at}, "a.example", false)
	if err != nil || !slices.Equal(got, addrs("198.51.100.1")) || s.queries != 2 {
		t.Errorf("%v, %v, with %d queries", got, err, s.queries)
	}
}

// TestFirstAnswerOfTwo checks that the answer to the query with EDNS still counts when the one
// without cannot be sent.
func TestFirstAnswerOfTwo(t *testing.T) {
	s := newServer(t)
	s.host("a.example", 60, addrs("198.51.100.1")...)
	s.set(func() { s.slow = serverTimeout + time.Second })
	var dials atomic.Int64
	c := client{dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if dials.Add(1) > 1 {
			return nil, net.ErrClosed
		}
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}}
	if got, _, err := c.resolve(t.Context(), []netip.AddrPort{s.at}, "a.example", false); err != nil || !slices.Equal(got, addrs("198.51.100.1")) || dials.Load() != 2 {
		t.Errorf("%v, %v, after %d queries", got, err, dials.Load())
	}
}

// TestLeftWhileRulesAreWritten checks that a client that loses its place while it waits for the
// rules receives no address.
func TestLeftWhileRulesAreWritten(t *testing.T) {
	s := newServer(t)
	s.set(func() { s.any = true })
	entered, leave := make(chan struct{}), make(chan struct{})
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute}, Options{Apply: func(context.Context) error {
		close(entered)
		<-leave
		return nil
	}}, "*.any.example")
	ctx, vacate := context.WithCancel(t.Context())
	query, _ := pack(1, "a.any.example", false)
	told := make(chan []byte, 1)
	go func() { told <- r.respond(ctx, r.attach("one"), "udp", query) }()
	<-entered
	vacate()
	response := <-told
	close(leave)
	h, _, err := question(response)
	a, err2 := read(response)
	if err != nil || err2 != nil || h.RCode != dnsmessage.RCodeServerFailure || len(a.addrs) > 0 {
		t.Errorf("received %v, %v, %v, %v", h.RCode, a.addrs, err, err2)
	}
}

// TestAdmission checks that an attachment may learn newBurst new addresses at once and then newRate
// a second, that refused ones cost it nothing, and that known addresses are free.
func TestAdmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Options{})
		r.Set(egress.DNS{Floor: time.Minute}, []string{"*.any.example"}, nil)
		from, n := r.attach("one"), 0
		admit := func(name string) bool {
			n++
			return r.admit(t.Context(), from, name, []netip.Addr{netip.AddrFrom4([4]byte{11, byte(n >> 16), byte(n >> 8), byte(n)})})
		}
		began := time.Now()
		for i := range newBurst + 10*newRate {
			if !admit("a.any.example") {
				t.Fatalf("address %d is refused", i)
			}
		}
		if took := time.Since(began).Round(time.Second); took != 10*time.Second {
			t.Errorf("they took %v", took)
		}
		// All at once: those that would wait for too long are refused.
		var wg sync.WaitGroup
		var admitted atomic.Int64
		for range 100 * newRate {
			n++
			a := netip.AddrFrom4([4]byte{11, byte(n >> 16), byte(n >> 8), byte(n)})
			wg.Go(func() {
				if r.admit(t.Context(), from, "a.any.example", []netip.Addr{a}) {
					admitted.Add(1)
				}
			})
		}
		wg.Wait()
		if got, want := int(admitted.Load()), int(newRate*newWait.Seconds()); got < want-1 || got > want+1 {
			t.Errorf("%d were admitted at once, want %d", got, want)
		}
		if refused, _, who := r.Limited(); int64(refused) != 100*newRate-admitted.Load() || who != "one" {
			t.Errorf("%d refused, of %q", refused, who)
		}
		time.Sleep(100 * time.Millisecond)
		began = time.Now()
		if !admit("a.any.example") || time.Since(began) > newWait/2 {
			t.Errorf("refused addresses count: waited for %v", time.Since(began))
		}
		began = time.Now()
		for range 10 * newBurst { // of names that no policy has
			if !admit("a.other.example") {
				t.Fatal("an address that changes nothing is refused")
			}
		}
		if time.Since(began) > 0 {
			t.Error("an address that changes nothing waits")
		}
	})
}

package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/isthmus-net/isthmus/router/egress"
	"github.com/isthmus-net/isthmus/test/root"
)

// TestMixedCase checks that an answer with the name in another case is not accepted, and that the
// server is queried over TCP.
func TestMixedCase(t *testing.T) {
	s := newServer(t)
	s.host("a-rather-long-name.example", 60, addrs("198.51.100.1")...)
	s.set(func() {
		s.mangle = func(m []byte) [][]byte {
			copy(nameIn(m), strings.ToLower(string(nameIn(m))))
			copy(m[len(m)-4:], []byte{198, 51, 100, 66})
			return [][]byte{m}
		}
	})
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute}, Options{})
	query, err := pack(7, "A-Rather-Long-Name.example", false)
	if err != nil {
		t.Fatal(err)
	}
	response := r.respond(t.Context(), r.attach("lo"), "udp", query)
	a, err := read(response)
	if err != nil || !slices.Equal(a.addrs, addrs("198.51.100.1")) {
		t.Errorf("%v, %v", a.addrs, err)
	}
	if _, q, err := question(response); err != nil || q.Name.String() != "A-Rather-Long-Name.example." {
		t.Errorf("the client asked for %v, %v", q.Name, err)
	}
}

// TestOneQueryForOneQuestion checks that a question of many clients is sent once, and again only
// after a moment.
func TestOneQueryForOneQuestion(t *testing.T) {
	s := newServer(t)
	s.host("a.example", 60, addrs("198.51.100.1")...)
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute}, Options{})
	var wg sync.WaitGroup
	s.mu.Lock() // so that it does not answer yet
	for i := range uint16(100) {
		wg.Go(func() {
			query, _ := pack(i, "a.example", false)
			h, _, err := question(r.respond(t.Context(), r.attach("lo"), "udp", query))
			if err != nil || h.ID != i || h.RCode != 0 {
				t.Errorf("%d: %+v, %v", i, h, err)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	s.mu.Unlock()
	wg.Wait()
	s.set(func() {
		if s.queries != 1 {
			t.Errorf("%d queries, want 1", s.queries)
		}
	})
	eventually(t, "it is asked again", func() bool {
		query, _ := pack(1, "a.example", false)
		r.respond(t.Context(), r.attach("lo"), "udp", query)
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.queries == 2
	})
	for i := range maxFlights + 100 {
		query, _ := pack(1, fmt.Sprintf("b%d.example", i), false)
		r.respond(t.Context(), r.attach("lo"), "udp", query)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.flights); n > maxFlights {
		t.Errorf("%d answers are cached", n)
	}
}

func TestPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := places{most: maxQueries, perHost: maxPerHost, patience: serverTimeout}
		vacated := map[netip.Prefix]int{}
		take := func(host netip.Prefix) (*place, netip.Prefix) { return p.take(host, func() { vacated[host]++ }) }
		one := hostOf(&net.UDPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1})
		if other := hostOf(&net.UDPAddr{IP: net.ParseIP("2001:db8::ffff:1"), Port: 2}); other != one {
			t.Errorf("%v and %v are two clients", one, other)
		}
		host := func(i int) netip.Prefix {
			return hostOf(&net.UDPAddr{IP: net.IPv4(10, 0, byte(i>>8), byte(i)), Port: 1})
		}
		var had []*place
		for i := range maxPerHost + 1 {
			got, left := take(one)
			if (got != nil) != (i < maxPerHost) || left.IsValid() {
				t.Errorf("place %d of a client: %v, taken from %v", i, got, left)
			}
			had = append(had, got)
		}
		for i := maxPerHost; i < maxQueries; i++ {
			if got, left := take(host(i)); got == nil || left.IsValid() {
				t.Errorf("place %d of all: %v, taken from %v", i, got, left)
			}
		}
		// All are taken: a client with fewer takes places of the client with the most, until they
		// have nearly the same number.
		for i := range maxPerHost/2 + 1 {
			got, left := take(host(1))
			if i < maxPerHost/2 && (got == nil || left != one || vacated[one] != i+1) || i >= maxPerHost/2 && got != nil {
				t.Errorf("place %d of a client that came late: %v, taken from %v; %v", i, got, left, vacated)
			}
		}
		p.leave(had[0]) // the client no longer has it
		if len(p.hosts[one]) != maxPerHost/2 || p.taken != maxQueries {
			t.Errorf("a place was left twice: %d of %d", len(p.hosts[one]), p.taken)
		}
		p.leave(had[maxPerHost-1])
		if got, left := take(host(2)); got == nil || left.IsValid() {
			t.Error("a place that was left is not free")
		}
		// After patience, old places make room for new ones, within the share of a client.
		time.Sleep(serverTimeout)
		n := 0
		for ; n < 2*maxQueries; n++ {
			got, left := take(one)
			if got == nil {
				break
			}
			if !left.IsValid() {
				t.Fatal("a place beyond the last one")
			}
		}
		if have := len(p.hosts[one]); n < maxPerHost/2 || n == 2*maxQueries || have < maxPerHost/2 || have > maxPerHost || p.taken != maxQueries {
			t.Errorf("a client took %d of the old places, and has %d; %d are taken", n, have, p.taken)
		}
		for len(p.hosts[one]) > 0 {
			p.leave(p.hosts[one][0])
		}
		if _, there := p.hosts[one]; there {
			t.Error("a client that has left is still in the map")
		}
	})
}

// TestOneClientDoesNotStarveOthers has one client ask for many names that have no answer, over UDP
// and TCP. Ring: namespace; needs root for port 53.
func TestOneClientDoesNotStarveOthers(t *testing.T) {
	root.Need(t, "port 53")
	s := newServer(t)
	s.host("good.example", 60, addrs("198.51.100.1")...)
	s.set(func() { s.mute = "dead" })
	at := netip.MustParseAddr("127.53.53.9")
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute, Proxy: []egress.Listener{{Address: at, Interface: "lo"}}}, Options{})
	dial := func(network, from string) net.Conn {
		d := net.Dialer{Timeout: 15 * time.Second, LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
		if network == "tcp" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		var conn net.Conn
		eventually(t, "connected", func() (ok bool) {
			var err error
			conn, err = d.Dial(network, netip.AddrPortFrom(at, 53).String())
			return err == nil
		})
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	stream := dial("tcp", "127.0.0.3") // the proxy listens from now on
	greedy, modest := dial("udp", "127.0.0.2"), dial("udp", "127.0.0.3")
	for i := range 4 * maxQueries {
		query, _ := pack(1, fmt.Sprintf("dead%d.example", i), false)
		_, _ = greedy.Write(query)
	}
	eventually(t, "queries are dropped", func() bool {
		n, last, host := r.Dropped()
		return n > 0 && !last.IsZero() && host == netip.MustParsePrefix("127.0.0.2/32")
	})
	query, _ := pack(5, "good.example", false)
	eventually(t, "another client is answered", func() bool {
		// the socket buffer may have been full
		modest.SetDeadline(time.Now().Add(200 * time.Millisecond))
		if _, err := modest.Write(query); err != nil {
			return false
		}
		_, err := modest.Read(make([]byte, 1000))
		return err == nil
	})

	stream.Close()
	stream = dial("tcp", "127.0.0.3")
	// Over one connection, an answer does not wait for the answer to an earlier query.
	stream.SetDeadline(time.Now().Add(time.Minute))
	for i := range 3 {
		query, _ := pack(uint16(i), fmt.Sprintf("dead-too%d.example", i), false)
		if err := writeTCP(stream, query); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeTCP(stream, query); err != nil {
		t.Fatal(err)
	}
	m, err := readTCP(stream, make([]byte, 65535))
	if h, _, err2 := question(m); err != nil || err2 != nil || h.ID != 5 {
		t.Errorf("the first answer is %+v, %v, %v", h, err, err2)
	}
}

// TestNamesDoNotReachInside checks that inside addresses and the like neither become destinations
// nor reach clients, for names of policies.
func TestNamesDoNotReachInside(t *testing.T) {
	s := newServer(t)
	s.host("good.example.com", 60, addrs("198.51.100.1")...)
	s.host("bad.example.com", 60, addrs("198.51.100.2", "10.1.2.3")...)
	s.host("meta.example.com", 60, addrs("168.63.129.16")...)
	s.host("bad.example", 60, addrs("10.1.2.3")...)
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute}, Options{Apply: func(context.Context) error { return nil }}, "*.example.com")
	code := func(name string) dnsmessage.RCode {
		query, _ := pack(1, name, false)
		h, _, err := question(r.respond(t.Context(), r.attach("lo"), "udp", query))
		if err != nil {
			t.Fatal(err)
		}
		return h.RCode
	}
	if code("bad.example.com") != 0 {
		t.Error("refused before an inside is set")
	}
	if got := r.Addresses("*.example.com"); !slices.Equal(got, addrs("10.1.2.3", "198.51.100.2")) {
		t.Fatalf("%v", got)
	}
	r.SetInside(netip.MustParsePrefix("10.0.0.0/8").Contains)
	for name, want := range map[string]dnsmessage.RCode{
		"good.example.com": 0, "bad.example.com": dnsmessage.RCodeRefused, "meta.example.com": dnsmessage.RCodeRefused, "bad.example": 0,
	} {
		if got := code(name); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if got := r.Addresses("*.example.com"); !slices.Equal(got, addrs("198.51.100.1", "198.51.100.2")) {
		t.Errorf("%v", got)
	}
	if n, last, name := r.Refused(); n != 2 || last.IsZero() || !strings.HasSuffix(name, ".example.com") {
		t.Errorf("%d answers refused, the last of %s at %v", n, name, last)
	}
}

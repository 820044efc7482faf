package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/isthmus-net/isthmus/router/egress"
)

// TestServersWithoutEDNS checks that a server without EDNS still works for the node and for clients
// of the proxy (RFC 6891 section 6.2.2), and that only the first query is sent twice.
func TestServersWithoutEDNS(t *testing.T) {
	says := func(code dnsmessage.RCode) func([]byte) []byte {
		return func(query []byte) []byte {
			h, q, _ := question(query)
			return refuse(h, q, code, false)
		}
	}
	for name, old := range map[string]func([]byte) []byte{
		"FORMERR": says(dnsmessage.RCodeFormatError), "NOTIMP": says(dnsmessage.RCodeNotImplemented),
		"a header alone": func(query []byte) []byte {
			return []byte{query[0], query[1], 0x81, byte(dnsmessage.RCodeFormatError), 0, 0, 0, 0, 0, 0, 0, 0}
		},
		"silence": func([]byte) []byte { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			s.host("a.example", 60, addrs("198.51.100.1")...)
			s.set(func() { s.old = old })
			c := client{dial: (&net.Dialer{}).DialContext}
			// Silence of a server that has supported EDNS proves nothing.
			if name != "silence" {
				c.note(s.at, true)
			}
			for range 3 {
				got, _, err := c.resolve(t.Context(), []netip.AddrPort{s.at}, "a.example", false)
				if err != nil || !slices.Equal(got, addrs("198.51.100.1")) {
					t.Fatalf("%v, %v", got, err)
				}
			}
			s.set(func() {
				if s.queries != 4 {
					t.Errorf("%d queries, want 4: the first one twice", s.queries)
				}
			})
		})
	}
}

// TestAnswersAreHandedOn checks that a client of the proxy receives the server's response code,
// also when the server supports EDNS.
func TestAnswersAreHandedOn(t *testing.T) {
	s := newServer(t)
	r := start(t, egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Minute}, Options{})
	for _, code := range []dnsmessage.RCode{dnsmessage.RCodeRefused, dnsmessage.RCodeFormatError, dnsmessage.RCodeNotImplemented, dnsmessage.RCodeServerFailure} {
		s.set(func() { s.code = code })
		// a new name each time, since answers are cached
		query, err := pack(7, fmt.Sprintf("a%d.example", code), false)
		if err != nil {
			t.Fatal(err)
		}
		for _, network := range []string{"udp", "tcp"} {
			h, q, err := question(r.respond(t.Context(), r.attach("lo"), network, query))
			if err != nil || h.ID != 7 || h.RCode != code || canonical(q.Name) != fmt.Sprintf("a%d.example", code) {
				t.Errorf("%v over %s: %+v, %v", code, network, h, err)
			}
		}
	}
}

// TestSilenceIsToldAsSuch checks that every kind of timeout becomes errSilent.
func TestSilenceIsToldAsSuch(t *testing.T) {
	for _, err := range []error{
		os.ErrDeadlineExceeded, net.ErrClosed, context.DeadlineExceeded, &net.OpError{Op: "read", Err: net.ErrClosed},
		fmt.Errorf("asking: %w", &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}),
	} {
		if got := brief(err); got != errSilent {
			t.Errorf("%v becomes %v", err, got)
		}
	}
	if refused := errors.New("connection refused"); brief(&net.OpError{Op: "read", Err: refused}) != refused {
		t.Error("a refusal becomes another error")
	}
}

// TestServersAreBounded checks that the list of servers does not grow with documents.
func TestServersAreBounded(t *testing.T) {
	var c client
	for i := range uint16(5 * maxServers) {
		c.note(netip.AddrPortFrom(netip.IPv6Loopback(), i), true)
	}
	if len(c.edns) > maxServers {
		t.Errorf("%d servers are in the list", len(c.edns))
	}
}

// TestUnusedFamily checks that a family that no policy can use is neither queried nor reported as
// failing, and that LastError names the family that fails.
func TestUnusedFamily(t *testing.T) {
	s := newServer(t)
	s.host("a.example", 60, addrs("198.51.100.1", "2001:db8::1")...)
	r := New(Options{Log: slog.New(slog.DiscardHandler), Changed: func(bool) {}})
	c := egress.DNS{Resolvers: []netip.AddrPort{s.at}, Floor: time.Second, Grace: time.Hour}
	only4 := func(_ string, ipv6 bool) bool { return ipv6 }
	r.Set(c, []string{"a.example"}, only4)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); r.Run(ctx) }()
	defer func() { cancel(); <-done }()
	eventually(t, "the IPv4 address is known", func() bool { return slices.Equal(r.Addresses("a.example"), addrs("198.51.100.1")) })
	s.set(func() { s.code = dnsmessage.RCodeServerFailure })
	r.Set(c, []string{"b.example"}, only4)
	eventually(t, "IPv4 fails", func() bool { return strings.HasPrefix(r.State("b.example").LastError, "IPv4: asking ") })
	s.set(func() {
		if slices.Contains(s.kinds, dnsmessage.TypeAAAA) {
			t.Errorf("queries for %v", s.kinds)
		}
	})
	if e := r.State("b.example").LastError; strings.Contains(e, "IPv6") {
		t.Errorf("%s", e)
	}
	r.Set(c, []string{"b.example"}, nil)
	eventually(t, "both fail", func() bool { return strings.Contains(r.State("b.example").LastError, "; IPv6: asking ") })
	r.Set(c, []string{"b.example"}, only4)
	if e := r.State("b.example").LastError; strings.Contains(e, "IPv6") {
		t.Errorf("%s", e)
	}
}

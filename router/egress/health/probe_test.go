package health

import (
	"context"
	"crypto/x509"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/root"
)

// TestProbe probes real servers on the loopback, from a separate source address. Ring: namespace;
// needs root for echo requests.
func TestProbe(t *testing.T) {
	root.Need(t, "raw ICMP sockets")
	from := netip.MustParseAddr("127.9.9.9")
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		switch {
		case host != "127.9.9.9" && host != "::1":
			w.WriteHeader(http.StatusForbidden)
		case r.URL.Path == "/moved":
			http.Redirect(w, r, "/", http.StatusFound)
		case r.URL.Path == "/sick":
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path == "/slow":
			<-r.Context().Done()
		case r.URL.String() != "/?a=b":
			w.WriteHeader(http.StatusNotFound)
		}
	})
	plain, secure := httptest.NewServer(handler), httptest.NewUnstartedServer(handler)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer plain.Close()
	defer secure.Close()
	roots := x509.NewCertPool()
	roots.AddCert(secure.Certificate())
	names := map[string][]netip.Addr{
		// a name in the certificate of httptest
		"example.com": {netip.MustParseAddr("::1"), netip.MustParseAddr("127.0.0.1")},
		"other.test":  {netip.MustParseAddr("127.0.0.1")},
		"six.test":    {netip.MustParseAddr("::1")},
		"moved.test":  {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("127.0.0.1")},
		"second.test": {netip.MustParseAddr("127.0.0.77"), netip.MustParseAddr("127.0.0.1")},
	}
	p := &Prober{Roots: roots, Resolve: func(_ context.Context, name string) ([]netip.Addr, error) {
		if a := names[name]; a != nil {
			return a, nil
		}
		return nil, &net.DNSError{Err: "no such host", Name: name}
	}}
	_, port, _ := net.SplitHostPort(plain.Listener.Addr().String())
	_, securePort, _ := net.SplitHostPort(secure.Listener.Addr().String())
	for _, k := range []struct{ from, iface, target, want string }{
		{"", "", "tcp://127.0.0.1:" + port, ""},
		{"", "lo", "tcp://127.0.0.1:" + port, ""},
		{"", "ist-none", "tcp://127.0.0.1:" + port, "no such device"},
		{"", "", "tcp://127.0.0.1:1", "connection refused"},
		{"192.0.2.77", "", "tcp://127.0.0.1:" + port, "cannot assign requested address"},
		{"", "", "tcp://second.test:" + port, ""},
		{"", "", "http://127.0.0.1:" + port + "/?a=b", ""},
		{"127.0.0.1", "", "http://127.0.0.1:" + port + "/?a=b", "403 Forbidden"},
		{"", "", "http://127.0.0.1:" + port + "/moved", "302 Found"},
		{"", "", "http://127.0.0.1:" + port + "/sick", "503 Service"},
		{"", "", "http://127.0.0.1:" + port + "/slow", "no answer in time"},
		{"", "", "https://127.0.0.1:" + securePort + "/?a=b", ""},
		{"", "", "https://example.com:" + securePort + "/?a=b", ""},
		{"", "", "https://other.test:" + securePort + "/?a=b", "certificate is valid for example.com"},
		{"", "", "https://127.0.0.1:" + port + "/", "server gave HTTP response to HTTPS client"},
		{"", "", "tcp://nowhere.test:" + port, "resolving nowhere.test"},
		{"", "", "tcp://six.test:" + port, "no address of the family"},
		{"", "", "icmp://127.0.0.1", ""},
		{"", "lo", "icmp://127.0.0.1", ""},
		{"", "", "icmp://example.com", ""},
		{"::1", "", "icmp://::1", ""},
		{"", "", "icmp://moved.test", ""}, // a name keeps its former address for a while
	} {
		source := from
		if k.from != "" {
			source = netip.MustParseAddr(k.from)
		}
		limit := 10 * time.Second
		if k.want == "no answer in time" {
			limit = 500 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		err := p.Probe(ctx, k.iface, source, target(t, k.target))
		cancel()
		switch {
		case k.want == "" && err != nil, k.want != "" && (err == nil || !strings.Contains(err.Error(), k.want)):
			t.Errorf("%s from %v by %q: %v, want %q", k.target, source, k.iface, err, k.want)
		}
	}
}

// TestEchoWithoutAnswer probes an unused address on the loopback.
func TestEchoWithoutAnswer(t *testing.T) {
	root.Need(t, "raw ICMP sockets")
	p := &Prober{}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := p.Probe(ctx, "lo", netip.MustParseAddr("127.0.0.1"), target(t, "icmp://192.0.2.1")); err != errTimeout {
		t.Errorf("%v, want %v", err, errTimeout)
	}
}

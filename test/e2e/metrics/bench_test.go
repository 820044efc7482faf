package metrics

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/isthmus-net/isthmus/test/e2e/daemon"
	"github.com/isthmus-net/isthmus/test/lab"
	"github.com/isthmus-net/isthmus/test/root"
)

// BenchmarkScrape scrapes a node with 10,000 policies over mutual TLS. Every scrape reads the
// counters of the policies from the kernel: the node keeps them for two seconds, and the pause
// before each scrape, which is longer, is not measured.
func BenchmarkScrape(b *testing.B) {
	root.Need(b, "network namespaces")
	ok := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	l, err := lab.New(lab.Options{})
	ok(err)
	defer l.Close()
	hub := daemon.New(l.Node("hub"), daemon.Build(b, "../../.."))
	hub.Args = []string{"-listen", "127.0.0.1:7443"}
	l.Link(lab.End{Node: hub.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")}, lab.End{Node: l.Node("outside"), Name: "hub"})
	ok(l.Up(b.Context()))
	hub.Start(b)
	const policies = 10_000
	var d strings.Builder
	d.WriteString("node: {name: hub}\nunderlay: {interface: wan, address: 192.0.2.100}\n")
	d.WriteString("egress:\n  pools: [{name: partner, addresses: [{address: 192.0.2.10}]}]\n  policies:\n")
	for i := range policies {
		fmt.Fprintf(&d, "  - {name: policy-%05d, sources: [10.%d.%d.0/24], pool: partner}\n", i, i/250, i%250)
	}
	hub.Apply(b, d.String())

	dir, err := hub.Dir()
	ok(err)
	text, err := os.ReadFile(filepath.Join(dir, "state", "admin.yaml"))
	ok(err)
	var c credentials
	ok(yaml.Unmarshal(text, &c))
	pair, err := tls.X509KeyPair([]byte(c.Certificate), []byte(c.Key))
	ok(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(c.Authority))
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DialContext:     hub.DialContext,
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, ServerName: "isthmusd", NextProtos: []string{"http/1.1"}},
	}}
	for b.Loop() {
		b.StopTimer()
		time.Sleep(2100 * time.Millisecond)
		b.StartTimer()
		r, err := client.Get("https://127.0.0.1:7443/metrics")
		ok(err)
		text, err := io.ReadAll(r.Body)
		ok(err)
		ok(r.Body.Close())
		if n := strings.Count(string(text), "\nisthmus_nat_policy_flows_total{"); r.StatusCode != http.StatusOK || n != policies {
			b.Fatalf("status %s, %d policies", r.Status, n)
		}
	}
}

package metrics

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
	scraper, err := daemon.NewScraper(hub.DialContext, "127.0.0.1:7443", text)
	ok(err)
	for b.Loop() {
		b.StopTimer()
		time.Sleep(2100 * time.Millisecond)
		b.StartTimer()
		text, err := scraper.Scrape(b.Context())
		ok(err)
		if n := strings.Count(text, "\nisthmus_nat_policy_flows_total{"); n != policies {
			b.Fatalf("%d policies", n)
		}
	}
}

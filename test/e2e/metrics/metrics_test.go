// Package metrics has a Prometheus that scrapes isthmusd with the certificate of a reader. Of the
// kernel it needs only TUN. Ring: namespace; needs root, and Debian's prometheus.
package metrics

import (
	"encoding/json"
	"errors"
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

const (
	endpoint = "192.0.2.100:7443"
	web      = "127.0.0.1:9090" // of Prometheus
)

type world struct {
	*testing.T
	hub, site *daemon.Node
	monitor   *lab.Node
	dir       string // of monitor
}

func (w *world) ok(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// begin has two nodes with a WireGuard tunnel between them, and a machine for Prometheus.
func begin(t *testing.T) *world {
	root.Need(t, "network namespaces")
	l, err := lab.New(lab.Options{})
	w := &world{T: t}
	w.ok(err)
	t.Cleanup(func() {
		if t.Failed() {
			for _, name := range []string{filepath.Join(w.dir, "prometheus.log"), w.hub.Process.Log} {
				log, _ := os.ReadFile(name)
				t.Logf("%s:\n%s", name, log)
			}
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	bin := daemon.Build(t, "../../..")
	w.hub, w.site, w.monitor = daemon.New(l.Node("hub"), bin), daemon.New(l.Node("site"), bin), l.Node("monitor")
	w.hub.Args = []string{"-listen", endpoint}
	w.monitor.Bridge("lan", daemon.Prefixes("192.0.2.1/24")...)
	w.monitor.Port("lan", lab.End{Node: w.hub.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.100/24")})
	w.monitor.Port("lan", lab.End{Node: w.site.Node, Name: "wan", Addrs: daemon.Prefixes("192.0.2.101/24")})
	w.ok(l.Up(t.Context()))
	w.dir, err = w.monitor.Dir()
	w.ok(err)

	hubPrivate, hubPublic := daemon.Key(t)
	sitePrivate, sitePublic := daemon.Key(t)
	document := func(n int, peer, more string) string {
		return fmt.Sprintf(`node: {name: node-%d}
underlay: {interface: wan, address: 192.0.2.10%[1]d}
tunnels:
- {name: lane, sources: [0.0.0.0/0], inside: [{local: 169.254.80.%[1]d/31}], wireguard: {privateKey: lane, peerPublicKey: %[2]s, endpoint: "192.0.2.10%[3]d:51820", listenPort: 51820}}
%[4]s`, n, peer, 1-n, more)
	}
	for n, key := range map[*daemon.Node]string{w.hub: hubPrivate, w.site: sitePrivate} {
		n.Start(t)
		_, err := n.CLI(t.Context(), key, "secret", "set", "lane")
		w.ok(err)
	}
	w.site.Apply(t, document(1, hubPublic, ""))
	w.hub.Apply(t, document(0, sitePublic, "access: {api: [192.0.2.1/32]}\n"))
	return w
}

// prometheus issues a reader's certificate and starts Prometheus with it, and with the alert rules.
// It returns the serial of the certificate.
func (w *world) prometheus() string {
	w.Helper()
	file := filepath.Join(w.dir, "context.yaml")
	_, err := w.hub.CLI(w.Context(), "", "client", "issue", "prometheus", "--role", "reader", "--endpoint", endpoint, "-o", file)
	w.ok(err)
	text, err := os.ReadFile(file)
	w.ok(err)
	var context daemon.Credentials
	w.ok(context.Read(text))
	rules, err := filepath.Abs("../../../docs/metrics/alerts.yaml")
	w.ok(err)
	for name, text := range map[string]string{
		"authority.pem": context.Authority, "prometheus.pem": context.Certificate, "prometheus.key": context.Key,
		"prometheus.yaml": fmt.Sprintf(`global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%s]
scrape_configs:
- job_name: isthmus
  scheme: https
  tls_config: {ca_file: authority.pem, cert_file: prometheus.pem, key_file: prometheus.key, server_name: isthmusd}
  static_configs: [{targets: ["%s"]}]
`, rules, endpoint),
	} {
		w.ok(os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o600))
	}
	_, err = w.monitor.Start("prometheus", "prometheus", "--config.file="+filepath.Join(w.dir, "prometheus.yaml"),
		"--storage.tsdb.path="+filepath.Join(w.dir, "data"), "--web.listen-address="+web)
	w.ok(err)
	list, err := w.hub.CLI(w.Context(), "", "client", "list", "-o", "json")
	w.ok(err)
	var clients struct {
		Clients []struct{ Name, Serial string }
	}
	w.ok(json.Unmarshal([]byte(list), &clients))
	for _, c := range clients.Clients {
		if c.Name == "prometheus" {
			return c.Serial
		}
	}
	w.Fatalf("the client is not in the list: %s", list)
	return ""
}

// until waits until Prometheus answers a query with a value, and fails otherwise.
func (w *world) until(query, value string) {
	w.Helper()
	w.ok(lab.Until(w.Context(), time.Minute, func() error {
		out, err := w.monitor.Exec(w.Context(), "promtool", "query", "instant", "http://"+web, query)
		if err != nil {
			return err
		}
		if !strings.Contains(out, " => "+value+" @") {
			return errors.New(query + " is " + out + ", want " + value)
		}
		return nil
	}))
}

// TestPrometheus has Prometheus scrape a node, see what the node says of its tunnel and its
// document, and lose the node when its certificate is revoked.
func TestPrometheus(t *testing.T) {
	w := begin(t)
	serial := w.prometheus()
	w.until(`up{job="isthmus"}`, "1")
	w.until(`isthmus_tunnel_state{tunnel="lane",state="up"}`, "1")
	w.until(`sum by (tunnel) (isthmus_tunnel_state)`, "1")
	w.until(`isthmus_document_generation == bool isthmus_document_applied_generation`, "1")
	w.until(`count(isthmus_condition{severity="error"} == 1) or vector(0)`, "0")
	// Without the tunnel its series end.
	w.hub.Apply(t, "node: {name: node-0}\nunderlay: {interface: wan, address: 192.0.2.100}\naccess: {api: [192.0.2.1/32]}\n")
	w.until(`isthmus_document_generation`, "2")
	w.until(`count(isthmus_tunnel_state) or vector(0)`, "0")
	_, err := w.hub.CLI(t.Context(), "", "client", "revoke", serial)
	w.ok(err)
	w.until(`up{job="isthmus"}`, "0")
}

package metrics

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// read scrapes the inside address of the hub from a node, and from an address of it unless that is
// empty.
func (w *world) read(n *lab.Node, source string) error {
	d := net.Dialer{Timeout: 2 * time.Second}
	if source != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
	}
	dial := func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = n.Do(func() error { c, err = d.DialContext(ctx, network, address); return err })
		return c, err
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	r, err := client.Get("http://169.254.80.0:9100/metrics")
	if err != nil {
		return err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err == nil && (r.StatusCode != http.StatusOK || !strings.Contains(string(text), `isthmus_tunnel_state{tunnel="lane",state="up"} 1`)) {
		err = fmt.Errorf("status %s: %s", r.Status, text)
	}
	return err
}

func (w *world) reads(source string) {
	w.Helper()
	w.ok(lab.Until(w.Context(), time.Minute, func() error { return w.read(w.site.Node, source) }))
}

func (w *world) readsNot(n *lab.Node, source string) {
	w.Helper()
	if err := w.read(n, source); err == nil {
		w.Errorf("%s %s reads the metrics", n.Name, source)
	}
}

// TestInside: a source that the document names reads the metrics at an inside address, also after
// the tunnel was created again. Another source, the underlay's side, and everyone once the section
// is removed, read nothing.
func TestInside(t *testing.T) {
	w := begin(t)
	document, err := w.hub.CLI(t.Context(), "", "get", "spec")
	w.ok(err)
	routed := document + "staticRoutes: [{prefix: 10.77.0.0/24, tunnels: [lane]}]\n"
	for _, command := range []string{"ip address add 10.77.0.1/32 dev lo", "ip address add 10.77.0.2/32 dev lo"} {
		_, err := w.site.Exec(t.Context(), strings.Fields(command)...)
		w.ok(err)
	}
	_, err = w.monitor.Exec(t.Context(), strings.Fields("ip route add 169.254.80.0/32 via 192.0.2.100")...)
	w.ok(err)
	w.hub.Apply(t, routed+"metrics: {listen: [169.254.80.0], from: [10.77.0.1/32, 192.0.2.0/24]}\n")
	w.reads("10.77.0.1")
	w.readsNot(w.site.Node, "10.77.0.2")
	w.readsNot(w.site.Node, "") // the remote inside address
	w.readsNot(w.monitor, "")

	_, err = w.hub.CLI(t.Context(), "", "tunnel", "disable", "lane")
	w.ok(err)
	w.ok(lab.Until(t.Context(), time.Minute, func() error {
		if w.read(w.site.Node, "10.77.0.1") == nil {
			return errors.New("the metrics outlive their tunnel")
		}
		return nil
	}))
	_, err = w.hub.CLI(t.Context(), "", "tunnel", "enable", "lane")
	w.ok(err)
	w.reads("10.77.0.1")
	w.hub.Apply(t, routed+"metrics: {listen: [169.254.80.0], from: [10.77.0.2/32]}\n")
	w.reads("10.77.0.2")
	w.readsNot(w.site.Node, "10.77.0.1")
	w.hub.Apply(t, routed)
	w.ok(lab.Until(t.Context(), time.Minute, func() error {
		if w.read(w.site.Node, "10.77.0.2") == nil {
			return errors.New("the metrics outlive their section of the document")
		}
		return nil
	}))
}

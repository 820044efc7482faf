package main

import (
	"context"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/spec"
	"github.com/isthmus-net/isthmus/tunnel"
)

// sources parses a list of prefixes; the error has each one that is not valid.
func sources(text string) ([]netip.Prefix, error) {
	if text == "" {
		return nil, nil
	}
	all, problems := spec.Sources("-api-from", strings.Split(text, ","))
	if len(problems) > 0 {
		return nil, problems
	}
	return all, nil
}

// hosts returns the names and addresses under which clients may reach the API: the configured ones,
// the host's name, and the addresses of its interfaces, in order.
func hosts(o options, links *link.Links) ([]string, error) {
	var out []string
	for _, h := range strings.Split(o.hosts, ",") {
		if h = strings.TrimSpace(h); h != "" {
			out = append(out, h)
		}
	}
	if name, err := os.Hostname(); err == nil {
		out = append(out, name)
	}
	if h, _, err := net.SplitHostPort(o.listen); err == nil && !everywhere(h) {
		return append(out, h), nil
	}
	// The addresses of tunnels are left out: they come and go, and a node is not managed through
	// them. Those of pools are left out too.
	around, err := links.Surroundings()
	if err != nil {
		return nil, err
	}
	tunnels, err := links.List(tunnel.Mark)
	if err != nil {
		return nil, err
	}
	var inside []string
	for _, t := range tunnels {
		inside = append(inside, t.Name)
	}
	for _, a := range around.Own(inside) {
		if a.IsGlobalUnicast() {
			out = append(out, a.String())
		}
	}
	return out, nil
}

// follow calls changed when the addresses of the machine may have changed, until ctx is done. At
// boot the machine gets them after the daemon has started.
func follow(ctx context.Context, links *link.Links, changed func()) {
	for ctx.Err() == nil {
		_ = links.Around(ctx, changed)
		select {
		case <-ctx.Done():
		case <-time.After(followRetry):
			changed() // for missed notifications
		}
	}
}

// followRetry is the pause before another attempt to watch addresses.
const followRetry = 5 * time.Second

// address returns the API's address for the first admin's context: the listening address, or the
// loopback if it is unspecified.
func address(listen string) string {
	h, port, err := net.SplitHostPort(listen)
	if err != nil {
		return listen
	}
	if everywhere(h) {
		h = "127.0.0.1"
	}
	return net.JoinHostPort(h, port)
}

// port returns the TCP port of an address to listen on, 0 when there is none.
func port(listen string) uint16 {
	_, text, err := net.SplitHostPort(listen)
	if err != nil {
		return 0
	}
	n, _ := net.LookupPort("tcp", text)
	return uint16(n)
}

// everywhere reports whether a host to listen on stands for all addresses.
func everywhere(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}

package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/api/apitest"
	"github.com/isthmus-net/isthmus/test/root"
)

// TestClocks: when the clock of one side keeps a connection from being made, the message names both
// clocks and what to do.
func TestClocks(t *testing.T) {
	root.Need(t, "being root on the API's socket")
	const year, date = 365 * 24 * time.Hour, `(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)`
	const reach = `isthmus: the daemon at [0-9.:]+ cannot be reached: `
	server := reach + `this machine's clock says ` + date + `, and the node's said ` + date + ` when it issued its certificate, which ends at \S+: set the one that is wrong \(timedatectl set-ntp true\)`
	for _, c := range []struct {
		what           string
		node, here     time.Duration // what their clocks are ahead
		want           string
		hereAt, nodeAt int // in the message
		warned         bool
	}{
		{what: "right", want: `^$`},
		{what: "this machine is ahead", here: 5 * year, want: server, hereAt: 1, nodeAt: 2, warned: true},
		{what: "this machine is behind", here: -5 * year, want: server, hereAt: 1, nodeAt: 2},
		{what: "the node is ahead", node: 2 * year, want: server, hereAt: 1, nodeAt: 2},
		{what: "the certificate is over", node: 11 * time.Hour, here: 11 * time.Hour, hereAt: 2, nodeAt: 3, warned: true,
			want: reach + `the certificate of this client ended at ` + date + `, this machine's clock says ` + date + `, and the node's said ` + date + ` when it issued its own: let an admin issue`},
		{what: "the certificate is over by the node's clock alone", node: 11 * time.Hour, hereAt: 2, nodeAt: 3,
			want: reach + `the node refuses the certificate of this client as expired, but it ends at ` + date + `, and this machine's clock says ` + date + `; the node's clock is later, and said ` + date + ` when it issued its own certificate: set the one that is wrong`},
		{what: "the node was started without a battery", node: -56 * year, want: `^$`},
	} {
		t.Run(c.what, func(t *testing.T) {
			var offset atomic.Int64
			clock := func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
			s := apitest.Serve(t, clock, apitest.New(time.Now))
			home := t.TempDir()
			w := &world{t: t, server: s, home: home, context: filepath.Join(home, "ann.yaml")}
			if _, stderr, code := w.run(t.Context(), "", "--socket", s.Socket, "client", "issue", "ann", "--role", "operator", "--lifetime", "10h", "--endpoint", s.Address, "-o", w.context); code != 0 {
				t.Fatal(stderr)
			}
			offset.Store(int64(c.node))
			var stderr bytes.Buffer
			a := w.app(nil, io.Discard, &stderr)
			a.wall = func() time.Time { return time.Now().Add(c.here) }
			code := a.run(t.Context(), []string{"get", "tunnels"})
			text := stderr.String()
			if c.warned {
				_, text, _ = strings.Cut(text, "\n")
			}
			m := regexp.MustCompile(c.want).FindStringSubmatch(text)
			if m == nil || (code == 0) != (c.want == `^$`) {
				t.Fatalf("exit %d, %q", code, stderr.String())
			}
			near := func(which string, i int, ahead time.Duration) {
				if i == 0 {
					return
				}
				if at, err := time.Parse(time.RFC3339, m[i]); err != nil || time.Until(at.Add(-ahead)).Abs() > 10*time.Minute {
					t.Errorf("%s clock: %s, %v, and it is ahead by %v", which, m[i], err, ahead)
				}
			}
			near("this machine's", c.hereAt, c.here)
			near("the node's", c.nodeAt, c.node)
		})
	}
}

// TestAuthorityIsOver: what is wrong is the context then, or this machine's clock, and not the
// certificate of the node.
func TestAuthorityIsOver(t *testing.T) {
	now := noon
	ca := &x509.Certificate{Raw: []byte("a"), NotBefore: now.AddDate(-20, 0, 0), NotAfter: now.AddDate(0, 0, -1)}
	err := explainServer(fmt.Errorf("handshake: %w", &tls.CertificateVerificationError{
		UnverifiedCertificates: []*x509.Certificate{{Raw: []byte("b")}}, Err: x509.CertificateInvalidError{Cert: ca, Reason: x509.Expired},
	}), now)
	const want = "this machine's clock says 2026-03-01T12:00:00Z, and the authority in the context is valid from 2006-03-01T12:00:00Z to 2026-02-28T12:00:00Z: set the clock if it is wrong, or "
	if !strings.HasPrefix(err.Error(), want) {
		t.Errorf("%q, want %q", err, want)
	}
	other := &tls.CertificateVerificationError{UnverifiedCertificates: []*x509.Certificate{ca}, Err: x509.UnknownAuthorityError{Cert: ca}}
	if got := explainServer(other, now); got != error(other) {
		t.Errorf("another reason: %v", got)
	}
}

package auth

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
	"unicode"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

// serverFor has the parameters that a server certificate was issued for. The zero value matches
// none.
type serverFor struct {
	by    *signer
	wrong bool // the clock was wrong
}

// SetHosts changes the addresses and names in the server certificate. New connections get a new
// one.
func (a *Authority) SetHosts(hosts []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Equal(hosts, a.hosts) {
		a.hosts, a.issued = slices.Clone(hosts), serverFor{}
	}
}

// serverCertificate returns the present server certificate. Its key is only in memory. It is
// replaced when a third of its lifetime is left, and when the clock was set back so far that it was
// issued in the future. While the clock is wrong it is valid as long as the authority, so that
// clients with a right clock accept it. If none can be issued, the former one is used until its
// end.
func (a *Authority) serverCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, err := a.authority()
	if err != nil {
		return nil, err
	}
	r := a.clock()
	want := serverFor{c.server(r.trust), r.wrong != notWrong}
	if a.server != nil && a.issued == want {
		left := a.server.Leaf.NotAfter.Sub(r.now)
		if want.wrong || left > serverLifetime/3 && left <= serverLifetime+backdate {
			return a.server, nil
		}
	}
	server, err := a.issueServer(want, r)
	if a.unable = err; err == nil {
		a.server, a.issued = server, want
	} else if a.server == nil || r.now.After(a.server.Leaf.NotAfter) {
		return nil, err
	}
	return a.server, nil
}

func (a *Authority) issueServer(want serverFor, r reading) (*tls.Certificate, error) {
	key, _, err := newKey()
	if err != nil {
		return nil, err
	}
	template := a.template(ServerName, serverLifetime)
	if want.wrong {
		template.NotBefore, template.NotAfter = earlier(r.now, r.newest.at).Add(-backdate), want.by.cert.NotAfter
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, h := range append([]string{ServerName, "localhost", "127.0.0.1", "::1"}, a.hosts...) {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else if h != "" && !strings.ContainsFunc(h, func(r rune) bool { return r > unicode.MaxASCII }) {
			// A certificate has ASCII names only (RFC 5280 section 4.2.1.6). Without a certificate
			// the API would refuse every client.
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, want.by.cert, key.Public(), want.by.key)
	if err != nil {
		return nil, fmt.Errorf("issuing server certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("issuing server certificate: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

// serverConditions renews the server certificate when it is due, without waiting for a client, and
// reports failures.
func (a *Authority) serverConditions() []*isthmusv1.Condition {
	if _, err := a.authority(); err != nil {
		return nil // another condition reports it
	}
	_, err := a.serverCertificate(nil)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.unable == nil {
		return nil
	}
	text := "the API cannot be reached over the network"
	if err == nil {
		text = "the present one ends at " + a.server.Leaf.NotAfter.UTC().Format(time.RFC3339) + ", and then the API cannot be reached over the network"
	}
	return []*isthmusv1.Condition{condition.ServerCertificate.Error(time.Time{}, "%s", "renewing the certificate of the API failed: "+a.unable.Error()+": "+text+": restart isthmusd, or make a new authority (isthmus authority renew)")}
}

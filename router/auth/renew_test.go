package auth

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/store"
)

// request returns a certificate request of a key, a new one for nil.
func request(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	if key == nil {
		var err error
		if key, _, err = newKey(); err != nil {
			t.Fatal(err)
		}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// identity is what a connection with a certificate has.
func identity(t *testing.T, text string) Identity {
	t.Helper()
	block, _ := pem.Decode([]byte(text))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	role, err := roleOf(cert)
	if err != nil {
		t.Fatal(err)
	}
	return Identity{Name: cert.Subject.CommonName, Role: role, Serial: serialText(cert.SerialNumber), Expires: cert.NotAfter, cert: cert}
}

const day = 24 * time.Hour

func issueFor(t *testing.T, a *Authority, name string, role Role, lifetime time.Duration) (Identity, store.Client) {
	t.Helper()
	text, c, err := a.Issue(name, role, request(t, nil), lifetime)
	if err != nil {
		t.Fatal(err)
	}
	return identity(t, text), c
}

func renewFor(t *testing.T, a *Authority, id Identity) (Identity, store.Client) {
	t.Helper()
	text, c, err := a.RenewClient(id, request(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	return identity(t, text), c
}

// TestRenewClient: a renewed certificate has the name, role and lifetime of the one before, which
// stays valid; when, how often and how long it may be renewed has bounds; and the list says what
// came from what, over a restart too.
func TestRenewClient(t *testing.T) {
	dir, c := t.TempDir(), newClock()
	a, st, _ := setUp(t, dir, c)
	id, from := issueFor(t, a, "ann", Operator, 90*day)
	refused := func(what, want string, id Identity, csr []byte) {
		t.Helper()
		n := len(a.Clients())
		if _, _, err := a.RenewClient(id, csr); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
		if len(a.Clients()) != n {
			t.Errorf("%s: a certificate was issued", what)
		}
	}
	refused("root", "unix socket", Identity{Name: rootName, Role: Admin}, request(t, nil))
	refused("too early", "can be renewed from 2026-04-30", id, request(t, nil))
	c.Time = from.Issued.Add(60*day + time.Second)
	refused("no request", "parsing certificate request", id, []byte("x"))
	higher := id
	higher.Role = Admin
	refused("a role that is not listed", "is listed as ann as operator", higher, request(t, nil))

	csr := request(t, nil)
	text, to, err := a.RenewClient(id, csr)
	if err != nil {
		t.Fatal(err)
	}
	next := identity(t, text)
	if to.Name != "ann" || to.Role != "operator" || to.RenewedFrom != from.Serial || to.Serial == from.Serial || !to.First.Equal(from.Issued) ||
		!to.Expires.Equal(c.Time.Add(90*day)) || next.Name != "ann" || next.Role != Operator || next.Serial != to.Serial || !next.Expires.Equal(to.Expires) {
		t.Errorf("renewed %+v as %+v, certificate %+v", from, to, next)
	}
	if err := a.verify(id.cert); err != nil {
		t.Errorf("the former one: %v", err)
	}

	// The answer was lost: the same key gets the same certificate, after a restart too. Another key
	// does not.
	c.Time = c.Add(time.Hour)
	st.Close()
	a, st, _ = setUp(t, dir, c)
	text, again, err := a.RenewClient(id, csr)
	if err != nil || again.Serial != to.Serial || !identity(t, text).Expires.Equal(next.Expires) || !identity(t, text).cert.NotBefore.Equal(next.cert.NotBefore) {
		t.Errorf("the same key again: %+v, %v, want %+v", again, err, to)
	}
	refused("another key", "was renewed already, at 2026-04-30T12:00:01Z as "+to.Serial, id, request(t, nil))
	refused("the new one at once", "can be renewed from", next, request(t, nil))

	short, _ := issueFor(t, a, "bob", Reader, MinRenewed-time.Hour)
	c.Time = c.Add(MinRenewed - 2*time.Hour)
	refused("one of less than 30 days", "one for less than 720h0m0s is not renewed", short, request(t, nil))

	// In all it is MaxLifetime from the first one on, which the last one reaches.
	id, count := next, 1
	for ; count < 500; count++ {
		c.Time = id.Expires.Add(-day)
		text, to, err := a.RenewClient(id, request(t, nil))
		if err != nil {
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "cannot be renewed beyond 2036-02-27") {
				t.Errorf("at the end: %v", err)
			}
			break
		}
		id = identity(t, text)
		if to.Expires.After(from.Issued.Add(MaxLifetime)) || !to.First.Equal(from.Issued) {
			t.Fatalf("renewed until %v, for one of %v", to.Expires, from.Issued)
		}
	}
	if !id.Expires.Equal(from.Issued.Add(MaxLifetime)) || count < 40 || count > 42 {
		t.Errorf("%d certificates, until %v", count, id.Expires)
	}
	_ = st
}

// TestRevokeChain: revoking one of the certificates that follow each other revokes them all, what
// was cut short by a crash is as good, and none is renewed afterwards.
func TestRevokeChain(t *testing.T) {
	for which := range 3 {
		c := newClock()
		a, st, _ := setUp(t, t.TempDir(), c)
		id, first := issueFor(t, a, "ann", Admin, 90*day)
		_, other := issueFor(t, a, "ann", Admin, 0)
		ids, chain := []Identity{id}, []store.Client{first}
		for range 2 {
			c.Time = id.Expires.Add(-day)
			var to store.Client
			id, to = renewFor(t, a, id)
			ids, chain = append(ids, id), append(chain, to)
		}
		if err := a.Revoke(chain[which].Serial); err != nil {
			t.Fatal(err)
		}
		c.Time = id.Expires.Add(-day)
		for i, x := range ids {
			if err := a.verify(x.cert); err == nil {
				t.Errorf("revoked %d: %d is valid", which, i)
			}
			if _, _, err := a.RenewClient(x, request(t, nil)); err == nil || !strings.Contains(err.Error(), "is revoked") {
				t.Errorf("revoked %d: renewing %d: %v", which, i, err)
			}
		}
		if err := a.valid(other.Serial); err != nil {
			t.Errorf("revoked %d: the other certificate of ann: %v", which, err)
		}
		// A crash after the first record was written.
		for _, x := range chain[1:] {
			x.Revoked = false
			if err := st.SetClient(x); err != nil {
				t.Fatal(err)
			}
		}
		for _, x := range a.Clients() {
			if x.Serial != other.Serial && x.Name == "ann" && (!x.Revoked || a.valid(x.Serial) == nil) {
				t.Errorf("after a crash: %+v is valid", x)
			}
		}
	}
}

// TestRenewAfterAuthority: when the authority is renewed, each client gets a certificate of the new
// one at any time of its life, once.
func TestRenewAfterAuthority(t *testing.T) {
	c := newClock()
	a, _, _ := setUp(t, t.TempDir(), c)
	id, from := issueFor(t, a, "ann", Reader, 0)
	if _, err := a.Renew(false); err != nil {
		t.Fatal(err)
	}
	next, to := renewFor(t, a, id)
	if !to.Expires.Equal(from.Expires) || next.cert.CheckSignatureFrom(a.present.Load().cert) != nil {
		t.Errorf("renewed as %+v", to)
	}
	if _, _, err := a.RenewClient(next, request(t, nil)); !errors.Is(err, ErrInvalid) {
		t.Errorf("once more: %v", err)
	}
}

// TestRenewedGiveWay: certificates that were renewed twice make room for others, and a revoked one
// does not while a valid one was renewed from it.
func TestRenewedGiveWay(t *testing.T) {
	c := newClock()
	a, st, _ := setUp(t, t.TempDir(), c)
	a.room = 4 // with that of the first admin
	id, first := issueFor(t, a, "ann", Reader, 90*day)
	serials := []string{first.Serial}
	for range 5 {
		c.Time = id.Expires.Add(-day)
		var to store.Client
		id, to = renewFor(t, a, id)
		serials = append(serials, to.Serial)
	}
	if n := len(a.Clients()); n != 4 {
		t.Errorf("%d certificates", n)
	}
	for i, serial := range serials {
		if err := a.valid(serial); (err == nil) != (i >= 3) {
			t.Errorf("certificate %d: %v", i, err)
		}
	}
	third, err := st.Client(serials[3])
	if err != nil {
		t.Fatal(err)
	}
	third.Revoked = true // and a crash before the others
	if err := st.SetClient(third); err != nil {
		t.Fatal(err)
	}
	_, _, err = a.Issue("bob", Reader, request(t, nil), 0)
	if a.valid(serials[5]) == nil {
		t.Errorf("the last one became valid when the revoked one made room: %v", err)
	}
	if !errors.Is(err, ErrInvalid) {
		t.Errorf("a list of certificates that are needed: %v", err)
	}
	if err := a.Revoke(serials[5]); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if _, _, err := a.Issue(fmt.Sprint("bob", i), Reader, request(t, nil), 0); err != nil {
			t.Errorf("with room again: %v", err)
		}
	}
}

package auth

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/isthmus-net/isthmus/router/store"
)

const (
	// MinRenewed is the shortest lifetime of a certificate that can be renewed. A shorter one is
	// meant for that time only.
	MinRenewed = 30 * 24 * time.Hour

	// maxChain bounds the length of a chain of renewals, because damaged files could form a ring.
	maxChain = 1024
)

// RenewableFrom returns the earliest time of a renewal: when a third of the lifetime is left. A
// client that renews all the time would fill the list of certificates.
func RenewableFrom(issued, expires time.Time) time.Time { return expires.Add(-expires.Sub(issued) / 3) }

// RenewClient signs a certificate for the public key of a certificate request (PKCS #10, DER) as
// the successor of the caller's, and returns it in PEM, with the caller's name, role and lifetime.
// A certificate has one successor: the same key again returns the same certificate, because the
// answer may have been lost; another key is refused, because the first renewal may have been made
// with a stolen key. All certificates of a chain end MaxLifetime after the first was issued. The
// former certificate stays valid until its end. An error about a certificate that cannot be renewed
// wraps ErrInvalid.
func (a *Authority) RenewClient(id Identity, csr []byte) (string, store.Client, error) {
	none := func(format string, args ...any) (string, store.Client, error) {
		return "", store.Client{}, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...)
	}
	if id.Serial == "" || id.cert == nil {
		return none("the unix socket needs no certificate, so it has none to renew: issue one with isthmus client issue")
	}
	request, err := readRequest(csr)
	if err != nil {
		return "", store.Client{}, err
	}
	key, err := keyDigest(request.PublicKey)
	if err != nil {
		return "", store.Client{}, err
	}
	a.renewing.Lock()
	defer a.renewing.Unlock()
	if err := a.valid(id.Serial); err != nil {
		return "", store.Client{}, err
	}
	from, err := a.store.Client(id.Serial)
	if err != nil {
		return "", store.Client{}, err
	}
	role, err := ParseRole(from.Role)
	if err != nil {
		return "", store.Client{}, err
	}
	if role != id.Role || from.Name != id.Name {
		return none("certificate %s is for %s as %s, and is listed as %s as %s: let an admin issue another one", id.Serial, id.Name, id.Role, from.Name, from.Role)
	}
	if to, ok := a.successor(id.Serial); ok {
		if to.Key != key {
			return none("certificate %s was renewed already, at %s as %s, for another key: if this client did not do that, its key may be stolen: let an admin revoke %s and issue another one",
				id.Serial, to.Issued.Format(time.RFC3339), to.Serial, id.Serial)
		}
		certificate, err := a.sign(to, role, request.PublicKey)
		return certificate, to, err
	}
	if err := a.wrongClock(false); err != nil {
		return "", store.Client{}, err
	}
	now, lifetime := a.now(), from.Expires.Sub(from.Issued)
	present, err := a.authority()
	if err != nil {
		return "", store.Client{}, err
	}
	former := id.cert.CheckSignatureFrom(present.cert) != nil
	first := from.First
	if first.IsZero() {
		first = from.Issued
	}
	end := first.Add(MaxLifetime)
	early := RenewableFrom(from.Issued, from.Expires)
	lifetime = min(lifetime, end.Sub(now).Truncate(time.Second))
	switch {
	case !from.Expires.Before(end) && !former, lifetime < MinLifetime:
		return none("certificate %s follows one of %s, and cannot be renewed beyond %s: let an admin issue another one", id.Serial, first.Format(time.DateOnly), end.Format(time.DateOnly))
	case from.Expires.Sub(from.Issued) < MinRenewed:
		return none("certificate %s was issued for %v, and one for less than %v is not renewed: let an admin issue another one", id.Serial, from.Expires.Sub(from.Issued), MinRenewed)
	case now.Before(early) && !former:
		return none("certificate %s ends at %s, and can be renewed from %s on", id.Serial, from.Expires.Format(time.RFC3339), early.UTC().Format(time.RFC3339))
	}
	return a.issueAfter(store.Client{RenewedFrom: from.Serial, First: first, Key: key}, from.Name, role, request.PublicKey, lifetime)
}

func keyDigest(public any) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// successor returns the certificate that a certificate was renewed to.
func (a *Authority) successor(serial string) (store.Client, bool) {
	for _, c := range a.store.Clients() {
		if c.RenewedFrom == serial {
			return c, true
		}
	}
	return store.Client{}, false
}

// chain returns the chain of renewals that contains a certificate, from the first on.
func (a *Authority) chain(serial string) ([]store.Client, error) {
	c, err := a.store.Client(serial)
	if err != nil {
		return nil, err
	}
	for range maxChain {
		from, err := a.store.Client(c.RenewedFrom)
		if err != nil {
			break // it is the first one, or its predecessors were removed
		}
		c = from
	}
	out := []store.Client{c}
	for len(out) < maxChain {
		next, ok := a.successor(out[len(out)-1].Serial)
		if !ok {
			break
		}
		out = append(out, next)
	}
	return out, nil
}

// revokedChain reports whether a certificate, or one that it was renewed from, is revoked.
func (a *Authority) revokedChain(c store.Client) bool {
	for range maxChain {
		if c.Revoked {
			return true
		}
		from, err := a.store.Client(c.RenewedFrom)
		if err != nil {
			return false
		}
		c = from
	}
	return true // a ring
}

// Clients returns the issued certificates, oldest first. One is shown as revoked if one that it was
// renewed from is.
func (a *Authority) Clients() []store.Client {
	all := a.store.Clients()
	for i := range all {
		all[i].Revoked = all[i].Revoked || all[i].RenewedFrom != "" && a.revokedChain(all[i])
	}
	return all
}

// Revoke revokes a certificate with all others of its chain, and closes the connections that use
// them. An unknown serial is an error that wraps store.ErrNotFound.
func (a *Authority) Revoke(serial string) error {
	a.renewing.Lock()
	defer a.renewing.Unlock()
	chain, err := a.chain(serial)
	if err != nil {
		return err
	}
	var errs []error
	// the first one invalidates all others, so that dying in between leaves none valid
	for _, c := range chain {
		if !c.Revoked {
			c.Revoked = true
			if err := a.store.SetClient(c); err != nil {
				errs = append(errs, fmt.Errorf("revoking client certificate %s: %w", c.Serial, err))
			}
		}
	}
	a.see()
	for _, c := range chain {
		if a.valid(c.Serial) != nil {
			a.clients.cut(c.Serial)
		}
	}
	return errors.Join(errs...)
}

// forgettable returns the certificate to remove for a new one: the oldest revoked one that no valid
// one was renewed from, else the oldest one that was renewed and whose successor was renewed too.
// Such a one has expired before its second successor was issued, by the clock of that time, and its
// client has another.
func forgettable(all []store.Client) (string, bool) {
	next := make(map[string]store.Client, len(all))
	for _, c := range all {
		if c.RenewedFrom != "" {
			next[c.RenewedFrom] = c
		}
	}
	for _, c := range all {
		if to, ok := next[c.Serial]; c.Revoked && (!ok || to.Revoked) {
			return c.Serial, true
		}
	}
	for _, c := range all {
		if to, ok := next[c.Serial]; ok && !c.Revoked {
			if _, ok := next[to.Serial]; ok {
				return c.Serial, true
			}
		}
	}
	return "", false
}

package auth

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/store"
)

// ServerName is a name in every node's certificate. A client that trusts only this node's authority
// needs no other, and can reach the node at any address.
const ServerName = "isthmusd"

const (
	authorityLifetime = 20 * 365 * 24 * time.Hour
	serverLifetime    = 90 * 24 * time.Hour
	adminLifetime     = 365 * 24 * time.Hour

	// MinLifetime, MaxLifetime and DefaultLifetime bound a client certificate.
	MinLifetime     = time.Hour
	MaxLifetime     = 10 * 365 * 24 * time.Hour
	DefaultLifetime = 365 * 24 * time.Hour

	// Overlap is how long a former authority is trusted after it was renewed.
	Overlap = 30 * 24 * time.Hour
	// authorityWarning is how long before its end a condition asks to renew the authority.
	authorityWarning = 90 * 24 * time.Hour

	// maxClients bounds the list of certificates. The oldest revoked ones are removed first; no
	// clock causes a removal.
	maxClients = 4096

	// The clock of a machine that has just been started may be behind.
	backdate = 24 * time.Hour
)

// Options are the dependencies of an Authority.
type Options struct {
	Store *store.Store
	// Hosts are the addresses and names in the server certificate, besides ServerName and the
	// loopback addresses.
	Hosts []string
	// Address is the host and port in the first admin's context.
	Address string
	// Bundle is the file for the first admin's context, written on the first start only.
	Bundle string
	// Notice receives a line for the operator when Bundle was written.
	Notice io.Writer
	Audit  *Audit
	Now    func() time.Time
	// Sane is a time that is certainly in the past, such as that of the build. Before it, no
	// authority is made: its certificates would not be valid once the clock is set. Zero: any time
	// is sane.
	Sane time.Time
}

// Authority is the node's certificate authority with everything that depends on it. Its methods may
// be called from several goroutines.
type Authority struct {
	store *store.Store
	audit *Audit
	now   func() time.Time

	options Options
	room    int                       // for certificates of clients
	present atomic.Pointer[authority] // nil: it waits for the clock
	seeing  sync.Mutex                // held to compute newest
	newest  atomic.Pointer[seen]      // nil: no authority was made yet

	renewing sync.Mutex // held to renew or revoke a client certificate

	mu     sync.Mutex // held to make an authority
	hosts  []string
	server *tls.Certificate // nil: none was issued yet
	issued serverFor        // parameters that server was issued for
	unable error            // why no new one is issued although it is due
	failed error            // why no authority is made although the clock is sane

	clients registry
	logins  logins // of callers over the unix socket
}

// New opens the authority, and on the first start creates it together with the first admin. A
// damaged authority is an error: making a new one would lock out every client.
func New(o Options) (*Authority, error) {
	a := &Authority{store: o.Store, audit: o.Audit, now: o.Now, options: o, room: maxClients, hosts: slices.Clone(o.Hosts)}
	a.clients.init()
	if err := a.load(); err != nil {
		return nil, fmt.Errorf("opening certificate authority: %w", err)
	}
	if a.present.Load() == nil {
		return a, nil
	}
	if err := a.exportAdmin(o); err != nil {
		return nil, fmt.Errorf("exporting the first admin: %w", err)
	}
	return a, nil
}

// signer is a certificate with its key that signs others.
type signer struct {
	key  crypto.Signer
	cert *x509.Certificate
}

// authority has the signer of certificates and the trusted former one.
type authority struct {
	signer
	former *signer   // the one before; nil: none
	until  time.Time // end of the trust in former
}

// overlapping reports whether the former authority is still trusted.
func (a *authority) overlapping(now time.Time) bool {
	return a.former != nil && now.Before(a.until) && now.Before(a.former.cert.NotAfter) && now.After(a.former.cert.NotBefore)
}

// server returns the signer of the server certificate. While there are clients that trust only the
// former authority, that is the former one.
func (a *authority) server(now time.Time) *signer {
	if a.overlapping(now) {
		return a.former
	}
	return &a.signer
}

// trusted returns the certificates that may have signed those of clients.
func (a *authority) trusted(now time.Time) []*x509.Certificate {
	out := []*x509.Certificate{a.cert}
	if a.overlapping(now) {
		out = append(out, a.former.cert)
	}
	return out
}

type authorityRecord struct {
	Certificate, Key string // PEM
	// The former authority, until it is no longer trusted.
	FormerCertificate, FormerKey string    `json:",omitempty"`
	FormerUntil                  time.Time `json:",omitzero"`
}

func (a *Authority) load() error {
	data, err := a.store.Private("authority")
	if errors.Is(err, store.ErrNotFound) {
		if a.now().Before(a.options.Sane) {
			return nil // see Await
		}
		return a.create(authorityRecord{})
	}
	if err != nil {
		return err
	}
	var r authorityRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return err
	}
	return a.use(r)
}

// ErrClock means that no authority exists yet, because the clock is wrong.
var ErrClock = errors.New("the node has no certificate authority yet, since its clock is wrong")

// authority returns the present authority.
func (a *Authority) authority() (*authority, error) {
	if c := a.present.Load(); c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("%w: set it to a time after %s", ErrClock, a.options.Sane.UTC().Format(time.DateOnly))
}

// awaitEvery is the interval at which the clock is read.
const awaitEvery = time.Second

// Await creates the authority and the first admin as soon as the clock is sane. It returns when
// that is done, or ctx is.
func (a *Authority) Await(ctx context.Context) {
	ticker := time.NewTicker(awaitEvery)
	defer ticker.Stop()
	for a.present.Load() == nil && ctx.Err() == nil {
		if !a.now().Before(a.options.Sane) {
			a.catchUp()
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
		}
	}
}

func (a *Authority) catchUp() {
	a.mu.Lock()
	defer a.mu.Unlock()
	err := a.create(authorityRecord{})
	if err == nil {
		err = a.exportAdmin(a.options)
	}
	a.failed = err
}

// Renew makes a new authority. Certificates signed by the former one stay valid for Overlap, or end
// at once with atOnce. During that time the server shows a certificate of the former one, which
// clients that do not have the new one trust. It returns the end of the former authority, zero if
// it has ended. During an overlap only renewing at once is possible; otherwise the error wraps
// ErrInvalid.
func (a *Authority) Renew(atOnce bool) (time.Time, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, err := a.authority()
	if err != nil {
		return time.Time{}, err
	}
	now := a.now()
	if now.Before(a.options.Sane) {
		return time.Time{}, fmt.Errorf("%w: the clock is wrong: set it to a time after %s", ErrInvalid, a.options.Sane.UTC().Format(time.DateOnly))
	}
	if c.overlapping(now) && !atOnce {
		return time.Time{}, fmt.Errorf("%w: the authority before the present one is trusted until %s: wait, or renew at once, which shuts out every client", ErrInvalid, c.until.UTC().Format(time.RFC3339))
	}
	var r authorityRecord
	if !atOnce && now.Before(c.cert.NotAfter) {
		der, err := x509.MarshalPKCS8PrivateKey(c.key)
		if err != nil {
			return time.Time{}, fmt.Errorf("renewing authority: %w", err)
		}
		r.FormerCertificate, r.FormerUntil = certificatePEM(c.cert.Raw), now.Add(Overlap)
		r.FormerKey = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	if err := a.create(r); err != nil {
		return time.Time{}, fmt.Errorf("renewing authority: %w", err)
	}
	if r.FormerCertificate == "" {
		a.clients.cutAll() // root on the node has no certificate and keeps its connections
	}
	return r.FormerUntil, nil
}

// Conditions reports present and coming problems of the authority, the certificates and the clock.
func (a *Authority) Conditions() []*isthmusv1.Condition {
	return slices.Concat(a.authorityConditions(), a.clockConditions(), a.serverConditions(), a.endingConditions())
}

func (a *Authority) authorityConditions() []*isthmusv1.Condition {
	a.mu.Lock()
	failed := a.failed
	a.mu.Unlock()
	one := func(c *isthmusv1.Condition) []*isthmusv1.Condition { return []*isthmusv1.Condition{c} }
	c, err := a.authority()
	now := a.now()
	switch {
	case failed != nil:
		return one(condition.NoAuthority.Error(time.Time{}, "making the certificate authority and the first admin failed: %v; the next start tries again", failed))
	case err != nil:
		return one(condition.ClockWrong.Error(time.Time{}, "%v; until then the API works over the unix socket alone", err))
	case now.After(c.cert.NotAfter.Add(-authorityWarning)):
		return one(condition.AuthorityEnds.Error(time.Time{}, "the certificate authority ends at %s, and with it every certificate: see whether the clock is right, then `isthmus authority renew`", c.cert.NotAfter.UTC().Format(time.RFC3339)))
	case c.overlapping(now):
		return one(condition.AuthorityRenewed.Warning(time.Time{}, "the authority before the present one is trusted until %s: let each client run isthmus client renew until then, or issue new contexts", c.until.UTC().Format(time.RFC3339)))
	}
	return nil
}

// create makes an authority; former has the fields of the former one, if that stays trusted.
func (a *Authority) create(former authorityRecord) error {
	key, keyPEM, err := newKey()
	if err != nil {
		return err
	}
	template := a.template("isthmus authority", authorityLifetime)
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	r := former
	r.Certificate, r.Key = certificatePEM(der), keyPEM
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := a.store.SetPrivate("authority", data, a.now()); err != nil {
		return err
	}
	return a.use(r)
}

func (a *Authority) use(r authorityRecord) error {
	read := func(certificate, key string) (signer, error) {
		pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
		if err != nil {
			return signer{}, err
		}
		return signer{pair.PrivateKey.(crypto.Signer), pair.Leaf}, nil
	}
	defer a.see()
	present, err := read(r.Certificate, r.Key)
	if err != nil {
		return err
	}
	c := &authority{signer: present, until: r.FormerUntil}
	if r.FormerCertificate != "" {
		former, err := read(r.FormerCertificate, r.FormerKey)
		if err != nil {
			return fmt.Errorf("the authority before: %w", err)
		}
		c.former = &former
	}
	a.present.Store(c)
	return nil
}

// Certificate returns the certificates that a client must trust, in PEM: the authority's, and the
// former one's while it is trusted. Empty: none exists yet.
func (a *Authority) Certificate() string {
	c, err := a.authority()
	if err != nil {
		return ""
	}
	var out strings.Builder
	for _, cert := range c.trusted(a.clock().trust) {
		out.WriteString(certificatePEM(cert.Raw))
	}
	return out.String()
}

// roots are the authorities that may have signed certificates of clients.
func (a *Authority) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	if c, err := a.authority(); err == nil {
		for _, cert := range c.trusted(a.clock().trust) {
			pool.AddCert(cert)
		}
	}
	return pool
}

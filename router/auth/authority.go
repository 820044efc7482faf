package auth

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
	"github.com/isthmus-net/isthmus/router/disk"
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

func (a *Authority) template(name string, lifetime time.Duration) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: newSerial(),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    a.now().Add(-backdate),
		NotAfter:     a.now().Add(lifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
}

func newSerial() *big.Int {
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] = serial[0]&0x7f | 0x40 // positive, and always of the same length
	return new(big.Int).SetBytes(serial)
}

func newKey() (crypto.Signer, string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, "", err
	}
	return key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), nil
}

func certificatePEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// Sign signs data with the key of the present server certificate: ECDSA with SHA-256, in ASN.1. It
// returns the certificate, in PEM, with the signature.
func (a *Authority) Sign(data []byte) (signature []byte, certificate string, err error) {
	c, err := a.serverCertificate(nil)
	if err != nil {
		return nil, "", err
	}
	sum := sha256.Sum256(data)
	if signature, err = c.PrivateKey.(crypto.Signer).Sign(rand.Reader, sum[:], crypto.SHA256); err != nil {
		return nil, "", fmt.Errorf("signing: %w", err)
	}
	return signature, certificatePEM(c.Leaf.Raw), nil
}

// ErrInvalid means that a request cannot be fulfilled as it is.
var ErrInvalid = errors.New("invalid request")

var clientName = regexp.MustCompile(`^[A-Za-z0-9.@-]{1,63}$`)

// Issue signs a client certificate for the public key of a certificate request (PKCS #10, DER) and
// returns it in PEM. The lifetime is MinLifetime to MaxLifetime, or 0 for DefaultLifetime. An error
// about the request wraps ErrInvalid.
func (a *Authority) Issue(name string, role Role, csr []byte, lifetime time.Duration) (string, store.Client, error) {
	r, err := readRequest(csr)
	if err != nil {
		return "", store.Client{}, err
	}
	return a.issue(name, role, r.PublicKey, lifetime)
}

// CheckRequest returns why Issue would not sign a request, and the request's common name.
func CheckRequest(name string, csr []byte, lifetime time.Duration) (commonName string, err error) {
	r, err := readRequest(csr)
	if err != nil {
		return "", err
	}
	if name == "" {
		name = r.Subject.CommonName
	}
	return r.Subject.CommonName, checkClient(name, lifetime)
}

// readRequest parses a certificate request and checks its key.
func readRequest(csr []byte) (*x509.CertificateRequest, error) {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("%w: parsing certificate request: %w", ErrInvalid, err)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: certificate request: %w", ErrInvalid, err)
	}
	return r, checkKey(r.PublicKey)
}

func checkKey(public any) error {
	switch k := public.(type) {
	case ed25519.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize >= 256 {
			return nil
		}
	case *rsa.PublicKey:
		if k.N.BitLen() >= 2048 && k.N.BitLen() <= 8192 {
			return nil
		}
	}
	return fmt.Errorf("%w: key must be Ed25519, ECDSA of 256 bits or more, or RSA of 2048 to 8192 bits", ErrInvalid)
}

// checkClient returns why a certificate cannot have a name or a lifetime; 0 is DefaultLifetime.
func checkClient(name string, lifetime time.Duration) error {
	if !clientName.MatchString(name) {
		return fmt.Errorf("%w: name %.80q must be letters, digits, hyphens, dots, at signs, 1 to 63", ErrInvalid, name)
	}
	// root and isthmusd are the authors for the unix socket and the daemon in the history and the
	// audit log.
	if name == rootName || name == ServerName {
		return fmt.Errorf("%w: name %q is reserved", ErrInvalid, name)
	}
	if lifetime != 0 && (lifetime < MinLifetime || lifetime > MaxLifetime) {
		return fmt.Errorf("%w: lifetime %v must be %v to %v", ErrInvalid, lifetime, MinLifetime, MaxLifetime)
	}
	return nil
}

func (a *Authority) issue(name string, role Role, public any, lifetime time.Duration) (string, store.Client, error) {
	return a.issueAfter(store.Client{}, name, role, public, lifetime)
}

// issueAfter signs a certificate and adds it to the list, with its predecessor from renewed.
func (a *Authority) issueAfter(renewed store.Client, name string, role Role, public any, lifetime time.Duration) (string, store.Client, error) {
	if err := checkClient(name, lifetime); err != nil {
		return "", store.Client{}, err
	}
	if lifetime == 0 {
		lifetime = DefaultLifetime
	}
	if _, err := a.authority(); err != nil {
		return "", store.Client{}, err
	}
	if err := a.makeRoom(); err != nil {
		return "", store.Client{}, err
	}
	c := renewed
	c.Serial, c.Name, c.Role = serialText(newSerial()), name, role.String()
	c.Issued = a.now().UTC().Truncate(time.Second)
	c.Expires = c.Issued.Add(lifetime).Truncate(time.Second)
	certificate, err := a.sign(c, role, public)
	if err != nil {
		return "", store.Client{}, err
	}
	if err := a.store.SetClient(c); err != nil {
		return "", store.Client{}, err
	}
	a.see()
	return certificate, c, nil
}

// sign makes the certificate of a client. All of it but the signature follows from c and the key.
func (a *Authority) sign(c store.Client, role Role, public any) (string, error) {
	by, err := a.authority()
	if err != nil {
		return "", err
	}
	serial, ok := new(big.Int).SetString(c.Serial, 16)
	if !ok {
		return "", fmt.Errorf("issuing client certificate: serial %q is not a hexadecimal number", c.Serial)
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: c.Name},
		NotBefore:    c.Issued.Add(-backdate),
		NotAfter:     c.Expires,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		URIs:         []*url.URL{roleURI(role)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, public, by.key)
	if err != nil {
		return "", fmt.Errorf("issuing client certificate: %w", err)
	}
	return certificatePEM(der), nil
}

// makeRoom removes a certificate when there are too many; see forgettable. Expired ones stay: the
// clock may be wrong, and a certificate that is not in the list is refused forever.
func (a *Authority) makeRoom() error {
	all := a.store.Clients()
	if len(all) < a.room {
		return nil
	}
	serial, ok := forgettable(all)
	if !ok {
		return fmt.Errorf("%w: the list has %d client certificates and none of them is revoked: revoke those that are not used any more", ErrInvalid, len(all))
	}
	return a.store.DeleteClient(serial)
}

func serialText(n *big.Int) string { return fmt.Sprintf("%x", n) }

// The role is a URI among the subject's alternative names, such as isthmus:role/operator.
const (
	roleScheme = "isthmus"
	rolePrefix = "role/"
)

func roleURI(r Role) *url.URL { return &url.URL{Scheme: roleScheme, Opaque: rolePrefix + r.String()} }

func roleOf(cert *x509.Certificate) (Role, error) {
	if len(cert.URIs) != 1 || cert.URIs[0].Scheme != roleScheme || len(cert.URIs[0].Opaque) < len(rolePrefix) {
		return 0, errors.New("certificate names no role")
	}
	return ParseRole(cert.URIs[0].Opaque[len(rolePrefix):])
}

type adminRecord struct {
	Serial   string
	Exported bool
}

// exportAdmin writes the first admin's context, once in the life of the store. If power is lost in
// between, the certificate of that attempt becomes invalid and the next start makes another.
func (a *Authority) exportAdmin(o Options) error {
	var r adminRecord
	data, err := a.store.Private("admin")
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(data, &r); err != nil {
			return err
		}
		if r.Exported {
			return nil
		}
		if err := a.store.DeleteClient(r.Serial); err != nil {
			return err
		}
	}
	key, keyPEM, err := newKey()
	if err != nil {
		return err
	}
	certificate, c, err := a.issue("admin", Admin, key.Public(), adminLifetime)
	if err != nil {
		return err
	}
	if err := a.setAdmin(adminRecord{Serial: c.Serial}); err != nil {
		return err
	}
	text, err := protojson.MarshalOptions{Multiline: true}.Marshal(&isthmusv1.ClientContext{
		Address: o.Address, ServerName: ServerName, Authority: a.Certificate(), Certificate: certificate, Key: keyPEM,
	})
	if err != nil {
		return err
	}
	if err := disk.Replace(o.Bundle, append(text, '\n'), 0o600); err != nil {
		return err
	}
	if err := a.setAdmin(adminRecord{Serial: c.Serial, Exported: true}); err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.Notice, "isthmusd: the first admin's certificate and key are in %s; move the file to the admin's machine, it is not written again\n", o.Bundle)
	return err
}

// WithdrawFirst revokes the certificate of the first admin's context and removes its file. The
// context is not needed if an admin's own request was signed, and its key is on the disk.
func (a *Authority) WithdrawFirst() error {
	data, err := a.store.Private("admin")
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	var r adminRecord
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err == nil {
		err = a.Revoke(r.Serial)
	}
	if errors.Is(err, store.ErrNotFound) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("withdrawing the first admin's context: %w", err)
	}
	if err := os.Remove(a.options.Bundle); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("withdrawing the first admin's context: %w", err)
	}
	return nil
}

// Fingerprint returns the SHA-256 of the present authority's certificate, in hexadecimal; empty:
// none exists.
func (a *Authority) Fingerprint() string {
	c, err := a.authority()
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%x", sha256.Sum256(c.cert.Raw))
}

func (a *Authority) setAdmin(r adminRecord) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return a.store.SetPrivate("admin", data, a.now())
}

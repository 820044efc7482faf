package auth

import (
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
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"google.golang.org/protobuf/encoding/protojson"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/store"
)

// ServerName is a name that every node's certificate carries. A client that trusts only this node's authority needs no
// other, and can reach the node under whatever address the network gives it.
const ServerName = "isthmusd"

const (
	authorityLifetime = 20 * 365 * 24 * time.Hour
	serverLifetime    = 90 * 24 * time.Hour
	adminLifetime     = 365 * 24 * time.Hour

	// MinLifetime, MaxLifetime and DefaultLifetime bound a client certificate.
	MinLifetime     = time.Hour
	MaxLifetime     = 10 * 365 * 24 * time.Hour
	DefaultLifetime = 365 * 24 * time.Hour

	// An expired certificate stays in the list for so long.
	keepExpired = 30 * 24 * time.Hour

	// The clock of a machine that has just been started may be behind.
	backdate = 24 * time.Hour
)

// Options is what an Authority needs.
type Options struct {
	Store *store.Store
	// Hosts are the addresses and names of the server certificate, beside ServerName and the loopback.
	Hosts []string
	// Address is the host and port that the first admin's context names.
	Address string
	// Bundle is the file that takes the first admin's context, on the first start only.
	Bundle string
	// Notice takes one line for a person when Bundle was written.
	Notice io.Writer
	Audit  *Audit
	Now    func() time.Time
}

// Authority is the node's certificate authority and what hangs on it. Methods may be called from several goroutines.
type Authority struct {
	store *store.Store
	audit *Audit
	now   func() time.Time

	key  crypto.Signer
	cert *x509.Certificate
	pem  string
	pool *x509.CertPool

	mu     sync.Mutex
	hosts  []string
	server *tls.Certificate // nil: to be issued

	clients registry
}

// New opens the authority, and makes it on the first start together with the first admin. An authority that is there
// and damaged is an error: making a new one would shut out every client.
func New(o Options) (*Authority, error) {
	a := &Authority{store: o.Store, audit: o.Audit, now: o.Now, hosts: slices.Clone(o.Hosts)}
	a.clients.init()
	if err := a.load(); err != nil {
		return nil, fmt.Errorf("opening certificate authority: %w", err)
	}
	if err := a.exportAdmin(o); err != nil {
		return nil, fmt.Errorf("exporting the first admin: %w", err)
	}
	return a, nil
}

type authorityRecord struct {
	Certificate, Key string // PEM
}

func (a *Authority) load() error {
	data, err := a.store.Private("authority")
	if errors.Is(err, store.ErrNotFound) {
		return a.create()
	}
	if err != nil {
		return err
	}
	var r authorityRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return err
	}
	pair, err := tls.X509KeyPair([]byte(r.Certificate), []byte(r.Key))
	if err != nil {
		return err
	}
	a.use(pair.Leaf, pair.PrivateKey.(crypto.Signer))
	return nil
}

func (a *Authority) create() error {
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
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	data, err := json.Marshal(authorityRecord{Certificate: certificatePEM(der), Key: keyPEM})
	if err != nil {
		return err
	}
	if err := a.store.SetPrivate("authority", data, a.now()); err != nil {
		return err
	}
	a.use(cert, key)
	return nil
}

func (a *Authority) use(cert *x509.Certificate, key crypto.Signer) {
	a.cert, a.key, a.pem = cert, key, certificatePEM(cert.Raw)
	a.pool = x509.NewCertPool()
	a.pool.AddCert(cert)
}

// Certificate returns the authority's certificate in PEM.
func (a *Authority) Certificate() string { return a.pem }

func (a *Authority) template(name string, lifetime time.Duration) *x509.Certificate {
	serial := make([]byte, 16)
	rand.Read(serial)
	serial[0] = serial[0]&0x7f | 0x40 // positive, and always of the same length
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    a.now().Add(-backdate),
		NotAfter:     a.now().Add(lifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
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

// SetHosts changes the addresses and names of the server certificate. Connections from now on see a new one.
func (a *Authority) SetHosts(hosts []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !slices.Equal(hosts, a.hosts) {
		a.hosts, a.server = slices.Clone(hosts), nil
	}
}

// serverCertificate returns the present server certificate. Its key lives only in memory, and it is replaced when a
// third of its lifetime is left.
func (a *Authority) serverCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.server != nil && a.server.Leaf.NotAfter.Sub(a.now()) > serverLifetime/3 {
		return a.server, nil
	}
	key, _, err := newKey()
	if err != nil {
		return nil, err
	}
	template := a.template(ServerName, serverLifetime)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, h := range append([]string{ServerName, "localhost", "127.0.0.1", "::1"}, a.hosts...) {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else if h != "" && !strings.ContainsFunc(h, func(r rune) bool { return r > unicode.MaxASCII }) {
			// A certificate has ASCII names alone (RFC 5280 section 4.2.1.6). No certificate at all would shut everybody out.
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("issuing server certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("issuing server certificate: %w", err)
	}
	a.server = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	return a.server, nil
}

// Sign signs data with the key of the present server certificate: ECDSA with SHA-256, in ASN.1. It returns the certificate,
// in PEM, with the signature.
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

// Issue signs a client certificate for the public key of a certificate request (PKCS #10, DER) and returns it in PEM.
// The lifetime is MinLifetime to MaxLifetime, or 0 for DefaultLifetime. What is wrong with the request wraps
// ErrInvalid.
func (a *Authority) Issue(name string, role Role, csr []byte, lifetime time.Duration) (string, store.Client, error) {
	r, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return "", store.Client{}, fmt.Errorf("%w: parsing certificate request: %w", ErrInvalid, err)
	}
	if err := r.CheckSignature(); err != nil {
		return "", store.Client{}, fmt.Errorf("%w: certificate request: %w", ErrInvalid, err)
	}
	if err := checkKey(r.PublicKey); err != nil {
		return "", store.Client{}, err
	}
	return a.issue(name, role, r.PublicKey, lifetime)
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

func (a *Authority) issue(name string, role Role, public any, lifetime time.Duration) (string, store.Client, error) {
	if !clientName.MatchString(name) {
		return "", store.Client{}, fmt.Errorf("%w: name %q must be letters, digits, hyphens, dots, at signs, 1 to 63", ErrInvalid, name)
	}
	// The unix socket calls itself root, and the daemon isthmusd, in the history and in the audit log.
	if name == rootName || name == ServerName {
		return "", store.Client{}, fmt.Errorf("%w: name %q is reserved", ErrInvalid, name)
	}
	if lifetime == 0 {
		lifetime = DefaultLifetime
	}
	if lifetime < MinLifetime || lifetime > MaxLifetime {
		return "", store.Client{}, fmt.Errorf("%w: lifetime %v must be %v to %v", ErrInvalid, lifetime, MinLifetime, MaxLifetime)
	}
	template := a.template(name, lifetime)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	template.URIs = []*url.URL{roleURI(role)}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		return "", store.Client{}, fmt.Errorf("issuing client certificate: %w", err)
	}
	c := store.Client{
		Serial:  serialText(template.SerialNumber),
		Name:    name,
		Role:    role.String(),
		Issued:  a.now().UTC().Truncate(time.Second),
		Expires: template.NotAfter.UTC().Truncate(time.Second),
	}
	if err := a.store.SetClient(c); err != nil {
		return "", store.Client{}, err
	}
	return certificatePEM(der), c, a.forgetExpired()
}

// forgetExpired drops what expired long enough ago that a wrong clock is not the reason.
func (a *Authority) forgetExpired() error {
	for _, c := range a.store.Clients() {
		if a.now().Sub(c.Expires) < keepExpired {
			continue
		}
		if err := a.store.DeleteClient(c.Serial); err != nil {
			return err
		}
	}
	return nil
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

// Clients returns the issued certificates, oldest first.
func (a *Authority) Clients() []store.Client { return a.store.Clients() }

// Revoke refuses a certificate from now on and closes the connections that were opened with it. An unknown serial is an
// error that wraps store.ErrNotFound.
func (a *Authority) Revoke(serial string) error {
	c, err := a.store.Client(serial)
	if err != nil {
		return err
	}
	if !c.Revoked {
		c.Revoked = true
		if err := a.store.SetClient(c); err != nil {
			return fmt.Errorf("revoking client certificate %s: %w", serial, err)
		}
	}
	a.clients.cut(serial)
	return nil
}

type adminRecord struct {
	Serial   string
	Exported bool
}

// exportAdmin writes the first admin's context, once in the life of the store. When the power goes in between, the
// certificate of that attempt becomes invalid and the next start makes another.
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
		Address: o.Address, ServerName: ServerName, Authority: a.pem, Certificate: certificate, Key: keyPEM,
	})
	if err != nil {
		return err
	}
	if err := writeFile(o.Bundle, append(text, '\n')); err != nil {
		return err
	}
	if err := a.setAdmin(adminRecord{Serial: c.Serial, Exported: true}); err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.Notice, "isthmusd: the first admin's certificate and key are in %s; move the file to the admin's machine, it is not written again\n", o.Bundle)
	return err
}

func (a *Authority) setAdmin(r adminRecord) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return a.store.SetPrivate("admin", data, a.now())
}

// writeFile makes a file that its owner alone can read, whole or not at all.
func writeFile(name string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".admin-") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

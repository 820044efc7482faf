package auth

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"regexp"
	"time"

	"github.com/isthmus-net/isthmus/router/store"
)

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

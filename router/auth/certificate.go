package auth

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"
)

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

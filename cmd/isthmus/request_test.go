package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"
)

func aKey(t *testing.T) (*ecdsa.PrivateKey, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// answer is what a node's console shows for a key.
func answer(t *testing.T, public crypto.PublicKey, address string, usage x509.ExtKeyUsage, other bool) string {
	t.Helper()
	ca, _ := aKey(t)
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "isthmus authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "alice"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{usage}}
	text := func(c, parent *x509.Certificate, public crypto.PublicKey, by *ecdsa.PrivateKey) string {
		der, err := x509.CreateCertificate(rand.Reader, c, parent, public, by)
		if err != nil {
			t.Fatal(err)
		}
		return "  " + strings.ReplaceAll(strings.TrimSpace(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))), "\n", "\n  ") + "\n"
	}
	authority, by := text(root, root, &ca.PublicKey, ca), ca
	if other {
		by, _ = aKey(t)
	}
	return beginContext + "\n" + address + "serverName: isthmusd\nauthority: |\n" + authority + "certificate: |\n" + text(leaf, root, public, by) + endContext + "\n"
}

func TestAcceptConsole(t *testing.T) {
	key, keyPEM := aKey(t)
	stranger, strangerPEM := aKey(t)
	mine := answer(t, &key.PublicKey, "address: \"203.0.113.9:7443\"\n", x509.ExtKeyUsageClientAuth, false)
	older := answer(t, &key.PublicKey, "address: \"203.0.113.8:7443\"\n", x509.ExtKeyUsageClientAuth, false)
	theirs := answer(t, &stranger.PublicKey, "", x509.ExtKeyUsageClientAuth, false)
	crs := strings.ReplaceAll(mine, "\n", "\r\n")
	var noise strings.Builder
	for line := range strings.Lines(mine) {
		fmt.Fprintf(&noise, "[    1.5] random: crng init done\r\nreboot\r\n\x1b[0;1;31m%s\x1b[0m\r\n", strings.TrimSpace(line))
	}
	for what, c := range map[string]struct {
		text, address, says string
	}{
		"as it is":            {mine, "203.0.113.9:7443", ""},
		"with CRs":            {crs, "203.0.113.9:7443", ""},
		"as JSON":             {`{"Output": "` + strings.NewReplacer("\r", `\r`, "\n", `\n`, `"`, `\"`).Replace(crs) + `"}`, "203.0.113.9:7443", ""},
		"several":             {older + mine + theirs, "203.0.113.9:7443", ""},
		"after a cut one":     {mine[:len(mine)/2] + mine, "203.0.113.9:7443", ""},
		"before a broken one": {mine + strings.Replace(mine, "MII", "MIJ", 2), "203.0.113.9:7443", ""},
		"nothing":             {"hello", "", "this text has no answer"},
		"cut":                 {mine[:len(mine)-10], "", "this text has no answer"},
		"theirs":              {theirs, "", "for a key of \"alice\" that is not here"},
		"another authority":   {answer(t, &key.PublicKey, "", x509.ExtKeyUsageClientAuth, true), "", "against its authority"},
		"a server's":          {answer(t, &key.PublicKey, "", x509.ExtKeyUsageServerAuth, false), "", "against its authority"},
		"a letter":            {strings.Replace(mine, "certificate: |\n  -----BEGIN CERTIFICATE-----\n  MII", "certificate: |\n  -----BEGIN CERTIFICATE-----\n  MIJ", 1), "", "damaged: get it again"},
		"another address":     {strings.Replace(mine, "203.0.113.9:7443", "--socket", 1), "", ""},
	} {
		got, cert, err := acceptConsole(c.text, []string{"rubbish", keyPEM}, time.Now())
		if c.says != "" {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s: %v, want %q", what, err, c.says)
			}
			continue
		}
		if err != nil || got.Address != c.address || got.Key != keyPEM || cert.Subject.CommonName != "alice" {
			t.Errorf("%s: %v, %v", what, err, got)
			continue
		}
		if _, err := tlsConfig(got); err != nil {
			t.Errorf("%s: the context does not work: %v", what, err)
		}
	}
	// Words of a kernel between the lines of a certificate are not taken for a part of it unless
	// they look like one.
	if _, _, err := acceptConsole(strings.ReplaceAll(noise.String(), "reboot\r\n", ""), []string{keyPEM}, time.Now()); err != nil {
		t.Errorf("noise: %v", err)
	}
	if _, _, err := acceptConsole(noise.String(), []string{keyPEM}, time.Now()); err == nil || !strings.Contains(err.Error(), "get it again") {
		t.Errorf("noise like a certificate: %v", err)
	}
	if _, _, err := acceptConsole(theirs, []string{keyPEM, strangerPEM}, time.Now()); err != nil {
		t.Errorf("the second key: %v", err)
	}
}

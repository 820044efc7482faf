package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc/credentials"
)

// clockCredentials are credentials whose errors about the time name the clocks of both sides. The
// node's is known from the certificate that it shows, which begins a day before the node issued it.
type clockCredentials struct {
	credentials.TransportCredentials
	wall func() time.Time
	own  *x509.Certificate
}

func (c clockCredentials) Clone() credentials.TransportCredentials {
	c.TransportCredentials = c.TransportCredentials.Clone()
	return c
}

func (c clockCredentials) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		return conn, info, explainServer(err, c.wall())
	}
	if t, ok := info.(credentials.TLSInfo); ok && len(t.State.PeerCertificates) > 0 && c.own != nil {
		conn = &explainedConn{conn, func(err error) error { return explainClient(err, c.own, t.State.PeerCertificates[0], c.wall()) }}
	}
	return conn, info, nil
}

// explainedConn is a connection over which a refusal of the client's certificate comes: in TLS 1.3
// it is heard by reading.
type explainedConn struct {
	net.Conn
	explain func(error) error
}

func (c *explainedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		err = c.explain(err)
	}
	return n, err
}

func clockText(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// explainServer explains why the certificate of a node is not valid at a time.
func explainServer(err error, now time.Time) error {
	refused, ok := errors.AsType[*tls.CertificateVerificationError](err)
	if !ok || len(refused.UnverifiedCertificates) == 0 {
		return err
	}
	invalid, ok := errors.AsType[x509.CertificateInvalidError](err)
	if !ok || invalid.Reason != x509.Expired {
		return err
	}
	leaf := refused.UnverifiedCertificates[0]
	if invalid.Cert != nil && !invalid.Cert.Equal(leaf) {
		return fmt.Errorf("this machine's clock says %s, and the authority in the context is valid from %s to %s: set the clock if it is wrong, or let an admin issue another context (isthmus client issue)",
			clockText(now), clockText(invalid.Cert.NotBefore), clockText(invalid.Cert.NotAfter))
	}
	return fmt.Errorf("this machine's clock says %s, and the node's said %s when it issued its certificate, which ends at %s: set the one that is wrong (timedatectl set-ntp true)",
		clockText(now), clockText(leaf.NotBefore.Add(issuedBefore)), clockText(leaf.NotAfter))
}

// explainClient explains why a node does not take the own certificate.
func explainClient(err error, own, node *x509.Certificate, now time.Time) error {
	if !strings.Contains(err.Error(), "remote error: tls: expired certificate") {
		return err
	}
	if now.After(own.NotAfter) {
		return fmt.Errorf("the certificate of this client ended at %s, this machine's clock says %s, and the node's said %s when it issued its own: let an admin issue another one (isthmus client issue)",
			clockText(own.NotAfter), clockText(now), clockText(node.NotBefore.Add(issuedBefore)))
	}
	return fmt.Errorf("the node refuses the certificate of this client as expired, but it ends at %s, and this machine's clock says %s; the node's clock is later, and said %s when it issued its own certificate: "+
		"set the one that is wrong (timedatectl set-ntp true); root on the node gets in over the unix socket", clockText(own.NotAfter), clockText(now), clockText(node.NotBefore.Add(issuedBefore)))
}

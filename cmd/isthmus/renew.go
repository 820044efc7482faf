package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/disk"
)

// warnBefore is how long before its end a certificate is warned of; a third of its lifetime when
// that is less.
const warnBefore = 30 * 24 * time.Hour

// minRenewed is the shortest lifetime of a certificate that a node renews.
const minRenewed = 30 * 24 * time.Hour

// issuedBefore is how long before it was issued a certificate of a node or client begins.
const issuedBefore = 24 * time.Hour

func (a *app) clientRenew() *cobra.Command {
	var keep bool
	cmd := &cobra.Command{Use: "renew", Short: "Renew this client's certificate, and replace the context file", Args: cobra.NoArgs,
		Long: `Renew the certificate of this client, with the same name, role and lifetime. The key is made on this machine. The node renews a
certificate once, when a third of its lifetime is left, or after its authority was renewed.

The context file is replaced as a whole; until then the new key is next to it, as FILE.renewing. If the command is interrupted, run
it again: it continues with that key, and the node answers with the same certificate. The former certificate stays valid until its
end. isthmus client revoke with the serial of any of them revokes all of them.

The node does not renew a certificate with a lifetime of less than 30 days, one beyond 10 years after the first one was issued, or
one that was renewed for another key. Then an admin must issue another one (isthmus client issue).`}
	cmd.RunE = runs(func(cmd *cobra.Command, _ []string) error {
		if a.socketPath() != "" {
			return usageError{errors.New("the unix socket has no certificate to renew: name the context with --context")}
		}
		a.renewing = true
		conn, err := a.connect()
		if err != nil {
			return err
		}
		defer conn.Close()
		return a.renewContext(cmd.Context(), conn, a.contextPath(), keep)
	})
	cmd.Flags().BoolVar(&keep, "keep-key", false, "renew for the present private key")
	return cmd
}

// renewContext renews the certificate of a context file over an open connection.
func (a *app) renewContext(ctx context.Context, conn *grpc.ClientConn, path string, keep bool) error {
	// Resolve a symbolic link, so that the link stays.
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("reading context: %w", err)
	}
	lock, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("reading context: %w", err)
	}
	defer lock.Close()
	// Two processes would make two keys, but the node renews for one key only.
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("locking %s, which another process may be renewing: %w", path, err)
	}
	c, err := readContext(path)
	if err != nil {
		return fmt.Errorf("reading context %s: %w", path, err)
	}
	key := c.Key
	if !keep {
		if key, err = pendingKey(path+renewingSuffix, c.Certificate); err != nil {
			return fmt.Errorf("keeping the new key until the certificate is there: %w", err)
		}
	}
	signer, err := parseKey(key)
	if err != nil {
		return fmt.Errorf("renewing the certificate: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "renewed"}}, signer)
	if err != nil {
		return fmt.Errorf("renewing the certificate: %w", err)
	}
	r, err := isthmusv1.NewAccessServiceClient(conn).RenewClient(ctx, &isthmusv1.RenewClientRequest{Csr: csr})
	if err != nil {
		return fmt.Errorf("renewing the certificate of %s: %w", path, err)
	}
	c.Authority, c.Certificate, c.Key = r.Authority, r.Certificate, key
	if _, err := tlsConfig(c); err != nil {
		return fmt.Errorf("renewing the certificate of %s: the node's answer cannot be used: %w", path, err)
	}
	data, err := encodeYAML(c)
	if err != nil {
		return fmt.Errorf("writing context: %w", err)
	}
	if err := disk.Replace(path, data, 0o600); err != nil {
		return fmt.Errorf("writing context; run isthmus client renew again: %w", err)
	}
	if err := os.Remove(path + renewingSuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the file of the new key, which is in the context now: %w", err)
	}
	a.note("renewed %s for %s, role %s, serial %s, expires %s",
		path, r.Client.GetName(), r.Client.GetRole(), r.Client.GetSerial(), r.Client.GetExpires().AsTime().Format(time.RFC3339))
	return nil
}

const renewingSuffix = ".renewing"

// pendingKey returns the private key for the renewal of a certificate. The key is on disk before
// the request is sent, because the node renews a certificate for one key only. A file for another
// certificate is left from a completed renewal and is replaced.
func pendingKey(file, certificate string) (string, error) {
	if p, err := readContext(file); err == nil && p.Certificate == certificate {
		if _, err := parseKey(p.Key); err == nil {
			return p.Key, nil
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", err
	}
	text := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	data, err := encodeYAML(&isthmusv1.ClientContext{Certificate: certificate, Key: text})
	if err != nil {
		return "", err
	}
	if err := disk.Replace(file, data, 0o600); err != nil {
		return "", err
	}
	return text, nil
}

func parseKey(text string) (crypto.Signer, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("key is not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("parsing key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("key of type %T cannot sign", key)
	}
	return signer, nil
}

// warnOfEnd says on standard error that the certificate of a context ends soon, or has ended.
func (a *app) warnOfEnd(path string, leaf *x509.Certificate) {
	now := a.wall()
	if a.renewing || a.warned {
		return
	}
	lifetime := leaf.NotAfter.Sub(leaf.NotBefore) - issuedBefore
	left := leaf.NotAfter.Sub(now)
	if left > min(warnBefore, lifetime/3) {
		return
	}
	a.warned = true
	command := "run: isthmus client renew"
	switch {
	case a.contextFile != "":
		command += " --context " + path
	case a.nodeName != "":
		command += " --node " + a.nodeName
	}
	if lifetime < minRenewed {
		command = "let an admin issue another one (isthmus client issue)"
	}
	ends := leaf.NotAfter.UTC().Format(time.RFC3339)
	switch days := int(left / (24 * time.Hour)); {
	case left <= 0:
		fmt.Fprintf(a.stderr, "isthmus: warning: the certificate in %s ended at %s: let an admin issue another one (isthmus client issue)\n", path, ends)
	case days < 2:
		fmt.Fprintf(a.stderr, "isthmus: warning: the certificate in %s ends at %s, in %v; %s\n", path, ends, left.Round(time.Minute), command)
	default:
		fmt.Fprintf(a.stderr, "isthmus: warning: the certificate in %s ends at %s, in %d days; %s\n", path, ends, days, command)
	}
}

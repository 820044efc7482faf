package main

import (
	"context"
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
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

var clientColumns = []column[*isthmusv1.Client]{
	{header: "CLIENT", value: func(_ *app, c *isthmusv1.Client) string { return c.Name }},
	{header: "ROLE", value: func(_ *app, c *isthmusv1.Client) string { return c.Role }},
	{header: "STATE", style: state, value: func(a *app, c *isthmusv1.Client) string {
		switch {
		case c.Revoked:
			return "revoked"
		case c.Expires.AsTime().Before(a.now()):
			return "expired"
		}
		return "valid"
	}},
	{header: "EXPIRES", style: age, value: func(a *app, c *isthmusv1.Client) string { return a.until(c.Expires) }},
	{header: "SERIAL", value: func(_ *app, c *isthmusv1.Client) string { return c.Serial }},
	{header: "RENEWED-FROM", value: func(_ *app, c *isthmusv1.Client) string { return c.RenewedFrom }},
	{header: "ISSUED", style: age, wide: true, value: func(a *app, c *isthmusv1.Client) string { return a.since(c.Issued) }},
}

func (a *app) addClients(root, get, describe, _ *cobra.Command) {
	clients := nounCommands[*isthmusv1.Client]{
		singular: "client", plural: "clients", columns: clientColumns,
		what:     "NAME|SERIAL",
		samples:  [2]string{"alice", "bob"},
		list:     "List the client certificates that the node has issued",
		describe: "Show everything about client certificates",
		names:    func(c *isthmusv1.Client) []string { return []string{c.Name, c.Serial} },
	}
	clients.add(a, get, describe, nil)
	group := a.group("client", "Grant and revoke access to the node")
	group.AddCommand(a.clientIssue(), a.clientRequest(), a.clientAccept(), clients.get(a, "list"), &cobra.Command{
		Use: "revoke SERIAL", Short: "Revoke a certificate, and close its open connections", Args: cobra.ExactArgs(1), ValidArgsFunction: names(a, true, named((*isthmusv1.Client).GetSerial)),
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
			_, err := isthmusv1.NewAccessServiceClient(conn).RevokeClient(ctx, &isthmusv1.RevokeClientRequest{Serial: args[0]})
			return err
		})})
	root.AddCommand(group)
	group.AddCommand(a.clientRenew())
	authority := a.group("authority", "Renew the node's certificate authority")
	authority.AddCommand(a.authorityRenew())
	root.AddCommand(authority)
}

func (a *app) authorityRenew() *cobra.Command {
	var atOnce bool
	cmd := &cobra.Command{Use: "renew", Short: "Make a new certificate authority", Args: cobra.NoArgs,
		Long: `Make a new certificate authority. Use it when the present one is about to expire, was made with a wrong clock, or may have been
disclosed.

For 30 days the node still accepts clients of the former authority, and presents them a certificate that they trust. In that time run
isthmus client renew on each client, or issue new contexts (isthmus client issue), which trust both authorities. Afterwards only
renewed and new contexts work.

With --at-once the former authority ends now. The node refuses every client, including the caller; root on the node issues new
contexts over the unix socket.`}
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		r, err := isthmusv1.NewAccessServiceClient(conn).RenewAuthority(ctx, &isthmusv1.RenewAuthorityRequest{AtOnce: atOnce})
		if err != nil {
			return err
		}
		if r.FormerUntil == nil {
			a.note("renewed; the former authority has ended: as root on the node, issue new contexts to all clients")
			return nil
		}
		a.note("renewed; the former authority ends at %s: until then run isthmus client renew on each client, or issue new contexts", r.FormerUntil.AsTime().Format(time.RFC3339))
		return nil
	})
	cmd.Flags().BoolVar(&atOnce, "at-once", false, "stop trusting the former authority now")
	return cmd
}

func (a *app) clientIssue() *cobra.Command {
	var role, out, endpoint string
	var lifetime time.Duration
	cmd := &cobra.Command{Use: "issue NAME --role ROLE -o FILE", Short: "Make a key on this machine, have the node sign its certificate, and write a context file", Args: cobra.ExactArgs(1)}
	cmd.RunE = a.call(func(ctx context.Context, conn *grpc.ClientConn, args []string) error {
		c := &isthmusv1.ClientContext{Address: endpoint, ServerName: defaultServerName}
		if endpoint == "" {
			if a.socketPath() != "" {
				return usageError{errors.New("--endpoint is missing: over the unix socket, give the host and port at which the client reaches the node")}
			}
			own, err := a.loadContext(a.contextPath())
			if err != nil {
				return err
			}
			c.Address, c.ServerName = own.Address, own.ServerName
		} else if err := hostPort("--endpoint", endpoint); err != nil {
			return err
		}
		if _, err := os.Lstat(out); out != "-" && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s exists already: choose another file with --out", out)
		}
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: args[0]}}, key)
		if err != nil {
			return err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		request := &isthmusv1.IssueClientRequest{Name: args[0], Role: role, Csr: csr}
		if lifetime != 0 {
			request.Lifetime = durationpb.New(lifetime)
		}
		r, err := isthmusv1.NewAccessServiceClient(conn).IssueClient(ctx, request)
		if err != nil {
			return fmt.Errorf("issuing a certificate for %s: %w", args[0], err)
		}
		c.Authority, c.Certificate = r.Authority, r.Certificate
		c.Key = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		write := writeContext
		if out == "-" {
			write = a.printContext
		}
		if err := write(out, c); err != nil {
			return fmt.Errorf("writing context; revoke the certificate with isthmus client revoke %s: %w", r.Client.GetSerial(), err)
		}
		a.note("wrote %s for %s, role %s, serial %s, expires %s",
			out, args[0], role, r.Client.GetSerial(), r.Client.GetExpires().AsTime().Format(time.RFC3339))
		return nil
	})
	f := cmd.Flags()
	f.StringVar(&role, "role", "", "reader, operator or admin")
	f.StringVarP(&out, "out", "o", "", "the context file to write, which must not exist; - for standard output")
	f.StringVar(&endpoint, "endpoint", "", "host and port at which the client reaches the node (default: those of the own context)")
	f.DurationVar(&lifetime, "lifetime", 0, "lifetime of the certificate, 1h to 87600h (default 8760h)")
	cmd.MarkFlagRequired("role")
	cmd.MarkFlagRequired("out")
	completeFlag(cmd, "role", oneOf("reader", "operator", "admin"))
	cmd.MarkFlagFilename("out", documents...)
	return cmd
}

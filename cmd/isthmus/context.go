package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/encoding/protojson"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

const (
	defaultSocket     = "/run/isthmus/api.sock"
	defaultServerName = "isthmusd"
	maxAnswer         = 64 << 20
)

// contextPath returns the context file to use.
func (a *app) contextPath() string {
	switch env := a.getenv("ISTHMUS_CONTEXT"); {
	case a.contextFile != "":
		return a.contextFile
	case a.nodeName != "":
		return a.namedContext(a.nodeName)
	case env != "":
		return env
	}
	return a.namedContext(a.currentContext())
}

// socketPath returns the unix socket to use, or "" to use the context.
func (a *app) socketPath() string {
	switch {
	case a.socket != "":
		return a.socket
	case a.contextFile != "" || a.address != "" || a.nodeName != "":
		return ""
	case a.getenv("ISTHMUS_SOCKET") != "":
		return a.getenv("ISTHMUS_SOCKET")
	case a.getenv("ISTHMUS_CONTEXT") != "" || a.uid != 0:
		return ""
	}
	if info, err := os.Stat(defaultSocket); err == nil && info.Mode().Type() == os.ModeSocket {
		return defaultSocket
	}
	return ""
}

// readContext reads a context file as it is.
func readContext(path string) (*isthmusv1.ClientContext, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var tree any
	if err := yaml.Unmarshal(data, &tree); err != nil {
		return nil, err
	}
	if data, err = json.Marshal(tree); err != nil {
		return nil, err
	}
	c := &isthmusv1.ClientContext{}
	if err := protojson.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("not a valid context: %w", err)
	}
	return c, nil
}

// loadContext reads a context file and applies its defaults and the flags.
func (a *app) loadContext(path string) (*isthmusv1.ClientContext, error) {
	if a.nodeName != "" && a.contextFile == "" {
		if err := a.knownContext(a.nodeName); err != nil {
			return nil, err
		}
	}
	c, err := readContext(path)
	named := a.contextFile != "" || a.getenv("ISTHMUS_CONTEXT") != ""
	var file *fs.PathError // has the path
	switch {
	case errors.Is(err, fs.ErrNotExist) && !named && a.uid == 0 && a.address == "":
		return nil, fmt.Errorf("isthmusd does not run here (%s is missing), and the context %s of another node is missing too: see isthmus context import", defaultSocket, path)
	case errors.Is(err, fs.ErrNotExist) && !named:
		return nil, fmt.Errorf("the context %s is missing: see isthmus context import", path)
	case errors.As(err, &file):
		return nil, fmt.Errorf("reading context: %w", err)
	case err != nil:
		return nil, fmt.Errorf("reading context %s: %w", path, err)
	}
	if info, err := os.Stat(path); err == nil && info.Mode().Perm()&0o077 != 0 {
		fmt.Fprintf(a.stderr, "isthmus: warning: %s holds a private key and can be read by others; run: chmod 600 %s\n", path, path)
	}
	if c.ServerName == "" {
		c.ServerName = defaultServerName
	}
	if a.address != "" {
		if err := hostPort("--address", a.address); err != nil {
			return nil, err
		}
		c.Address = a.address
	}
	if c.Address == "" {
		return nil, fmt.Errorf("reading context %s: it has no address: give one with --address", path)
	}
	return c, nil
}

func tlsConfig(c *isthmusv1.ClientContext) (*tls.Config, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(c.Authority)) {
		return nil, errors.New("authority is not a certificate in PEM")
	}
	pair, err := tls.X509KeyPair([]byte(c.Certificate), []byte(c.Key))
	if err != nil {
		return nil, err
	}
	return &tls.Config{RootCAs: pool, ServerName: c.ServerName, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13}, nil
}

// hostPort checks the value of a flag that is a host and a port.
func hostPort(flag, value string) error {
	if host, port, err := net.SplitHostPort(value); err != nil || host == "" || port == "" {
		return usageError{fmt.Errorf("%s %q: must be a host and a port, as 203.0.113.9:7443", flag, value)}
	}
	return nil
}

// connect opens the connection to the node. The timeout bounds each call over it.
func (a *app) connect() (*grpc.ClientConn, error) {
	if a.nodeName != "" && (a.contextFile != "" || a.socket != "") {
		return nil, usageError{errors.New("--node cannot be used together with --context or --socket: give one of them")}
	}
	if a.node = a.socketPath(); a.node != "" {
		return a.client("unix:"+a.node, insecure.NewCredentials())
	}
	path := a.contextPath()
	c, err := a.loadContext(path)
	if err != nil {
		return nil, err
	}
	conn, err := a.dial(c)
	if err != nil {
		return nil, fmt.Errorf("using context %s: %w", path, err)
	}
	if cert, _, err := certificateOf(c); err == nil {
		a.warnOfEnd(path, cert)
	}
	return conn, nil
}

// dial opens the connection of a context.
func (a *app) dial(c *isthmusv1.ClientContext) (*grpc.ClientConn, error) {
	config, err := tlsConfig(c)
	if err != nil {
		return nil, err
	}
	config.Time = a.wall
	a.node = c.Address
	return a.client("dns:///"+c.Address, clockCredentials{credentials.NewTLS(config), a.wall, config.Certificates[0].Leaf})
}

func (a *app) client(target string, creds credentials.TransportCredentials) (*grpc.ClientConn, error) {
	if a.timeout <= 0 {
		return nil, usageError{fmt.Errorf("--timeout %v: must be more than 0s", a.timeout)}
	}
	within := func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		ctx, cancel := context.WithTimeout(ctx, a.timeout)
		defer cancel()
		return invoke(ctx, method, request, reply, conn, opts...)
	}
	return grpc.NewClient(target, grpc.WithTransportCredentials(creds), grpc.WithUnaryInterceptor(within),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithUserAgent("isthmus-cli/"+version()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}))
}

// call wraps f for cobra and gives it a connection to the node.
func (a *app) call(f func(ctx context.Context, conn *grpc.ClientConn, args []string) error) func(*cobra.Command, []string) error {
	return runs(func(cmd *cobra.Command, args []string) error {
		conn, err := a.connect()
		if err != nil {
			return err
		}
		defer conn.Close()
		return f(cmd.Context(), conn, args)
	})
}

// printContext writes a context to standard output.
func (a *app) printContext(_ string, c *isthmusv1.ClientContext) error {
	data, err := encodeYAML(c)
	if err != nil {
		return err
	}
	_, err = a.stdout.Write(data)
	return err
}

// writeContext writes a new context file that only its owner can read.
func writeContext(path string, c *isthmusv1.ClientContext) error {
	data, err := encodeYAML(c)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

package auth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

const (
	rootName = "root"
	selfName = "isthmusd itself" // no serial number is like this

	http1, http2 = "http/1.1", "h2" // in ALPN (RFC 7301)
)

// speaking is the connection of a handshake. Its client must send soon.
type speaking struct {
	net.Conn
	spoke bool // the first byte came
}

func (c *speaking) Read(p []byte) (int, error) {
	if c.spoke {
		return c.Conn.Read(p)
	}
	if err := c.Conn.SetReadDeadline(time.Now().Add(firstByte)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(p)
	if err == nil {
		c.spoke = true
		err = c.Conn.SetReadDeadline(time.Now().Add(handshakeTime))
	}
	return n, err
}

// conn is an authenticated connection. It closes when its certificate is revoked or expires.
type conn struct {
	net.Conn
	serial  string
	clients *registry
	expiry  *time.Timer
	once    sync.Once
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.clients.remove(c)
		if c.expiry != nil {
			c.expiry.Stop()
		}
	})
	return c.Conn.Close()
}

// Credentials returns the transport credentials of the server. A connection over a unix socket must
// come from user 0 of the node, or from this very process, which is a reader; any other must use
// TLS 1.3 and present a certificate that was issued here and is not revoked. gRPC's
// ConnectionTimeout bounds the handshake. Clients that offer HTTP/1.1 get it, and go to web; with
// nil they are refused unless they offer HTTP/2 as well. A client of gRPC offers HTTP/2 alone.
func (a *Authority) Credentials(web *Web) credentials.TransportCredentials { return transport{a, web} }

type transport struct {
	a   *Authority
	web *Web
}

func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	var c net.Conn
	var id Identity
	var err error
	host := hostOf(raw.RemoteAddr())
	if u, ok := raw.(*net.UnixConn); ok {
		c, id, err = t.a.acceptUnix(u)
	} else {
		c, id, err = t.a.acceptTLS(raw, t.web)
	}
	if err != nil {
		raw.Close()
		// All hosts share one allowance, because their number is unbounded.
		err = errors.Join(err, t.a.audit.refuse("", Entry{Who: id.Name, Serial: id.Serial, Address: host, Error: shorten(err.Error())}))
		return nil, nil, err
	}
	if w, ok := c.(*webConn); ok {
		t.web.pass(w)
		return nil, nil, credentials.ErrConnDispatched
	}
	return c, id, nil
}

func hostOf(addr net.Addr) string {
	if addr.Network() == "unix" {
		return "unix"
	}
	if host, _, err := net.SplitHostPort(addr.String()); err == nil {
		return host
	}
	return addr.String()
}

func (a *Authority) acceptUnix(u *net.UnixConn) (net.Conn, Identity, error) {
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, Identity{}, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(cerr, err); err != nil {
		return nil, Identity{}, fmt.Errorf("reading the user of the other end: %w", err)
	}
	id := Identity{Name: fmt.Sprintf("uid %d", cred.Uid)}
	// the watchdog of a daemon that does not run as root checks the API; it takes no place of
	// root's
	if cred.Uid != 0 && int(cred.Pid) == os.Getpid() {
		id.Name, id.Role, id.SecurityLevel = selfName, Reader, credentials.PrivacyAndIntegrity
		c := &conn{Conn: u, serial: selfName, clients: &a.clients}
		return c, id, a.clients.add(c, 0)
	}
	if cred.Uid != 0 {
		return nil, id, errors.New("only root may use the unix socket")
	}
	id.Name, id.Role, id.SecurityLevel = a.logins.root(cred.Pid), Admin, credentials.PrivacyAndIntegrity
	c := &conn{Conn: u, clients: &a.clients}
	return c, id, a.clients.add(c, 0)
}

func (a *Authority) acceptTLS(raw net.Conn, web *Web) (net.Conn, Identity, error) {
	if _, err := a.authority(); err != nil {
		return nil, Identity{}, err
	}
	good := false
	h := a.clients.beginHandshake(hostPrefix(raw.RemoteAddr()), func() { raw.Close() })
	defer func() { a.clients.endHandshake(h, good) }()
	config := a.tlsConfig()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		a.clients.spoke(h)
		return nil, nil
	}
	if web != nil {
		config.NextProtos = []string{http1, http2} // the first one that the client offers counts
	}
	speaks := &speaking{Conn: raw}
	t := tls.Server(speaks, config)
	err := t.Handshake()
	var id Identity
	state := t.ConnectionState()
	if len(state.PeerCertificates) > 0 {
		leaf := state.PeerCertificates[0]
		id = Identity{Name: shorten(leaf.Subject.CommonName), Serial: serialText(leaf.SerialNumber), Expires: leaf.NotAfter, cert: leaf}
	}
	if err != nil {
		linger(raw)
		return nil, id, fmt.Errorf("TLS handshake: %w", err)
	}
	if id.Role, err = roleOf(state.PeerCertificates[0]); err != nil {
		return nil, id, err
	}
	switch state.NegotiatedProtocol {
	case http2:
	case http1:
		if speaks.Conn, err = detach(raw); err != nil {
			return nil, id, err
		}
	default:
		return nil, id, errors.New("client does not speak HTTP/2 over TLS (ALPN)")
	}
	id.SecurityLevel = credentials.PrivacyAndIntegrity
	c := &conn{Conn: t, serial: id.Serial, clients: &a.clients}
	if err := a.clients.add(c, id.Expires.Sub(a.clock().at)); err != nil {
		return nil, id, errors.Join(err, c.Close())
	}
	// Revoke may have run between the handshake and the line above.
	if err := a.valid(id.Serial); err != nil {
		return nil, id, errors.Join(err, c.Close())
	}
	good = true
	if state.NegotiatedProtocol == http1 {
		return &webConn{c, id}, id, nil
	}
	return c, id, nil
}

// linger gives a refused client time to read the alert with the reason. In TLS 1.3 the client sends
// its first request before it receives the alert, and closing a TCP connection with unread data
// resets it, which may discard the alert at the other end.
func linger(c net.Conn) {
	t, ok := c.(*net.TCPConn)
	if !ok || t.CloseWrite() != nil || t.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
		return
	}
	_, _ = io.CopyN(io.Discard, t, lingerBytes) // until the client closes
}

func (a *Authority) tlsConfig() *tls.Config {
	config := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{http2},
		GetCertificate:         a.serverCertificate,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              a.roots(),
		Time:                   a.now,
		SessionTicketsDisabled: true, // every connection shows its certificate
		VerifyConnection: func(s tls.ConnectionState) error {
			return a.verify(s.PeerCertificates[0])
		},
	}
	if r := a.clock(); r.wrong != notWrong {
		config.ClientAuth = tls.RequireAnyClientCert // the library's check uses only the clock
		config.VerifyConnection = func(s tls.ConnectionState) error {
			if err := a.verifyAnyway(s.PeerCertificates[0], r); err != nil {
				return err
			}
			return a.verify(s.PeerCertificates[0])
		}
	}
	return config
}

func (a *Authority) verify(cert *x509.Certificate) error {
	if _, err := roleOf(cert); err != nil {
		return err
	}
	return a.valid(serialText(cert.SerialNumber))
}

// valid returns an error unless a certificate was issued here and neither it nor one that it was
// renewed from is revoked. A certificate that is not in the store is not valid.
func (a *Authority) valid(serial string) error {
	c, err := a.store.Client(serial)
	if err != nil {
		return err
	}
	if a.revokedChain(c) {
		return fmt.Errorf("client certificate %s is revoked", serial)
	}
	return nil
}

func (t transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("auth: these are the credentials of a server")
}

func (t transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls", SecurityVersion: "1.3"}
}

func (t transport) Clone() credentials.TransportCredentials { return t }
func (t transport) OverrideServerName(string) error         { return nil }

// shorten bounds the text that an unauthenticated caller can put into a log line.
func shorten(s string) string {
	if len(s) > 256 {
		return s[:256]
	}
	return s
}

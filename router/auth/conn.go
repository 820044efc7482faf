package auth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
)

// Limits of one server. An unfinished handshake costs memory and, for each signature, about 0.1 ms.
// One whose client has not sent its first message costs only some KiB, and there are many places
// for these: a client that sends at once is not cut by those after it.
const (
	maxSilent            = 1024 // at once, of unknown hosts, and as many of known ones
	maxHandshakes        = 256  // whose clients have sent a message, likewise
	maxHandshakesPerHost = 8
	maxKnownHosts        = 256
	firstByte            = 2 * time.Second // a client sends first, and at once
	// from the first byte on; gRPC's ConnectionTimeout bounds all of it
	handshakeTime       = 10 * time.Second
	maxConnsPerClient   = 64
	maxStreamsPerClient = 256 // watches and other streams that are open at once
	lingerTime          = 500 * time.Millisecond
	lingerBytes         = 64 << 10
	callsPerSecond      = 100
	callsBurst          = 200
)

const (
	rootName = "root"
	selfName = "isthmusd itself" // no serial number is like this
)

// registry has the open connections and the usage of each client. Clients have a certificate of
// ours, so their number is bounded by the issued certificates.
type registry struct {
	mu         sync.Mutex
	conns      map[string]map[*conn]struct{} // by serial
	usage      map[string]*usage             // by serial
	handshakes []*handshake                  // under way, the oldest first
	// hosts with a recent good handshake, the latest last
	known []netip.Prefix
}

// handshake is an unfinished handshake.
type handshake struct {
	host  netip.Prefix
	known bool // its host had a good one recently
	spoke bool // the client has sent its first message (ClientHello)
	cut   func()
}

type usage struct {
	calls   *rate.Limiter
	streams int
}

func (r *registry) init() {
	r.conns = make(map[string]map[*conn]struct{})
	r.usage = make(map[string]*usage)
}

// cut closes the connections of a client.
func (r *registry) cut(serial string) {
	r.mu.Lock()
	var open []*conn
	for c := range r.conns[serial] {
		open = append(open, c)
	}
	r.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
}

// cutAll closes the connections of all clients with a certificate.
func (r *registry) cutAll() {
	r.mu.Lock()
	serials := slices.Collect(maps.Keys(r.conns))
	r.mu.Unlock()
	for _, serial := range serials {
		if serial != "" {
			r.cut(serial)
		}
	}
}

// add registers a connection, which closes after lifetime if that is not 0.
func (r *registry) add(c *conn, lifetime time.Duration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	open := r.conns[c.serial]
	if open == nil {
		open = make(map[*conn]struct{})
		r.conns[c.serial] = open
	}
	if len(open) >= maxConnsPerClient {
		return fmt.Errorf("%d connections are open already", maxConnsPerClient)
	}
	open[c] = struct{}{}
	if lifetime != 0 {
		c.expiry = time.AfterFunc(lifetime, func() { c.Close() })
	}
	return nil
}

func (r *registry) remove(c *conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns[c.serial], c)
	if len(r.conns[c.serial]) == 0 {
		delete(r.conns, c.serial)
	}
}

func (r *registry) usageLocked(serial string) *usage {
	u := r.usage[serial]
	if u == nil {
		u = &usage{calls: rate.NewLimiter(callsPerSecond, callsBurst)}
		r.usage[serial] = u
	}
	return u
}

func (r *registry) allowCall(serial string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.usageLocked(serial).calls.AllowN(now, 1)
}

// openStream returns a function that releases the stream, or false if there are too many.
func (r *registry) openStream(serial string) (func(), bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := r.usageLocked(serial)
	if u.streams >= maxStreamsPerClient {
		return nil, false
	}
	u.streams++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		u.streams--
	}, true
}

// hostPrefix returns the prefix that counts as one host: an IPv4 address, or the /64 of an IPv6
// address, since a host may use any address of its /64.
func hostPrefix(addr net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(addr.String())
	if err != nil {
		return netip.Prefix{}
	}
	a, bits := ap.Addr().Unmap().WithZone(""), 64
	if a.Is4() {
		bits = 32
	}
	p, _ := a.Prefix(bits)
	return p
}

// beginHandshake assigns a place to a handshake. If none is free, the oldest handshake is cut:
// unknown hosts can lock out neither each other nor, because known hosts have places of their own,
// a host with a recent good handshake.
func (r *registry) beginHandshake(host netip.Prefix, cut func()) *handshake {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := &handshake{host: host, known: slices.Contains(r.known, host), cut: cut}
	if !r.makeRoomLocked(maxHandshakesPerHost, func(o *handshake) bool { return o.host == host }) {
		r.makeRoomLocked(maxSilent, func(o *handshake) bool { return o.known == h.known && !o.spoke })
	}
	r.handshakes = append(r.handshakes, h)
	return h
}

// makeRoomLocked cuts the oldest of some handshakes if their maximum is reached, and reports
// whether it did.
func (r *registry) makeRoomLocked(most int, of func(*handshake) bool) bool {
	n, oldest := 0, -1
	for i, h := range r.handshakes {
		if of(h) {
			if n++; oldest < 0 {
				oldest = i
			}
		}
	}
	if n < most {
		return false
	}
	r.handshakes[oldest].cut()
	r.handshakes = slices.Delete(r.handshakes, oldest, oldest+1)
	return true
}

// spoke records that the client has sent its first message.
func (r *registry) spoke(h *handshake) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.makeRoomLocked(maxHandshakes, func(o *handshake) bool { return o.known == h.known && o.spoke })
	h.spoke = true
}

// endHandshake releases the place.
func (r *registry) endHandshake(h *handshake, good bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if i := slices.Index(r.handshakes, h); i >= 0 {
		r.handshakes = slices.Delete(r.handshakes, i, i+1)
	}
	if !good || !h.host.IsValid() {
		return
	}
	if i := slices.Index(r.known, h.host); i >= 0 {
		r.known = slices.Delete(r.known, i, i+1)
	} else if len(r.known) >= maxKnownHosts {
		r.known = slices.Delete(r.known, 0, 1)
	}
	r.known = append(r.known, h.host)
}

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
// ConnectionTimeout bounds the handshake.
func (a *Authority) Credentials() credentials.TransportCredentials { return transport{a} }

type transport struct{ a *Authority }

func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	var c net.Conn
	var id Identity
	var err error
	host := hostOf(raw.RemoteAddr())
	if u, ok := raw.(*net.UnixConn); ok {
		c, id, err = t.a.acceptUnix(u)
	} else {
		c, id, err = t.a.acceptTLS(raw)
	}
	if err != nil {
		raw.Close()
		// All hosts share one allowance, because their number is unbounded.
		err = errors.Join(err, t.a.audit.refuse("", Entry{Who: id.Name, Serial: id.Serial, Address: host, Error: shorten(err.Error())}))
		return nil, nil, err
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
	id.Name, id.Role, id.SecurityLevel = rootName, Admin, credentials.PrivacyAndIntegrity
	c := &conn{Conn: u, clients: &a.clients}
	return c, id, a.clients.add(c, 0)
}

func (a *Authority) acceptTLS(raw net.Conn) (net.Conn, Identity, error) {
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
	t := tls.Server(&speaking{Conn: raw}, config)
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
	if state.NegotiatedProtocol != "h2" {
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
		NextProtos:             []string{"h2"},
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

package health

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/egress"
)

// Prober sends probes.
type Prober struct {
	// Resolve returns the addresses of a name. Required for targets with names.
	Resolve func(ctx context.Context, name string) ([]netip.Addr, error)
	// Roots are the authorities for https. Default: those of the system.
	Roots *x509.CertPool
}

// Probe probes a target once, from an address and through an interface (any when it is empty), and
// returns nil when the target answers correctly before ctx ends. Echo requests need CAP_NET_RAW.
func (p *Prober) Probe(ctx context.Context, iface string, from netip.Addr, t egress.Target) error {
	err := p.probe(ctx, iface, from, t)
	if err != nil && (ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded)) {
		return errTimeout
	}
	return brief(err)
}

func (p *Prober) probe(ctx context.Context, iface string, from netip.Addr, t egress.Target) error {
	d := dialer{p, iface, from}
	switch t.Scheme {
	case "icmp":
		addrs, err := d.addresses(ctx, t.Host)
		if err != nil {
			return err
		}
		return each(ctx, addrs, d.echo)
	case "tcp":
		conn, err := d.dial(ctx, "tcp", net.JoinHostPort(t.Host, strconv.Itoa(int(t.Port))))
		if err != nil {
			return err
		}
		return conn.Close()
	}
	return d.get(ctx, t.String(), p.Roots)
}

// brief leaves out the target and the address, which the caller has.
func brief(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		if number, ok := errors.AsType[syscall.Errno](op); ok {
			return number
		}
	}
	return err
}

// dialer opens sockets with a source address, bound to an interface: a route that a spoke announced
// must not draw probes into its tunnel.
type dialer struct {
	p     *Prober
	iface string
	from  netip.Addr
}

func (d *dialer) control(_, _ string, c syscall.RawConn) (err error) {
	if d.iface == "" {
		return nil
	}
	outer := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), d.iface) })
	return errors.Join(outer, err)
}

// addresses returns the addresses of a host that have the family of the source; at least one.
func (d *dialer) addresses(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a}, nil
	}
	all, err := d.p.Resolve(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("resolving %s: %w", host, err)
	}
	var out []netip.Addr
	for _, a := range all {
		if a.Is4() == d.from.Is4() {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("resolving %s: it has no address of the family of %v", host, d.from)
	}
	return out, nil
}

// each tries the addresses of a host in order, each for its part of the time, until one works: a
// name keeps former addresses for a while.
func each(ctx context.Context, addrs []netip.Addr, try func(context.Context, netip.Addr) error) (err error) {
	for i, a := range addrs {
		part, cancel := ctx, context.CancelFunc(func() {})
		if deadline, ok := ctx.Deadline(); ok {
			part, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(len(addrs)-i))
		}
		err = try(part, a)
		cancel()
		if err == nil {
			return nil
		}
	}
	return err
}

// dial connects to the first address of a host that accepts.
func (d *dialer) dial(ctx context.Context, _, hostPort string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil {
		return nil, err
	}
	addrs, err := d.addresses(ctx, host)
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: d.from.AsSlice()}, Control: d.control, KeepAlive: -1}
	var conn net.Conn
	err = each(ctx, addrs, func(ctx context.Context, a netip.Addr) (err error) {
		conn, err = dialer.DialContext(ctx, "tcp", net.JoinHostPort(a.String(), port))
		return err
	})
	return conn, err
}

// get sends one HTTP request on its own connection.
func (d *dialer) get(ctx context.Context, url string, roots *x509.CertPool) error {
	transport := &http.Transport{
		DialContext: d.dial, DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
		TLSClientConfig: &tls.Config{RootCAs: roots},
	}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	q, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	q.Header.Set("User-Agent", "isthmus")
	r, err := client.Do(q)
	if err != nil {
		return errors.Unwrap(err) // *url.Error repeats the target
	}
	r.Body.Close()
	if r.StatusCode/100 != 2 {
		return fmt.Errorf("the answer is %s", r.Status)
	}
	return nil
}

// echo sends one echo request (RFC 792, RFC 4443 section 4) and waits for the reply.
func (d *dialer) echo(ctx context.Context, to netip.Addr) error {
	network, reply := "ip4:icmp", byte(0)
	message := icmp.Message{Type: ipv4.ICMPTypeEcho}
	if to.Is6() {
		network, reply, message.Type = "ip6:ipv6-icmp", 129, ipv6.ICMPTypeEchoRequest
	}
	listen := net.ListenConfig{Control: d.control}
	conn, err := listen.ListenPacket(ctx, network, d.from.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	// Identifier, sequence number and data are random, because the socket receives other replies as
	// well.
	random := make([]byte, 20)
	rand.Read(random)
	message.Body = &icmp.Echo{ID: int(binary.BigEndian.Uint16(random)), Seq: int(binary.BigEndian.Uint16(random[2:])), Data: random[4:]}
	request, err := message.Marshal(nil) // the kernel computes the checksum of ICMPv6
	if err != nil {
		return err
	}
	if _, err := conn.WriteTo(request, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		return err
	}
	for buffer := make([]byte, 1500); ; {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return err
		}
		a, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP)
		if a.Unmap() == to && n == len(request) && buffer[0] == reply && string(buffer[4:n]) == string(request[4:]) {
			return nil
		}
	}
}

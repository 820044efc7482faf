// Package door serves one page over plain HTTP at inside addresses of the node, to sources that the
// document names. The page is made once for all clients, and takes at most a tenth of a processor.
package door

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
	"github.com/isthmus-net/isthmus/router/bell"
)

// Bounds of clients.
const (
	maxConns        = 16
	maxConnsPerHost = 4 // a host is an IPv4 address, or a /64 of IPv6
	maxHeader       = 8 << 10
	headerTime      = 5 * time.Second
	writeTime       = 30 * time.Second
)

const (
	// retryPace is the interval of trying to listen again, and lookPace that of checks for a
	// replaced interface.
	retryPace = time.Second
	lookPace  = 2 * time.Second
)

// Options are the dependencies of Doors.
type Options struct {
	// Page is served at /metrics.
	Page http.Handler
	// Changed is called when what Shut returns has changed.
	Changed func()
	Log     *slog.Logger
}

// Doors are the addresses at which the page is served.
type Doors struct {
	o     Options
	pages http.Handler
	bell  bell.Bell

	mu     sync.Mutex
	wanted nat.Metrics
	shut   map[nat.Inlet]failure
	conns  map[netip.Prefix]int // by host
	total  int
}

// failure is why an address is not served.
type failure struct {
	since time.Time
	err   string
}

// New returns Doors that serve nothing until Set and Run.
func New(o Options) *Doors {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", &shared{next: o.Page, now: time.Now})
	return &Doors{o: o, pages: mux, shut: map[nat.Inlet]failure{}, conns: map[netip.Prefix]int{}}
}

// Set sets the addresses, the port and the sources. Port 0: nothing is served.
func (d *Doors) Set(m nat.Metrics) {
	d.mu.Lock()
	same := reflect.DeepEqual(m, d.wanted)
	d.wanted = m
	d.mu.Unlock()
	if !same {
		d.bell.Ring()
	}
}

// Run serves until ctx is done. Another port or other sources close all connections, so that a
// source that was removed from the document loses those that it has.
func (d *Doors) Run(ctx context.Context) error {
	type key struct {
		nat.Inlet
		port uint16
		from string
	}
	open := map[key]func(){}
	for {
		changed := d.bell.Wait()
		d.mu.Lock()
		m := d.wanted
		d.mu.Unlock()
		wanted := map[key]bool{}
		for _, one := range m.Inlets {
			wanted[key{one, m.Port, fmt.Sprint(m.From)}] = true
		}
		if ctx.Err() != nil {
			wanted = nil
		}
		for k, end := range open {
			if !wanted[k] {
				end() // before another one at the same address begins
				delete(open, k)
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		for k := range wanted {
			if open[k] != nil {
				continue
			}
			within, cancel := context.WithCancel(ctx)
			done := make(chan struct{})
			open[k] = func() { cancel(); <-done }
			go func() {
				defer close(done)
				d.keep(within, m, k.Inlet)
			}()
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
}

// keep serves at one address. A tunnel's interface may appear later, and may be created again.
func (d *Doors) keep(ctx context.Context, m nat.Metrics, a nat.Inlet) {
	defer d.note(a, nil)
	for ctx.Err() == nil {
		if err := d.serve(ctx, m, a); err != nil && ctx.Err() == nil && d.note(a, err) {
			d.o.Log.Warn("the metrics are not served; retrying every second", "address", a.Address, "interface", a.Interface, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryPace):
		}
	}
}

// note records whether an address is served, and reports whether that has changed.
func (d *Doors) note(a nat.Inlet, err error) (news bool) {
	d.mu.Lock()
	was, failed := d.shut[a]
	switch {
	case err == nil:
		delete(d.shut, a)
		news = failed
	case !failed || was.err != err.Error():
		since := time.Now()
		if failed {
			since = was.since
		}
		d.shut[a] = failure{since, err.Error()}
		news = true
	}
	d.mu.Unlock()
	if news {
		d.o.Changed()
	}
	return news
}

// Shut returns the first address, by address and interface, that is not served, with the error and
// its time, and the number of such addresses.
func (d *Doors) Shut() (first nat.Inlet, err string, since time.Time, n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for a, f := range d.shut {
		if n++; n == 1 || cmp.Or(a.Address.Compare(first.Address), strings.Compare(a.Interface, first.Interface)) < 0 {
			first, err, since = a, f.err, f.since
		}
	}
	return first, err, since, n
}

// serve serves at one address until ctx is done or the interface is replaced. The socket receives
// nothing from other interfaces, even packets to the same address, so that it stays closed to the
// underlay while there are no rules.
func (d *Doors) serve(ctx context.Context, m nat.Metrics, a nat.Inlet) error {
	bound, err := net.InterfaceByName(a.Interface)
	if err != nil {
		return err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if outer := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), a.Interface) }); outer != nil {
			return outer
		}
		return err
	}}
	l, err := config.Listen(ctx, "tcp", netip.AddrPortFrom(a.Address, m.Port).String())
	if err != nil {
		return err
	}
	d.note(a, nil)
	d.o.Log.Info("the metrics are served", "address", l.Addr(), "interface", a.Interface)
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	server := &http.Server{
		Handler: d.pages, Protocols: protocols, ReadHeaderTimeout: headerTime, ReadTimeout: headerTime, WriteTimeout: writeTime, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(d.o.Log.Handler(), slog.LevelDebug),
	}
	server.SetKeepAlivesEnabled(false)
	served := make(chan error, 1)
	go func() { served <- server.Serve(&gate{Listener: l, doors: d, from: m.From}) }()
	defer server.Close()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-served:
			return err
		case <-time.After(lookPace):
		}
		if now, err := net.InterfaceByName(a.Interface); err != nil {
			return err
		} else if now.Index != bound.Index {
			return fmt.Errorf("interface %s was created again", a.Interface)
		}
	}
}

// gate accepts connections of allowed sources, within the bounds of clients.
type gate struct {
	net.Listener
	doors *Doors
	from  []netip.Prefix
}

// Accept implements net.Listener. The rules let in only these sources; while there are no rules,
// this does.
func (g *gate) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from, err := netip.ParseAddrPort(c.RemoteAddr().String())
		who := from.Addr().Unmap()
		if err == nil && slices.ContainsFunc(g.from, func(p netip.Prefix) bool { return p.Contains(who) }) {
			if host := hostOf(who); g.doors.enter(host) {
				return &conn{Conn: c, leave: sync.OnceFunc(func() { g.doors.leave(host) })}, nil
			}
		}
		c.Close()
	}
}

type conn struct {
	net.Conn
	leave func()
}

func (c *conn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// hostOf returns the network that counts as one host: for IPv6 a /64, because one host has all its
// addresses.
func hostOf(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	host, _ := a.WithZone("").Prefix(bits)
	return host
}

func (d *Doors) enter(host netip.Prefix) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.total >= maxConns || d.conns[host] >= maxConnsPerHost {
		return false
	}
	d.total++
	d.conns[host]++
	return true
}

func (d *Doors) leave(host netip.Prefix) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.total--
	if d.conns[host]--; d.conns[host] == 0 {
		delete(d.conns, host)
	}
}

package ipsec

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-net/isthmus/router/link"
	"github.com/isthmus-net/isthmus/router/secret"
	"github.com/isthmus-net/isthmus/tunnel"
)

// Ring: fake. A server that implements the vici protocol (strongSwan,
// src/libcharon/plugins/vici/README.md) on a unix socket. It is stricter than charon: it refuses
// to initiate or unload what was not loaded, and to create a second SA.

// sect is a section of a vici message: keys in order, values string, []string or *sect.
type sect struct {
	keys   []string
	values map[string]any
}

func msg(pairs ...any) *sect {
	s := &sect{values: map[string]any{}}
	for i := 0; i < len(pairs); i += 2 {
		s.set(pairs[i].(string), pairs[i+1])
	}
	return s
}

func (s *sect) set(key string, v any) {
	if _, ok := s.values[key]; !ok {
		s.keys = append(s.keys, key)
	}
	s.values[key] = v
}

func (s *sect) str(key string) string { v, _ := s.values[key].(string); return v }

func (s *sect) encode(b *bytes.Buffer) {
	name := func(kind byte, n string) { b.WriteByte(kind); b.WriteByte(byte(len(n))); b.WriteString(n) }
	value := func(v string) { _ = binary.Write(b, binary.BigEndian, uint16(len(v))); b.WriteString(v) }
	for _, k := range s.keys {
		switch v := s.values[k].(type) {
		case string:
			name(3, k)
			value(v)
		case []string:
			name(4, k)
			for _, x := range v {
				b.WriteByte(5)
				value(x)
			}
			b.WriteByte(6)
		case *sect:
			name(1, k)
			v.encode(b)
			b.WriteByte(2)
		}
	}
}

func decodeSect(b *bytes.Reader) (*sect, error) {
	s := msg()
	name := func() string { n, _ := b.ReadByte(); v := make([]byte, n); _, _ = io.ReadFull(b, v); return string(v) }
	value := func() string {
		var n uint16
		_ = binary.Read(b, binary.BigEndian, &n)
		v := make([]byte, n)
		_, _ = io.ReadFull(b, v)
		return string(v)
	}
	for {
		kind, err := b.ReadByte()
		if err != nil || kind == 2 {
			return s, nil
		}
		switch kind {
		case 1:
			n := name()
			sub, err := decodeSect(b)
			if err != nil {
				return nil, err
			}
			s.set(n, sub)
		case 3:
			n := name()
			s.set(n, value())
		case 4:
			n := name()
			list := []string{}
			for {
				if k, err := b.ReadByte(); err != nil || k == 6 {
					break
				}
				list = append(list, value())
			}
			s.set(n, list)
		default:
			return nil, fmt.Errorf("element %d", kind)
		}
	}
}

type fakeSA struct {
	id, child int
	conn      string
	state     string
	childless bool
}

type fakeCharon struct {
	t      *testing.T
	socket string

	mu      sync.Mutex
	l       net.Listener
	clients map[net.Conn]map[string]bool // with the events that each client has registered
	conns   map[string]*sect
	keys    map[string]string
	sas     []*fakeSA
	next    int
	counts  map[string]int
	order   []string
	deaf    bool          // events are lost
	slow    time.Duration // before each answer
	crashAt string        // exit without answering this command
	dead    map[string]string
	moving  int // number of lists in which no IKE SA has its CHILD SA
	version string
}

func newFake(t *testing.T) *fakeCharon {
	f := &fakeCharon{t: t, socket: filepath.Join(t.TempDir(), "vici"), dead: map[string]string{}, version: oldest}
	f.start()
	t.Cleanup(f.crash)
	return f
}

func (f *fakeCharon) start() {
	os.Remove(f.socket)
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	f.l, f.clients, f.conns, f.keys, f.sas = l, map[net.Conn]map[string]bool{}, map[string]*sect{}, map[string]string{}, nil
	f.counts = map[string]int{}
	f.mu.Unlock()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.clients[c] = map[string]bool{}
			f.mu.Unlock()
			go f.serve(c)
		}
	}()
}

// crash closes all connections and drops all state, as SIGKILL does.
func (f *fakeCharon) crash() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.crashLocked()
}

func (f *fakeCharon) crashLocked() {
	f.l.Close()
	for c := range f.clients {
		c.Close()
	}
	f.clients = nil
}

func (f *fakeCharon) serve(c net.Conn) {
	for {
		var n uint32
		if binary.Read(c, binary.BigEndian, &n) != nil {
			return
		}
		p := make([]byte, n)
		if _, err := io.ReadFull(c, p); err != nil {
			return
		}
		name := string(p[2 : 2+p[1]])
		f.mu.Lock()
		slow := f.slow
		f.mu.Unlock()
		time.Sleep(slow)
		f.mu.Lock()
		switch p[0] {
		case 3, 4: // register, unregister an event
			if f.clients[c] != nil {
				f.clients[c][name] = p[0] == 3
			}
			f.send(c, 5, "", nil)
		case 0:
			in, err := decodeSect(bytes.NewReader(p[2+p[1]:]))
			if err != nil {
				f.t.Error(err)
			}
			f.counts[name]++
			f.order = append(f.order, name)
			if f.crashAt == name {
				f.crashAt = ""
				f.crashLocked()
				f.mu.Unlock()
				return
			}
			if out := f.command(c, name, in); out != nil {
				f.send(c, 1, "", out)
			} else {
				f.send(c, 2, "", nil)
			}
		}
		f.mu.Unlock()
	}
}

func (f *fakeCharon) send(c net.Conn, kind byte, name string, m *sect) {
	var b bytes.Buffer
	b.WriteByte(kind)
	if kind == 7 {
		b.WriteByte(byte(len(name)))
		b.WriteString(name)
	}
	if m != nil {
		m.encode(&b)
	}
	_, _ = c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(b.Len())), b.Bytes()...))
}

func (f *fakeCharon) event(name string, m *sect) {
	if f.deaf {
		return
	}
	for c, wants := range f.clients {
		if wants[name] {
			f.send(c, 7, name, m)
		}
	}
}

func refuse(why string) *sect { return msg("success", "no", "errmsg", why) }

func (f *fakeCharon) show(s *fakeSA) *sect {
	ike := msg("uniqueid", strconv.Itoa(s.id), "state", s.state, "initiator-spi", fmt.Sprintf("%016x", s.id),
		"remote-host", "203.0.113.7", "remote-port", "4500", "established", "1")
	if s.state == "ESTABLISHED" && !s.childless {
		ike.set("child-sas", msg(fmt.Sprintf("%s-%d", s.conn, s.child), msg("uniqueid", strconv.Itoa(s.child), "state", "INSTALLED",
			"spi-in", fmt.Sprintf("%08x", s.child), "spi-out", fmt.Sprintf("%08x", s.child+1000), "install-time", "1",
			"remote-ts", []string{"0.0.0.0/0"})))
	}
	return ike
}

func (f *fakeCharon) command(c net.Conn, name string, in *sect) *sect {
	ok := msg("success", "yes")
	names := func(m map[string]*sect) (out []string) {
		for n := range m {
			out = append(out, n)
		}
		return out
	}
	switch name {
	case "get-conns":
		return msg("conns", names(f.conns))
	case "get-shared":
		out := []string{}
		for k := range f.keys {
			out = append(out, k)
		}
		return msg("keys", out)
	case "load-shared":
		if in.str("type") != "IKE" || in.str("data") == "" || in.str("id") == "" {
			return refuse("bad key")
		}
		f.keys[in.str("id")] = in.str("data")
		return ok
	case "unload-shared":
		if _, there := f.keys[in.str("id")]; !there {
			return refuse("not found")
		}
		delete(f.keys, in.str("id"))
		return ok
	case "load-conn":
		if len(in.keys) != 1 {
			return refuse("not one connection")
		}
		if _, there := f.keys[in.keys[0]]; !there {
			return refuse("no key for it yet")
		}
		f.conns[in.keys[0]] = in.values[in.keys[0]].(*sect)
		return ok
	case "unload-conn":
		if f.conns[in.str("name")] == nil {
			return refuse("not found")
		}
		delete(f.conns, in.str("name"))
		return ok
	case "list-sas":
		if !f.clients[c]["list-sa"] {
			return refuse("no client has registered list-sa")
		}
		for _, s := range f.sas {
			if want := in.str("ike"); want == "" || want == s.conn {
				shown := *s
				shown.childless = s.childless || f.moving > 0
				f.send(c, 7, "list-sa", msg(s.conn, f.show(&shown)))
				if f.moving > 0 { // the SA that will take the CHILD SA
					f.send(c, 7, "list-sa", msg(s.conn, f.show(&fakeSA{id: s.id + 500, conn: s.conn, state: "CONNECTING"})))
				}
			}
		}
		f.moving = max(f.moving-1, 0)
		return msg()
	case "initiate":
		conn := in.str("ike")
		if f.conns[conn] == nil || in.str("child") != conn || in.str("timeout") != "-1" {
			return refuse("CHILD_SA config not found")
		}
		for _, s := range f.sas {
			if s.conn == conn && s.state != "DELETING" && !s.childless {
				f.t.Errorf("initiated %s next to an SA in state %s", conn, s.state)
			}
		}
		f.next++
		s := &fakeSA{id: f.next, child: f.next, conn: conn, state: "CONNECTING"}
		why := f.dead[conn]
		if why != "" {
			f.event("log", msg("group", "IKE", "ikesa-name", conn, "msg", why))
			return ok
		}
		f.sas = slices.DeleteFunc(f.sas, func(s *fakeSA) bool { return s.conn == conn && s.childless })
		f.sas = append(f.sas, s)
		time.AfterFunc(5*time.Millisecond, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			s.state = "ESTABLISHED"
			f.event("child-updown", msg("up", "yes", conn, f.show(s)))
		})
		return ok
	case "terminate":
		for i, s := range f.sas {
			switch {
			case in.str("ike-id") == strconv.Itoa(s.id):
				f.sas = slices.Delete(f.sas, i, i+1)
				f.event("ike-updown", msg(s.conn, f.show(s)))
				return ok
			case in.str("child-id") == strconv.Itoa(s.child):
				s.childless = true
				f.event("child-updown", msg(s.conn, f.show(s)))
				return ok
			}
		}
		return refuse("no matching SAs to terminate found")
	case "version":
		return msg("daemon", "charon-systemd", "version", f.version, "sysname", "Linux")
	case "stats":
		return msg("uptime", msg("since", "now"), "plugins", []string{"kernel-netlink", "vici"})
	}
	return nil
}

// lose removes the SAs of a connection as the peer would.
func (f *fakeCharon) lose(conn string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sas {
		if s.conn == conn {
			s.childless = true
			f.event("child-updown", msg(conn, f.show(s)))
		}
	}
}

func (f *fakeCharon) count(command string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts[command]
}

func (f *fakeCharon) live(conn string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.sas {
		if s.conn == conn && s.state == "ESTABLISHED" && !s.childless {
			n++
		}
	}
	return n
}

// fakeLinks keeps interfaces in memory.
type fakeLinks struct {
	mu     sync.Mutex
	links  map[string]link.Wanted
	sas    []link.SA
	writes int
}

func (f *fakeLinks) Get(name string) (link.Link, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if w, ok := f.links[name]; ok {
		return link.Link{Name: name, Kind: w.Kind, Alias: w.Alias, IfID: w.IfID, Up: true}, nil
	}
	return link.Link{}, link.ErrNotFound
}

func (f *fakeLinks) List(mark string) (out []link.Link, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, w := range f.links {
		if strings.HasPrefix(w.Alias, mark) {
			out = append(out, link.Link{Name: name, Kind: w.Kind, Alias: w.Alias})
		}
	}
	return out, nil
}

func (f *fakeLinks) Ensure(w link.Wanted) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.links[w.Name]; !ok {
		f.links[w.Name] = w
		f.writes++
	}
	return nil
}

func (f *fakeLinks) Remove(alias string, _ ...string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, w := range f.links {
		if w.Alias == alias {
			delete(f.links, name)
			f.writes++
		}
	}
	return nil
}

func (f *fakeLinks) Watch(ctx context.Context, notify func(link.Change)) error {
	notify(link.Change{})
	<-ctx.Done()
	return nil
}

func (f *fakeLinks) SAs() ([]link.SA, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sas, nil
}

func (f *fakeLinks) DeleteSA(sa link.SA) error { return fmt.Errorf("deleting %+v", sa) }

func (f *fakeLinks) Inbound(netip.Addr, uint32) (link.Inbound, error) {
	return link.Inbound{}, link.ErrNoSA
}

// fakeBench is a driver that uses a fake charon.
type fakeBench struct {
	*fakeCharon
	d     *Driver
	links *fakeLinks
	stop  func() error // stops Run
}

func runFake(t *testing.T, f *fakeCharon, dir string, links *fakeLinks) *fakeBench {
	b := &fakeBench{fakeCharon: f, links: links}
	b.d = New(Options{
		Socket: f.socket, Links: links, RuntimeDir: dir,
		Secrets: func(r secret.Ref) ([]byte, error) { return []byte("the secret of " + r.Name), nil },
	})
	b.d.fullRead = time.Second
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.d.Run(ctx, func(tunnel.State) {}) }()
	b.stop = sync.OnceValue(func() error {
		cancel()
		defer b.d.Close()
		return <-done
	})
	t.Cleanup(func() {
		if err := b.stop(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func numbered(n int) tunnel.Config {
	c := example()
	c.Name, c.ID, c.Interface = fmt.Sprintf("t%d", n), uint32(n+1), fmt.Sprintf("ist%d", n)
	i := *c.IPsec
	i.RemoteIdentity = fmt.Sprintf("peer-%d", n)
	c.IPsec = &i
	return c
}

func (b *fakeBench) await(t *testing.T, c tunnel.Config, s tunnel.Status) tunnel.State {
	t.Helper()
	var last tunnel.State
	until(t, 20*time.Second, fmt.Sprintf("%s is %s", c.Name, s), func() bool {
		all, _ := b.d.Observe(t.Context()) // fails until Run has begun
		for _, o := range all {
			if o.Name == c.Name {
				last = o
			}
		}
		return last.Status == s
	})
	return last
}

func TestFakeLoadsOnceAndOneAtATime(t *testing.T) {
	f, dir, links := newFake(t), t.TempDir(), &fakeLinks{links: map[string]link.Wanted{}}
	b := runFake(t, f, dir, links)
	const n = 100
	for i := range n {
		if err := b.d.Apply(t.Context(), numbered(i)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n {
		b.await(t, numbered(i), tunnel.Up)
	}
	for range 2 {
		for i := range n {
			if err := b.d.Apply(t.Context(), numbered(i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if l, k, i := f.count("load-conn"), f.count("load-shared"), f.count("initiate"); l != n || k != n || i != n {
		t.Errorf("%d load-conn, %d load-shared, %d initiate for %d tunnels", l, k, i, n)
	}
	if b.d.Writes() != 3*n || links.writes != n {
		t.Errorf("%d writes counted, %d link writes", b.d.Writes(), links.writes)
	}
	c := numbered(7)
	c.IPsec.ESPProposals = []string{"aes128gcm16"}
	if err := b.d.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if l, k := f.count("load-conn"), f.count("load-shared"); l != n+1 || k != n {
		t.Errorf("an edit of one tunnel: %d load-conn, %d load-shared more", l-n, k-n)
	}
	// The next isthmusd takes over everything without changes.
	next := runFake(t, f, dir, links)
	for i := range n {
		want := numbered(i)
		if i == 7 {
			want = c
		}
		if err := next.d.Apply(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		next.await(t, want, tunnel.Up)
	}
	if next.d.Writes() != 0 {
		t.Errorf("%d writes to adopt: %v", next.d.Writes(), f.order[len(f.order)-5:])
	}
}

func TestFakeHeals(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	b := runFake(t, f, t.TempDir(), &fakeLinks{links: map[string]link.Wanted{}})
	c := numbered(1)
	if err := b.d.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	b.await(t, c, tunnel.Up)
	conn := connection(c.Name)
	t.Run("crash", func(t *testing.T) {
		f.crash()
		b.await(t, c, tunnel.Unknown) // not Down
		f.start()
		b.await(t, c, tunnel.Up)
		until(t, 10*time.Second, "a new SA", func() bool { return f.live(conn) == 1 })
		if l := f.count("load-conn"); l != 1 || f.live(conn) != 1 {
			t.Errorf("%d load-conn, %d SAs", l, f.live(conn))
		}
	})
	t.Run("a CHILD SA moves while SAs are listed", func(t *testing.T) {
		before := b.await(t, c, tunnel.Up)
		f.mu.Lock()
		f.moving = rereads
		f.mu.Unlock()
		b.d.nudge(conn)
		until(t, 10*time.Second, "the list is read", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.moving == 0 })
		if s := b.await(t, c, tunnel.Up); s.TimesUp != before.TimesUp || f.live(conn) != 1 {
			t.Errorf("up %d times, before %d; %d SAs", s.TimesUp, before.TimesUp, f.live(conn))
		}
	})
	t.Run("crash in the middle of a load", func(t *testing.T) {
		f.mu.Lock()
		f.crashAt = "load-conn"
		f.mu.Unlock()
		c.IPsec.ChildRekey += time.Minute
		if err := b.d.Apply(t.Context(), c); err == nil {
			t.Error("no error")
		}
		f.start()
		until(t, 10*time.Second, "loaded as applied last", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			conn := f.conns[conn]
			return conn != nil && conn.values["children"].(*sect).values[connection(c.Name)].(*sect).str("rekey_time") == "3060s"
		})
		until(t, 10*time.Second, "up", func() bool { return f.live(conn) == 1 })
		b.await(t, c, tunnel.Up)
	})
	t.Run("events are lost", func(t *testing.T) {
		f.mu.Lock()
		f.deaf = true
		f.mu.Unlock()
		f.lose(conn)
		until(t, 10*time.Second, "up again", func() bool { return f.live(conn) == 1 })
		f.mu.Lock()
		f.deaf = false
		f.mu.Unlock()
	})
	t.Run("unloaded by hand", func(t *testing.T) {
		f.mu.Lock()
		delete(f.conns, conn)
		delete(f.keys, conn)
		f.mu.Unlock()
		until(t, 10*time.Second, "loaded again", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.conns[conn] != nil && f.keys[conn] != ""
		})
	})
	t.Run("reason and next try", func(t *testing.T) {
		f.mu.Lock()
		f.dead[conn] = "received AUTHENTICATION_FAILED notify error"
		f.sas = nil
		f.event("ike-updown", msg(conn, msg("state", "DELETING")))
		f.mu.Unlock()
		until(t, 10*time.Second, "down with a reason", func() bool {
			s := b.await(t, c, tunnel.Down)
			return strings.Contains(s.LastError, "AUTHENTICATION_FAILED") && !s.NextTry.IsZero()
		})
		f.mu.Lock()
		delete(f.dead, conn)
		f.mu.Unlock()
		b.await(t, c, tunnel.Up)
	})
	t.Run("reset", func(t *testing.T) {
		before, ended := b.await(t, c, tunnel.Up), f.count("terminate")
		for range 3 { // a loss soon after the last one is not a failed attempt either
			if err := b.d.Reset(t.Context(), c.Name); err != nil {
				t.Fatal(err)
			}
			before.TimesUp++
			until(t, 5*time.Second, "up again", func() bool {
				s := b.await(t, c, tunnel.Up)
				return s.TimesUp == before.TimesUp && f.live(conn) == 1
			})
		}
		if n := f.count("terminate") - ended; n != 3 {
			t.Errorf("%d SAs were ended", n)
		}
		if err := b.d.Reset(t.Context(), "x"); !errors.Is(err, tunnel.ErrNotFound) {
			t.Errorf("an unknown tunnel: %v", err)
		}
	})
	t.Run("remove", func(t *testing.T) {
		if err := errors.Join(b.d.Remove(t.Context(), c.Name), b.d.Remove(t.Context(), c.Name)); err != nil {
			t.Fatal(err)
		}
		if all, err := b.d.Observe(t.Context()); err != nil || len(all) != 0 {
			t.Errorf("%+v, %v", all, err)
		}
		if f.live(conn) != 0 || len(f.conns) != 0 || len(f.keys) != 0 {
			t.Errorf("left in charon: %d SAs, %v, %d keys", f.live(conn), f.conns, len(f.keys))
		}
	})
}

func TestFakeRefusesTwoKeysForOnePair(t *testing.T) {
	b := runFake(t, newFake(t), "", &fakeLinks{links: map[string]link.Wanted{}})
	a, c := numbered(1), numbered(2)
	c.IPsec.RemoteIdentity = a.IPsec.RemoteIdentity
	if err := b.d.Apply(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	if err := b.d.Apply(t.Context(), c); err != nil {
		t.Errorf("the same PSK twice: %v", err)
	}
	c.IPsec.PSK.Fingerprint = "other"
	if err := b.d.Apply(t.Context(), c); err == nil || !strings.Contains(err.Error(), "another PSK") {
		t.Errorf("two PSKs: %v", err)
	}
}

func TestFakeCharonAway(t *testing.T) {
	f := newFake(t)
	f.crash()
	b := runFake(t, f, t.TempDir(), &fakeLinks{links: map[string]link.Wanted{}})
	c := numbered(1)
	if err := b.d.Apply(t.Context(), c); err == nil {
		t.Error("applied without a charon")
	}
	b.await(t, c, tunnel.Unknown)
	f.start()
	b.await(t, c, tunnel.Up) // without another Apply
}

// TestFakeTellsWhatDoesNotFit checks that the driver logs on connecting that charon is too old,
// with or without a tunnel.
func TestFakeTellsWhatDoesNotFit(t *testing.T) {
	for version, told := range map[string]bool{"5.9.7": true, oldest: false} {
		f := newFake(t)
		f.version = version
		var mu sync.Mutex
		var log bytes.Buffer
		text := func() string {
			mu.Lock()
			defer mu.Unlock()
			return log.String()
		}
		d := New(Options{Socket: f.socket, Links: &fakeLinks{links: map[string]link.Wanted{}}, RuntimeDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(writer(func(p []byte) {
			mu.Lock()
			defer mu.Unlock()
			log.Write(p)
		}), nil))})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- d.Run(ctx, func(tunnel.State) {}) }()
		until(t, 20*time.Second, "all was read", func() bool { return f.count("get-conns") > 0 })
		if got := strings.Contains(text(), `charon is version \"`+version+`\": at least 5.9.8 is needed`); got != told {
			t.Errorf("charon %s: %s", version, text())
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		d.Close()
	}
}

// writer is an io.Writer.
type writer func(p []byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }

func TestBackoffTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newClock(t)
		c.now = time.Now()
		tries := 0
		for end := time.Now().Add(time.Hour); time.Now().Before(end); {
			c.now = time.Now()
			c.r.sas = nil
			actions, again := c.r.decide(c.now, c.rnd)
			for _, a := range actions {
				if a.initiate {
					tries++
				}
			}
			if again.IsZero() {
				t.Fatal("nothing planned")
			}
			time.Sleep(time.Until(again))
		}
		if tries < 60 || tries > 130 {
			t.Errorf("%d attempts in an hour without an answer", tries)
		}
	})
}

// TestFakeSwappedPeers exchanges the peers of two tunnels, which keep their keys.
func TestFakeSwappedPeers(t *testing.T) {
	f := newFake(t)
	b := runFake(t, f, "", &fakeLinks{links: map[string]link.Wanted{}})
	all := []tunnel.Config{numbered(1), numbered(2), numbered(3)}
	for i := range all {
		all[i].IPsec.PSK = secret.Ref{Name: all[i].Name, Fingerprint: all[i].Name}
		if err := b.d.Apply(t.Context(), all[i]); err != nil {
			t.Fatal(err)
		}
		b.await(t, all[i], tunnel.Up)
	}
	first := all[0].IPsec.RemoteIdentity
	for i := range all {
		own := *all[i].IPsec
		own.RemoteIdentity = first
		if i+1 < len(all) {
			own.RemoteIdentity = all[i+1].IPsec.RemoteIdentity
		}
		all[i].IPsec = &own
	}
	until(t, 10*time.Second, "all are applied", func() bool {
		ok := true
		for _, c := range all { // as the scheduler does
			ok = b.d.Apply(t.Context(), c) == nil && ok
		}
		return ok
	})
}

// TestFakeOutdated checks that an Apply which a Remove or another Apply has overtaken makes no
// interface and loads nothing: a connection without a record would stay until the next prune, and
// its peer could bring it up.
func TestFakeOutdated(t *testing.T) {
	links := &fakeLinks{links: map[string]link.Wanted{}}
	b := runFake(t, newFake(t), "", links)
	c := numbered(1)
	if err := b.d.Apply(t.Context(), numbered(2)); err != nil { // connects to charon
		t.Fatal(err)
	}
	written := func() int {
		links.mu.Lock()
		defer links.mu.Unlock()
		return links.writes
	}
	overtake := func(what string, by func() error) {
		conn, err := compile(c)
		if err != nil {
			t.Fatal(err)
		}
		want := digests(c, conn)
		if err := b.d.want(c, want); err != nil {
			t.Fatal(err)
		}
		if err := by(); err != nil {
			t.Fatal(err)
		}
		loads, made := b.count("load-conn"), written()
		if err := b.d.create(t.Context(), c, conn, want); !errors.Is(err, errOutdated) {
			t.Errorf("%s: create: %v", what, err)
		}
		if err := b.d.loadOne(t.Context(), c, conn, want); !errors.Is(err, errOutdated) {
			t.Errorf("%s: loadOne: %v", what, err)
		}
		if n, m := b.count("load-conn"), written(); n != loads || m != made {
			t.Errorf("%s: %d connections loaded, %d links written", what, n-loads, m-made)
		}
	}
	overtake("removed", func() error { return b.d.Remove(t.Context(), c.Name) })
	overtake("changed", func() error {
		changed := numbered(1)
		changed.IPsec.ESPProposals = []string{"aes128gcm16"}
		return b.d.Apply(t.Context(), changed)
	})
	// Remove fails after the record is gone, so that the ledger still has the tunnel.
	c.IPsec.RemoteIdentity = "peer-new"
	overtake("removed in vain", func() error {
		b.crash()
		if err := b.d.Remove(t.Context(), c.Name); err == nil {
			return errors.New("removed without a charon")
		}
		return nil
	})
}

// TestFakeCharonHangs checks that tunnels do not wait one after another for a charon that accepts
// connections but does not answer.
func TestFakeCharonHangs(t *testing.T) {
	f := newFake(t)
	f.mu.Lock() // as SIGSTOP does
	hangs := true
	defer func() {
		if hangs {
			f.mu.Unlock()
		}
	}()
	b := &fakeBench{fakeCharon: f}
	b.d = New(Options{
		Socket: f.socket, Links: &fakeLinks{links: map[string]link.Wanted{}},
		Secrets: func(r secret.Ref) ([]byte, error) { return []byte("the secret of " + r.Name), nil },
	})
	defer b.d.Close()
	began := time.Now()
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			if err := b.d.Apply(t.Context(), numbered(i)); err == nil {
				t.Error("applied without an answer")
			}
		})
	}
	wg.Wait()
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("four tunnels took %v", took)
	}
	f.mu.Unlock()
	hangs = false
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.d.Run(ctx, func(tunnel.State) {}) }()
	b.await(t, numbered(0), tunnel.Up)
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("up after %v", took)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestFakeKernelLosesSAs flushes the kernel's IPsec states, which charon does not notice.
func TestFakeKernelLosesSAs(t *testing.T) {
	t.Parallel()
	f, links := newFake(t), &fakeLinks{links: map[string]link.Wanted{}}
	b := runFake(t, f, "", links)
	c := numbered(1)
	if err := b.d.Apply(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	b.await(t, c, tunnel.Up)
	set := func(sas ...link.SA) {
		links.mu.Lock()
		defer links.mu.Unlock()
		links.sas = sas
	}
	time.Sleep(7 * time.Second)
	if n := f.count("terminate"); n != 0 {
		t.Errorf("ended %d SAs that the kernel has never shown", n)
	}
	set(link.SA{IfID: c.ID, SPI: 1}, link.SA{IfID: c.ID, SPI: 1001})
	time.Sleep(2 * time.Second)
	set(link.SA{IfID: c.ID, SPI: 1001})
	until(t, 20*time.Second, "a new SA", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.next > 1
	})
	set(link.SA{IfID: c.ID, SPI: 2}, link.SA{IfID: c.ID, SPI: 1002})
	b.await(t, c, tunnel.Up)
	time.Sleep(7 * time.Second)
	if n, i := f.count("terminate"), f.count("initiate"); n != 1 || i != 2 {
		t.Errorf("%d SAs ended, %d initiated", n, i)
	}
}

// TestFakeObservesConnectionWithoutInterface checks that a connection that a former run left in
// charon is observed while Run is active, and can be removed.
func TestFakeObservesConnectionWithoutInterface(t *testing.T) {
	f := newFake(t)
	f.mu.Lock()
	f.conns["isthmus:left"], f.keys["isthmus:left"], f.conns["another's"] = msg(), "key", msg()
	f.mu.Unlock()
	b := runFake(t, f, "", &fakeLinks{links: map[string]link.Wanted{}})
	if err := b.d.Apply(t.Context(), numbered(1)); err != nil {
		t.Fatal(err)
	}
	b.await(t, numbered(1), tunnel.Up)
	seen := func() (names []string) {
		all, err := b.d.Observe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			names = append(names, s.Name)
		}
		return names
	}
	if got := seen(); !slices.Equal(got, []string{"left", "t1"}) {
		t.Errorf("observed %q", got)
	}
	if err := b.d.Remove(t.Context(), "left"); err != nil {
		t.Fatal(err)
	}
	if got := seen(); !slices.Equal(got, []string{"t1"}) || len(f.conns) != 2 {
		t.Errorf("after its removal observed %q, in charon %d", got, len(f.conns))
	}
}

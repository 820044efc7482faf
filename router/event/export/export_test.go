package export

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/router/event"
	"github.com/isthmus-net/isthmus/router/secret"
)

func everywhere(netip.Addr) error { return nil }

// node is a log of events with an exporter.
type node struct {
	t    *testing.T
	dir  string
	log  *event.Log
	x    *Exporter
	stop func()
	key  []byte // of every secret; nil: none is stored
}

func newNode(t *testing.T) *node {
	n := &node{t: t, dir: t.TempDir(), key: []byte("sixteen bytes at least")}
	n.open("events")
	t.Cleanup(func() { n.log.Close() })
	return n
}

func (n *node) open(name string) {
	n.t.Helper()
	log, err := event.Open(filepath.Join(n.dir, name), time.Now)
	if err != nil {
		n.t.Fatal(err)
	}
	n.log = log
}

// start runs an exporter until stop is called or the test ends.
func (n *node) start(reach func(netip.Addr) error, targets ...Target) {
	n.t.Helper()
	n.x = New(Options{
		Log: n.log, File: filepath.Join(n.dir, "export.json"), Changed: func() {}, Logger: slog.New(slog.DiscardHandler), Reach: reach,
		Secrets: func(r secret.Ref) ([]byte, error) {
			if n.key == nil {
				return nil, secret.ErrNotFound
			}
			return n.key, nil
		},
	})
	n.x.Set("hub-1", targets)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = n.x.Run(ctx)
	}()
	n.stop = sync.OnceFunc(func() { cancel(); <-done })
	n.t.Cleanup(n.stop)
	n.wait("the targets have begun", func() bool {
		n.x.mu.Lock()
		defer n.x.mu.Unlock()
		for _, t := range targets {
			if s := n.x.states[t.Name]; s == nil || s.at == (position{}) {
				return false
			}
		}
		return true
	})
}

// record adds events, each of a secret with a name.
func (n *node) record(names ...string) {
	for _, name := range names {
		n.log.Call(event.Call{Time: time.Now(), Event: "end", Who: "ann", Method: "/x/SetSecret", Object: name, Result: "OK"})
	}
}

func (n *node) wait(what string, ok func() bool) {
	n.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("%s: not within a minute; %+v", what, n.x.States())
		}
	}
}

func (n *node) state(name string) State {
	all := n.x.States()
	return all[slices.IndexFunc(all, func(s State) bool { return s.Name == name })]
}

// receiver collects the objects of the events that it receives.
type receiver struct {
	mu   sync.Mutex
	got  []string
	raw  []string
	down atomic.Bool // takes connections and closes them
	gaps int
}

func (r *receiver) add(raw, object string, gap bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.raw, r.got = append(r.raw, raw), append(r.got, strings.TrimPrefix(object, "secret/"))
	if gap {
		r.gaps++
	}
}

func (r *receiver) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.got, " ")
}

func (r *receiver) told() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gaps
}

// record adds a message of syslog.
func (r *receiver) record(m string) {
	_, object, _ := strings.Cut(m, ` object="`)
	object, _, _ = strings.Cut(object, `"`)
	r.add(m, object, strings.Contains(m, ` gap="`))
}

// tcp serves syslog over TCP, and returns the address and what ends it. It is strict about lengths.
func (r *receiver) tcp(t *testing.T, address string) (netip.AddrPort, func()) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var conns []net.Conn
	stop := func() {
		l.Close()
		mu.Lock()
		defer mu.Unlock()
		for _, c := range conns {
			c.Close()
		}
	}
	t.Cleanup(stop)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			if r.down.Load() {
				c.Close()
				continue
			}
			go func() {
				for in := bufio.NewReader(c); ; {
					size, err := in.ReadString(' ')
					if err != nil {
						return
					}
					n, err := strconv.Atoi(strings.TrimSuffix(size, " "))
					if err != nil || n < 1 || n > 2048 {
						t.Errorf("a message of length %q", size)
						return
					}
					m := make([]byte, n)
					if _, err := io.ReadFull(in, m); err != nil {
						return
					}
					r.record(string(m))
				}
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort(), stop
}

// TestSyslogTCP checks that a receiver gets each event in order, and after it was away those that
// it missed; and that the state says so.
func TestSyslogTCP(t *testing.T) {
	n, r := newNode(t), &receiver{}
	at, stop := r.tcp(t, "127.0.0.1:0")
	n.record("before")
	n.start(everywhere, Target{Name: "siem", Syslog: at})
	n.record("a", "b")
	n.wait("two events", func() bool { return r.text() == "a b" && n.state("siem").Delivered == 2 })
	stop()
	n.record("c")
	n.wait("a failure", func() bool { s := n.state("siem"); return s.Failures > 0 && !s.Since.IsZero() && s.Error != "" })
	n.record("d")
	r.down.Store(true)
	_, stop = r.tcp(t, at.String())
	failed := n.state("siem").Failed
	n.wait("a connection that is closed at once", func() bool { return n.state("siem").Failed > failed })
	stop()
	r.down.Store(false)
	r.tcp(t, at.String())
	n.wait("the events that it missed", func() bool { return r.text() == "a b c d" })
	n.wait("no failure", func() bool {
		s := n.state("siem")
		return s.Failures == 0 && s.Since.IsZero() && s.Delivered == 4 && s.Gaps == 0
	})
	if len(r.raw) > 0 && !strings.HasPrefix(r.raw[0], "<134>1 20") || !strings.Contains(r.raw[0], ` hub-1 isthmus - SecretSet [isthmus@32473 log="`) {
		t.Errorf("%q", r.raw)
	}
}

func TestSyslogUDP(t *testing.T) {
	n, r := newNode(t), &receiver{}
	conn, err := net.ListenPacket("udp", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		for b := make([]byte, 4096); ; {
			size, _, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			r.record(string(b[:size]))
		}
	}()
	n.start(everywhere, Target{Name: "siem", UDP: true, Syslog: conn.LocalAddr().(*net.UDPAddr).AddrPort(), Severity: event.Info})
	n.record("a", "b")
	n.wait("two events", func() bool { return r.text() == "a b" })
	conn.Close()
	n.record("c") // may be lost: the answer to it comes too late
	n.wait("c is sent", func() bool { return n.state("siem").Delivered == 3 || n.state("siem").Failed > 0 })
	n.record("d")
	n.wait("a failure", func() bool { return n.state("siem").Failures > 0 })
}

// hook serves a webhook. answer gives the status of an attempt.
func (r *receiver) hook(t *testing.T, key []byte, answer func(w http.ResponseWriter, attempt int) int) *httptest.Server {
	attempts := 0
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		attempts++
		data, _ := io.ReadAll(q.Body)
		var b struct {
			Node, Log string
			Gap       bool
			Events    []struct{ Object, Sequence, Type string }
		}
		if err := json.Unmarshal(data, &b); err != nil || q.Method != http.MethodPost || q.Header.Get("Content-Type") != "application/json" || b.Node != "hub-1" || b.Log == "" || len(b.Events) < 1 || len(b.Events) > batch {
			t.Errorf("%s %v: %v, %s", q.Method, q.Header, err, data)
		}
		at := q.Header.Get("Isthmus-Timestamp")
		if q.Header.Get("Isthmus-Signature") != "sha256="+signature(key, at, data) && key != nil || (key == nil) != (at == "") {
			t.Errorf("the signature %q of %q", q.Header.Get("Isthmus-Signature"), at)
		}
		status := answer(w, attempts)
		if status/100 == 2 {
			for i, e := range b.Events {
				r.add(string(data), e.Object, b.Gap && i == 0)
			}
		}
		w.WriteHeader(status)
	}))
}

func TestWebhook(t *testing.T) {
	n, r := newNode(t), &receiver{}
	s := r.hook(t, n.key, func(w http.ResponseWriter, attempt int) int {
		switch attempt {
		case 1:
			return http.StatusInternalServerError
		case 2:
			w.Header().Set("Location", "/other")
			return http.StatusTemporaryRedirect
		case 3:
			return http.StatusForbidden
		}
		return http.StatusAccepted
	})
	defer s.Close()
	n.start(everywhere, Target{Name: "pager", Webhook: s.URL + "/hook?key=FileKey", Secret: secret.Ref{Name: "k"}})
	n.record("a")
	for i, want := range []string{"500 Internal Server Error", "307 Temporary Redirect", "403 Forbidden"} {
		n.wait(want, func() bool { s := n.state("pager"); return s.Failed > uint64(i) })
		if s := n.state("pager"); s.Failed == uint64(i)+1 && (!strings.Contains(s.Error, want) || strings.Contains(s.Error, "FileKey")) {
			t.Errorf("%q, want %q", s.Error, want)
		}
	}
	n.record("b")
	n.wait("both events", func() bool { return r.text() == "a b" && n.state("pager").Failures == 0 })

	n.key = nil
	n.record("c")
	n.wait("no secret", func() bool { return strings.Contains(n.state("pager").Error, "reading secret k: no such secret") })
}

// TestSlow checks that a webhook that does not answer delays no other target, and not the log.
func TestSlow(t *testing.T) {
	n, slow, r := newNode(t), &receiver{}, &receiver{}
	free := make(chan struct{})
	s := slow.hook(t, nil, func(http.ResponseWriter, int) int { <-free; return http.StatusOK })
	defer s.Close()
	defer close(free)
	at, _ := r.tcp(t, "127.0.0.1:0")
	n.start(everywhere, Target{Name: "slow", Webhook: s.URL}, Target{Name: "siem", Syslog: at})
	for i := range 5 {
		n.record(fmt.Sprint("s", i))
		n.wait("an event", func() bool { return strings.HasSuffix(r.text(), fmt.Sprint("s", i)) })
	}
	if slow.text() != "" {
		t.Error("the slow one was not slow")
	}
}

// TestRestart checks that events are neither missing nor there twice after an orderly restart, that
// a new target begins at the present, and that a lost log is told to the receiver.
func TestRestart(t *testing.T) {
	n, r, other := newNode(t), &receiver{}, &receiver{}
	at, _ := r.tcp(t, "127.0.0.1:0")
	elsewhere, _ := other.tcp(t, "127.0.0.1:0")
	siem, more := Target{Name: "siem", Syslog: at}, Target{Name: "more", Syslog: elsewhere}
	n.start(everywhere, siem)
	n.record("a")
	n.wait("an event", func() bool { return r.text() == "a" && n.state("siem").Delivered == 1 })
	n.stop()
	n.record("b")
	n.start(everywhere, siem, more)
	n.record("c")
	n.wait("the events since", func() bool {
		return r.text() == "a b c" && other.text() == "c" && n.state("siem").Delivered == 2 && n.state("more").Delivered == 1
	})
	if r.told() != 0 {
		t.Error("told of a gap")
	}

	// A changed target goes on, also when it becomes another kind.
	changed := siem
	changed.Syslog = elsewhere
	n.x.Set("hub-1", []Target{changed})
	n.wait("the other target is gone", func() bool { return len(n.x.States()) == 1 })
	n.record("d")
	n.wait("d at the new address", func() bool { return other.text() == "c d" && n.state("siem").Delivered == 3 })

	// A target that comes back is a new one.
	n.x.Set("hub-1", nil)
	n.wait("no target", func() bool { return len(n.x.States()) == 0 })
	n.record("e")
	n.x.Set("hub-1", []Target{siem})
	n.wait("it has begun", func() bool {
		n.x.mu.Lock()
		defer n.x.mu.Unlock()
		return n.x.states["siem"] != nil && n.x.states["siem"].at.Seq == n.log.Newest()
	})
	n.record("f")
	n.wait("f", func() bool { return r.text() == "a b c f" && n.state("siem").Delivered == 1 })

	n.stop()
	n.log.Close()
	n.open("another")
	n.record("g")
	n.start(everywhere, siem)
	n.wait("g with a gap", func() bool {
		return r.text() == "a b c f g" && r.told() == 1 && n.state("siem").Delivered == 1
	})
	if s := n.state("siem"); s.Gaps != 1 {
		t.Errorf("%+v", s)
	}
	n.record("h")
	n.wait("h without", func() bool {
		return r.text() == "a b c f g h" && r.told() == 1 && n.state("siem").Delivered == 2
	})
}

// TestFilter checks that a target gets events of its severity, and none that only admins see.
func TestFilter(t *testing.T) {
	n, r := newNode(t), &receiver{}
	at, _ := r.tcp(t, "127.0.0.1:0")
	n.start(everywhere, Target{Name: "siem", Syslog: at, Severity: event.Warning})
	n.record("low")
	n.log.Call(event.Call{Time: time.Now(), Event: "refused", Who: "ann", Method: "/x/Apply", Error: "no"})
	n.log.Call(event.Call{Time: time.Now(), Event: "end", Who: "ann", Method: "/x/Reboot", Result: "OK"})
	n.wait("the warning", func() bool { return r.text() == "node" })
}

// TestReach checks that a name does not lead to the node itself or to the cloud's own services.
func TestReach(t *testing.T) {
	n := newNode(t)
	s := (&receiver{}).hook(t, nil, func(http.ResponseWriter, int) int { t.Error("a request has come"); return 200 })
	defer s.Close()
	_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
	n.start(nil, Target{Name: "name", Webhook: "http://localhost:" + port}, Target{Name: "siem", Syslog: netip.MustParseAddrPort("169.254.169.254:80")})
	n.record("a")
	n.wait("two failures", func() bool { return n.state("name").Failures > 0 && n.state("siem").Failures > 0 })
	for name, want := range map[string]string{"name": "is the node itself", "siem": "is a service of the cloud for the machine"} {
		if got := n.state(name).Error; !strings.Contains(got, want) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestMessage(t *testing.T) {
	at := time.Date(2026, 12, 3, 4, 5, 6, 789123456, time.FixedZone("", 3600))
	long := strings.Repeat(`"`, 160)
	for _, test := range []struct {
		e    event.Event
		gap  bool
		want string
	}{
		{event.Event{Seq: 7, Time: at, Type: "TunnelDown", Object: "tunnel/aws-0", Severity: event.Error, Message: "aws-0 is down: no answer", Lasted: time.Minute, Generation: 3, Who: "ann"}, false,
			`<131>1 2026-12-03T03:05:06.789123Z hub-1 isthmus - TunnelDown [isthmus@32473 log="l1" sequence="7" object="tunnel/aws-0" who="ann" generation="3" lasted="1m0s"] aws-0 is down: no answer`},
		{event.Event{Seq: 8, Time: at, Type: "PeerReset", Object: `a"b\c]d`, Severity: event.Info, Message: "one\n<0>1 two\x00\u202e"}, true,
			`<134>1 2026-12-03T03:05:06.789123Z hub-1 isthmus - PeerReset [isthmus@32473 log="l1" sequence="8" gap="events before this one may be missing" object="a\"b\\c\]d"] one?<0>1 two??`},
		{event.Event{Seq: 9, Time: at, Severity: "odd", Message: "é"}, false, "<132>1 2026-12-03T03:05:06.789123Z hub-1 isthmus - - [isthmus@32473 log=\"l1\" sequence=\"9\"] \ufeffé"},
	} {
		if got := message("hub-1", "l1", test.gap, test.e); got != test.want {
			t.Errorf("%s\nwant\n%s", got, test.want)
		}
	}
	for _, k := range event.All {
		if header(k.Name, 32) != k.Name {
			t.Errorf("%s is no MSGID", k.Name)
		}
	}
	longest := message(strings.Repeat("n", 300), strings.Repeat("f", 32), true, event.Event{Seq: 1 << 63, Time: at, Type: strings.Repeat("T", 99), Object: long, Detail: long, Who: long, Message: strings.Repeat("é", 256), Generation: 1 << 63, Lasted: 1 << 62})
	if len(longest) > 2048 {
		t.Errorf("the longest message has %d bytes, and receivers need not take more than 2048", len(longest))
	}
}
